"""The public operator: from hidden states and LM heads to the weighted divergence of student and teacher.

    p = softmax(z_s / τ)    q = softmax(z_t / τ)    loss = Σ_n w_n D(p_n, q_n)

with z the logits of `Head`, and D the forward KL(q‖p) at beta = 0, the reverse KL(p‖q) at beta = 1 and the generalised
Jensen-Shannon divergence (1-β) KL(p‖m) + β KL(q‖m), m = (1-β) p + β q, between (SDPO, arXiv 2601.20802; GKD, arXiv
2306.13649), or another divergence of that share.
"""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import ops
from .arguments import DivergenceOptions, check_keywords, problem_of
from .problem import Head, PolicyGradient, Problem, RoutedHeads, SampledToken, TopK, TopLogprobs, entries_of
from .vocab_shard import VocabShard

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LinearDivergence(NamedTuple):
    """What one pass over the logits gives, fp32 (float64 from the reference schedule in float64), in nats.

    Every field but `loss` is detached.
    Rows that were skipped because their weight is 0 hold 0.
    """

    loss: Tensor  # () fp32, Σ token_weight · importance_ratio · divergence + coefficient · policy_loss, differentiable
    divergence: Tensor  # (...,)
    student_entropy: Tensor  # (...,) -Σ p log p
    teacher_entropy: Tensor | None  # (...,) -Σ q log q, None with TopLogprobs
    student_logp: Tensor | None  # (...,) log p at target_ids, None without them
    teacher_logp: Tensor | None  # (...,) log q at target_ids, None without them or with TopLogprobs
    importance_ratio: Tensor | None  # (...,) multiplies the token's weight; None without old_logp
    policy_loss: Tensor | None  # (...,) -min(r A, clip(r) A), None without policy
    policy_clipped: Tensor | None  # (...,) 1 where the clip is active, else 0; None without policy
    metrics: dict[str, Tensor] | None  # (...,) each; None where none was asked for


def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor | Sequence[Tensor] | None = None,
    teacher_head: Tensor | Head | RoutedHeads | None = None,
    *,
    token_weight: Tensor | None = None,
    beta: float | Tensor = 0.5,
    divergence: str = "jensen_shannon",
    temperature: float = 1.0,
    support: TopK | TopLogprobs | SampledToken | None = None,
    entry_clip: float | None = None,
    target_ids: Tensor | None = None,
    old_logp: Tensor | None = None,
    importance_clip: float = 2.0,
    policy: PolicyGradient | None = None,
    metrics: Sequence[str] = (),
    schedule: str = "auto",
    rows: Tensor | None = None,
    shard: VocabShard | None = None,
    shared_prefix: bool = False,
) -> LinearDivergence:
    """Weighted divergence of student and teacher over the whole vocabulary; the logits never exist in full.

    Tokens of weight 0 are never projected: they cost nothing, have zero gradient and are 0 in every output. With
    `policy` these are the ones whose advantage or coefficient is 0 as well.
    The loss differentiates into `student_hidden` and the student's head (weight, bias and both matrices of a LoRA),
    once: the gradients are made in the forward pass (the head is read there only), and a second backward or a double
    backward raises. Nothing differentiates into the teacher, even where its head is the student's or requires grad, nor
    into `token_weight`. Under autocast, hidden states and weights are cast as `torch.nn.functional.linear` casts them.
    On a CPU a token's values have the same bits whichever tokens stand beside it; gradients, and on a GPU values, may
    differ in their last digits.

    Args:
        student_hidden: (..., D) bf16, fp16 or fp32: what the model hands to its LM head.
        student_head: (V, D) of the same dtype, or a `Head` that has more than a weight.
        teacher_hidden: (..., D_t) bf16, fp16 or fp32. None with support=TopLogprobs(...). With `RoutedHeads`, each
            token's own teacher's, or a list of one tensor for each teacher k, of its own width and dtype: (..., D_k),
            of which the tokens of other teachers are not looked at, or (n_k, D_k) of the n_k tokens whose index is k
            alone, in the order of all tokens.
        teacher_head: (V, D_t) of the teacher's dtype, or a `Head`. None: the student's whole head, whose
            `_replace(bias=...)` is that head with another bias. `RoutedHeads`: several teachers, one for each token.
        token_weight: (...,) any finite numbers. None: ones.
        beta: the teacher's share. 0: forward KL(q‖p). 1: reverse KL(p‖q). Between: `divergence`. A tensor (...,) of
            floating-point numbers is a share of each token's own, which nothing differentiates into; it is not looked
            at where the weight is 0.
        divergence: what it is between the ends. "jensen_shannon": (1-β) KL(p‖m) + β KL(q‖m), m = (1-β) p + β q.
            "jeffreys": (1-β) KL(q‖p) + β KL(p‖q). "skewed_forward": KL(q‖m), β in [0, 1). "skewed_reverse": KL(p‖m),
            β in (0, 1] (DistiLLM, arXiv 2402.03898).
        temperature: τ > 0 divides both sides' logits; there is no τ² factor.
        support: `TopK`, `TopLogprobs` or `SampledToken` in place of the whole vocabulary.
        entry_clip: nats, > 0. At beta=0, Σ_v min(q_v log(q_v / p_v), entry_clip) in place of KL(q‖p) (OPSD): a clipped
            entry's term has no gradient. The sum is at most KL(q‖p), and for a clip below 1/e (0.37) may be below 0
            far from p = q, which is then a minimum of its neighbourhood alone.
        target_ids: (...,) integers in [0, V): sampled tokens, asks for their log-probabilities. Ids of tokens that are
            not computed are not looked at.
        old_logp: (...,) nats: log-probabilities of target_ids at the time they were sampled. Each token's weight is
            then multiplied with its importance ratio min(e^clamp(log p - old_logp, -20, 20), importance_clip),
            detached, log p being this pass's own (SDPO, arXiv 2601.20802). Where the weight is 0 they are not looked
            at.
        importance_clip: > 0, with old_logp.
        policy: a `PolicyGradient` loss of target_ids that is added to the weighted divergence.
        metrics: names of what else is to be read off the same logits, (...,) each in the result's `metrics`.
            "top1_agreement": 1 where one token is the likeliest of both sides (ties count), else 0; not with
            TopLogprobs. "support_mass": "student_support_mass" and "teacher_support_mass", each side's probability of
            the tokens of a TopK or TopLogprobs, before `tail`. "entry_clipped", with entry_clip: how many of the
            tokens with q_v > 0 have a term above it, divided by their number. "importance_clipped", with old_logp: 1
            where the ratio was above importance_clip, else 0.
        schedule: "chunked" projects a chunk of tokens at a time, into buffers. "reference" is plain PyTorch with full
            logits, in any dtype up to float64 and differentiable twice. "auto" is "chunked".
        rows: (R,) int64 flat indices: every token whose token_weight (or, with `policy`, advantage) is not 0, once, and
            any others, for a caller who knows them. On a GPU the operator waits for the device once, to learn how many
            tokens have a weight and to check values; with `rows` it never does. What would have raised then gives NaN:
            an incomplete list NaN in the loss and all gradients, a target outside the vocabulary NaN in its log-
            probabilities, a support with wrong ids or a beta out of its range NaN for its token. With `RoutedHeads`
            it waits all the same, for the number of each teacher's tokens, and then checks the index.
        shard: the vocabulary is spread over a process group, as in Megatron's tensor parallelism. Weights, biases and
            LoRA's B are this process's part; ids are the whole vocabulary's. Every process calls this with the same
            tokens (or, with `shard.sequence_parallel`, each with its own) and gets the same results and the whole
            gradient of its hidden states and of its part of the head. A student_head that is a DTensor, sharded on dim
            0 of a one-dimensional mesh, means the same. Collective.
        shared_prefix: heads of unequal length, as of one tokenizer whose models pad their vocabularies differently,
            have the shorter one's tokens; the longer head's further ones are forbidden, as by logits of -inf, and have
            a gradient of 0. Ids are below the shorter length. False: unequal heads raise. With `shard`, start and stop
            are of the shared tokens, and only the part that ends with the last of them may be longer.

    Raises:
        TypeError, ValueError: an argument does not fit, or two do not fit together; the message names them, what was
            expected and what came.
    """
    options: DivergenceOptions = {
        "beta": beta, "divergence": divergence, "temperature": temperature, "support": support,
        "entry_clip": entry_clip, "target_ids": target_ids, "old_logp": old_logp, "importance_clip": importance_clip,
        "policy": policy, "metrics": metrics, "schedule": schedule, "rows": rows, "shard": shard,
        "shared_prefix": shared_prefix,
    }  # fmt: skip
    problem = problem_of(student_hidden, student_head, teacher_hidden, teacher_head, token_weight, options)
    if schedule == "reference":
        loss, _, scalars, of_metrics = _on_full_logits(problem)
    else:
        loss, scalars, of_metrics = ops.divergence(problem)
    has_target, has_teacher = problem.target is not None, len(problem.teachers) > 0
    has_policy = problem.policy is not None
    there = (True, True, has_teacher, has_target, has_target and has_teacher, old_logp is not None)
    there += (has_policy, has_policy)
    single = student_hidden.dim() == 1
    fields = ((x.squeeze(0) if single else x) if has else None for x, has in zip(scalars, there, strict=True))
    named = None
    if entries := entries_of(problem.metrics):
        named = {entry: x.squeeze(0) if single else x for entry, x in zip(entries, of_metrics, strict=True)}
    return LinearDivergence(loss, *fields, named)


# A function that takes **options is told only some.
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(linear_divergence).parameters.items()
    if name in DivergenceOptions.__annotations__
}


def linear_divergence_per_token(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor | Sequence[Tensor] | None = None,
    teacher_head: Tensor | Head | RoutedHeads | None = None,
    **options: "Unpack[DivergenceOptions]",
) -> Tensor:
    """Importance ratio · D(p_n, q_n) of every token, for a caller who makes the loss of them: any upstream gradient.

    With `policy`, its coefficient · policy loss is added to each token's.

    `linear_divergence` with weights that are known beforehand is cheaper: it makes the gradients in the forward pass.
    Here backward computes the tokens again, without those whose upstream gradient is 0. It may run repeatedly
    (retain_graph=True); double backward works with schedule="reference" only.

    Args:
        student_hidden, student_head, teacher_hidden, teacher_head, options: as of `linear_divergence`, all but
            token_weight and metrics. Tokens that are not in `rows` are 0.

    Returns:
        (...,) fp32, nats.

    Raises:
        TypeError, ValueError: as `linear_divergence`.
    """
    if "token_weight" in options:
        raise TypeError("token_weight: linear_divergence_per_token takes none; multiply its result")
    check_keywords("linear_divergence_per_token", options)
    if options.get("metrics"):
        raise TypeError("metrics: linear_divergence_per_token takes none, since it returns one tensor")
    problem = problem_of(student_hidden, student_head, teacher_hidden, teacher_head, None, DEFAULTS | options)
    if problem.rows is not None:
        everything = problem.token_weight.view(-1)
        inside = problem.rows.clamp(0, max(0, len(everything) - 1))
        wanted = torch.zeros_like(everything).index_fill_(0, inside, 1.0).view(problem.token_weight.shape)
        problem = problem._replace(token_weight=wanted)
        if (policy := problem.policy) is not None:
            problem = problem._replace(policy=policy._replace(coefficient=policy.coefficient * wanted))
    if options.get("schedule") == "reference":
        _, divergence, *_ = _on_full_logits(problem)
    else:
        divergence = ops.divergence_per_token(problem)
    return divergence.squeeze(0) if student_hidden.dim() == 1 else divergence


def _on_full_logits(problem: Problem):
    from .schedules import reference

    with torch.autocast(problem.student.hidden.device.type, enabled=False):
        return reference.divergence(problem)
