"""PyTorch tensors of random numbers with their checksums, and matrices that are multiplied on and on.

    tensors.py GIB [--allocator native|async|expandable] [--pinned MIB] [--zeros GIB]

--zeros is one tensor more, all zero but for a value in every 64 MiB.
"""
import argparse
import os

import asked

parser = argparse.ArgumentParser()
parser.add_argument("gib", type=float)
parser.add_argument("--allocator", choices=("native", "async", "expandable"), default="native")
parser.add_argument("--pinned", type=int, default=0)
parser.add_argument("--zeros", type=int, default=0)
options = parser.parse_args()
if options.allocator != "native":
    setting = {"async": "backend:cudaMallocAsync", "expandable": "expandable_segments:True"}[options.allocator]
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"] = setting

import torch

CHUNK = 1 << 26  # values of a tensor: 256 MiB
torch.manual_seed(1)
tensors = [
    torch.randint(-(2**31), 2**30, (CHUNK,), dtype=torch.int32, device="cuda")
    for _ in range(max(1, int(4 * options.gib)))
]


def total(tensor):
    return int(tensor.sum(dtype=torch.int64))


totals = [total(tensor) for tensor in tensors]
weights = torch.randn(1024, 1024, device="cuda")
rotation = torch.linalg.qr(torch.randn(64, 64, device="cuda", dtype=torch.float64))[0]
state = torch.eye(64, device="cuda", dtype=torch.float64)
host = torch.randint(0, 256, (max(1, options.pinned) << 20,), dtype=torch.uint8)
pinned = host.pin_memory() if options.pinned else None
zeros = torch.zeros(options.zeros << 28, dtype=torch.int32, device="cuda")
zeros[:: 1 << 24] = torch.arange(1, 16 * options.zeros + 1, dtype=torch.int32, device="cuda")
turns = changes = 0


def work():
    global state, turns
    state = state @ rotation
    turns += 1
    torch.cuda.synchronize()


def answer():
    found = [total(tensor) for tensor in tensors]
    ok = found == [before + changes * CHUNK for before in totals]
    if pinned is not None:
        # The card reads it, and so does the processor.
        ok = ok and bool(torch.equal(pinned, host)) and bool(torch.equal(pinned.cuda(non_blocking=True).cpu(), host))
    count = 16 * options.zeros
    # Not in one sum: numbers of 64 bits are made of all first.
    ok = ok and sum(map(total, zeros.split(CHUNK))) == total(zeros[:: 1 << 24]) == count * (count + 1) // 2
    return {"ok": ok, "same": asked.digest([value - changes * CHUNK for value in found])}


def go():
    """What the processor computes must be what the card has come to."""
    global changes
    for _ in range(10):
        work()
    expected = torch.linalg.matrix_power(rotation.cpu(), turns)
    for tensor in tensors:
        tensor.add_(1)
    changes += 1
    # Memory that is allocated now: of a pool, or mapped at addresses that are reserved.
    fresh = torch.full((32 << 20,), 3.0, device="cuda")
    product = (weights @ weights.T).diagonal().sum()
    near = torch.allclose(product, weights.pow(2).sum(), rtol=1e-2)
    ok = torch.allclose(state.cpu(), expected, atol=1e-6) and float(fresh.sum()) == 3.0 * (32 << 20) and bool(near)
    return {"ok": ok, "turns": turns}


asked.serve({"answer": answer, "go": go}, work, allocator=torch.cuda.get_allocator_backend())
