"""torch.distributed with NCCL and its TCPStore, one rank: all_reduce on and on, and a new group after each question for it.

    distributed.py [ADDRESS]
"""
import sys

import asked
import torch
import torch.distributed as distributed

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1"
distributed.init_process_group("nccl", init_method=f"tcp://{address}:29500", rank=0, world_size=1)
tensor, turns = torch.ones(1 << 20, device="cuda"), 0


def turn():
    global turns
    tensor.add_(1)
    distributed.all_reduce(tensor)
    torch.cuda.synchronize()
    turns += 1
    return float(tensor[-1]) == turns + 1


def new():
    """A group of its own: the store and the set-up of NCCL are used again."""
    group = distributed.new_group([0])
    found = torch.full((16,), 3.0, device="cuda")
    distributed.all_reduce(found, group=group)
    return {"ok": float(found.sum()) == 48.0, "same": "right"}


def answer():
    return {"ok": turn(), "same": "right"}


asked.serve({"answer": answer, "go": answer, "new": new}, work=turn)
