"""Big memory in the node store beside the same in CRIU's images, interleaved in one run."""
import os
import random
import signal
import statistics
import time

from .bed import Failed, cmdline, numbers
from .core import case
from .overhead import driver
from .programs import same

IMAGES = {"gpusnap.dev/memory": "images"}


def stored(suite):
    """Bytes that the store takes."""
    return int(suite.bed.run("du", "-s", "--block-size=1", suite.machine.store).split()[0])


def moved(suite, which, annotations, number, *program):
    """A checkpoint that ends the container, and a restore. What each took, in seconds."""
    source = suite.container(f"{which}-{number}", *program, annotations=annotations)
    source.start()
    first, before = source.ask("answer"), stored(suite)
    source.ask("go")
    about = source.checkpoint("c", leave=False)
    source.ended()
    suite.step(f"{which}: checkpointed", stored=stored(suite) - before, **about)
    restored, again = source.restored("c", f"{which}-{number}-restored")
    same(again.pop("answer"), first, "restored")
    restored.ask("go")
    suite.step(f"{which}: restored", **again)
    resident(suite, which, restored)
    restored.forget("c")
    restored.remove()
    restored.nothing_left()
    return about["took"], again["create"] + again["start"]


def moved_by_hand(suite, number, *program):
    """The stock sequence: driver calls by hand, and `runc checkpoint` and `runc restore` by runc's own shim."""
    source = suite.container(f"hand-{number}", *program, stock=True)
    source.start()
    first = source.ask("answer")
    source.ask("go")
    pid, begin = source.init(), time.monotonic()
    driver(suite, "lock", pid)
    driver(suite, "checkpoint", pid)
    saved = time.monotonic() - begin
    about = source.checkpoint("c", leave=False)
    source.ended()
    suite.step("by hand: checkpointed", driver=saved, **about)
    restored, again = source.restored("c", f"hand-{number}-restored")
    pid, begin = restored.init(), time.monotonic()
    driver(suite, "restore", pid)
    driver(suite, "unlock", pid)
    back = time.monotonic() - begin
    same(restored.ask("answer"), first, "restored")
    suite.step("by hand: restored", driver=back, **again)
    restored.forget("c")
    restored.remove()
    restored.nothing_left()
    return saved + about["took"], again["create"] + again["start"] + back


def resident(suite, which, container):
    total = 0
    for pid in container.pids():
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as rollup:
            total += sum(int(line.split()[1]) << 10 for line in rollup if line.startswith("Pss:"))
    suite.step(f"{which}: resident", pss=total)


def compared(suite, rounds, *program, by_hand=False):
    series = {}
    for number in range(rounds):
        if by_hand:
            for name, seconds in zip(("checkpoint", "restore"), moved_by_hand(suite, number, *program)):
                series.setdefault(f"by hand: {name}", []).append(seconds)
        for which, annotations in (("ours", {}), ("plain", IMAGES)):
            for name, seconds in zip(("checkpoint", "restore"), moved(suite, which, annotations, number, *program)):
                series.setdefault(f"{which}: {name}", []).append(seconds)
    for name, values in series.items():
        suite.step(name, median=statistics.median(values), least=min(values), most=max(values))


@case(200, alone=True, default=False)
def bulk_28g(suite):
    """26 GiB of random tensors (28 GB): the stock sequence, in the store, in the images."""
    compared(suite, 1, "tensors.py", "26", by_hand=True)


@case(60, alone=True, default=False, fake=True)
def bulk_small(suite):
    """1 GiB, three times each."""
    compared(suite, 3, *(("gpu.py", "--size", "64") if suite.fake else ("tensors.py", "1")), by_hand=True)


@case(60, alone=True, default=False)
def bulk_zeros(suite):
    """28 GiB in one tensor (30 GB), nearly all zero."""
    moved(suite, "zeros", {}, 0, "tensors.py", "0.25", "--zeros", "28")


@case(150, alone=True, default=False)
def bulk_pinned(suite):
    """8 GiB of pinned tensors, as of a server that sleeps: in the store, in the images."""
    compared(suite, 1, "slept.py", "8")


@case(200, alone=True, default=False)
def bulk_pinned_28g(suite):
    """26 GiB of pinned tensors (28 GB), in the store."""
    moved(suite, "pinned", {}, 0, "slept.py", "26")


def scaled(suite, *sizes):
    for gib in sizes:
        took = moved(suite, f"{gib}-gib", {}, 0, "tensors.py", str(gib))
        suite.step(f"{gib} GiB", checkpoint=took[0], restore=took[1])


@case(150, alone=True, default=False)
def bulk_scaling(suite):
    """Restores of 1, 4, 16 and 32 GiB."""
    scaled(suite, 1, 4, 16, 32)


@case(100, alone=True, default=False)
def bulk_64g(suite):
    """The same of 60 GiB (64 GB), which want 192 GB of the machine's memory."""
    scaled(suite, 60)


@case(200, alone=True, default=False)
def vit_ten(suite):
    """The compiled ViT restored ten times from one checkpoint of each kind, in turns."""
    sources = {}
    for which, annotations in (("ours", {}), ("plain", IMAGES)):
        source = suite.container(which, "compiled.py", annotations=annotations)
        cold, before = source.start(), stored(suite)
        first = source.ask("answer")
        about = source.checkpoint(which, leave=False)
        source.ended()
        suite.step(f"{which}: checkpointed", cold=cold, stored=stored(suite) - before, **about)
        sources[which] = (source, first)
    series = {}
    for number in range(10):
        for which, (source, first) in sources.items():
            restored, about = source.restored(which, f"{which}-{number}")
            same(about.pop("answer"), first, "restored")
            series.setdefault(which, []).append(about["first answer"])
            suite.step(f"{which}: restored", **about)
            if number == 0:
                resident(suite, which, restored)
            restored.remove()
            restored.nothing_left()
    for which, values in series.items():
        suite.step(f"{which}: Start to first answer", median=statistics.median(values), least=min(values), most=max(values))


@case(420, alone=True, default=False, fake=True)
def bulk_killed(suite):
    """A process of ours is killed at 50 moments of checkpoints that leave the container running; its memory is right each time."""
    random.seed(1)
    source = suite.container(0, *(("gpu.py", "--size", "96") if suite.fake else ("tensors.py", "8")))
    source.start()
    first = source.ask("answer")
    usual = source.checkpoint("a")["took"]
    source.forget("a")
    rounds, killed, taken = (10 if suite.fake else 50), {}, 0
    for _ in range(rounds):
        name = random.choice(["gpusnap-session", "criu", "cuda-caller"])
        process = source.checkpointing("k")
        time.sleep(random.uniform(0, usual))
        victims = [pid for pid in numbers() if name in cmdline(pid)[:2]]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
                killed[name] = killed.get(name, 0) + 1
            except OSError:
                pass
        process.communicate(timeout=120)
        taken += process.returncode == 0
        same(source.ask("answer"), first, f"after a kill of {name}")
        source.ask("go")
        source.forget("k")
    if not killed:
        raise Failed("there was nothing to kill")
    suite.step("killed", checkpoints=rounds, taken=taken, **killed)
    source.checkpoint("z")
    same(source.ask("answer"), first, "at the end")
