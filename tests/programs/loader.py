"""A PyTorch data loader whose workers are forked after CUDA has started, with pinned memory; batches must come in order,
none twice and none left out.
"""
import asked
import torch


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 1 << 30

    def __getitem__(self, index):
        return torch.full((256,), index, dtype=torch.int64)


weights = torch.randn(256, 64, device="cuda")
reference = (torch.ones(8, 256, device="cuda") @ weights).cpu()
loader = torch.utils.data.DataLoader(
    Numbers(), batch_size=16, num_workers=4, pin_memory=True, prefetch_factor=2, multiprocessing_context="fork"
)
batches = iter(loader)
seen = 0


def work():
    global seen
    batch = next(batches).cuda(non_blocking=True)
    expected = torch.arange(seen, seen + 16, device="cuda")
    assert bool((batch.sum(1) == 256 * expected).all()), f"{batch[:, 0].tolist()} after {seen}"
    seen += 16


def answer():
    found = (torch.ones(8, 256, device="cuda") @ weights).cpu()
    return {"ok": torch.allclose(found, reference, rtol=1e-3, atol=1e-3), "same": asked.digest(reference.numpy().tobytes())}


def go():
    for _ in range(20):
        work()
    return {"ok": True, "seen": seen}


work()
asked.serve({"answer": answer, "go": go}, work)
