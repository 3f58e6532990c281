"""Common parts of all cases: bed, machine, containerd's log with the shims' timelines, and the list of cases."""
import json
import os
import pathlib
import re
import time

from .bed import REPO, Bed
from .container import TIMELINE, Container
from .machine import Machine

CASES = {}


class Case:
    """`seconds`: how long it takes about. `alone`: nothing else may run beside it, because its times count or because
    the GPU or the memory has no room. `fake`: it says something with the simulated driver as well."""

    def __init__(self, run, seconds, alone, fake, default):
        self.run, self.name = run, run.__name__.replace("_", "-")
        self.seconds, self.alone, self.fake, self.default = seconds, alone, fake, default


def case(seconds, alone=False, fake=False, default=True):
    def add(run):
        made = Case(run, seconds, alone, fake, default)
        CASES[made.name] = made
        return run

    return add


class Suite:
    """`state`: what `run` has settled: {"bed": folder, "fake": folder or null, "runtime": ..., "disk": bool}."""

    def __init__(self, state, case="", report=None):
        self.state, self.case = state, case
        self.bed = Bed(state["bed"])
        self.fake = pathlib.Path(state["fake"]) if state["fake"] else None
        self.machine = Machine(self.bed, self.fake, state["disk"])
        self.runtime = state["runtime"]
        self.report = report or (lambda row: print(json.dumps(row), flush=True))

    def container(self, number, *program, **more):
        return Container(self, self.case, number, list(program), **more)

    def log_size(self):
        try:
            return os.path.getsize(self.bed.log)
        except OSError:
            return 0

    def timeline(self, container, what, mark, seconds=3):
        """Steps of a checkpoint or a restore and how long they took, from the shim's line in containerd's log."""
        end = time.monotonic() + seconds
        while True:
            with open(self.bed.log, "rb") as log:
                log.seek(mark)
                text = log.read().decode(errors="replace")
            for name, done, steps in TIMELINE.findall(text):
                if (name, done) == (container, what):
                    return timeline_of(steps)
            if time.monotonic() > end:
                return []
            time.sleep(0.02)

    def step(self, name, **facts):
        """Something went as it has to."""
        self.report({"case": self.case, "step": name, **facts})


def timeline_of(text):
    return [(name, float(seconds)) for name, seconds in re.findall(r"([a-z-]+) ([0-9.]+) s", text)]


def spent(timeline, *steps):
    return sum(seconds for name, seconds in timeline if name in steps)


# Phases of a checkpoint and of a restore that are not ours: CRIU with containerd's folders, and the driver.
OTHERS = ("cuda-checkpoint", "cuda-restore", "dump", "restore")


def ours(timeline):
    return sum(seconds for name, seconds in timeline if name not in OTHERS)


def cuda_call():
    """The program that makes one driver call."""
    for folder in (REPO / ".gpu-carry", REPO / "target/release", REPO / "target/debug"):
        if os.access(folder / "cuda-call", os.X_OK):
            return folder / "cuda-call"
    raise FileNotFoundError("cuda-call: cargo build --release -p fake-cuda")
