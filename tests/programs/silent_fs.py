"""silent_fs.py FOLDER SILENT: a file system in FOLDER that answers no lookup while the file SILENT exists. A thread that
looks up a name waits meanwhile, uninterruptibly once it gets a signal. Every name is missing. Says `ready`, and
`silent` when the first one waits; ends with its mount."""
import ctypes
import errno
import os
import select
import struct
import sys

LOOKUP, FORGET, GETATTR, INIT, INTERRUPT, BATCH_FORGET = 1, 2, 3, 26, 36, 42
HEADER, ANSWER = "<IIQQ", "<IiQ"
# A directory, mode 0755, with two links and blocks of 4096 bytes.
ATTRIBUTES = struct.pack("<QQQQQQIIIIIIIIII", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0o40755, 2, 0, 0, 0, 4096, 0)


def main(folder, silent):
    device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
    libc = ctypes.CDLL(None, use_errno=True)
    options = b"fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other" % device
    if libc.mount(b"silent", folder.encode(), b"fuse", 0, options):
        sys.exit("mount: " + os.strerror(ctypes.get_errno()))
    print("ready", flush=True)
    waiting, told = [], False

    def answer(unique, error, body=b""):
        try:
            os.write(device, struct.pack(ANSWER, 16 + len(body), -error, unique) + body)
        except FileNotFoundError:
            pass  # Its caller was killed.

    while True:
        select.select([device], [], [], 0.005)
        if not os.path.exists(silent):
            for unique in waiting:
                answer(unique, errno.ENOENT)
            waiting.clear()
        elif waiting and not told:
            told = True
            print("silent", flush=True)
        try:
            request = os.read(device, 1 << 17)
        except (BlockingIOError, FileNotFoundError):
            continue  # There is none, or it was interrupted.
        except OSError:
            return  # Unmounted.
        _, operation, unique, node = struct.unpack_from(HEADER, request)
        if operation == INIT:
            answer(unique, 0, struct.pack("<IIIIHHIIHHI28x", 7, 31, 0, 0, 12, 12, 4096, 1, 0, 0, 0))
        elif operation == GETATTR and node == 1:
            answer(unique, 0, struct.pack("<QII", 3600, 0, 0) + ATTRIBUTES)
        elif operation == LOOKUP:
            waiting.append(unique)
        elif operation not in (FORGET, INTERRUPT, BATCH_FORGET):
            answer(unique, errno.ENOSYS)


main(*sys.argv[1:])
