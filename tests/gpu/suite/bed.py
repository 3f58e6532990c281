"""The test bed as seen from outside of it, where Python runs: commands in it, its files, its processes."""
import os
import pathlib
import subprocess
import time

REPO = pathlib.Path(__file__).resolve().parents[3]
TESTBED = REPO / "tests/testbed/testbed"
NAME = "gpu"  # of the containerd
WORK = "/run/gputest"  # a folder in the bed, in memory
IMAGE = "docker.io/test/machine:1"


class Failed(Exception):
    """Something did not go as it has to."""


def until(what, check, seconds, pause=0.02):
    """The first true value that `check` gives."""
    end = time.monotonic() + seconds
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {seconds} s")
        time.sleep(pause)


class Bed:
    def __init__(self, state=None):
        self.state = pathlib.Path(state or os.environ.get("GPUSNAP_TESTBED", "/var/tmp/gpusnap-testbed"))
        self.environment = dict(os.environ, GPUSNAP_TESTBED=str(self.state))

    def testbed(self, *arguments, timeout=120, **environment):
        """A command of the test bed's script."""
        environment = {**self.environment, **environment}
        command = [str(TESTBED), *arguments]
        try:
            out = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"testbed {' '.join(arguments[:3])}: not done in {timeout} s") from None
        if out.returncode != 0:
            raise Failed(f"testbed {' '.join(arguments[:3])}: {out.stderr.strip()[-600:]}")
        return out.stdout

    def up(self, packs, tops):
        """Brings up the bed, unpacked from `packs` where it is not built. It shows these folders of the machine's root in
        /host, and not the whole root: runtimes would take its cgroup mounts for theirs."""
        if not (self.state / ".built").exists():
            for pack in packs:
                self.testbed("unpack", str(pack))
        self.testbed("up", GPUSNAP_TESTBED_BIND=" ".join(f"/{top}:/host/{top}" for top in tops))
        if self.tries("ls", "-d", *(f"/host/{top}" for top in tops))[0] != 0:
            raise Failed("the bed is up, but not for this: 'testbed down' first")

    def start(self, shims, environment):
        """Starts containerd with our shim."""
        extra = [word for pair in environment for word in ("--env", pair)]
        self.testbed("start", NAME, "--shims", str(shims), *extra)

    def popen(self, *argv, **more):
        """A command in the bed, started."""
        more.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(
            [str(TESTBED), "in", *map(str, argv)], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
        )

    def tries(self, *argv, timeout=30):
        """A command in the bed: exit status and output. 124 when it has to be killed."""
        process = self.popen(*argv)
        try:
            return wait(process, timeout)
        finally:
            process.kill()

    def run(self, *argv, timeout=30):
        """The output of a command in the bed that succeeds."""
        status, text = self.tries(*argv, timeout=timeout)
        if status != 0:
            raise Failed(f"{' '.join(map(str, argv[:6]))}: exit {status}: {text.strip()[-900:]}")
        return text

    def ctr(self, *argv, timeout=30):
        return self.run("ctr", "--address", f"/run/{NAME}/containerd.sock", *argv, timeout=timeout)

    @property
    def init(self):
        """Process 1 of the bed, as this machine numbers it."""
        return int((self.state / "bed/init").read_text().split()[0])

    def path(self, path):
        """A path in the bed, for this side."""
        return f"/proc/{self.init}/root{path}"

    @property
    def socket(self):
        return self.path(f"/run/{NAME}/containerd.sock")

    @property
    def log(self):
        return self.path(f"/var/log/containerd-{NAME}.log")

    def cgroups(self):
        """The bed's cgroup in each hierarchy."""
        lines = (self.state / "bed/procs").read_text().split()
        return [pathlib.Path(line.removesuffix("/cgroup.procs").removesuffix("/init")) for line in lines]

    def pids(self, container):
        """Processes of a container, as this machine numbers them."""
        found = []
        for cgroup in self.cgroups():
            try:
                found = [int(line) for line in (cgroup / "default" / container / "cgroup.procs").read_text().split()]
            except OSError:
                continue
            if found:
                break
        return sorted(found)

    def init_of(self, container):
        """Process 1 of a container, as this machine numbers it."""
        for pid in self.pids(container):
            if status(pid).get("NSpid", "").split()[-1:] == ["1"]:
                return pid
        return None

    def shim_of(self, container):
        """The shim of a container."""
        for pid in numbers():
            words = cmdline(pid)
            if words and "containerd-shim" in words[0] and "-id" in words and words[words.index("-id") + 1] == container:
                if "start" not in words and "delete" not in words:
                    return pid
        return None

    def thaw(self, container):
        for cgroup in self.cgroups():
            for name, value in (("cgroup.freeze", "0"), ("freezer.state", "THAWED")):
                try:
                    (cgroup / "default" / container / name).write_text(value)
                except OSError:
                    pass


def wait(process, timeout):
    """Exit status and output of what `popen` has started; 124 when it has to be killed."""
    try:
        text, _ = process.communicate(timeout=timeout)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            text, _ = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            text = ""
        return 124, f"{text}\n(killed after {timeout} s)"


def numbers():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def cmdline(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def status(pid):
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def children(pid):
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            found += [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    except OSError:
        pass
    return found


def descendants(pid):
    found, look = [], [pid]
    while look:
        look = [child for parent in look for child in children(parent)]
        found += look
    return found


def named(pids, name):
    """Pids of the processes with this name or first argument."""
    return [pid for pid in pids if status(pid).get("Name") == name or cmdline(pid)[1:2] == [name]]


def describe(pid):
    """A line about a process that may be stuck."""
    facts = status(pid)
    try:
        where = pathlib.Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        where = "?"
    shown = " ".join(f"{name}={facts.get(name)}" for name in ("Name", "State", "PPid", "TracerPid", "Threads"))
    return f"{pid} {shown} wchan={where}"
