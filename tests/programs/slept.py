"""A server that sleeps: its weights are pinned tensors of random numbers, and the GPU has none of them.

    slept.py GIB
"""
import sys

import asked
import torch

CHUNK = 1 << 26  # values of a tensor: 256 MiB
torch.manual_seed(1)


def total(tensor):
    return int(tensor.sum(dtype=torch.int64))


def fell_asleep(weights):
    """Moves weights to pinned memory."""
    slept = torch.empty(CHUNK, dtype=torch.int32, pin_memory=True)
    slept.copy_(weights)
    return slept


def fresh():
    return torch.randint(-(2**31), 2**30, (CHUNK,), dtype=torch.int32, device="cuda")


asleep, totals = [], []
for _ in range(max(1, int(4 * float(sys.argv[1])))):
    weights = fresh()
    totals.append(total(weights))
    asleep.append(fell_asleep(weights))
    del weights
torch.cuda.empty_cache()
changes = 0


def answer():
    """The processor reads all weights."""
    found = [total(weights) for weights in asleep]
    return {"ok": found == [before + changes * CHUNK for before in totals], "same": asked.digest(totals)}


def go():
    """The server wakes: the GPU reads all weights, changes them, and gives them back."""
    global changes
    ok = True
    for weights, before in zip(asleep, totals):
        awake = weights.cuda(non_blocking=True)
        ok = ok and total(awake) == before + changes * CHUNK
        weights.copy_(awake.add_(1))
        torch.cuda.synchronize()
    changes += 1
    torch.cuda.empty_cache()
    return {"ok": ok}


asked.serve({"answer": answer, "go": go})
