"""SIGKILL of each process of ours in each step: the container goes on and its GPU computes right. When to strike is taken from
the timeline of a checkpoint that nobody disturbs, counted from the moment at which the guardian, or criu, is seen.
"""
import os
import signal
import threading
import time

from .bed import Failed, children, descendants, named, until, wait
from .core import case

SLOW = {"FAKE_CUDA": "lock-ms=150,checkpoint-ms=300,restore-ms=300"}


def started(suite, number):
    """A program that is large enough for steps to last, and checks all of its memory."""
    if suite.fake:
        container = suite.container(number, "gpu.py", "--size", "64", settings=SLOW)
    else:
        container = suite.container(number, "tensors.py", "2")
    container.start()
    container.ask("answer")
    return container


def seen(shim, name, seconds=30):
    """Waits for a process below the shim; gives its pid."""
    def look():
        found = named(children(shim) if name == "cuda-guardian" else descendants(shim), name)
        return found[0] if found else None

    return until(name, look, seconds, pause=0.001)


def begins(timeline):
    """When each step begins and how long it is, from Discover on; of a step that comes twice, the first."""
    at, found, on = 0.0, {}, False
    for name, seconds in timeline:
        on = on or name == "discover"
        if on:
            found.setdefault(name, (at, seconds))
            at += seconds
    return found


def strike(suite, container, role, step, plan):
    """Kills the role in the middle of the step of a checkpoint; gives what the client was told."""
    shim = container.shim()
    process = container.checkpointing("struck")
    seen(shim, "cuda-guardian")
    at, length = plan[step]
    time.sleep(max(0.0, at + length * 0.5))
    victims = [shim] if role == "shim" else named(descendants(shim), role)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    status, text = wait(process, 120)
    if status == 124:
        raise Failed(f"{role} killed in {step}: the checkpoint hangs: {container.stuck()}")
    told = "succeeded" if status == 0 else " ".join(text.split())[-260:]
    container.forget("struck")
    return len(victims), told


def survives(suite, role, steps):
    container = started(suite, 0)
    plan = begins(container.checkpoint("clean")["timeline"])
    container.forget("clean")
    killed = 0
    for step in steps:
        if step not in plan:
            raise Failed(f"no step {step} in {plan}")
        count, told = strike(suite, container, role, step, plan)
        killed += count
        if container.status() != "RUNNING":
            raise Failed(f"{role} killed in {step}: {container.id} is {container.status()}; {told}")
        container.ask("answer", seconds=90)
        container.ask("go")
        suite.step(f"{role} killed in {step}", killed=count, told=told)
    if not killed:
        raise Failed("there was nothing to kill")
    container.ask("answer")
    suite.step("a checkpoint afterwards", **container.checkpoint("after"))
    container.ask("answer")
    container.ask("go")


@case(75, fake=True)
def guardian_killed(suite):
    """SIGKILL of the guardian in each step."""
    survives(suite, "cuda-guardian", ["discover", "lock", "hold", "cuda-checkpoint", "dump", "cuda-restore"])


@case(75, fake=True)
def caller_killed(suite):
    """SIGKILL of the process that makes the driver's calls."""
    survives(suite, "cuda-caller", ["lock", "hold", "cuda-checkpoint", "dump", "cuda-restore"])


@case(50, fake=True)
def criu_killed(suite):
    """SIGKILL of criu in a dump."""
    survives(suite, "criu", ["dump", "dump"])


@case(90, fake=True)
def shim_killed(suite):
    """SIGKILL of the shim: containerd ends its container, and nothing of it may be stuck or keep the GPU."""
    small = ("gpu.py", "--size", "64") if suite.fake else ("gpu.py", "--size", "256")
    settings = SLOW if suite.fake else {}
    for number, step in enumerate(["lock", "cuda-checkpoint", "dump", "cuda-restore"]):
        container = suite.container(number, *small, settings=settings)
        container.start()
        container.ask("answer")
        plan = begins(container.checkpoint("clean")["timeline"])
        container.forget("clean")
        before = suite.bed.pids(container.id)
        shim = container.shim()
        _, told = strike(suite, container, "shim", step, plan)
        below = [pid for pid in [*before, *descendants(shim)] if os.path.exists(f"/proc/{pid}")]
        until(f"the end of {below}", lambda: not [pid for pid in below if os.path.exists(f"/proc/{pid}")], 60)
        container.nothing_left()
        suite.bed.tries("ctr", "--address", "/run/gpu/containerd.sock", "task", "rm", "--force", container.id, timeout=40)
        suite.bed.ctr("task", "start", "--detach", "--null-io", container.id)
        container.ready(90)
        container.ask("answer")
        suite.step(f"shim killed in {step}: cleaned up, started again", told=told)
        container.remove()


@case(60, fake=True)
def restore_killed(suite):
    """SIGKILL in a restore: it fails, nothing is left, a second try works."""
    source = started(suite, 0)
    first = source.ask("answer")
    source.checkpoint("a")
    good, about = source.restored("a", 1)
    good.remove()
    at = {}
    moment = 0.0
    for name, seconds in about["timeline"]:
        at.setdefault(name, (moment, seconds))
        moment += seconds
    for number, (role, step) in enumerate([("criu", "restore"), ("cuda-guardian", "cuda-restore"), ("shim", "cuda-restore")], 2):
        struck = struck_restore(suite, source, number, role, at[step])
        new, about = source.restored("a", number + 10)
        if about.pop("answer")["same"] != first["same"]:
            raise Failed("another answer after a second try")
        new.remove()
        suite.step(f"{role} killed in {step} of a restore", told=struck)


def struck_restore(suite, source, number, role, moment):
    """A restore whose `role` is killed; gives what the client was told."""
    new = suite.container(number, *source.program, settings=source.settings)
    new.create()
    told = []

    def restore():
        try:
            new.restore(source.saved("a"), 120)
            told.append("succeeded")
        except Failed as failure:
            told.append(str(failure)[-260:])

    thread = threading.Thread(target=restore)
    thread.start()
    try:
        shim = until("the shim", new.shim, 20, pause=0.001)
        # Start begins: the guardian is started right after the checkpoint was looked at.
        seen(shim, "cuda-guardian")
        time.sleep(max(0.0, moment[0] + moment[1] * 0.5 - 0.02))
        for pid in [shim] if role == "shim" else named(descendants(shim), role):
            os.kill(pid, signal.SIGKILL)
    finally:
        thread.join(150)
    if told == ["succeeded"]:
        new.ask("answer")
    else:
        new.nothing_left()
    new.bed.tries("ctr", "--address", "/run/gpu/containerd.sock", "task", "rm", "--force", new.id, timeout=40)
    new.bed.tries("ctr", "--address", "/run/gpu/containerd.sock", "container", "rm", new.id)
    return told[0] if told else "no answer"
