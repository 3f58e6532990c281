#!/usr/bin/env python3
"""A GPU program that checks itself, for the real driver and the simulated one: Python and libcuda.so.1 only.

It fills memory of a GPU with a pattern that depends on the position, then for ever adds one to every value, checks a
part of it and writes a line `n=COUNT sum=CHECKSUM ok`. As soon as anything is wrong it writes `FAILED: ...` and exits
with 1. It exits with 0 on SIGTERM, or after --count rounds.

SIGUSR1 starts a kernel of --spin milliseconds (line `spin`); SIGUSR2 has all memory checked (line `full n=COUNT ...`).
"""
import argparse
import array
import ctypes
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib

# For compute capability 5.0 and up; newer GPUs compile it for themselves. The simulated driver knows the names.
PTX = b"""
.version 6.0
.target sm_50
.address_size 64

// spin(u64 nanoseconds)
.visible .entry spin(.param .u64 spin_ns)
{
    .reg .pred %p<2>;
    .reg .b64 %rd<5>;
    ld.param.u64 %rd1, [spin_ns];
    mov.u64 %rd2, %globaltimer;
AGAIN:
    mov.u64 %rd3, %globaltimer;
    sub.u64 %rd4, %rd3, %rd2;
    setp.lt.u64 %p1, %rd4, %rd1;
    @%p1 bra AGAIN;
    ret;
}

// add_one(u32 *values, u32 count)
.visible .entry add_one(.param .u64 add_values, .param .u32 add_count)
{
    .reg .pred %p<2>;
    .reg .b32 %r<8>;
    .reg .b64 %rd<5>;
    ld.param.u64 %rd1, [add_values];
    ld.param.u32 %r1, [add_count];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.u32 %r5, %r2, %r3, %r4;
    setp.ge.u32 %p1, %r5, %r1;
    @%p1 bra END;
    cvta.to.global.u64 %rd2, %rd1;
    mul.wide.u32 %rd3, %r5, 4;
    add.u64 %rd4, %rd2, %rd3;
    ld.global.u32 %r6, [%rd4];
    add.u32 %r7, %r6, 1;
    st.global.u32 [%rd4], %r7;
END:
    ret;
}

// fill(u32 *values, u32 count, u32 seed): value i is ((i ^ seed) * 2654435761 mod 2^32) / 2
.visible .entry fill(.param .u64 fill_values, .param .u32 fill_count, .param .u32 fill_seed)
{
    .reg .pred %p<2>;
    .reg .b32 %r<10>;
    .reg .b64 %rd<5>;
    ld.param.u64 %rd1, [fill_values];
    ld.param.u32 %r1, [fill_count];
    ld.param.u32 %r2, [fill_seed];
    mov.u32 %r3, %ctaid.x;
    mov.u32 %r4, %ntid.x;
    mov.u32 %r5, %tid.x;
    mad.lo.u32 %r6, %r3, %r4, %r5;
    setp.ge.u32 %p1, %r6, %r1;
    @%p1 bra END;
    cvta.to.global.u64 %rd2, %rd1;
    mul.wide.u32 %rd3, %r6, 4;
    add.u64 %rd4, %rd2, %rd3;
    xor.b32 %r7, %r6, %r2;
    mul.lo.u32 %r8, %r7, 0x9E3779B1;
    shr.u32 %r9, %r8, 1;
    st.global.u32 [%rd4], %r9;
END:
    ret;
}
"""

WORDS_PER_TILE = 1 << 18  # 1 MiB: what is summed in each round
BLOCK = 256
PERIOD = 0.05
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Failed(Exception):
    """Something is wrong; the program ends."""


class Cuda:
    """libcuda.so.1, every call checked."""

    def __init__(self):
        self.lib = ctypes.CDLL("libcuda.so.1")

    def __getattr__(self, name):
        function = getattr(self.lib, name)

        def call(*arguments):
            code = function(*arguments)
            if code != 0:
                text = ctypes.c_char_p()
                self.lib.cuGetErrorName(code, ctypes.byref(text))
                raise Failed(f"{name}: {code} {(text.value or b'').decode()}")

        return call


def pattern(index, seed):
    return (((index ^ seed) * 0x9E3779B1) & 0xFFFFFFFF) >> 1


class Buffer:
    """Memory of one GPU: each value is its pattern plus the count of additions."""

    def __init__(self, cuda, ordinal, mib):
        self.cuda, self.seed, self.tiles, self.count = cuda, 17 * ordinal + 1, mib, 0
        self.words = mib * WORDS_PER_TILE
        device, self.context, module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(self.context), device)
        self.select()
        cuda.cuModuleLoadData(ctypes.byref(module), PTX)
        self.functions = {}
        for name in ("spin", "add_one", "fill"):
            self.functions[name] = ctypes.c_void_p()
            cuda.cuModuleGetFunction(ctypes.byref(self.functions[name]), module, name.encode())
        self.pointer = ctypes.c_uint64()
        cuda.cuMemAlloc_v2(ctypes.byref(self.pointer), ctypes.c_size_t(4 * self.words))
        self.launch("fill", self.pointer, ctypes.c_uint32(self.words), ctypes.c_uint32(self.seed))
        cuda.cuCtxSynchronize()
        self.sums = [sum(self.read(tile * WORDS_PER_TILE, WORDS_PER_TILE)) for tile in range(self.tiles)]

    def select(self):
        self.cuda.cuCtxSetCurrent(self.context)

    def launch(self, name, *parameters):
        blocks = 1 if name == "spin" else (self.words + BLOCK - 1) // BLOCK
        threads = 1 if name == "spin" else BLOCK
        pointers = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(value) for value in parameters))
        self.cuda.cuLaunchKernel(self.functions[name], blocks, 1, 1, threads, 1, 1, 0, None, pointers, None)

    def read(self, first, words):
        values = array.array("I", bytes(4 * words))
        address, _ = values.buffer_info()
        source = ctypes.c_uint64(self.pointer.value + 4 * first)
        self.cuda.cuMemcpyDtoH_v2(ctypes.c_void_p(address), source, ctypes.c_size_t(4 * words))
        return values

    def add_one(self):
        self.launch("add_one", self.pointer, ctypes.c_uint32(self.words))
        self.cuda.cuCtxSynchronize()
        self.count += 1

    def check(self, tile):
        """Sums one tile and compares some of its values; gives the sum."""
        first = tile * WORDS_PER_TILE
        values = self.read(first, WORDS_PER_TILE)
        for at in [0, WORDS_PER_TILE - 1, *random.sample(range(WORDS_PER_TILE), 64)]:
            expected = pattern(first + at, self.seed) + self.count
            if values[at] != expected:
                raise Failed(f"value {first + at} after {self.count} additions is {values[at]} and not {expected}")
        total = sum(values)
        if total != self.sums[tile] + self.count * WORDS_PER_TILE:
            raise Failed(f"the sum of tile {tile} after {self.count} additions is {total}")
        return total


class Pinned:
    """A page-locked buffer of the host: its contents stay."""

    def __init__(self, cuda, mib):
        size = mib << 20
        pointer = ctypes.c_void_p()
        cuda.cuMemAllocHost_v2(ctypes.byref(pointer), ctypes.c_size_t(size))
        self.address = pointer.value
        self.contents = random.Random(5).randbytes(size)
        ctypes.memmove(self.address, self.contents, size)

    def check(self):
        if ctypes.string_at(self.address, len(self.contents)) != self.contents:
            raise Failed("pinned memory has changed")


class Children:
    """Other processes, which must live as long as this one."""

    def __init__(self):
        self.forked, self.spawned = [], []

    def fork(self, count, ballast):
        """With so many MiB of memory each, unlike anybody's, which they look at again and again."""
        parent = os.getpid()
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                own = random.randbytes(ballast << 20)
                first = zlib.crc32(own)
                while os.getppid() == parent:
                    if zlib.crc32(own) != first:
                        os._exit(1)
                    time.sleep(PERIOD if ballast == 0 else 5 * PERIOD)
                os._exit(0)
            self.forked.append(pid)

    def spawn(self, count, arguments):
        # Blocked until they have handlers: they inherit it.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for at in range(count):
            command = [sys.executable, os.path.abspath(__file__), *arguments, "--name", f"w{at}"]
            self.spawned.append(subprocess.Popen(command))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def check(self):
        for pid in self.forked:
            if os.waitpid(pid, os.WNOHANG)[0] != 0:
                raise Failed(f"the forked child {pid} has ended")
        for child in self.spawned:
            if child.poll() is not None:
                raise Failed(f"the spawned process {child.pid} has ended with {child.returncode}")

    def end(self):
        for child in self.spawned:
            child.terminate()
        for child in self.spawned:
            if child.wait() != 0:
                raise Failed(f"the spawned process {child.pid} ended with {child.returncode}")
        for pid in self.forked:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class Program:
    def __init__(self, options):
        self.options = options
        self.signals = set()
        self.output = os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if options.log else 1
        for number in SIGNALS:
            signal.signal(number, lambda number, _frame: self.signals.add(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def say(self, line):
        prefix = f"{self.options.name} " if self.options.name else ""
        os.write(self.output, f"{prefix}{line}\n".encode())

    def asked(self, number):
        return number in self.signals and (self.signals.discard(number) or True)

    def start(self):
        options = self.options
        self.children, self.buffers, self.pinned = Children(), [], None
        if not options.front:
            self.cuda = Cuda()
            self.cuda.cuInit(0)
            self.buffers = [Buffer(self.cuda, ordinal, options.size) for ordinal in range(options.devices)]
            self.buffers[0].select()
            if options.pinned:
                self.pinned = Pinned(self.cuda, options.pinned)
            if options.managed:
                self.cuda.cuMemAllocManaged(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(1 << 20), 1)
            if options.poll:
                self.poll()
        for_workers = ["--size", str(options.size), "--devices", str(options.devices), "--spin", str(options.spin)]
        for flag in ("managed", "poll"):
            for_workers += [f"--{flag}"] if getattr(options, flag) else []
        for_workers += ["--pinned", str(options.pinned)] if options.pinned else []
        for_workers += ["--log", options.log] if options.log else []
        self.children.spawn(max(options.spawn, int(options.front)), for_workers)
        self.children.fork(options.fork, options.ballast)

    def poll(self):
        """A thread that reads driver memory without the driver's lock. Nothing is known that has the real one do so."""
        read = getattr(self.cuda.lib, "fakeCudaPoll", None)
        if read is None:
            self.say("--poll: not with this driver")
            return

        def run():
            while True:
                read(1000)

        threading.Thread(target=run, daemon=True).start()

    def round(self, at):
        total = 0
        for buffer in self.buffers:
            buffer.select()
            buffer.add_one()
            total += buffer.check(at % buffer.tiles)
        if self.pinned:
            self.pinned.check()
        self.children.check()
        self.say(f"n={at + 1} sum={total} ok")

    def full(self, at):
        total = 0
        for buffer in self.buffers:
            buffer.select()
            total += sum(buffer.check(tile) for tile in range(buffer.tiles))
        self.say(f"full n={at + 1} sum={total} ok")

    def spin(self):
        self.buffers[0].select()
        self.say("spin")
        self.buffers[0].launch("spin", ctypes.c_uint64(self.options.spin * 1_000_000))

    def run(self):
        self.start()
        self.say(f"ready pid={os.getpid()}")
        at = 0
        while not self.asked(signal.SIGTERM) and at != self.options.count:
            self.round(at)
            if self.asked(signal.SIGUSR2):
                self.full(at)
            if self.asked(signal.SIGUSR1) and self.buffers:
                self.spin()
            at += 1
            time.sleep(PERIOD)
        self.children.end()
        self.say("end")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4, metavar="MIB", help="memory on each GPU (default 4)")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="use the first N GPUs")
    pinned = "also a page-locked buffer on the host, of so many MiB"
    parser.add_argument("--pinned", type=int, nargs="?", const=1, default=0, help=pinned)
    parser.add_argument("--managed", action="store_true", help="also managed memory, which no checkpoint can save")
    parser.add_argument("--spin", type=int, default=3000, metavar="MS", help="how long SIGUSR1's kernel runs")
    parser.add_argument("--fork", type=int, default=0, metavar="N", help="children forked after CUDA has started")
    parser.add_argument("--ballast", type=int, default=0, metavar="MIB", help="memory of each of these")
    parser.add_argument("--spawn", type=int, default=0, metavar="N", help="child processes that use CUDA themselves")
    parser.add_argument("--front", action="store_true", help="no CUDA in this process, only in spawned ones")
    parser.add_argument("--poll", action="store_true", help="a thread that reads driver memory (simulated driver only)")
    parser.add_argument("--count", type=int, default=-1, metavar="N", help="end after N rounds")
    parser.add_argument("--log", metavar="FILE", help="append the lines to FILE, not to standard output")
    parser.add_argument("--name", default="", help=argparse.SUPPRESS)
    program = Program(parser.parse_args())
    try:
        program.run()
    except (Failed, OSError) as failure:
        program.say(f"FAILED: {failure}")
        print(f"gpu.py: {failure}", file=sys.stderr)
        sys.exit(1)


main()
