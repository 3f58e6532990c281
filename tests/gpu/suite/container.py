"""A container with a GPU program in it: started, asked, checkpointed into a folder, restored from there."""
import json
import os
import pathlib
import re
import time

from . import containerd
from .bed import IMAGE, WORK, Failed, descendants, describe, until, wait

LONG = 240  # seconds that a checkpoint or a restore may take
TIMELINE = re.compile(r"container (\S+) is (checkpointed|restored): ((?:[a-z-]+ [0-9.]+ s(?:, )?)+)")


class Container:
    """`program`: arguments of a script of tests/programs. `settings`: variables of its environment.
    `annotations`: of the container."""

    def __init__(self, suite, case, number, program, settings=(), annotations=(), host_network=False, stock=False):
        self.suite, self.bed, self.case, self.id = suite, suite.bed, case, f"{case}_{number}"
        self.program, self.settings, self.annotations = program, dict(settings), dict(annotations)
        self.host_network, self.stock = host_network, stock
        self.tmp = f"{WORK}/tmp/{case}/{number}"
        self.cgroup = self.id  # its name; `ctr container restore` keeps the old one

    @property
    def is_gpu_py(self):
        return self.program[0] == "gpu.py"

    def options(self):
        options = self.suite.machine.options(self.tmp, gpus=self.argument("--devices", 1))
        for name, value in self.settings.items():
            options += ["--env", f"{name}={value}"]
        for name, value in self.annotations.items():
            options += ["--annotation", f"{name}={value}"]
        if self.host_network:
            options.append("--net-host")
        options += ["--runtime", "io.containerd.runc.v2" if self.stock else "io.containerd.gpusnap.v2"]
        if self.suite.runtime == "runc" and not self.stock:
            options += ["--runtime-config-path", f"{WORK}/runc.toml"]
        return options

    def argv(self):
        argv = [self.suite.machine.python, f"/programs/{self.program[0]}", *self.program[1:]]
        return argv + ["--log", "/dev/shm/log"] if self.is_gpu_py else argv

    def start(self, seconds=150):
        """Starts it cold; gives the seconds until it is ready."""
        begin = time.monotonic()
        self.bed.ctr("run", "--detach", "--null-io", *self.options(), IMAGE, self.id, *self.argv(), timeout=90)
        try:
            self.ready(seconds)
        except Failed as failure:
            raise Failed(f"{failure}; {self.why()}") from None
        return time.monotonic() - begin

    def ready(self, seconds):
        def look():
            log = self.log()
            if "FAILED" in log or not self.alive():
                raise Failed(f"{self.id} has ended: {log.strip()[-600:]} {self.output()[-600:]}")
            return "ready " in log and self.workers() <= len(set(re.findall(r"^w\d+ (?=n=)", log, re.MULTILINE)))

        until(f"{self.id} ready", look, seconds)

    def workers(self):
        """Number of further gpu.py processes that have to compute."""
        return self.argument("--spawn", 0)

    def argument(self, name, otherwise):
        """A number among the program's arguments."""
        return int(self.program[self.program.index(name) + 1]) if name in self.program else otherwise

    def why(self):
        """The reason for a failed start: the output of another try."""
        if self.alive():
            return f"it runs on: {self.output()[-600:]}"
        status, text = self.bed.tries(
            "ctr", "--address", "/run/gpu/containerd.sock", "run", "--rm", *self.options(), IMAGE, f"{self.id}-why", *self.argv(), timeout=20
        )
        failed = pathlib.Path(self.bed.path(f"{self.tmp}/failed"))
        told = failed.read_text()[-1500:] if failed.exists() else ""
        return f"again: exit {status}: {text.strip()[-1500:]} {told}"

    def init(self):
        pid = self.bed.init_of(self.cgroup)
        if pid is None:
            raise Failed(f"{self.id} has no process")
        return pid

    def alive(self):
        return self.bed.init_of(self.cgroup) is not None

    def shim(self):
        return self.bed.shim_of(self.id)

    def status(self):
        for line in self.bed.ctr("task", "ls").splitlines():
            if line.split()[:1] == [self.id]:
                return line.split()[2]
        return None

    def file(self, name):
        return pathlib.Path(f"/proc/{self.init()}/root/dev/shm/{name}")

    def log(self):
        try:
            return self.file("log").read_text(errors="replace")
        except (OSError, Failed):
            return ""

    def output(self):
        try:
            return self.file("output").read_text(errors="replace")
        except (OSError, Failed):
            return ""

    def ask(self, name, *argument, seconds=60):
        """The program's answer."""
        if self.is_gpu_py:
            return self.two_rounds(seconds)
        number = f"{os.getpid()}{time.monotonic_ns()}"
        new = self.file("ask.new")
        new.write_text(" ".join([number, name, *argument]))
        new.rename(self.file("ask"))

        def look():
            for line in reversed(self.log().splitlines()):
                if line.startswith(f"answer {number} "):
                    return json.loads(line.split(" ", 3)[3])
                if line.startswith("FAILED"):
                    raise Failed(f"{self.id}: {line}; {self.output()[-700:]}")
            if not self.alive():
                raise Failed(f"{self.id} has ended while it was asked for {name}; {self.deaths()}")
            return None

        result = until(f"{self.id}: {name}", look, seconds, pause=0.003)
        if not result["ok"]:
            raise Failed(f"{self.id}: {name}: {result}")
        return result

    def rounds(self, log=None):
        found = re.findall(r"^n=(\d+) ", log if log is not None else self.log(), re.MULTILINE)
        return int(found[-1]) if found else 0

    def two_rounds(self, seconds=60):
        """gpu.py checks in each round what it has computed."""
        before = self.rounds()

        def look():
            log = self.log()
            if "FAILED" in log:
                raise Failed(f"{self.id}: {log.strip().splitlines()[-1]}")
            if not self.alive():
                raise Failed(f"{self.id} has ended; {self.deaths()}")
            return self.rounds(log) > before + 1

        until(f"{self.id} past round {before}", look, seconds)
        return {"ok": True, "same": "rounds", "rounds": self.rounds()}

    def deaths(self):
        """The kernel's log about processes that died."""
        status, text = self.bed.tries("dmesg", timeout=5)
        lines = [line for line in text.splitlines() if "segfault" in line or "NVRM" in line]
        return " | ".join(lines[-3:])

    def saved(self, number):
        return f"{WORK}/saved/{self.case}/{number}"

    def checkpointing(self, number, leave=True):
        """Begins a checkpoint into a folder."""
        self.bed.run("mkdir", "-p", f"{WORK}/saved/{self.case}")
        exits = [] if leave else ["--exit"]
        return self.bed.popen(
            "ctr", "--address", "/run/gpu/containerd.sock", "task", "checkpoint", *exits, "--image-path", self.saved(number), self.id
        )

    def checkpoint(self, number, leave=True, seconds=LONG):
        """Into a folder; gives what there is to say of it."""
        mark = self.suite.log_size()
        process = self.checkpointing(number, leave)
        begin = time.monotonic()
        status, text = wait(process, seconds)
        took = time.monotonic() - begin
        if status == 124:
            raise Failed(f"the checkpoint of {self.id} hangs: {self.stuck()}")
        if status != 0:
            raise Failed(f"the checkpoint of {self.id}: {text.strip()[-900:]}")
        self.keep_tmp(number)
        timeline = [] if self.stock else self.suite.timeline(self.id, "checkpointed", mark)
        return {"took": took, "timeline": timeline, **self.size(number)}

    def keep_tmp(self, number):
        """Copies /tmp, as a volume would bring it to the new container: processes map files compiled there."""
        self.bed.run("bash", "-euc", f"rm -rf {self.saved(number)}.tmp; cp -a {self.tmp} {self.saved(number)}.tmp", timeout=60)

    def stuck(self):
        shim = self.shim()
        pids = ([shim, *descendants(shim)] if shim else []) + self.pids()
        return "; ".join(describe(pid) for pid in dict.fromkeys(pids))[:4000]

    def size(self, number):
        folder = pathlib.Path(self.bed.path(self.saved(number)))
        total = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        about = {"bytes": total}
        try:
            gpu = json.loads((folder / "gpusnap.json").read_text()).get("gpu") or {}
            about["staged"] = sum(process.get("staged", 0) for process in gpu.get("processes", []))
            about["cuda processes"] = len(gpu.get("processes", []))
            about["cleaned"] = gpu.get("cleaned", 0)
        except (OSError, ValueError):
            pass
        return about

    def forget(self, number):
        self.bed.tries("rm", "-rf", self.saved(number), f"{self.saved(number)}.tmp", timeout=60)

    def restored(self, number, as_number, seconds=LONG):
        """A new container from the folder; gives it and what there is to say."""
        new = Container(
            self.suite, self.case, as_number, self.program, self.settings, self.annotations, self.host_network, self.stock
        )
        new.create(f"{self.saved(number)}.tmp")
        return new, new.restore(self.saved(number), seconds)

    def create(self, tmp):
        """Without a task; its /tmp is a copy of that folder."""
        self.bed.run("bash", "-euc", f"mkdir -p {os.path.dirname(self.tmp)}; rm -rf {self.tmp}; cp -a {tmp} {self.tmp}", timeout=60)
        self.bed.ctr("container", "create", *self.options(), IMAGE, self.id, *self.argv())

    def root(self):
        """Mounts of the container's root."""
        words = self.bed.ctr("snapshots", "mounts", "/x", self.id).split()
        # mount -t overlay overlay /x -o index=off,workdir=...
        return [(words[words.index("-t") + 1], words[words.index("-t") + 2], words[-1].split(","))]

    def make(self, folder):
        """A task from a folder, not yet started; gives the seconds that took."""
        root, binary = self.root(), "runc" if self.suite.runtime == "runc" and not self.stock else ""
        begin = time.monotonic()
        containerd.create(self.bed.socket, self.id, root, folder, binary, 60)
        return time.monotonic() - begin

    def restore(self, folder, seconds=LONG, answer="answer"):
        """A task from a folder. How long until it is made, is started, and gives this answer."""
        mark = self.suite.log_size()
        try:
            about = {"create": self.make(folder)}
            begin = time.monotonic()
            containerd.start(self.bed.socket, self.id, seconds)
        except containerd.Refused as refusal:
            raise Failed(f"the restore of {self.id}: {refusal}") from None
        except OSError as error:
            raise Failed(f"the restore of {self.id} hangs: {error!r}; {self.stuck()}") from None
        about["start"] = time.monotonic() - begin
        if not self.stock:
            about["answer"] = self.ask(answer, seconds=90)
            about["first answer"] = time.monotonic() - begin
            about["timeline"] = self.suite.timeline(self.id, "restored", mark)
        return about

    def remove(self):
        self.bed.tries("ctr", "--address", "/run/gpu/containerd.sock", "task", "rm", "--force", self.id, timeout=40)
        self.bed.ctr("container", "rm", self.id)

    def ended(self):
        """Waits until the task is stopped, and removes it."""
        until(f"{self.id} stopped", lambda: self.status() == "STOPPED", 30)
        self.remove()

    def pids(self):
        return self.bed.pids(self.cgroup)

    def nothing_left(self):
        until(f"no process of {self.id}", lambda: not self.pids(), 30)

    def exec(self, *argv, seconds=40):
        return self.bed.ctr("task", "exec", "--exec-id", f"x{time.monotonic_ns()}", self.id, *argv, timeout=seconds)
