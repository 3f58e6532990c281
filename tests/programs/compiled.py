"""ViT-base of random weights in half precision with torch.compile as it comes: compile workers, a helper with a CUDA context
of its own, processes forked from that. What it was compiled to must serve after a restore; a new compile must work.
"""
import asked
import torch
import torch._dynamo.utils
from transformers import ViTConfig, ViTForImageClassification

torch.manual_seed(1)
model = ViTForImageClassification(ViTConfig(num_labels=1000)).eval().to("cuda", torch.float16)
compiled = torch.compile(model)
image = torch.linspace(-1, 1, 3 * 224 * 224, device="cuda").reshape(1, 3, 224, 224).half()


def infer():
    with torch.no_grad():
        return compiled(image).logits.float().cpu()


for _ in range(3):
    reference = infer()


def compiles():
    return sum(torch._dynamo.utils.counters["frames"].values())


before, served = compiles(), 0


def answer():
    logits = infer()
    near = torch.allclose(logits, reference, rtol=1e-2, atol=1e-2)
    return {
        "ok": near and compiles() == before,
        "exact": torch.equal(logits, reference),
        "compiles": compiles() - before,
        "same": asked.digest(reference.numpy().tobytes()),
    }


def go():
    global served
    served += 1
    return {"ok": answer()["ok"], "served": served}


def new():
    global before
    columns = 250 + served

    def function(a, b):
        return torch.nn.functional.gelu(a @ b).softmax(-1) + a.sin().mean()

    a, b = (torch.randn(columns, columns, device="cuda") for _ in range(2))
    found, expected = torch.compile(function, dynamic=False)(a, b), function(a, b)
    fresh, before = compiles() - before, compiles()
    return {"ok": torch.allclose(found, expected, atol=1e-2) and fresh > 0, "compiles": fresh}


asked.serve({"answer": answer, "go": go, "new": new})
