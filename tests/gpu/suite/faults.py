"""SIGKILL of each process of ours in each step: the container goes on and its GPU computes right. When to strike is taken from
the timeline of a checkpoint that nobody disturbs, counted from the moment at which the session, or criu, is seen.
"""
import os
import pathlib
import signal
import threading
import time

from . import containerd
from .bed import Failed, children, cmdline, descendants, describe, named, numbers, until, wait
from .core import case

OURS = ("gpusnap-session", "cuda-caller")
SLOW = {"FAKE_CUDA": "lock-ms=150,checkpoint-ms=300,restore-ms=300"}


def started(suite, number, annotations=()):
    """A program that is large enough for steps to last, and checks all of its memory."""
    if suite.fake:
        container = suite.container(number, "gpu.py", "--size", "64", settings=SLOW, annotations=annotations)
    else:
        container = suite.container(number, "tensors.py", "2", annotations=annotations)
    container.start()
    container.ask("answer")
    return container


def seen(shim, name, seconds=30):
    """Waits for a process below the shim; gives its pid."""
    def look():
        found = named(children(shim) if name == "gpusnap-session" else descendants(shim), name)
        return found[0] if found else None

    return until(name, look, seconds, pause=0.001)


def begins(timeline, first="discover"):
    """Begin and duration of each step, from `first` on; the longer one of a step that comes twice."""
    at, found, on = 0.0, {}, False
    for name, seconds in timeline:
        on = on or name == first
        if on:
            if seconds > found.get(name, (0, -1))[1]:
                found[name] = (at, seconds)
            at += seconds
    return found


def strike(suite, container, role, step, plan):
    """Kills the role in the middle of the step of a checkpoint; gives how many and what the client was told."""
    shim = container.shim()
    process = container.checkpointing("struck")
    at, length = plan[step]
    if role == "criu":
        seen(shim, "criu")
        time.sleep(length * 0.5)
    else:
        seen(shim, "gpusnap-session")
        time.sleep(at + length * 0.5)
    count = kill(shim, role)
    status, text = wait(process, 120)
    if status == 124:
        raise Failed(f"{role} killed in {step}: the checkpoint hangs: {container.stuck()}")
    container.forget("struck")
    return count, "succeeded" if status == 0 else " ".join(text.split())[-260:]


def kill(shim, role):
    """Kills all processes of this role; gives how many there were."""
    victims = [shim] if role == "shim" else named(descendants(shim), role)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    return len(victims)


def survives(suite, role, steps, annotations=()):
    container = started(suite, 0, annotations)
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
def session_killed(suite):
    """SIGKILL of the session in each step."""
    survives(suite, "gpusnap-session", ["discover", "lock", "hold", "cuda-checkpoint", "dump", "cuda-restore"])


@case(75, fake=True)
def caller_killed(suite):
    """SIGKILL of the process that makes the driver's calls."""
    survives(suite, "cuda-caller", ["lock", "hold", "cuda-checkpoint", "dump", "cuda-restore"])


@case(50, fake=True)
def criu_killed(suite):
    """SIGKILL of criu in a dump."""
    # Through the images, which leaves time for the kill.
    survives(suite, "criu", ["dump", "dump"], {"gpusnap.dev/memory": "images"})


def starts_again(suite, container):
    """containerd is not done with it when its processes are gone, nor when it lists it no more."""

    def starts():
        try:
            suite.bed.ctr("task", "start", "--detach", "--null-io", container.id)
        except Failed as failure:
            if "already exists" not in str(failure):
                raise
            return False
        return True

    try:
        until(f"containerd lets go of {container.id}", starts, 30, 0.5)
    except Failed as failure:
        ours = [pid for pid in numbers() if {"containerd-shim-gpusnap-v2", *OURS} & {os.path.basename(word) for word in cmdline(pid)[:2]}]
        raise Failed(f"{failure}; {'; '.join(describe(pid) for pid in ours)[:3000]}") from None


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
        _, told = strike(suite, container, "shim", step, plan)
        container.nothing_left()
        suite.bed.tries("ctr", "--address", "/run/gpu/containerd.sock", "task", "rm", "--force", container.id, timeout=40)
        starts_again(suite, container)
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
    plan = begins(about["timeline"], "inspect")
    killed = 0
    for number, (role, step) in enumerate([("criu", "restore"), ("gpusnap-session", "cuda-restore"), ("shim", "cuda-restore")], 2):
        count, told = struck_restore(suite, source, number, role, step, plan)
        killed += count
        new, about = source.restored("a", number + 10)
        if about.pop("answer")["same"] != first["same"]:
            raise Failed("another answer after a second try")
        new.remove()
        suite.step(f"{role} killed in {step} of a restore", killed=count, told=told)
    if not killed:
        raise Failed("there was nothing to kill")


def struck_restore(suite, source, number, role, step, plan):
    """A restore whose `role` is killed; gives how many and what the client was told."""
    new = suite.container(number, *source.program, settings=source.settings)
    new.create(f"{source.saved('a')}.tmp")
    new.make(source.saved("a"))
    shim, told, count = new.shim(), [], 0

    def start():
        try:
            containerd.start(suite.bed.socket, new.id, 120)
            told.append("succeeded")
        except (containerd.Refused, OSError) as error:
            told.append(str(error)[-260:])

    thread = threading.Thread(target=start)
    thread.start()
    try:
        at, length = plan[step]
        if role == "criu":
            seen(shim, "criu")
            time.sleep(length * 0.5)
        else:
            seen(shim, "gpusnap-session")
            time.sleep(at + length * 0.5)
        count = kill(shim, role)
    finally:
        thread.join(150)
    if told == ["succeeded"]:
        new.ask("answer")
    else:
        new.nothing_left()
    for words in (["task", "rm", "--force"], ["container", "rm"]):
        suite.bed.tries("ctr", "--address", "/run/gpu/containerd.sock", *words, new.id, timeout=40)
    return count, told[0] if told else "no answer"


HALTS = "/run/gpu-halts"
KILLS = 12


def halted(suite, container, phase, is_paused):
    """Kills a session that has halted at a phase; gives what the client was told."""
    mark = pathlib.Path(f"/proc/{container.shim()}/root{HALTS}/{container.id}.{phase}")
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    told = []

    def checkpoint():
        try:
            containerd.call(suite.bed.socket, "Checkpoint", containerd.field(1, container.id), 60)
        except (containerd.Refused, OSError) as error:
            told.append(str(error)[-200:])

    def paused_first():
        told.append(" ".join(wait(container.checkpointing("halted"), 60)[1].split())[-200:])

    client = threading.Thread(target=paused_first if is_paused else checkpoint)
    client.start()
    until("the halt", lambda: not mark.exists(), 30, pause=0.001)
    session = seen(container.shim(), "gpusnap-session")
    stat = pathlib.Path(f"/proc/{session}/stat")
    until("the stop", lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T", 10, pause=0.001)
    os.kill(session, signal.SIGKILL)
    client.join()
    return told


@case(120, fake=True)
def session_released(suite):
    """SIGKILL of the session while it holds a thawed container whose GPU state is on its way to memory, or there."""
    for number, is_paused in enumerate((True, False)):
        container = started(suite, number)
        for phase in ("cuda-checkpoint", "freeze"):
            for kill_number in range(KILLS):
                told = halted(suite, container, phase, is_paused)
                if container.status() != "RUNNING":
                    raise Failed(f"{container.id} is {container.status()} after kill {kill_number} in {phase}, paused {is_paused}: {told}")
                container.ask("answer", seconds=90)
                container.ask("go")
        suite.step("the session was killed", paused=is_paused, times=2 * KILLS)
