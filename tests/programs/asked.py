"""What the GPU programs of this folder (all but gpu.py) have in common: they say what they do in a log in the container's
own /dev/shm, and answer what is written to a file beside it. Files of a container's own memory, because a checkpoint
has them and nobody else writes to them.

    log:  ready pid=1 {"total": 4.2}            once
          answer 7 answer {"ok": true, ...}     for each request
    ask:  7 answer                              number, name of an answer, and for some an argument

Every program knows `answer` (the same before and after: what is not is told by `ok`) and `go` (it computes on, from where
it was, and checks it). An exception ends the program; it is in the log, and in /tmp/failed.
"""
import hashlib
import json
import os
import sys
import time
import traceback

FOLDER = os.environ.get("ASKED_FOLDER", "/dev/shm")
ASK, LOG = f"{FOLDER}/ask", f"{FOLDER}/log"
BEGAN = float(os.environ.get("ASKED_BEGAN", time.time()))

# Warnings must not go to a file outside: its length would change after a checkpoint. Children inherit it.
_output = os.open(f"{FOLDER}/output", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
os.dup2(_output, 1)
os.dup2(_output, 2)


def say(line):
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(log, f"{line}\n".encode())
    os.close(log)


def failed(kind, value, trace):
    text = "".join(traceback.format_exception(kind, value, trace))
    say(f"FAILED: {value!r}")
    with open("/tmp/failed", "a", encoding="utf-8") as file:
        file.write(f"{sys.argv}\n{text}")
    sys.__excepthook__(kind, value, trace)


sys.excepthook = failed


def digest(*values):
    """A few digits that stand for bytes, numbers or tensors of the CPU."""
    total = hashlib.sha256()
    for value in values:
        total.update(value if isinstance(value, bytes) else repr(value).encode())
    return total.hexdigest()[:16]


def serve(answers, work=None, **about):
    """Says that it is ready, then answers for ever; `work` is called in between."""
    say(f"ready pid={os.getpid()} {json.dumps({'total': round(time.time() - BEGAN, 2), **about})}")
    while True:
        try:
            with open(ASK, encoding="utf-8") as file:
                number, name, *argument = file.read().split()
        except FileNotFoundError:
            if work:
                work()
            time.sleep(0.002)
            continue
        os.unlink(ASK)
        begin = time.perf_counter()
        result = answers[name](*argument)
        result["took"] = round(time.perf_counter() - begin, 4)
        say(f"answer {number} {name} {json.dumps(result)}")
