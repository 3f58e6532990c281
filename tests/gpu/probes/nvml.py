#!/usr/bin/env python3
"""Prints what becomes of NVML when the descriptors of the driver's devices are replaced, as a checkpoint replaces them.

Run on a machine with an NVIDIA GPU: `python3 tests/gpu/probes/nvml.py`. Needs libnvidia-ml.so.1 and libcuda.so.1 (ctypes).
- alone: a process with NVML only. Its descriptors become /dev/null, are put back, are closed, are opened anew; NVML is asked
  after each, and after nvmlShutdown and nvmlInit.
- inherited: a CUDA process that was forked from a process with NVML. Its descriptors before and after the driver's
  Checkpoint, and the answers of NVML in it.
- both: NVML and CUDA in one process, likewise.
"""
import ctypes, os, signal, sys, time


def library(*names):
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            pass
    sys.exit(f"none of {names}")


def nvml():
    return library("libnvidia-ml.so.1", "/usr/local/nvidia/lib64/libnvidia-ml.so.1")


def cuda():
    return library("libcuda.so.1", "/usr/local/nvidia/lib64/libcuda.so.1")


class Nvml:
    def __init__(self):
        self.lib = nvml()
        self.init = self.lib.nvmlInit_v2()
        self.handle = ctypes.c_void_p()
        self.get = self.lib.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.handle))

    def ask(self):
        memory = (ctypes.c_ulonglong * 3)()
        used = (ctypes.c_uint * 2)()
        temperature = ctypes.c_uint()
        name = ctypes.create_string_buffer(96)
        count = ctypes.c_uint()
        answers = [
            self.lib.nvmlDeviceGetMemoryInfo(self.handle, memory),
            self.lib.nvmlDeviceGetUtilizationRates(self.handle, used),
            self.lib.nvmlDeviceGetTemperature(self.handle, 0, ctypes.byref(temperature)),
            self.lib.nvmlDeviceGetName(self.handle, name, 96),
            self.lib.nvmlDeviceGetCount_v2(ctypes.byref(count)),
        ]
        return f"memory, utilization, temperature, name, count: {answers} {memory[0] >> 20} MiB"

    def again(self):
        codes = [self.lib.nvmlShutdown(), self.lib.nvmlInit_v2()]
        codes.append(self.lib.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.handle)))
        return f"shutdown, init, handle: {codes}"


def devices(pid="self"):
    found = []
    for fd in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
        try:
            path = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        if path.startswith("/dev/nvidia"):
            flags = next(line.split()[1] for line in open(f"/proc/{pid}/fdinfo/{fd}") if line.startswith("flags"))
            found.append((int(fd), path, flags))
    return found


def mapped(pid="self"):
    return sum("/dev/nvidia" in line for line in open(f"/proc/{pid}/maps"))


def say(*words):
    print(*words, flush=True)


def replace(fds, path):
    for fd, own, _ in fds:
        new = os.open(path or own, os.O_RDWR)
        os.dup2(new, fd)
        os.close(new)


def alone():
    one = Nvml()
    say("init", one.init, one.get, "devices", devices(), "mappings", mapped())
    say("before:", one.ask())
    fds = devices()
    kept = [os.dup(fd) for fd, _, _ in fds]
    replace(fds, "/dev/null")
    say("/dev/null:", one.ask(), devices())
    for (fd, _, _), original in zip(fds, kept):
        os.dup2(original, fd)
    say("put back:", one.ask(), devices())
    for original in kept:
        os.close(original)
    replace(fds, None)
    say("opened anew:", one.ask(), devices())
    say("again:", one.again(), one.ask(), devices())
    fds = devices()
    replace(fds, "/dev/null")
    say("/dev/null, originals gone:", one.ask(), devices())
    say("again:", one.again(), one.ask(), devices())
    for fd, _, _ in devices():
        os.close(fd)
    say("closed:", one.ask(), devices())
    say("again:", one.again(), one.ask(), devices())


def call(name, pid, *arguments):
    arguments = (ctypes.c_uint64 * 8)(*arguments)
    return getattr(cuda(), name)(pid, arguments)


def context():
    lib = cuda()
    handle = ctypes.c_void_p()
    pointer = ctypes.c_uint64()
    codes = [lib.cuInit(0), lib.cuDevicePrimaryCtxRetain(ctypes.byref(handle), 0), lib.cuCtxSetCurrent(handle)]
    codes.append(lib.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(64 << 20)))
    return codes, pointer


def checkpointed(prepare):
    """A child with a context, prepared by `prepare`, goes through Lock, Checkpoint, Restore, Unlock."""
    ask_in, ask_out = os.pipe()
    tell_in, tell_out = os.pipe()
    child = os.fork()
    if child == 0:
        one = prepare()
        codes, pointer = context()
        os.write(tell_out, f"context {codes} nvml {one.ask() if one else None}\n".encode())
        while order := os.read(ask_in, 1):
            if order == b"q":
                os._exit(0)
            code = cuda().cuMemsetD8_v2(pointer, 7, ctypes.c_size_t(64 << 20))
            words = one.ask() if one else ""
            if order == b"i" and one:
                words += one.again() + one.ask()
            os.write(tell_out, f"memset {code} nvml {words} devices {devices()}\n".encode())

    def ask(order=b"a"):
        os.write(ask_out, order)
        return os.read(tell_in, 4096).decode().strip()

    say(os.read(tell_in, 4096).decode().strip())
    say("devices", devices(child), "mappings", mapped(child))
    say("lock", call("cuCheckpointProcessLock", child, 5000), "checkpoint", call("cuCheckpointProcessCheckpoint", child))
    say("devices left", devices(child), "mappings", mapped(child))
    say("restore", call("cuCheckpointProcessRestore", child), "unlock", call("cuCheckpointProcessUnlock", child))
    say("devices", len(devices(child)), "mappings", mapped(child))
    say(ask())
    say(ask(b"i"))
    os.write(ask_out, b"q")
    os.waitpid(child, 0)


def run(name, job):
    say(f"--- {name}")
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            job()
        except BaseException as error:  # noqa: BLE001
            say("failed:", repr(error))
        os._exit(0)
    say("status", os.waitpid(pid, 0)[1])


def lines(pid="self"):
    return [line.strip() for line in open(f"/proc/{pid}/maps") if "/dev/nvidia" in line]


def libc_mmap(address, length, protection, flags, fd, offset):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_long
    libc.mmap.argtypes = [ctypes.c_long, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    answer = libc.mmap(address, length, protection, flags, fd, offset)
    return "ok" if answer == address else f"errno {ctypes.get_errno()}"


def mappings():
    """Mappings of NVML alone: replaced by inaccessible memory, and mapped again by each descriptor of their file."""
    one = Nvml()
    one.ask()
    found = lines()
    say("devices", devices(), "mappings", found)
    kept = [os.dup(fd) for fd, _, _ in devices()]
    originals = devices()[: len(kept)]
    replace(originals, "/dev/null")
    for line in found:
        range_, mode, offset, _, _, path = line.split()
        start, end = (int(part, 16) for part in range_.split("-"))
        say("inaccessible", libc_mmap(start, end - start, 0, 0x32, -1, 0))
        for original, (fd, name, _) in zip(kept, originals):
            if name == path:
                protection = (1 if mode[0] == "r" else 0) | (2 if mode[1] == "w" else 0)
                answer = libc_mmap(start, end - start, protection, 0x11, original, int(offset, 16))
                say("by descriptor", fd, answer)
                if answer == "ok":
                    break
    for original, (fd, _, _) in zip(kept, originals):
        os.dup2(original, fd)
        os.close(original)
    say("mappings", lines(), one.ask())
    say("again:", one.again(), one.ask(), lines())


def inaccessible():
    one = Nvml()
    one.ask()
    for line in lines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        libc_mmap(start, end - start, 0, 0x32, -1, 0)
    say("descriptors kept, mappings inaccessible:", one.ask())
    say("again:", one.again(), one.ask(), lines())


def forked_only():
    one = Nvml()
    say("parent", one.ask())
    if (child := os.fork()) == 0:
        signal.alarm(20)
        say("child:", one.ask())
        say("child:", one.again(), one.ask(), len(devices()))
        os._exit(0)
    say("child's status", os.waitpid(child, 0)[1])


def inherited():
    one = Nvml()
    say("parent:", one.ask(), devices())
    checkpointed(lambda: one)
    say("parent:", one.ask())


def after_shutdown():
    one = Nvml()
    one.lib.nvmlShutdown()
    say("parent after shutdown:", devices())
    checkpointed(lambda: None)


run("alone", alone)
run("mappings", mappings)
run("inaccessible mappings", inaccessible)
run("forked, no checkpoint", forked_only)
run("inherited", inherited)
run("shut down before the fork", after_shutdown)
run("both", lambda: checkpointed(Nvml))
