"""Every causal-LM and image-text class of transformers beside its own logits: right, refused or not built.

`python tests/test_every_model.py` writes docs/models.md.
"""

import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("transformers", reason="transformers: pip install '.[transformers]'")

import small_models
import transformers

from scsdpo.head import distill, patch_lm_head

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
TOKENS = 5
# Numbers that classes know or do not know, under the names that they have for them, away from what changes nothing.
CHANGES = {
    "logit_scale": 0.3, "logits_scaling": 3.0, "lm_head_multiplier": 0.7, "logits_mup_width_multiplier": 3.0,
    "final_logit_softcapping": 2.5, "logits_soft_cap": 2.5, "output_logit_soft_cap": 2.5, "unpadded_vocab_size": 180,
}  # fmt: skip
TEMPLATE = """# Models

Each causal-LM and image-text class of transformers {version}, built small from its config and compared with its own
logits and gradients in fp32: {right} are right, {refused} are refused with a reason, {absent} were not built by the
rules that the test has, and none is silently different. Numbers such as scales and softcaps have their default first;
"changed" says what comes of other ones, where a config has them. The table is written by
`python tests/test_every_model.py`, and a test compares it.

A class that was not built is measured like any other when it is used, and is then right or refused.

## Right

{rights}

## Refused

| class | reason |
|---|---|
{refusals}

## Not built

{missing}
"""


class Outcome(NamedTuple):
    kind: str  # right, refused, different, not built
    why: str = ""


def outcome(name: str, changes: dict | None = None) -> Outcome:
    try:
        model = small_models.build(name, changes=changes)
    except RuntimeError as error:
        return Outcome("not built", str(error))
    before = traces(model)
    try:
        patch_lm_head(model)
    except ValueError as error:
        return Outcome("refused", str(error))
    finally:
        after = traces(model)
    if changed := [key for key, x in before.items() if not torch.equal(x, after[key])]:
        return Outcome("different", f"the measurement has left traces in {changed}")
    try:
        return compared(model)
    except UntrainableError as error:
        return Outcome("not built", str(error))
    except Exception as error:
        return Outcome("different", f"{type(error).__name__}: {error}")


def traces(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a measurement must leave as it is."""
    found = {key: x.clone() for key, x in model.named_buffers()}
    found["modes"] = torch.tensor([x.training for x in model.modules()])
    found["gradients"] = torch.tensor([x.grad is not None for x in model.parameters()])
    return {**found, "random numbers": torch.get_rng_state()}


class UntrainableError(Exception):
    """A class whose own logits have no gradient here."""


def compared(model: torch.nn.Module) -> Outcome:
    """The forward KL from a random teacher, and the gradient of all parameters, on the operator and on full logits."""
    ids, attention = small_models.batch()
    generator = torch.Generator().manual_seed(0)
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, -TOKENS - 1 : -1]
    teacher = torch.randn(2, TOKENS, 8, generator=generator)
    weight = torch.randn(logits.shape[-1], 8, generator=generator) / 2
    log_p, log_q = logits.double().log_softmax(-1), (teacher @ weight.T).double().log_softmax(-1)
    loss = (log_q.exp() * (log_q - log_p)).sum()
    try:
        loss.backward()
    except Exception as error:
        raise UntrainableError(f"{type(error).__name__}: {error}") from error
    expected = {key: x.grad.clone() for key, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    result = distill(model, ids, attention, TOKENS, mask=None, teacher_hidden=teacher, teacher_head=weight, beta=0.0,
                     target_ids=ids[:, -TOKENS:])  # fmt: skip
    result.loss.backward()
    size = sum(x.double().square().sum() for x in expected.values()).sqrt()
    off = [x - (0 if (own := model.get_parameter(key).grad) is None else own) for key, x in expected.items()]
    error = sum(x.double().square().sum() for x in off).sqrt() / size
    target = log_p.gather(-1, ids[:, -TOKENS:, None])[..., 0]
    nats = (result.student_logp - target).abs().max() / target.abs().max().clamp(min=1)
    if nats < 1e-5 and error < 1e-3 and abs(result.loss - loss) < 1e-4 * loss:
        return Outcome("right")
    return Outcome("different", f"log p by {nats:.1e}, loss {result.loss:.5g} for {loss:.5g}, gradient by {error:.1e}")


def sweep() -> dict[str, tuple[Outcome, Outcome | None]]:
    """Every class's: as its config has it, and with its numbers changed; None where it has none of them."""
    transformers.logging.set_verbosity_error()
    found = {}
    for name in small_models.classes():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = outcome(name)
            has = small_models.numbers(name) & CHANGES.keys() if plain.kind != "not built" else set()
            found[name] = plain, outcome(name, CHANGES) if has else None
    return found


def page(found: dict[str, tuple[Outcome, Outcome | None]]) -> str:
    def of(kind: str) -> list[str]:
        return [name for name, (plain, _) in found.items() if plain.kind == kind]

    def entry(name: str) -> str:
        changed = found[name][1]
        return f"{name} (changed: {changed.kind})" if changed is not None else name

    refusals = [f"| {name} | {found[name][0].why.removeprefix(name + ': ').split(';')[0]} |" for name in of("refused")]
    rights, missing = (wrapped(", ".join(entry(name) for name in of(kind))) for kind in ("right", "not built"))
    return TEMPLATE.format(
        version=transformers.__version__, right=len(of("right")), refused=len(of("refused")),
        absent=len(of("not built")), rights=rights, refusals="\n".join(refusals), missing=missing,
    )  # fmt: skip


def wrapped(text: str) -> str:
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) > 118:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def written(kind: str) -> set[str]:
    """The classes that stand on the page under a heading."""
    section = PAGE.read_text().split(f"\n## {kind}\n")[1].split("\n## ")[0]
    return set(re.findall(r"\w+", section)) & set(small_models.classes())


def test_no_class_is_silently_different():
    """And the page says what comes out. Which classes can be built depends on packages beside transformers, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = sweep()
    finally:
        torch.set_num_threads(threads)
    wrong = {
        name: [x.why for x in both if x is not None and x.kind == "different"]
        for name, both in found.items()
        if any(x is not None and x.kind == "different" for x in both)
    }
    assert not wrong, wrong
    assert sum(plain.kind == "right" for plain, _ in found.values()) >= 0.75 * len(found)
    if f"transformers {transformers.__version__}," not in PAGE.read_text().replace("\n", " "):
        return
    for kind in ("right", "refused"):
        other = {"right": "refused", "refused": "right"}[kind]
        here = {name for name, (plain, _) in found.items() if plain.kind == kind}
        assert not here & written(other.capitalize()), f"docs/models.md: run {Path(__file__).name}"
    assert set().union(*(written(x) for x in ("Right", "Refused", "Not built"))) == set(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = sweep()
    PAGE.write_text(page(result))
    for name, both in result.items():
        for x in both:
            if x is not None and x.kind != "right":
                print(name, *x, sep=": ", file=sys.stderr)
