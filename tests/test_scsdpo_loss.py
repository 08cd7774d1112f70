"""SC-SDPO's batch loss: every aggregation against its sum written out, and micro-batches against the whole batch."""

import oracle
import pytest
import torch
from oracle import relative_error
from test_linear_divergence import problem

from scsdpo_kernels import linear_divergence, question_weights, scsdpo_loss

B, T = 8, 6


def batch(dtype=torch.float32):
    """Tensors, and rewards of two mixed questions, one solved and one failed, with masks that differ in length."""
    hidden, weight, teacher, _ = problem(leading=(B, T), dtype=dtype)
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    lengths = torch.tensor([6, 3, 5, 6, 2, 6, 0, 4])
    return (hidden, weight, teacher), {
        "rewards": rewards,
        "question_ids": ids,
        "mask": torch.arange(T) < lengths[:, None],
    }


def differentiated(tensors, **options):
    hidden, weight, teacher = tensors
    inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    result = scsdpo_loss(*inputs, teacher, **options)
    return result, *torch.autograd.grad(result.loss, inputs)


def written_out(divergence, options, reduction):
    mask = options["mask"].double()
    weight = question_weights(options["rewards"], options["question_ids"]).double()[:, None]
    if reduction == "token-mean":
        return (weight * mask * divergence).sum() / mask.sum()
    if reduction == "weighted-token-mean":
        return (weight * mask * divergence).sum() / (weight * mask).sum()
    if reduction == "sequence-mean":
        return ((weight * mask * divergence).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    return (weight * mask * divergence).sum()


@pytest.mark.parametrize("reduction", ["token-mean", "weighted-token-mean", "sequence-mean", "sum"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_reductions(reduction, beta):
    tensors, options = batch()
    hidden, weight, teacher = (x.double() for x in tensors)
    divergence = linear_divergence(hidden, weight, teacher, beta=beta, schedule="reference").divergence
    values = oracle.end_to_end(*tensors, beta=beta)
    torch.testing.assert_close(divergence, values.divergence)
    expected = written_out(values.divergence, options, reduction)
    result, grad_hidden, grad_weight = differentiated(tensors, reduction=reduction, beta=beta, **options)
    assert relative_error(result.loss, expected) < 1e-6

    # the gradient is linear in the tokens' weights: the oracle's own, with the weights that the sum written out has
    token_weight = torch.autograd.functional.jacobian(
        lambda d: written_out(d, options, reduction), torch.ones(B, T, dtype=torch.float64)
    )
    exact = oracle.end_to_end(*tensors, token_weight=token_weight, beta=beta)
    assert relative_error(grad_hidden, exact.grad_hidden) < 1e-5
    assert relative_error(grad_weight, exact.grad_weight) < 1e-5


def test_per_token_fields_are_not_weighted():
    tensors, options = batch()
    result, _, _ = differentiated(tensors, **options)
    kept = options["mask"] & (question_weights(options["rewards"], options["question_ids"]) > 0)[:, None]
    plain = linear_divergence(*tensors)
    assert kept.any() and not kept.all()
    torch.testing.assert_close(result.divergence[kept], plain.divergence[kept], rtol=1e-5, atol=1e-9)
    assert (result.divergence[~kept] == 0).all()


@pytest.mark.parametrize("reduction", ["token-mean", "weighted-token-mean", "sequence-mean", "sum"])
@pytest.mark.parametrize("factor", [2.0, -1.0])
def test_token_weight_is_a_further_factor(reduction, factor):
    """Its sign and scale reach the loss: it is in no denominator."""
    tensors, options = batch()
    ratio = torch.rand(B, T) * factor
    result, grad_hidden, grad_weight = differentiated(tensors, token_weight=ratio, reduction=reduction, **options)
    divergence = oracle.end_to_end(*tensors).divergence
    weight = torch.autograd.functional.jacobian(
        lambda d: written_out(d, options, reduction), torch.ones_like(divergence)
    )
    assert relative_error(result.loss, (divergence * weight * ratio).sum()) < 1e-6
    exact = oracle.end_to_end(*tensors, token_weight=weight * ratio)
    assert relative_error(grad_hidden, exact.grad_hidden) < 1e-5
    assert relative_error(grad_weight, exact.grad_weight) < 1e-5


@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean"])
def test_micro_batches_add_up_to_the_batch(reduction):
    """Weights once for the batch, the step's denominator for each part: the parts' sum is the whole."""
    tensors, options = batch()
    hidden, weight, teacher = tensors
    whole, whole_hidden, whole_weight = differentiated(tensors, reduction=reduction, **options)
    question_weight = question_weights(options["rewards"], options["question_ids"])
    denominator = options["mask"].sum() if reduction == "token-mean" else B
    parts = [slice(0, 1), slice(1, 4), slice(4, 8)]
    results = [
        differentiated(
            (hidden[part], weight, teacher[part]),
            question_weight=question_weight[part],
            mask=options["mask"][part],
            reduction=reduction,
            denominator=denominator,
        )
        for part in parts
    ]
    torch.testing.assert_close(sum(r.loss for r, _, _ in results), whole.loss)
    assert relative_error(torch.cat([h for _, h, _ in results]), whole_hidden) < 1e-6
    assert relative_error(sum(w for _, _, w in results), whole_weight) < 1e-6


@pytest.mark.parametrize("reduction", ["token-mean", "weighted-token-mean", "sequence-mean", "sum"])
@pytest.mark.parametrize("empty", ["mask", "weights"])
def test_nothing_to_learn_is_a_zero_with_gradients(reduction, empty):
    tensors, options = batch()
    if empty == "mask":
        options["mask"] = torch.zeros(B, T)
    else:
        options["rewards"] = torch.ones(B)
    result, grad_hidden, grad_weight = differentiated(tensors, reduction=reduction, **options)
    assert result.loss == 0 and (grad_hidden == 0).all() and (grad_weight == 0).all()


def test_options_reach_the_operator_and_the_weights():
    tensors, options = batch()
    options["rewards"] = options["rewards"] * 10 - 5
    ids = torch.zeros(B, T, dtype=torch.long)
    result = scsdpo_loss(
        *tensors, **options, success_threshold=0.0, exponent=1.0, temperature=2.0, target_ids=ids, schedule="reference"
    )
    assert result.student_logp.shape == (B, T)
    binary = (options["rewards"] > 0).float()
    weight = question_weights(binary, options["question_ids"], exponent=1.0)[:, None] * options["mask"]
    expected = linear_divergence(*tensors, token_weight=weight / options["mask"].sum(), temperature=2.0)
    torch.testing.assert_close(result.loss, expected.loss)


def bad_calls():
    tensors, good = batch()
    weights = torch.ones(B)
    without = {"rewards": None, "question_ids": None}
    cases = [
        ("question_weight", {**good, **without}),
        ("question_weight", {**good, "question_weight": weights}),
        ("rewards, question_ids", {**good, "rewards": None}),
        ("rewards, question_ids", {**good, "question_ids": None}),
        ("rewards, question_ids", {**good, "rewards": weights[:4], "question_ids": good["question_ids"][:4]}),
        ("question_ids", {**good, "rewards": weights[:4]}),
        ("question_weight", {**good, **without, "question_weight": weights[:3]}),
        ("mask", {**good, "mask": good["mask"][:, 1:]}),
        ("token_weight", {**good, "token_weight": weights}),
        ("reduction", {**good, "reduction": "mean"}),
        ("denominator", {**good, "denominator": 0}),
        ("denominator", {**good, "denominator": torch.tensor(0)}),
        ("denominator", {**good, "denominator": torch.tensor(-25.0)}),
        ("denominator", {**good, "denominator": float("inf")}),
        ("denominator", {**good, "denominator": torch.ones(B)}),
        ("denominator", {**good, "denominator": 3, "reduction": "sum"}),
        ("mask", {**good, "mask": good["mask"] * 7}),
        ("mask", {**good, "mask": good["mask"] * torch.nan}),
        ("exponent", {**good, **without, "question_weight": weights, "exponent": 1.0}),
        ("success_threshold", {**good, **without, "question_weight": weights, "success_threshold": 0.5}),
        ("beta", {**good, "beta": 2}),
        ("schedule", {**good, "schedule": "x"}),
        ("mask", {**good, "mask": good["mask"].to("meta")}),
    ]
    return [pytest.param(tensors, options, match, id=f"{i}-{match}") for i, (match, options) in enumerate(cases)]


@pytest.mark.parametrize("tensors, options, match", bad_calls())
def test_bad_input_names_the_argument(tensors, options, match):
    with pytest.raises(ValueError, match=match):
        scsdpo_loss(*tensors, **options)


@pytest.mark.parametrize("name", ["mask", "token_weight", "question_weight"])
def test_lists_are_refused(name):
    tensors, options = batch()
    good = {"mask": options["mask"], "question_weight": torch.ones(B)}
    with pytest.raises(TypeError, match=name):
        scsdpo_loss(*tensors, **{**good, name: [[1.0]]})
    with pytest.raises(TypeError, match="denominator"):
        scsdpo_loss(*tensors, **good, denominator="3")


def test_compiles_with_the_weights_given():
    tensors, options = batch()
    question_weight = question_weights(options["rewards"], options["question_ids"])

    def step(hidden, weight, teacher, mask):
        return scsdpo_loss(
            hidden, weight, teacher, question_weight=question_weight, mask=mask, denominator=torch.tensor(9)
        ).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors, options["mask"]), step(*tensors, options["mask"]))


def test_flat_hidden_states_are_refused():
    (hidden, weight, teacher), options = batch()
    with pytest.raises(ValueError, match="student_hidden"):
        scsdpo_loss(hidden.flatten(0, 1), weight, teacher.flatten(0, 1), **options)
