#!/usr/bin/env python3
"""Prints what /proc and NVML show of processes that share GPU memory by CUDA IPC.

Run on a machine with an NVIDIA GPU: `python3 tests/gpu/probes/ipc.py`. Needs libcuda.so.1 only (ctypes), and nvidia-smi for
NVML's view. Three processes are compared at four moments: "plain" never shares, "exporter" has cuIpcGetMemHandle and
cuIpcGetEventHandle called, "importer" opens both. What differs between plain and the others, and between "context" and later
moments, is what a checkpoint could look for before the driver's Checkpoint. In the end cuCheckpointProcessLock, Checkpoint and
Restore are tried on each of them, if the driver has them, and each answer is printed.
"""
import ctypes, json, os, re, struct, subprocess, sys, time

SIZE = 64 << 20
# IPC_ONLY=memory: no event is shared.
ONLY_MEMORY = os.environ.get("IPC_ONLY") == "memory"


class Cuda:
    def __init__(self):
        for name in (os.environ.get("GPUSNAP_LIBCUDA"), "libcuda.so.1", "/usr/local/nvidia/lib64/libcuda.so.1"):
            try:
                self.lib = ctypes.CDLL(name) if name else None
            except OSError:
                self.lib = None
            if self.lib:
                return
        sys.exit("no libcuda.so.1")

    def __call__(self, name, *arguments):
        code = getattr(self.lib, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name}: {code}")


class Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * 64)]


def context(cuda):
    cuda("cuInit", 0)
    handle = ctypes.c_void_p()
    cuda("cuDevicePrimaryCtxRetain", ctypes.byref(handle), 0)
    cuda("cuCtxSetCurrent", handle)


def allocate(cuda):
    pointer = ctypes.c_uint64()
    cuda("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(SIZE))
    return pointer


def child(role, inbox, outbox):
    """One process: takes an order a line, answers with a line."""
    cuda = Cuda()
    kept = []
    for line in inbox:
        order, _, argument = line.strip().partition(" ")
        try:
            if order == "context":
                context(cuda)
                kept.append(allocate(cuda))
                answer = "ok"
            elif order == "export":
                memory, event, at = Handle(), Handle(), ctypes.c_void_p()
                cuda("cuIpcGetMemHandle", ctypes.byref(memory), kept[0])
                if ONLY_MEMORY:
                    print(bytes(memory).hex() + " " + bytes(event).hex(), file=outbox, flush=True)
                    continue
                # CU_EVENT_INTERPROCESS | CU_EVENT_DISABLE_TIMING
                cuda("cuEventCreate", ctypes.byref(at), 6)
                kept.append(at)
                cuda("cuIpcGetEventHandle", ctypes.byref(event), at)
                answer = bytes(memory).hex() + " " + bytes(event).hex()
            elif order == "import":
                memory, event = (Handle.from_buffer_copy(bytes.fromhex(word)) for word in argument.split())
                pointer, at = ctypes.c_uint64(), ctypes.c_void_p()
                opener = getattr(cuda.lib, "cuIpcOpenMemHandle_v2", None) or cuda.lib.cuIpcOpenMemHandle
                opener.argtypes = [ctypes.c_void_p, Handle, ctypes.c_uint]
                code = opener(ctypes.byref(pointer), memory, 1)
                if ONLY_MEMORY:
                    print(f"memory {code}", file=outbox, flush=True)
                    continue
                cuda.lib.cuIpcOpenEventHandle.argtypes = [ctypes.c_void_p, Handle]
                other = cuda.lib.cuIpcOpenEventHandle(ctypes.byref(at), event)
                kept += [pointer, at]
                answer = f"memory {code}, event {other}"
            elif order == "close":
                answer = str(cuda.lib.cuIpcCloseMemHandle(kept[-2]))
            else:
                break
        except (RuntimeError, AttributeError) as error:
            answer = f"failed: {error}"
        print(answer, file=outbox, flush=True)


class Process:
    def __init__(self, role):
        self.role = role
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid

    def __call__(self, order):
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


def read(path):
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8", "replace")
    except OSError as error:
        return f"({error})"


def look(pid):
    """Visible facts about a process, as sets of lines without the numbers that always differ."""
    descriptors, infos = [], []
    for fd in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        descriptors.append(re.sub(r"\[\d+\]", "[N]", target))
        if "nvidia" in target or "socket" in target or "anon" in target or "dmabuf" in target or "memfd" in target:
            info = read(f"/proc/{pid}/fdinfo/{fd}")
            lines = [line for line in info.splitlines() if not line.startswith(("pos:", "mnt_id:", "ino:"))]
            infos.append(descriptors[-1] + ": " + " | ".join(lines))
    maps = []
    for line in read(f"/proc/{pid}/maps").splitlines():
        fields = line.split(None, 5)
        path = fields[5] if len(fields) > 5 else ""
        start, end = (int(word, 16) for word in fields[0].split("-"))
        if "nvidia" in path or path.startswith(("/dev", "/memfd", "/SYSV", "anon_inode")) or (end - start) == SIZE:
            maps.append(f"{fields[1]} {end - start:#x} offset {fields[2]} {path}")
    threads = []
    for tid in os.listdir(f"/proc/{pid}/task"):
        status = read(f"/proc/{pid}/task/{tid}/status")
        blocked = re.search(r"^SigBlk:\s*(\S+)", status, re.M)
        threads.append(read(f"/proc/{pid}/task/{tid}/comm").strip() + " SigBlk " + (blocked.group(1) if blocked else "?"))
    unix = [line.split()[-1] for line in read("/proc/net/unix").splitlines() if "cuda" in line or "nvidia" in line]
    of_it = [re.sub(rf"\b{pid}\b", "PID", name) for name in unix if str(pid) in name]
    shm = [name for name in os.listdir("/dev/shm") if str(pid) in name or "cuda" in name]
    return {"fd": sorted(descriptors), "fdinfo": sorted(infos), "maps": sorted(maps), "threads": sorted(threads),
            "unix": sorted(of_it), "shm": sorted(re.sub(rf"\b{pid}\b", "PID", name) for name in shm)}


def difference(before, after):
    found = {}
    for key in after:
        old, new = list(before[key]), []
        for item in after[key]:
            if item in old:
                old.remove(item)
            else:
                new.append(item)
        if new or old:
            found[key] = {"new": new, "gone": old}
    return found


def show(title, what):
    print(f"== {title}")
    print(json.dumps(what, indent=1), flush=True)


def checkpoint_calls(pid):
    cuda = Cuda()
    arguments = (ctypes.c_byte * 64)()
    state = ctypes.c_int(-1)
    for name in ("Lock", "Checkpoint", "Restore", "Unlock"):
        call = getattr(cuda.lib, f"cuCheckpointProcess{name}", None)
        if call is None:
            print(f"{pid}: no cuCheckpointProcess{name}")
            return
        if name == "Lock":
            struct.pack_into("<I", arguments, 0, 5000)
        else:
            ctypes.memset(arguments, 0, 64)
        code = call(pid, arguments)
        cuda.lib.cuCheckpointProcessGetState(pid, ctypes.byref(state))
        print(f"{pid}: {name} answers {code}, state {state.value}", flush=True)


def main():
    plain, exporter, importer = (Process(role) for role in ("plain", "exporter", "importer"))
    all_of_them = {"plain": plain, "exporter": exporter, "importer": importer}
    for process in all_of_them.values():
        print(process.role, process.pid, process("context"))
    time.sleep(1)
    first = {role: look(process.pid) for role, process in all_of_them.items()}
    show("plain, all", first["plain"])
    show("exporter beside plain, before it exports", difference(first["plain"], first["exporter"]))
    handles = exporter("export")
    print("export:", "ok" if " " in handles and not handles.startswith("failed") else handles)
    time.sleep(1)
    second = {role: look(process.pid) for role, process in all_of_them.items()}
    show("exporter, what export changed", difference(first["exporter"], second["exporter"]))
    print("import:", importer("import " + handles))
    time.sleep(1)
    third = {role: look(process.pid) for role, process in all_of_them.items()}
    show("exporter, what import changed", difference(second["exporter"], third["exporter"]))
    show("importer, what import changed", difference(second["importer"], third["importer"]))
    show("plain, what it all changed", difference(first["plain"], third["plain"]))
    print(subprocess.run(["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv"], capture_output=True, text=True).stdout)
    if "--no-calls" not in sys.argv:
        for process in (plain, exporter, importer):
            print(process.role)
            checkpoint_calls(process.pid)
    print("close:", importer("close"))
    fourth = look(importer.pid)
    show("importer, what closing changed", difference(third["importer"], fourth))
    for process in all_of_them.values():
        process.process.kill()


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("plain", "exporter", "importer"):
        child(sys.argv[1], sys.stdin, sys.stdout)
    else:
        main()
