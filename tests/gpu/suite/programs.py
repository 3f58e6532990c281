"""Each program through its whole life: started cold, checkpointed and left running, restored as a new container, checkpointed
again with an end, restored again."""
import json
import shutil
import subprocess
import sys

from .bed import REPO, Failed, until
from .core import case


def life(suite, *program, single=False, new=False, inspect=None, alongside=None, second=True, settings=(), annotations=(), host_network=False):
    """`single`: the source has to go before the restore, because the GPU or the network has room for one. `new`: the
    program is asked for something new after a restore. `inspect`: called with each container. `alongside`: gives a
    function that ends what runs beside the checkpoint."""
    source = suite.container(0, *program, settings=settings, annotations=annotations, host_network=host_network)
    cold = source.start()
    first = source.ask("answer")
    source.ask("go")
    suite.step("started", seconds=cold, processes=len(source.pids()), ready=ready_line(source))
    if inspect:
        inspect(source)
    finish = alongside(source) if alongside else None
    checkpoint = source.checkpoint("a")
    if finish:
        finish()
    same(source.ask("answer"), first, "after the checkpoint")
    source.ask("go")
    suite.step("checkpointed, left running", cold=cold, **checkpoint)
    if single:
        source.remove()
        source.nothing_left()
    restored, about = source.restored("a", 1)
    same(about.pop("answer"), first, "restored")
    restored.ask("go")
    if new:
        restored.ask("new", seconds=120)
        same(restored.ask("answer"), first, "after something new")
    if inspect:
        inspect(restored)
    suite.step("restored as a new container", cold=cold, bytes=checkpoint["bytes"], processes=len(restored.pids()), **about)
    restored.forget("a")
    if not single:
        source.ask("go")
        same(source.ask("answer"), first, "beside the restored one")
        source.remove()
    if not second:
        restored.remove()
        return
    checkpoint = restored.checkpoint("b", leave=False)
    restored.ended()
    restored.nothing_left()
    suite.step("checkpointed again, ended", **checkpoint)
    again, about = restored.restored("b", 2)
    same(about.pop("answer"), first, "restored again")
    again.ask("go")
    if new:
        again.ask("new", seconds=120)
    suite.step("restored again", **about)
    again.forget("b")
    again.remove()
    again.nothing_left()


def same(answer, first, when):
    if answer["same"] != first["same"]:
        raise Failed(f"{when} it answers {answer} and not {first}")


def ready_line(container):
    return next((line.split(" ", 2)[-1] for line in container.log().splitlines() if line.startswith("ready ")), "")


def nvidia_smi(container):
    """nvidia-smi works in the container."""
    if not container.suite.fake:
        text = container.exec(shutil.which("nvidia-smi"), "--query-gpu=uuid,memory.used", "--format=csv,noheader")
        container.suite.step("nvidia-smi", says=text.strip())


@case(75, alone=True)
def torch_8g(suite):
    """8 GiB of tensors."""
    life(suite, "tensors.py", "8", inspect=nvidia_smi)


@case(240, alone=True, default=False)
def torch_32g(suite):
    """32 GiB of tensors."""
    life(suite, "tensors.py", "32", single=True)


@case(110, alone=True)
def vit_compile(suite):
    """ViT-base with torch.compile, default compile workers, cold cache; a new compile after each restore."""
    life(suite, "compiled.py", new=True)


@case(60)
def jax_preallocated(suite):
    """JAX with its default allocator, which takes its share of the GPU at once: 8 GB here."""
    life(suite, "jaxed.py", single=True, settings={"XLA_PYTHON_CLIENT_MEM_FRACTION": ".10"})


@case(40)
def jax_on_demand(suite):
    """JAX without preallocation."""
    life(suite, "jaxed.py", settings={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})


@case(30)
def cupy(suite):
    """CuPy: FFT, NVRTC kernels, two streams, events."""
    life(suite, "cupied.py")


@case(40)
def data_loader(suite):
    """A data loader with workers forked after CUDA started, pinned memory."""
    life(suite, "loader.py")


@case(45)
def spawned_workers(suite):
    """A front without CUDA and two spawned workers."""
    life(suite, "workers.py")


@case(60)
def nvml_beside(suite):
    """NVML in a CUDA process, alone in a process beside it, and inherited by a CUDA process, as vLLM's engine inherits it."""

    def told(container, name, here, beside):
        found = container.ask(name, seconds=90)
        suite.step(f"{container.id}: {name}", **found)
        if found["here"] != here or beside not in (None, found["beside"]):
            raise Failed(f"{container.id}: NVML answers {found}, not {here} here and {beside} beside")

    right = [0, 0, 0]
    source = suite.container(0, "monitored.py")
    cold = source.start()
    first = source.ask("answer")
    told(source, "nvml", right, right)
    for number in ("a", "b"):
        checkpoint = source.checkpoint(number)
        same(source.ask("answer"), first, "after the checkpoint")
        told(source, "nvml", right, right)
    suite.step("checkpointed twice, left running", cold=cold, **checkpoint)
    restored, about = source.restored("b", 1)
    same(about.pop("answer"), first, "restored")
    # The driver has nothing to restore in a process without CUDA: its queries fail until NVML begins again.
    told(restored, "nvml", right, None)
    told(restored, "again", right, right)
    same(restored.ask("answer"), first, "after NVML has begun again")
    suite.step("restored", **about)
    checkpoint = restored.checkpoint("c", leave=False)
    restored.ended()
    again, about = restored.restored("c", 2)
    same(about.pop("answer"), first, "restored again")
    told(again, "again", right, right)
    suite.step("restored again", **about)


@case(45)
def torch_async_allocator(suite):
    """cudaMallocAsync."""
    life(suite, "tensors.py", "1", "--allocator", "async")


@case(45)
def torch_vmm_pinned(suite):
    """VMM memory (expandable segments), and pinned memory."""
    life(suite, "tensors.py", "1", "--allocator", "expandable", "--pinned", "256")


@case(55)
def cnn_graph(suite):
    """ResNet-50, cuDNN, channels last, a CUDA graph."""
    life(suite, "vision.py")


@case(45)
def sentence_encoder(suite):
    """A transformer of the size of MiniLM."""
    life(suite, "encoder.py", "sentence")


@case(50)
def speech_encoder(suite):
    """The encoder of a speech model, Whisper small."""
    life(suite, "encoder.py", "speech")


@case(150, alone=True, default=False)
def llm_kv_pool(suite):
    """A language model of 0.5 billion parameters, a CUDA graph, a pool of 20 GiB for keys and values, nearly all zero."""
    life(suite, "decoder.py", "20", single=True, second=False)


@case(50)
def llm_small_pool(suite):
    """The same with a pool of 1 GiB."""
    life(suite, "decoder.py", "1")


VLLM = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "PYTHONPATH": "/opt/vsite"}


def served(suite, *program, settings=(), sleeps=False, times=3):
    """A server of somebody else's, without an annotation: saved, left running, and restored `times` times."""
    source = suite.container(0, "served.py", *program, settings=settings)
    cold = source.start(seconds=400)
    first = source.ask("answer")
    source.ask("load", seconds=120)
    suite.step("started", seconds=cold, processes=len(source.pids()), ready=ready_line(source))
    if sleeps:
        suite.step("asleep", **source.ask("sleep", seconds=180))
    checkpoint = source.checkpoint("a")
    same(source.ask("awake" if sleeps else "answer", seconds=120), first, "after the checkpoint")
    source.ask("load", seconds=120)
    suite.step("checkpointed, left running", cold=cold, **checkpoint)
    source.remove()
    for number in range(1, times + 1):
        restored = suite.container(number, "served.py", *program, settings=settings)
        restored.create(f"{source.saved('a')}.tmp")
        about = restored.restore(source.saved("a"), answer="awake" if sleeps else "answer")
        same(about.pop("answer"), first, "restored")
        restored.ask("load", seconds=120)
        suite.step("restored", cold=cold, **about)
        if number < times:
            restored.remove()
    checkpoint = restored.checkpoint("b", leave=False)
    restored.ended()
    again, about = restored.restored("b", times + 1)
    same(about.pop("answer"), first, "restored again")
    suite.step("restored again", **about)
    again.remove()


@case(200, alone=True, default=False)
def vllm_serve(suite):
    """`vllm serve`, 0.5B, default start method, torch.compile, CUDA graphs (tests/gpu/README.md says how vLLM gets there)."""
    served(suite, "vllm", "0.5B", "--gpu-memory-utilization", "0.1", settings=VLLM)


@case(200, alone=True, default=False)
def vllm_serve_spawn(suite):
    """The same with the start method spawn."""
    served(suite, "vllm", "0.5B", "--gpu-memory-utilization", "0.1", settings=VLLM | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}, times=1)


@case(300, alone=True, default=False)
def vllm_serve_7b(suite):
    """`vllm serve`, 7B."""
    served(suite, "vllm", "7B", "--gpu-memory-utilization", "0.2", "--max-model-len", "8192", settings=VLLM)


@case(300, alone=True, default=False)
def vllm_asleep_7b(suite):
    """`vllm serve`, 7B, asleep at level 1: its weights are in pinned memory."""
    settings = VLLM | {"VLLM_SERVER_DEV_MODE": "1"}
    served(suite, "vllm", "7B", "--gpu-memory-utilization", "0.2", "--max-model-len", "8192", "--enable-sleep-mode", settings=settings, sleeps=True)


@case(90, default=False)
def uvicorn_fastapi(suite):
    """uvicorn with FastAPI, uvloop and httptools, torch behind them, connections that stay open."""
    served(suite, "uvicorn", settings={"PYTHONPATH": "/opt/vsite"}, times=2)


@case(45)
def torch_distributed(suite):
    """torch.distributed with NCCL, one rank; a new group after each restore."""
    life(suite, "distributed.py", new=True)


PORT = 9911


@case(50)
def http_under_load(suite):
    """A threaded HTTP server that is asked without pause while it is checkpointed, and again when it is restored."""
    if suite.runtime == "runc":
        suite.step("not with runc, which cannot be told to close connections")
        return

    def load(server):
        reference = server.ask("reference")["values"]
        client = [sys.executable, str(REPO / "tests/gpu/load.py"), str(PORT), json.dumps(reference)]
        enter = ["nsenter", f"--net=/proc/{suite.bed.init}/ns/net"]
        process = subprocess.Popen(enter + client, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        before = server.ask("go")["served"]
        until("the server under load", lambda: server.ask("go")["served"] > before + 50, 30)

        def finish():
            text, _ = process.communicate("", timeout=90)
            told = json.loads(text)
            if told["wrong"] or told["errors"] or not told["right"]:
                raise Failed(f"under load: {told}")
            suite.step("load", **told)

        return finish

    def served(server):
        if server.id.endswith("_1"):
            load(server)()

    life(suite, "server.py", str(PORT), single=True, annotations={"gpusnap.dev/tcp": "close"}, host_network=True, alongside=load, inspect=served)


@case(25, fake=True)
def gpu_py_pinned(suite):
    """Python on libcuda alone, 1 GiB, pinned memory."""
    life(suite, "gpu.py", "--size", "16" if suite.fake else "1024", "--pinned")


@case(20, fake=True)
def gpu_py_forked(suite):
    """Children forked after CUDA started."""
    life(suite, "gpu.py", "--fork", "4")


@case(20, fake=True)
def gpu_py_two_processes(suite):
    """Two CUDA processes in one container, one the other's child."""
    life(suite, "gpu.py", "--spawn", "1")


@case(20, fake=True)
def gpu_py_front(suite):
    """A front without CUDA, two workers."""
    life(suite, "gpu.py", "--front", "--spawn", "2")


@case(25, fake=True, default=False)
def gpu_py_two_gpus(suite):
    """One process on two GPUs, 1 GiB on each."""
    life(suite, "gpu.py", "--devices", "2", "--size", "16" if suite.fake else "1024")
