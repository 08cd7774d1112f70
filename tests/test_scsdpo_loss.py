"""SC-SDPO's batch loss: every aggregation against its sum written out, and micro-batches against the whole batch."""

import oracle
import pytest
import torch
from oracle import relative_error
from problems import Problem, problem

from scsdpo_kernels import question_weights, scsdpo_loss

B, T = 8, 6


def batch() -> tuple[Problem, dict]:
    """Both sides, and rewards of two mixed questions, one solved and one failed, with masks that differ in length."""
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    lengths = torch.tensor([6, 3, 5, 6, 2, 6, 0, 4])
    return problem((B, T)), {
        "rewards": rewards,
        "question_ids": ids,
        "mask": torch.arange(T) < lengths[:, None],
    }


def written_out(divergence, options, reduction):
    """The loss of these divergences."""
    mask = options["mask"].double()
    weight = question_weights(options["rewards"], options["question_ids"]).double()[:, None]
    if reduction == "token-mean":
        return (weight * mask * divergence).sum() / mask.sum()
    if reduction == "weighted-token-mean":
        return (weight * mask * divergence).sum() / (weight * mask).sum()
    if reduction == "sequence-mean":
        return ((weight * mask * divergence).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    return (weight * mask * divergence).sum()


def weights_of(options, reduction):
    """What each token's divergence counts in the loss, which is linear in them."""
    ones = torch.ones(B, T, dtype=torch.float64)
    return torch.autograd.functional.jacobian(lambda x: written_out(x, options, reduction), ones)


@pytest.mark.parametrize("reduction", ["token-mean", "weighted-token-mean", "sequence-mean", "sum"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_reductions(reduction, beta):
    given, options = batch()
    divergence = given.to(torch.float64).call(beta=beta, schedule="reference").divergence
    values, *_ = oracle.expected(given, beta=beta)
    torch.testing.assert_close(divergence, values.divergence)
    result, *gradients = given.run(scsdpo_loss, reduction=reduction, beta=beta, **options)
    assert relative_error(result.loss, written_out(values.divergence, options, reduction)) < 1e-6
    _, *exact = oracle.expected(given, token_weight=weights_of(options, reduction), beta=beta)
    for got, want in zip(gradients, exact, strict=True):
        assert relative_error(got, want) < 1e-5


def test_per_token_fields_are_not_weighted():
    given, options = batch()
    result, _, _ = given.run(scsdpo_loss, **options)
    kept = options["mask"] & (question_weights(options["rewards"], options["question_ids"]) > 0)[:, None]
    plain = given.call()
    assert kept.any() and not kept.all()
    torch.testing.assert_close(result.divergence[kept], plain.divergence[kept], rtol=1e-5, atol=1e-9)
    assert (result.divergence[~kept] == 0).all()


@pytest.mark.parametrize("reduction", ["token-mean", "weighted-token-mean", "sequence-mean", "sum"])
@pytest.mark.parametrize("factor", [2.0, -1.0])
def test_token_weight_is_a_further_factor(reduction, factor):
    """Its sign and scale reach the loss: it is in no denominator."""
    given, options = batch()
    ratio = torch.rand(B, T) * factor
    result, *gradients = given.run(scsdpo_loss, token_weight=ratio, reduction=reduction, **options)
    exact, *exact_gradients = oracle.expected(given, token_weight=weights_of(options, reduction) * ratio)
    assert relative_error(result.loss, exact.loss) < 1e-6
    for got, want in zip(gradients, exact_gradients, strict=True):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean"])
def test_micro_batches_add_up_to_the_batch(reduction):
    """Weights once for the batch, the step's denominator for each part: the parts' sum is the whole."""
    given, options = batch()
    whole, whole_hidden, whole_weight = given.run(scsdpo_loss, reduction=reduction, **options)
    question_weight = question_weights(options["rewards"], options["question_ids"])
    denominator = options["mask"].sum() if reduction == "token-mean" else B
    parts = [slice(0, 1), slice(1, 4), slice(4, 8)]
    results = [
        given.tokens(part).run(
            scsdpo_loss,
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
    given, options = batch()
    if empty == "mask":
        options["mask"] = torch.zeros(B, T)
    else:
        options["rewards"] = torch.ones(B)
    result, grad_hidden, grad_weight = given.run(scsdpo_loss, reduction=reduction, **options)
    assert result.loss == 0 and (grad_hidden == 0).all() and (grad_weight == 0).all()


def test_options_reach_the_operator_and_the_weights():
    given, options = batch()
    options["rewards"] = options["rewards"] * 10 - 5
    ids = torch.zeros(B, T, dtype=torch.long)
    result = given.call(
        scsdpo_loss,
        **options,
        success_threshold=0.0,
        exponent=1.0,
        temperature=2.0,
        target_ids=ids,
        schedule="reference",
    )
    assert result.student_logp.shape == (B, T)
    binary = (options["rewards"] > 0).float()
    weight = question_weights(binary, options["question_ids"], exponent=1.0)[:, None] * options["mask"]
    expected = given.call(token_weight=weight / options["mask"].sum(), temperature=2.0)
    torch.testing.assert_close(result.loss, expected.loss)


def bad_calls():
    given, good = batch()
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
    return [pytest.param(given, options, match, id=f"{i}-{match}") for i, (match, options) in enumerate(cases)]


@pytest.mark.parametrize("given, options, match", bad_calls())
def test_bad_input_names_the_argument(given, options, match):
    with pytest.raises(ValueError, match=match):
        given.call(scsdpo_loss, **options)


@pytest.mark.parametrize("name", ["mask", "token_weight", "question_weight"])
def test_lists_are_refused(name):
    given, options = batch()
    good = {"mask": options["mask"], "question_weight": torch.ones(B)}
    with pytest.raises(TypeError, match=name):
        given.call(scsdpo_loss, **{**good, name: [[1.0]]})
    with pytest.raises(TypeError, match="denominator"):
        given.call(scsdpo_loss, **good, denominator="3")


def test_compiles_with_the_weights_given():
    given, options = batch()
    tensors = given.hidden, given.head, given.teacher, options["mask"]
    question_weight = question_weights(options["rewards"], options["question_ids"])

    def step(hidden, weight, teacher, mask):
        options = {"question_weight": question_weight, "mask": mask, "denominator": torch.tensor(9)}
        return scsdpo_loss(hidden, weight, teacher, **options).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), step(*tensors))


def test_flat_hidden_states_are_refused():
    given, options = batch()
    flat = given.but(hidden=given.hidden.flatten(0, 1), teacher=given.teacher.flatten(0, 1))
    with pytest.raises(ValueError, match="student_hidden"):
        flat.call(scsdpo_loss, **options)
