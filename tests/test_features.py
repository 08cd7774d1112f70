"""The README's table of features: what each schedule has on each device, from what really runs and is right."""

import itertools
import re
from pathlib import Path

import cuda_on_host
import torch
from conftest import DEVICE
from test_linear_divergence import problem

from scsdpo_kernels import chunked, linear_divergence, linear_divergence_per_token, native
from scsdpo_kernels.kernels import kernels_of, triton_kernels

README = Path(__file__).parents[1] / "README.md"
ROWS, VOCABULARY, WIDTH = 5, 67, 16


def _features():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    support = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:6] for _ in range(ROWS)])
    lora = torch.randn(2, WIDTH, generator=generator) * 0.3, torch.randn(VOCABULARY, 2, generator=generator), 0.7
    target = {"target_ids": ids, "old_logp": torch.full((ROWS,), -4.0)}
    return {
        "KL and Jensen-Shannon divergences, `beta`, `temperature`": {"temperature": 0.8},
        "`token_weight`, rows of weight 0 left out": {"token_weight": torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0])},
        "`target_ids`, `old_logp`, `importance_clip`": {**target, "importance_clip": 1.5},
        "`linear_divergence_per_token`": {"per_token": True},
        "`top_k`, `tail=\"bucket\"`": {"top_k": 6},
        "`top_k`, `tail=\"renormalize\"`": {"top_k": 6, "tail": "renormalize"},
        "`support_ids`, `support_logp`": {"support_ids": support, "support_logp": torch.full((ROWS, 6), -3.0)},
        "`sampled_token`": {**target, "sampled_token": True, "beta": 1.0},
        "`entry_clip`": {"entry_clip": 0.02, "beta": 0.0},
        "`student_bias`, `teacher_bias`": {"student_bias": torch.randn(VOCABULARY, generator=generator)},
        "`student_softcap`, `teacher_softcap`": {"student_softcap": 3.0},
        "`student_logit_scale`, `teacher_logit_scale`": {"student_logit_scale": 0.4},
        "`student_lora`, `teacher_lora`": {"student_lora": lora},
    }  # fmt: skip


FEATURES = _features()
COLUMNS = {  # schedule, row kernel
    "chunked, CPU": ("chunked", None),
    "chunked, GPU, CUDA rows": ("chunked", "cuda"),
    "chunked, GPU, Triton rows": ("chunked", "triton"),
    "tiled, GPU": ("tiled", None),
    "reference": ("reference", None),
}


def on_device(options, device):
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    if "student_lora" in moved:
        moved["student_lora"] = *(x.to(device) for x in moved["student_lora"][:2]), moved["student_lora"][2]
    return moved


def gradients(options, schedule, device, dtype):
    """The loss and all gradients of one call."""
    hidden, weight, teacher, _ = problem((ROWS,), WIDTH, VOCABULARY, 0.5)
    options = on_device(options, device)
    inputs = [x.detach().to(device, dtype).requires_grad_() for x in (hidden, weight)]
    if "student_bias" in options:
        inputs.append(options["student_bias"].detach().to(dtype).requires_grad_())
        options["student_bias"] = inputs[-1]
    if "student_lora" in options:
        inputs += [x.detach().to(dtype).requires_grad_() for x in options["student_lora"][:2]]
        options["student_lora"] = (*inputs[-2:], options["student_lora"][2])
    given = None if "support_ids" in options else teacher.to(device, dtype)
    if options.pop("per_token", False):
        loss = linear_divergence_per_token(*inputs[:2], given, **options, schedule=schedule).square().sum()
    else:
        loss = linear_divergence(*inputs[:2], given, **options, schedule=schedule).loss
    return [x.detach().double().cpu() for x in (loss, *torch.autograd.grad(loss, inputs))]


def has(options, schedule, device):
    """True where the gradients are the reference's in float64, False where the schedule says that it has no such."""
    betas = {options["beta"]} if "beta" in options else {0.0, 0.5, 1.0}
    found = set()
    for beta in betas:
        exact = gradients({**options, "beta": beta}, "reference", "cpu", torch.double)
        try:
            got = gradients({**options, "beta": beta}, schedule, device, torch.float32)
        except ValueError as error:
            assert f"schedule={schedule!r}: it does not have" in str(error)
            assert any(name in str(error) for name in options), error
            found.add(False)
            continue
        for x, y in zip(got, exact, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        found.add(True)
    assert len(found) == 1
    return found.pop()


def device_of(monkeypatch, schedule, row_kernel):
    """Where a column runs. Without a GPU its kernels run on the CPU: Triton's interpreted, CUDA's as host code."""
    if row_kernel is None:
        return DEVICE if schedule == "tiled" else "cpu"
    kernels = triton_kernels()
    if DEVICE == "cuda":
        kernels = kernels_of(torch.device(DEVICE, 0), row_kernel)
    elif row_kernel == "cuda":
        cuda_on_host.install(monkeypatch, shared=4096)
        kernels = kernels._replace(row_divergence=native.row_divergence_cuda)
    monkeypatch.setattr(chunked, "kernels_of", lambda device: kernels)
    return DEVICE


def table(found):
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for feature in FEATURES:
        lines.append(f"| {feature} | " + " | ".join("yes" if found[feature, c] else "—" for c in COLUMNS) + " |")
    return "\n".join(lines)


def test_the_table_of_features(untuned, monkeypatch):
    found = {}
    for column, feature in itertools.product(COLUMNS, FEATURES):
        with monkeypatch.context() as patch:
            device = device_of(patch, *COLUMNS[column])
            found[feature, column] = has(FEATURES[feature], COLUMNS[column][0], device)
    shown = re.search(r"<!-- tests/test_features.py -->\n(.*?)\n<!-- end -->", README.read_text(), re.DOTALL)
    assert shown and shown[1] == table(found), "\n" + table(found)
