"""Cases beside a program's plain life: kernels that run long, memory that cannot be saved, stopped processes, two containers on
one GPU, and the clients ctr (to an image) and nerdctl.
"""
import json
import os
import signal
import time

from .bed import IMAGE, WORK, Failed, until, wait
from .core import case
from .programs import same

SMALL = ("gpu.py", "--size", "64")


def spinning(container):
    """Has gpu.py start its long kernel."""
    os.kill(container.init(), signal.SIGUSR1)
    until("the kernel", lambda: "spin" in container.log(), 20)


@case(75, fake=True)
def long_kernel(suite):
    """A kernel of 20 s: the checkpoint tries again and succeeds; a restored container computes on."""
    seconds = 4 if suite.fake else 20
    source = suite.container(0, *SMALL, "--spin", str(1000 * seconds))
    source.start()
    spinning(source)
    begin = time.monotonic()
    checkpoint = source.checkpoint("a")
    took = time.monotonic() - begin
    if took < seconds * 0.6:
        raise Failed(f"the checkpoint took {took:.1f} s, with a kernel of {seconds} s")
    source.two_rounds()
    suite.step("waited for and checkpointed", **checkpoint)
    restored, about = source.restored("a", 1)
    restored.two_rounds()
    about.pop("answer")
    suite.step("restored", **about)


@case(50, fake=True)
def long_kernel_impatient(suite):
    """The same with a patience of 3 s: it fails cleanly, and the kernel comes to its end."""
    seconds = 6 if suite.fake else 20
    source = suite.container(0, *SMALL, "--spin", str(1000 * seconds), annotations={"gpusnap.dev/gpu-patience": "3"})
    source.start()
    spinning(source)
    message = refused(source, "has had GPU work under way")
    source.two_rounds(seconds + 30)
    suite.step("refused, computes on", message=message)
    suite.step("checkpointed afterwards", **source.checkpoint("b"))
    source.two_rounds()


def refused(container, word):
    """A checkpoint fails with this word; gives the message."""
    begin = time.monotonic()
    status, text = wait(container.checkpointing("refused"), 120)
    text = text.strip()
    if status == 0 or word not in text:
        raise Failed(f"a checkpoint that should say {word!r}: exit {status}: {text[-900:]}")
    if container.status() != "RUNNING":
        raise Failed(f"{container.id} is {container.status()}")
    return f"{text[-300:]} ({time.monotonic() - begin:.1f} s)"


@case(20, fake=True)
def managed_memory(suite):
    """Managed memory: refused with a message that says so; the program computes on."""
    source = suite.container(0, *SMALL, "--managed")
    source.start()
    suite.step("refused, computes on", message=refused(source, "managed memory"))
    source.two_rounds()


@case(30, fake=True)
def stopped_process(suite):
    """A process that SIGSTOP has stopped is saved, stays stopped, and computes on after SIGCONT, here and restored."""
    source = suite.container(0, *SMALL, "--front", "--spawn", "1")
    source.start()

    def worker(container):
        found = [pid for pid in container.pids() if pid != container.init()]
        return found[0] if found else None

    def said(container):
        return sum(line.startswith("w0 n=") for line in container.log().splitlines())

    def state(pid):
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0]

    def goes_on(container):
        before = said(container)
        os.kill(worker(container), signal.SIGCONT)
        until("the worker to compute on", lambda: said(container) > before + 1, 20)

    until("the worker", lambda: said(source) > 1, 60)
    os.kill(worker(source), signal.SIGSTOP)
    until("it to stop", lambda: state(worker(source)) == "T", 5)
    source.checkpoint("a")
    until("it to stay stopped", lambda: state(worker(source)) == "T", 5)
    restored, _ = source.restored("a", 1)
    until("the restored one to stay stopped", lambda: state(worker(restored)) == "T", 5)
    goes_on(restored)
    goes_on(source)
    suite.step("stopped, saved, restored, continued")


@case(70, fake=True)
def two_containers(suite):
    """Two containers on one GPU: each is saved while the other computes, then both at once."""
    program = SMALL if suite.fake else ("tensors.py", "2")
    one, other = suite.container(0, *program), suite.container(1, *program)
    one.start()
    other.start()
    first = one.ask("answer")
    other.ask("answer")
    one.checkpoint("a")
    other.ask("go")
    one.ask("go")
    suite.step("one of two")
    both = [one.checkpointing("b"), other.checkpointing("c")]
    for process in both:
        status, text = wait(process, 120)
        if status != 0:
            raise Failed(f"two checkpoints at once: {text[-900:]}")
    one.keep_tmp("b")
    for container in (one, other):
        container.ask("go")
        same(container.ask("answer"), first, "after two checkpoints at once")
    suite.step("both at once")
    restored, about = one.restored("b", 2)
    same(about.pop("answer"), first, "restored")
    for container in (one, other, restored):
        container.ask("go")
    suite.step("a third from one of them", **about)


@case(45, fake=True)
def ctr_image(suite):
    """`ctr container checkpoint` to an image and `ctr container restore` from it: Pause first, Resume after."""
    program = SMALL if suite.fake else ("tensors.py", "0.5")
    source = suite.container(0, *program)
    source.start()
    first = source.ask("answer")
    suite.bed.tries("ctr", "--address", "/run/gpu/containerd.sock", "image", "rm", "gputest/ctr")
    mark, begin = suite.log_size(), time.monotonic()
    suite.bed.ctr("container", "checkpoint", "--task", "--rw", "--image", source.id, "gputest/ctr", timeout=180)
    took = time.monotonic() - begin
    same(source.ask("answer"), first, "after the checkpoint")
    source.ask("go")
    suite.step("checkpointed to an image", took=took, timeline=suite.timeline(source.id, "checkpointed", mark))
    source.remove()
    restored = suite.container(1, *program)
    restored.cgroup = source.id
    mark, begin = suite.log_size(), time.monotonic()
    suite.bed.ctr("container", "restore", "--live", "--rw", restored.id, "gputest/ctr", timeout=180)
    took = time.monotonic() - begin
    same(restored.ask("answer"), first, "restored")
    restored.ask("go")
    suite.step("restored from the image", took=took, timeline=suite.timeline(restored.id, "restored", mark))


@case(45, fake=True)
def nerdctl(suite):
    """`nerdctl checkpoint create` and `nerdctl start --checkpoint`."""
    program = ("gpu.py", "--size", "64", "--log", "/dev/shm/log") if suite.fake else ("tensors.py", "0.5")
    container = suite.container(0, *program[: 3 if suite.fake else 2])
    name, folder = f"{suite.case}-name", f"{WORK}/saved/{suite.case}"
    suite.bed.run("mkdir", "-p", folder)

    def run(*words, timeout=120):
        return suite.bed.run("nerdctl", "--address", "/run/gpu/containerd.sock", *words, timeout=timeout)

    options = ["--runtime", "io.containerd.gpusnap.v2", "--net", "none", "--pull", "never"]
    options += ["--annotation", "gpusnap.dev/on-checkpoint=exit"]
    options += suite.machine.options(container.tmp, "nerdctl")
    argv = [suite.machine.python, f"/programs/{program[0]}", *program[1:]]
    container.id = container.cgroup = run("run", "-d", "--name", name, *options, IMAGE, *argv).strip().splitlines()[-1]
    try:
        container.ready(90)
        first = container.ask("answer")
        mark, begin = suite.log_size(), time.monotonic()
        run("checkpoint", "create", "--checkpoint-dir", folder, name, "one")
        took = time.monotonic() - begin
        container.nothing_left()
        suite.step("checkpointed", took=took, timeline=suite.timeline(container.id, "checkpointed", mark))
        until("it to have exited", lambda: json.loads(run("inspect", name))[0]["State"]["Status"] == "exited", 20)
        mark, begin = suite.log_size(), time.monotonic()
        run("start", "--checkpoint-dir", folder, "--checkpoint", "one", name)
        took = time.monotonic() - begin
        same(container.ask("answer"), first, "restored")
        container.ask("go")
        suite.step("started from it", took=took, timeline=suite.timeline(container.id, "restored", mark))
    finally:
        suite.bed.tries("nerdctl", "--address", "/run/gpu/containerd.sock", "rm", "--force", name, timeout=60)
