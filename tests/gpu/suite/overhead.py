"""Our checkpoint beside the plain sequence: driver calls by hand and `runc checkpoint` by runc's own shim, interleaved."""
import statistics
import subprocess
import time

from .bed import Failed
from .core import case, cuda_call, ours, spent

ROUNDS = 3


@case(110, alone=True, fake=True)
def overhead(suite):
    """A checkpoint and a restore by us and by hand, three rounds; what of ours is neither the driver nor CRIU."""
    program = ("gpu.py", "--size", "64") if suite.fake else ("tensors.py", "2")
    # As by hand, all through CRIU's images.
    us, hand = suite.container("ours", *program, annotations={"gpusnap.dev/memory": "images"}), suite.container("hand", *program, stock=True)
    us.start()
    hand.start()
    series = {}

    def note(name, value):
        series.setdefault(name, []).append(value)

    for number in range(ROUNDS):
        us.forget("a")
        about = us.checkpoint("a")
        note("checkpoint: ours, as ctr sees it", about["took"])
        note("checkpoint: ours, timeline", sum(seconds for _, seconds in about["timeline"]))
        note("checkpoint: our own part", ours(about["timeline"]))
        note("checkpoint: our driver calls", spent(about["timeline"], "cuda-checkpoint", "cuda-restore"))
        note("checkpoint: our dump", spent(about["timeline"], "dump"))
        us.ask("answer")
        hand.forget("b")
        pid = hand.init()
        begin = time.monotonic()
        driver(suite, "lock", pid)
        driver(suite, "checkpoint", pid)
        saved = time.monotonic()
        about = hand.checkpoint("b")
        dumped = time.monotonic()
        driver(suite, "restore", pid)
        driver(suite, "unlock", pid)
        note("checkpoint: by hand", time.monotonic() - begin)
        note("checkpoint: driver by hand", time.monotonic() - dumped + saved - begin)
        note("checkpoint: runc's shim", about["took"])
        hand.ask("answer")
        restored, about = us.restored("a", f"ours-{number}")
        note("restore: ours", about["create"] + about["start"])
        note("restore: our own part", ours(about["timeline"]))
        restored.remove()
        restored, about = hand.restored("b", f"hand-{number}")
        pid, begin = restored.init(), time.monotonic()
        driver(suite, "restore", pid)
        driver(suite, "unlock", pid)
        note("restore: by hand", about["create"] + about["start"] + time.monotonic() - begin)
        restored.ask("answer")
        restored.remove()
    for name, values in series.items():
        suite.step(name, median=statistics.median(values), least=min(values), most=max(values))
    own = statistics.median(series["checkpoint: our own part"])
    if own > 0.1 and not suite.fake:
        raise Failed(f"our own part of a checkpoint is {own:.3f} s")


def driver(suite, operation, pid):
    out = subprocess.run(
        [str(cuda_call()), operation, str(pid), *(["10000"] if operation == "lock" else [])],
        check=False, env=suite.machine.driver_environment(), capture_output=True, text=True, timeout=60,
    )
    if out.returncode != 0:
        raise Failed(f"cuda-call {operation} {pid}: {out.stdout} {out.stderr}")
