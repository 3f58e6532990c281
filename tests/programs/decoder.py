"""A language model of 0.5 billion random weights that decodes greedily by one CUDA graph, with a pool for keys and values of
GIB, almost all of it zero.

    decoder.py GIB
"""
import sys

import asked
import torch

LAYERS, WIDTH, HEADS, HIDDEN, WORDS, LONGEST = 24, 896, 14, 4864, 151936, 512
half = {"dtype": torch.float16, "device": "cuda"}
torch.manual_seed(1)


def matrix(rows, columns):
    return torch.randn(rows, columns, **half) * (0.7 / rows**0.5)


words = torch.randn(WORDS, WIDTH, **half) * 0.05
layers = [
    {"qkv": matrix(WIDTH, 3 * WIDTH), "out": matrix(WIDTH, WIDTH), "up": matrix(WIDTH, 2 * HIDDEN), "down": matrix(HIDDEN, WIDTH)}
    for _ in range(LAYERS)
]
# As a server has it: pages for many sequences, of which one is in use.
pages = int(float(sys.argv[1]) * 2**30) // (LAYERS * 2 * LONGEST * WIDTH * 2)
pool = torch.zeros(pages, LAYERS, 2, LONGEST, WIDTH, **half)
page = pages // 2
token = torch.zeros(1, dtype=torch.int64, device="cuda")
position = torch.zeros(1, dtype=torch.int64, device="cuda")
places = torch.arange(LONGEST, device="cuda")


def norm(x):
    return torch.nn.functional.rms_norm(x, (WIDTH,))


def step():
    """From the token at the position to the next one."""
    x = words[token]
    hidden = (places > position).view(1, 1, LONGEST)
    for index, layer in enumerate(layers):
        q, k, v = (norm(x) @ layer["qkv"]).view(3, 1, WIDTH).unbind(0)
        keys, values = pool[page, index, 0], pool[page, index, 1]
        keys.index_copy_(0, position, k)
        values.index_copy_(0, position, v)
        q = q.view(HEADS, 1, -1)
        weights = (q @ keys.view(LONGEST, HEADS, -1).permute(1, 2, 0)).float() / (WIDTH // HEADS) ** 0.5
        weights = weights.masked_fill(hidden, float("-inf")).softmax(-1).half()
        x = x + (weights @ values.view(LONGEST, HEADS, -1).permute(1, 0, 2)).view(1, WIDTH) @ layer["out"]
        gate, up = (norm(x) @ layer["up"]).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ layer["down"]
    token.copy_((norm(x) @ words.T).argmax(-1))
    position.add_(1)


with torch.no_grad():
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()


def decode(first, count):
    token.fill_(first)
    position.zero_()
    return resume(count)


def resume(count):
    found = []
    for _ in range(count):
        graph.replay()
        found.append(int(token))
    return found


reference = decode(7, 48)
story = decode(11, 64)
told = decode(11, 8)


def answer():
    """A text that is decoded in between must not disturb the one that goes on: it is put back in its place."""
    kept = pool[page, :, :, :48].clone(), token.clone(), position.clone()
    found = decode(7, 48)
    pool[page, :, :, :48].copy_(kept[0])
    token.copy_(kept[1])
    position.copy_(kept[2])
    zero = not bool(pool[0].any()) and not bool(pool[-1].any())
    return {"ok": found == reference and zero, "same": asked.digest(reference), "pages": pages}


def go():
    """The story goes on as it went when it was told at once."""
    told.extend(resume(4) if len(told) < 60 else [])
    return {"ok": told == story[: len(told)], "told": len(told)}


asked.serve({"answer": answer, "go": go})
