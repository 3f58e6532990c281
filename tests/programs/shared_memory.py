"""Memory that two processes share, in each of the kernel's kinds. Both compare all of it with what it ought to be, over and over,
and count together in /count. Argument: MiB of the largest segment.
"""
import ctypes
import fcntl
import functools
import mmap
import os
import random
import sys
import time

MIB = 1 << 20
SIZE = int(sys.argv[1]) * MIB if len(sys.argv) > 1 else 64 * MIB
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p


@functools.cache
def noise(seed, length):
    return random.Random(seed).randbytes(length)


class Segment:
    """Memory, and pieces of it with their contents. All else is zero."""

    def __init__(self, memory, size, *pieces):
        self.memory, self.size, self.pieces = memory, size, sorted(pieces)

    def write(self):
        for at, content in self.pieces:
            self.memory[at : at + len(content)] = content
        return self

    def is_right(self):
        end = 0
        for at, content in [*self.pieces, (self.size, b"")]:
            if self.memory[end:at] != bytes(at - end) or self.memory[at : at + len(content)] != content:
                return False
            end = at + len(content)
        return True


def in_memory(name, size, content=b"", flags=0):
    file = os.memfd_create(name, flags)
    os.ftruncate(file, size)
    os.pwrite(file, content, 0)
    return file


# Holes before, between and behind, one of a page; and a page that is written to all the time.
counter = mmap.mmap(-1, SIZE)
sparse = Segment(counter, SIZE - 4096, (8 * MIB, noise(1, SIZE // 2)), (SIZE - 4 * MIB + 4096, noise(2, 3 * MIB))).write()
# Each process maps a half.
halves = in_memory("halves", 24 * MIB, noise(3, 24 * MIB))
# Nobody has this mapped.
descriptor = in_memory("descriptor", 2 * MIB, noise(4, 2 * MIB))
sealed = in_memory("sealed", 2 * MIB, noise(5, 2 * MIB), os.MFD_ALLOW_SEALING)
fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW)
# A copy of a file in memory, changed in one place.
copied = mmap.mmap(halves, 24 * MIB, flags=mmap.MAP_PRIVATE)
copied[12 * MIB : 12 * MIB + 3] = b"own"
system_v_id = libc.shmget(0x6770, ctypes.c_size_t(8 * MIB), 0o1600)
system_v = (ctypes.c_char * (8 * MIB)).from_address(libc.shmat(system_v_id, None, 0))
system_v[0 : 8 * MIB] = noise(6, 8 * MIB)

parent = os.getpid()
is_child = os.fork() == 0
half = 12 * MIB * is_child
ours = mmap.mmap(halves, 12 * MIB, offset=half)
every = noise(3, 24 * MIB)


def check():
    assert sparse.is_right(), "sparse"
    assert ours[:] == every[half : half + 12 * MIB], "halves"
    assert copied[:] == every[: 12 * MIB] + b"own" + every[12 * MIB + 3 :], "copied"
    assert os.pread(descriptor, 2 * MIB, 0) == noise(4, 2 * MIB), "descriptor"
    assert os.pread(sealed, 2 * MIB, 0) == noise(5, 2 * MIB), "sealed"
    assert fcntl.fcntl(sealed, fcntl.F_GET_SEALS) == fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW, "seals"
    assert system_v.raw == noise(6, 8 * MIB), "System V"


def number():
    return int.from_bytes(counter[SIZE - 4096 : SIZE - 4088], "little")


while True:
    check()
    # The two take turns, by the memory that they share.
    while number() % 2 != is_child:
        assert is_child or os.waitpid(-1, os.WNOHANG) == (0, 0), "the child has ended"
        assert not is_child or os.getppid() == parent, "the parent has ended"
        time.sleep(0.001)
    if not is_child:
        with open("/new", "w") as file:
            file.write(str(number()))
        os.replace("/new", "/count")
    counter[SIZE - 4096 : SIZE - 4088] = (number() + 1).to_bytes(8, "little")
