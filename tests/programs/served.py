"""A server of somebody else's, started as its users start it, asked over HTTP from inside its container.

    served.py vllm SHAPE [ARGUMENT...]      `vllm serve` with random weights in the shape of Qwen2.5 0.5B or 7B
    served.py uvicorn                       FastAPI on uvicorn with uvloop and httptools, a torch model behind it

This process is the front that the suite asks; the server is its child, whose environment and arguments it leaves alone.
`answer`: the server's answers to fixed questions. `load`: the same by many connections at once, some of which stay open.
`sleep`, `wake`: vLLM's own calls.
"""
import http.client
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import asked

SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
             "tie_word_embeddings": True, "vocab_size": 151936},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
           "tie_word_embeddings": False, "vocab_size": 152064},
}
VLLM_PORT, UVICORN_PORT = 8000, 8001
PROMPTS = [[number * 7 + at for at in range(1, 9)] for number in range(4)]

APPLICATION = """
import threading, torch, fastapi
torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(256, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 256)).eval().to("cuda")
app, lock = fastapi.FastAPI(), threading.Lock()
@app.get("/health")
def health():
    return {}
@app.get("/infer/{seed}")
def infer(seed: int):
    with lock, torch.no_grad():
        x = torch.arange(256, device="cuda", dtype=torch.float32).mul(seed + 1).sin()
        return {"value": round(float(model(x).double().abs().sum()), 2)}
@app.get("/count/{seed}")
async def count(seed: int):
    return {"value": seed}
"""


def model_folder(shape):
    """A model's folder without weights: the configuration, and a tokenizer of a few words."""
    folder = pathlib.Path(f"/tmp/model-{shape}")
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "max_position_embeddings": 32768, "initializer_range": 0.02, "use_sliding_window": False,
        "bos_token_id": 1, "eos_token_id": 2, **SHAPES[shape],
    }
    (folder / "config.json").write_text(json.dumps(config))
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(1000))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "model_max_length": 32768}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return str(folder)


kind, *arguments = sys.argv[1:]
if kind == "vllm":
    port, shape = VLLM_PORT, arguments[0]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model_folder(shape), "--load-format", "dummy",
               "--served-model-name", "model", "--port", str(port), *arguments[1:]]
else:
    port = UVICORN_PORT
    pathlib.Path("/tmp/application.py").write_text(APPLICATION)
    command = [sys.executable, "-m", "uvicorn", "application:app", "--app-dir", "/tmp", "--loop", "uvloop", "--http", "httptools", "--port", str(port),
               *arguments]
server = subprocess.Popen(command)


def talk(method, path, body=None, connection=None, seconds=60):
    own = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    own.request(method, path, json.dumps(body) if body is not None else None, {"Content-Type": "application/json"})
    response = own.getresponse()
    text = response.read().decode()
    if connection is None:
        own.close()
    if response.status // 100 != 2:
        raise RuntimeError(f"{method} {path}: {response.status}: {text[:500]}")
    return json.loads(text) if text.strip().startswith(("{", "[")) else text


def question(number, connection=None):
    if kind == "vllm":
        body = {"model": "model", "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 16, "temperature": 0, "logprobs": 1, "ignore_eos": True,
                "return_tokens_as_token_ids": True}
        return talk("POST", "/v1/completions", body, connection)["choices"][0]["logprobs"]["tokens"]
    return talk("GET", f"/infer/{number % 16}", connection=connection)["value"]


def answer():
    found = [question(number) for number in range(4)]
    return {"ok": found == reference[:4], "same": asked.digest(reference), "found": found if found != reference[:4] else len(found)}


kept = []  # connections that stay open from one load to the next


def load():
    """Four threads with connections of their own, which stay open; those of the load before are tried as well."""
    wrong, right, broken = [], [0], []

    def one(connection):
        for number in range(8):
            if question(number, connection) != reference[number % len(reference)]:
                wrong.append(number)
            right[0] += 1

    for connection in kept:
        try:
            one(connection)
        except (OSError, http.client.HTTPException) as error:
            # A server may close a connection that was idle for some seconds.
            broken.append(repr(error))
            connection.close()
    connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(4)]
    threads = [threading.Thread(target=one, args=(connection,)) for connection in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept[:] = connections
    return {"ok": not wrong, "right": right[0], "wrong": wrong, "broken": broken}


def sleeping(state):
    end = time.time() + 120
    while time.time() < end:
        if talk("GET", "/is_sleeping")["is_sleeping"] == state:
            return True
        time.sleep(0.05)
    return False


def sleep():
    talk("POST", "/sleep?level=1", seconds=120)
    return {"ok": sleeping(True)}


def wake():
    talk("POST", "/wake_up", seconds=120)
    return {"ok": sleeping(False)}


def awake():
    """The first answer of a server that sleeps."""
    wake()
    return answer()


while True:
    if server.poll() is not None:
        raise RuntimeError(f"the server has ended: {server.returncode}")
    try:
        talk("GET", "/health")
        break
    except OSError:
        time.sleep(0.2)
healthy = time.time() - asked.BEGAN
reference = [question(number) for number in range(16 if kind != "vllm" else 4)]
asked.serve({"answer": answer, "go": answer, "load": load, "sleep": sleep, "wake": wake, "awake": awake}, healthy=round(healthy, 1))
