"""CUDA and NVML: in this process, in a process beside it that has NVML alone, and in one that was forked from a process with
NVML and has CUDA of its own, as vLLM's engine.

`answer`: what CUDA computes here and in the forked process. `nvml`: the codes of NVML's answers here and beside; `again`: the
same after nvmlShutdown and nvmlInit.
"""
import ctypes
import json
import os
import time

FOLDER = os.environ.get("ASKED_FOLDER", "/dev/shm")


class Nvml:
    def __init__(self):
        self.lib = ctypes.CDLL("libnvidia-ml.so.1")
        self.handle = ctypes.c_void_p()
        self.begin()

    def begin(self):
        code = self.lib.nvmlInit_v2()
        return code or self.lib.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.handle))

    def again(self):
        return self.lib.nvmlShutdown() or self.begin()

    def ask(self):
        memory, used, degrees = (ctypes.c_ulonglong * 3)(), (ctypes.c_uint * 2)(), ctypes.c_uint()
        return [
            self.lib.nvmlDeviceGetMemoryInfo(self.handle, memory),
            self.lib.nvmlDeviceGetUtilizationRates(self.handle, used),
            self.lib.nvmlDeviceGetTemperature(self.handle, 0, ctypes.byref(degrees)),
        ]


def write(name, value):
    with open(f"{FOLDER}/{name}.new", "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.rename(f"{FOLDER}/{name}.new", f"{FOLDER}/{name}")


def read(name):
    try:
        with open(f"{FOLDER}/{name}", encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def beside():
    """NVML alone: asks ten times a second, and begins again when told so."""
    nvml, rounds, begun = Nvml(), 0, None
    while True:
        if (wanted := read("begin")) != begun:
            begun, code = wanted, nvml.again()
            write("begun", [begun, code])
        rounds += 1
        write("beside", [rounds, nvml.ask()])
        time.sleep(0.1)


def computing(name):
    """CUDA of its own: adds, and writes the count and the sum."""
    import torch

    tensor, rounds = torch.zeros(1 << 20, device="cuda"), 0
    while True:
        rounds += 1
        tensor.add_(1)
        right = float(tensor.sum()) == rounds * (1 << 20) if rounds < 16 else float(tensor[-1]) == rounds
        write(name, [rounds, right])
        time.sleep(0.05)


def child(job):
    if (pid := os.fork()) == 0:
        try:
            job()
        finally:
            os._exit(1)
    return pid


def fork_with_nvml():
    """The parent of a process that inherits NVML's descriptors."""
    Nvml()
    child(lambda: computing("forked"))
    while True:
        time.sleep(10)


child(beside)
child(fork_with_nvml)

import asked  # noqa: E402
import torch  # noqa: E402

nvml = Nvml()
tensor, added = torch.zeros(64 << 20, device="cuda"), 0
while not read("forked"):
    time.sleep(0.1)


def later(name, seconds=20):
    """The next value of a file that is written again and again."""
    first = read(name)[0]
    end = time.time() + seconds
    while time.time() < end:
        found = read(name)
        if found[0] > first + 1:
            return found[1]
        time.sleep(0.02)
    return None


def answer():
    global added
    added += 1
    tensor.add_(1)
    forked = later("forked")
    return {"ok": bool(float(tensor[-1]) == added and forked), "same": "right", "forked": forked}


def codes():
    return {"ok": True, "here": nvml.ask(), "beside": later("beside")}


def again():
    write("begin", time.time())
    end = time.time() + 20
    while (read("begun") or [None])[0] != read("begin") and time.time() < end:
        time.sleep(0.02)
    return codes() | {"begun": read("begun")[1]}


asked.serve({"answer": answer, "go": answer, "nvml": codes, "again": again})
