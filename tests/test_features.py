"""The table of features in docs/objectives.md: what runs and is right with every schedule, on every device."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import DEVICE
from test_linear_divergence import problem
from torch import Tensor
from torch.utils._pytree import tree_map_only

from scsdpo_kernels import (
    Head,
    LoRA,
    PolicyGradient,
    RoutedHeads,
    SampledToken,
    TopK,
    TopLogprobs,
    linear_divergence,
    linear_divergence_per_token,
)

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"
ROWS, VOCABULARY, WIDTH = 5, 67, 16


class Feature(NamedTuple):
    """A line of the table: a call that needs the feature."""

    options: dict = {}  # noqa: RUF012 of linear_divergence
    head: dict = {}  # noqa: RUF012 what the student's Head has beside its weight, and so the teacher's
    per_token: bool = False
    more_rows: int = 0  # the student's head has than the teacher's
    teachers: int = 1


def _features() -> dict[str, Feature]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    support = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:6] for _ in range(ROWS)])
    named = TopLogprobs(support, torch.full((ROWS, 6), -3.0))
    lora = torch.randn(2, WIDTH, generator=generator) * 0.3, torch.randn(VOCABULARY, 2, generator=generator), 0.7
    bias = torch.randn(VOCABULARY, generator=generator)
    weights = torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0])
    target = {"target_ids": ids, "old_logp": torch.full((ROWS,), -4.0)}
    return {
        "KL and Jensen-Shannon divergences, `beta`, `temperature`": Feature({"temperature": 0.8}),
        '`divergence="jeffreys"`': Feature({"divergence": "jeffreys", "beta": 0.4}),
        '`divergence="skewed_forward"`, `"skewed_reverse"`': Feature({"divergence": "skewed_forward", "beta": 0.4}),
        "`beta` of each token": Feature({"beta": torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0])}),
        "`token_weight`, tokens of weight 0 left out": Feature({"token_weight": weights}),
        "`target_ids`, `old_logp`, `importance_clip`": Feature({**target, "importance_clip": 1.5}),
        "`policy=PolicyGradient(...)`": Feature({**target, "policy": PolicyGradient(weights + 0.5)}),
        "`metrics`": Feature({**target, "metrics": ("top1_agreement", "importance_clipped")}),
        "`linear_divergence_per_token`": Feature(per_token=True),
        "`support=TopK(k)`": Feature({"support": TopK(6)}),
        '`support=TopK(k, tail="renormalize")`': Feature({"support": TopK(6, "renormalize")}),
        "`support=TopLogprobs(ids, logp)`": Feature({"support": named}),
        "`support=SampledToken()`": Feature({**target, "support": SampledToken(), "beta": 1.0}),
        "`entry_clip`": Feature({"entry_clip": 0.02, "beta": 0.0}),
        "`Head(bias=...)`": Feature(head={"bias": bias}),
        "`Head(softcap=...)`": Feature(head={"softcap": 3.0}),
        "`Head(logit_scale=...)`": Feature(head={"logit_scale": 0.4}),
        "`Head(lora=...)`": Feature(head={"lora": LoRA(*lora)}),
        "`RoutedHeads`": Feature(teachers=3),
        "`shared_prefix`": Feature({"shared_prefix": True, "target_ids": ids % 60}, more_rows=7),
    }


FEATURES = _features()
COLUMNS = {  # schedule, device
    "chunked, CPU": ("chunked", "cpu"),
    "chunked, GPU": ("chunked", "gpu"),
    "reference": ("reference", "cpu"),
}


def gradients(feature: Feature, beta: float, schedule: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """The loss and all gradients of one call."""
    hidden, weight, teacher, _ = problem((ROWS,), WIDTH, VOCABULARY, 0.5)
    options = tree_map_only(Tensor, lambda x: x.to(device), {**feature.options, "beta": beta, "schedule": schedule})
    inputs: list[Tensor] = []

    def differentiable(x: Tensor) -> Tensor:
        inputs.append(x.detach().to(device, dtype).requires_grad_())
        return inputs[-1]

    hidden = differentiable(hidden)
    head = Head(*tree_map_only(Tensor, differentiable, Head(weight, **feature.head)))
    given = None if isinstance(options.get("support"), TopLogprobs) else teacher.to(device, dtype)
    other = weight[: -feature.more_rows].to(device, dtype) if feature.more_rows else None
    if feature.teachers > 1:
        heads = [(weight * (1 + k)).to(device, dtype) for k in range(feature.teachers)]
        other = RoutedHeads(heads, torch.arange(ROWS, device=device) % feature.teachers)
    if feature.per_token:
        loss = linear_divergence_per_token(hidden, head, given, other, **options).square().sum()
    else:
        loss = linear_divergence(hidden, head, given, other, **options).loss
    return [x.detach().double().cpu() for x in (loss, *torch.autograd.grad(loss, inputs))]


def check(feature: Feature, schedule: str, device: str) -> None:
    """The gradients are the reference's in float64."""
    for beta in (feature.options["beta"],) if "beta" in feature.options else (0.0, 0.5, 1.0):
        exact = gradients(feature, beta, "reference", "cpu", torch.double)
        got = gradients(feature, beta, schedule, device, torch.float32)
        for x, y in zip(got, exact, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def table():
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {feature} |" + " yes |" * len(COLUMNS) for feature in FEATURES]
    return "\n".join(lines)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("column", COLUMNS)
def test_a_cell_of_the_table(column, feature, request):
    schedule, device = COLUMNS[column]
    if device == "gpu":  # without one, its kernels run in Triton's interpreter
        device = DEVICE
        request.getfixturevalue("gpu_kernels")
    check(FEATURES[feature], schedule, device)


def test_the_table_of_features():
    shown = re.search(r"<!-- tests/test_features.py -->\n(.*?)\n<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert shown and shown[1] == table(), "\n" + table()
