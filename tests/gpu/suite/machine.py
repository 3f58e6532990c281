"""The machine's own software as a container sees it: an image with the top of its file system and /etc, into which /usr and
the like are mounted read-only, and the driver, real or simulated.
"""
import hashlib
import io
import json
import os
import pathlib
import shutil
import sys
import tarfile
import time

from .bed import IMAGE, REPO, WORK

DRIVER = "/usr/local/nvidia"
NOT_SHOWN = ("", "dev", "etc", "proc", "run", "sys", "tmp", "var")  # a container has its own
PASSED_ON = ("CUDA", "NVIDIA", "NCCL", "NVSHMEM", "TORCH", "TRITON", "XLA", "JAX", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")


def memory():
    """The machine's, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Machine:
    """`fake`: a folder with the simulated driver. `disk`: the node's store is on the disk that the bed is on."""

    def __init__(self, bed, fake=None, disk=False):
        self.bed, self.fake, self.disk = bed, fake, disk
        self.store = f"{WORK}-store-{'disk' if disk else 'memory'}"
        self.python = shutil.which("python3")
        found = [os.path.dirname(self.python), sys.base_prefix, "/usr/bin", "/opt", "/lib", *sys.path]
        found += [os.path.realpath(path) for path in found] + [os.path.realpath(self.python)]
        tops = {path.split("/")[1] for path in found if os.path.exists(path) and not path.startswith(str(REPO))}
        self.tops = sorted(top for top in tops if top not in NOT_SHOWN and not os.path.islink(f"/{top}"))

    def folders(self):
        """Folders mounted into containers: the machine's folders at the top, and the mounts in them."""
        mounted = [line.split()[4] for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()]
        inner = [path for path in mounted if path.split("/")[1] in self.tops and path.count("/") > 1]
        return [f"/{top}" for top in self.tops] + sorted(set(inner))

    def prepare(self):
        """Mounts and the image, in the bed. Once, before containers start."""
        # A fixed size, not a share of the memory: a machine may show more memory under use.
        size = "16g" if self.fake else "110g"
        script = [f"mkdir -p {WORK}", f"mountpoint -q {WORK} || mount -t tmpfs -o mode=755,size={size} tmpfs {WORK}"]
        for path in self.folders():
            # Without mounts below the path: CRIU is told of the mounts in the container's spec only.
            to = f"{WORK}/machine{path.replace('/', '+')}"
            make = f"mkdir -p {to}" if os.path.isdir(path) else f"mkdir -p {WORK}/machine; touch {to}"
            script.append(f"{make}; mountpoint -q {to} || {{ mount --bind /host{path} {to}; mount -o remount,bind,ro {to}; }}")
        script.append(f"mkdir -p {WORK}/saved {WORK}/tmp {WORK}/shims; touch /etc/criu/runc.conf 2>/dev/null || mkdir -p /etc/criu")
        # The network lock makes CRIU fail on the machine with the H100, and our shim does not lock either.
        script.append("echo network-lock skip >/etc/criu/runc.conf")
        script.append(f"printf 'BinaryName = \"runc\"\\n' >{WORK}/runc.toml")
        if self.fake:
            script.append(f"{REPO}/tests/fake-cuda/nodes /dev 2")
        self.bed.run("bash", "-euc", "\n".join(script))
        archive = self.bed.path(f"{WORK}/machine.tar")
        with open(archive, "wb") as file:
            self.image(file)
        self.bed.ctr("image", "import", f"{WORK}/machine.tar", timeout=120)

    def image(self, file):
        """An OCI layout of one layer."""
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            for name in sorted(os.listdir("/")):
                if os.path.islink(f"/{name}"):
                    tar.add(f"/{name}", name)
            for name in [*self.tops, "tmp", "proc", "sys", "dev", "run", "root", "var", "var/tmp", "programs", "cuda"]:
                entry = tarfile.TarInfo(name)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if "tmp" in name else 0o755
                tar.addfile(entry)
            tar.add("/etc", "etc", filter=small)
        layer = layer.getvalue()
        digest = hashlib.sha256(layer).hexdigest()
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
        with tarfile.open(fileobj=file, mode="w") as tar:

            def add(name, data):
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(data), 0o644
                tar.addfile(entry, io.BytesIO(data))

            def blob(kind, data):
                digest = hashlib.sha256(data).hexdigest()
                add(f"blobs/sha256/{digest}", data)
                return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

            layers = [blob("layer.v1.tar", layer)]
            config = blob("config.v1+json", json.dumps(config).encode())
            manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layers}
            manifest = blob("manifest.v1+json", json.dumps(manifest).encode())
            manifest["annotations"] = {"io.containerd.image.name": IMAGE, "org.opencontainers.image.ref.name": "1"}
            manifest["platform"] = {"architecture": "amd64", "os": "linux"}
            add("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
            add("index.json", json.dumps({"schemaVersion": 2, "manifests": [manifest]}).encode())

    def options(self, tmp, mounts_of="ctr", gpus=1):
        """Options of `ctr run` or `nerdctl run` for a container with the machine's software and its first GPUs, and a folder of
        the bed as its /tmp, which has all that it writes."""
        self.bed.run("mkdir", "-p", f"{tmp}/home", timeout=10)
        binds = [(f"{WORK}/machine{path.replace('/', '+')}", path, "ro") for path in self.folders()]
        binds += [(f"{REPO}/tests/programs", "/programs", "ro"), (tmp, "/tmp", "rw")]
        if self.fake:
            binds.append((str(self.fake), "/cuda", "ro"))
        options = []
        for source, target, mode in binds:
            if mounts_of == "nerdctl":
                options += ["-v", f"{source}:{target}:{mode}"]
            else:
                options += ["--mount", f"type=bind,src={source},dst={target},options=rbind:{mode}"]
        for node in (*(f"/dev/nvidia{minor}" for minor in range(gpus)), "/dev/nvidiactl", "/dev/nvidia-uvm"):
            options += ["--device", node]
        for name, value in self.environment().items():
            options += ["--env", f"{name}={value}"]
        return options

    def environment(self):
        passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        libraries = passed.get("LD_LIBRARY_PATH", "")
        own = "/cuda" if self.fake else f"{DRIVER}/lib64"
        if own not in libraries.split(":"):
            passed["LD_LIBRARY_PATH"] = f"{own}:{libraries}".strip(":")
        path = ":".join(dict.fromkeys([os.path.dirname(self.python), *os.environ["PATH"].split(":")]))
        return passed | {"PATH": path, "HOME": "/tmp/home", "PYTHONDONTWRITEBYTECODE": "1"}

    def shim_environment(self):
        store = [f"GPUSNAP_STORE={self.store}", f"GPUSNAP_QUOTA={memory() // 3}", "GPUSNAP_TEST_HALTS=/run/gpu-halts"]
        if not self.fake:
            return store
        return [*store, f"GPUSNAP_LIBCUDA={self.fake}/libcuda.so.1", f"GPUSNAP_NVML={self.fake}/libnvidia-ml.so.1"]

    def make_store(self):
        """The node's store. In memory it is as large as may be: what is measured is not the disk then."""
        self.bed.run("mkdir", "-p", self.store)
        if not self.disk:
            self.bed.run("mount", "-t", "tmpfs", "-o", f"huge=always,mode=700,size={memory() * 3 // 5}", "tmpfs", self.store)

    def driver_environment(self):
        """For a process on this side that calls the driver."""
        own = str(self.fake) if self.fake else f"{DRIVER}/lib64"
        return dict(os.environ, LD_LIBRARY_PATH=f"{own}:{os.environ.get('LD_LIBRARY_PATH', '')}")

    def facts(self):
        """Conditions of a result."""
        facts = {"kernel": os.uname().release, "cores": os.cpu_count(), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        facts["memory"] = f"{memory() >> 30} GiB"
        try:
            facts["thp"] = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip()
        except OSError:
            pass
        return facts


def small(entry):
    """Parts of /etc: plain files, folders and links."""
    return entry if (entry.isfile() and entry.size < 4 << 20) or entry.isdir() or entry.issym() else None
