"""The torch.library operators behind the public functions: schemas, fakes, autograd.

Gradients are made in the forward pass and wait in the autograd node: dD/d(hidden) and dD/d(head) of Σ w_n D_n, which
backward multiplies by the loss's own gradient and hands over, once.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch._C import DispatchKeySet
from torch._ops import OpOverload

from . import main_grad
from .checks import in_autocast
from .kernels.contract import Scalars
from .problem import PATHS, SCHEMA, WRT, Gradients, Problem, entries_of, flatten, unflatten
from .schedules import plan
from .schedules.plan import Outcome, gradient_dtype
from .schedules.products import Factors
from .schedules.shards import Shard

NAMESPACE = "scsdpo_kernels"  # torch.ops.scsdpo_kernels.divergence
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# The loss, scalars, metrics, gradients, and the hidden states of `Factors`.
_RESULTS = 3 + len(Scalars._fields) + len(Gradients._fields)
_WEIGHT, _MAIN_GRAD = (PATHS.index(("student", "head", name)) for name in ("weight", "main_grad"))


def _define(name: str, signature: str, forward: Callable, fake: Callable, function: type) -> OpOverload:
    """An operator, its fake, and the autograd function that stands above it.

    torch.library.custom_op and register_autograd do the same, and take longer for it than a small problem: they search
    every call's arguments and results for aliases, and for defaults.
    """
    _LIBRARY.define(f"{name}{signature}", tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def below(keyset: DispatchKeySet, *values):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *values)

    def above(keyset: DispatchKeySet, *values):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in values):
            return function.apply(partial(below, keyset), *values)
        return below(keyset, *values)

    _LIBRARY.impl(name, above, "Autograd", with_keyset=True)
    return operator


def _operator_forward(*values) -> tuple[Tensor, ...]:
    """The leaves of an Outcome, empty where they were not asked for. Of `Factors`, the second is the last one."""
    from .schedules import chunked  # not before the first call: it brings the compiled module

    leaves = iter(values)
    problem: Problem = unflatten(leaves)
    (wanted,) = leaves
    hidden = problem.student.hidden
    with _without_autocast(hidden.device), _on(hidden.device):
        outcome = plan.run(problem, chunked.run, wanted)
    gradients, states = outcome.gradients, None
    if isinstance(gradients.weight, Factors):
        logit_gradient, states = gradients.weight
        gradients = gradients._replace(weight=logit_gradient)
    leaves = (outcome.loss, *outcome.scalars, outcome.metrics, *gradients, states)
    return tuple(hidden.new_empty(0, dtype=torch.float32) if x is None else x for x in leaves)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, enabled=False) if in_autocast(device.type) else nullcontext()


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _outcome(results: tuple) -> Outcome:
    loss, *rest, states = results
    count = len(Scalars._fields)
    gradients = Gradients(*rest[count + 1 :])
    if states.dim() == 2:
        gradients = gradients._replace(weight=Factors(gradients.weight, states))
    return Outcome(loss, Scalars(*rest[:count]), rest[count], gradients)


def _operator_fake(*values) -> tuple[Tensor, ...]:
    leaves = iter(values)
    problem: Problem = unflatten(leaves)
    (wanted,) = leaves
    hidden, target = problem.student.hidden, problem.target

    def empty(is_there: bool, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        return hidden.new_empty(shape if is_there else (0,), dtype=dtype)

    def gradient(tensor: Tensor | None, want: bool) -> Tensor:
        there = want and tensor is not None
        return empty(True, tensor.shape, gradient_dtype(tensor)) if there else empty(False)

    leading = hidden.shape[:-1]
    scalars = Scalars(
        divergence=empty(True, leading),
        student_entropy=empty(True, leading),
        teacher_entropy=empty(True, leading),
        student_logp=empty(target is not None, leading),
        teacher_logp=empty(target is not None, leading),
        importance_ratio=empty(target is not None and target.old_logp is not None, leading),
        policy_loss=empty(problem.policy is not None, leading),
        policy_clipped=empty(problem.policy is not None, leading),
    )
    entries = len(entries_of(problem.metrics))
    metrics = empty(entries > 0, (entries, *leading))
    gradients = (gradient(values[i], want) for i, want in zip(WRT, wanted, strict=True))
    return empty(True), *scalars, metrics, *gradients, empty(False)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operator: Callable, *values):
        output = operator(*values)
        ctx.set_materialize_grads(False)  # no (V, D) of zeros for outputs that nothing differentiates
        ctx.mark_non_differentiable(*output[1:])
        ctx.dtypes = [None if values[i] is None else values[i].dtype for i in WRT]
        ctx.gradients = _outcome(output).gradients
        ctx.main_grad = _rows_that_count(values)
        ctx.sole_holder = False
        return output

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_divergence: double backward (create_graph=True) is not supported; schedule='reference' has it"
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_divergence: this loss was differentiated before, and its gradients were handed over then; "
                "call linear_divergence again, or add the losses and differentiate their sum once"
            )
        gradients, ctx.gradients = ctx.gradients, None
        _, *needed = ctx.needs_input_grad
        if grad_loss is None:
            return (None,) * (1 + len(needed))
        if ctx.main_grad is not None and needed[_WEIGHT]:
            main_grad.add(ctx.main_grad, gradients.weight, grad_loss)
            needed[_WEIGHT] = False
        given = [
            _scaled(gradient, grad_loss, ctx.sole_holder).to(dtype) if needed[i] else None
            for i, gradient, dtype in zip(WRT, gradients, ctx.dtypes, strict=True)
        ]
        return None, *_at_inputs(given, len(needed))


def _rows_that_count(values: Sequence) -> Tensor | None:
    """Of main_grad: behind them the gradient is 0, and nothing is added."""
    whole, vocabulary = values[_MAIN_GRAD], values[PATHS.index(("vocabulary",))]
    return None if whole is None else whole[:vocabulary]


def _at_inputs(gradients: list[Tensor | None], count: int) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `Gradients` where the operator's arguments have their tensors."""
    inputs: list[Tensor | None] = [None] * count
    for i, gradient in zip(WRT, gradients, strict=True):
        inputs[i] = gradient
    return tuple(inputs)


def _scaled(gradient: Tensor, by: Tensor, in_place: bool) -> Tensor:
    """gradient · by: not another pass over (V, D) where `by` is 1, as in plain loss.backward()."""
    if not in_place or gradient.dtype == torch.float64:
        return gradient * by
    if by.device.type == "cpu":
        return gradient if by.item() == 1.0 else gradient.mul_(by)
    from .kernels import scaling_triton  # the device decides: nobody waits for it

    return scaling_triton.multiply(gradient, by)


# token_weight is 1 at the rows that are wanted, else 0. Nothing waits for backward but the inputs.
def _per_token_forward(*values) -> Tensor:
    """Importance ratio · divergence of each row, and coefficient · policy loss."""
    scalars = _outcome(_operator(*values, [False] * len(WRT))).scalars
    has_ratio = values[PATHS.index(("target", "old_logp"))] is not None
    result = scalars.divergence * scalars.importance_ratio if has_ratio else scalars.divergence
    policy = unflatten(iter(values)).policy
    return result if policy is None else result + _of_policy(policy.coefficient, scalars.policy_loss)


def _of_policy(coefficient: Tensor, policy_loss: Tensor) -> Tensor:
    """Nothing of what has no coefficient."""
    return torch.where(coefficient == 0, 0.0, coefficient.float() * policy_loss)


def _per_token_fake(*values) -> Tensor:
    hidden = values[WRT[0]]
    return hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operator: Callable, *values):
        ctx.lengths = [len(x) if isinstance(x, list | tuple) else None for x in values]
        flat = [x for value in values for x in (value if isinstance(value, list | tuple) else (value,))]
        # Other backward passes change main_grad, which nothing is computed from.
        saved = [isinstance(x, Tensor) and x is not values[_MAIN_GRAD] for x in flat]
        ctx.save_for_backward(*(x if save else None for x, save in zip(flat, saved, strict=True)))
        ctx.options = [None if save else x for x, save in zip(flat, saved, strict=True)]
        return operator(*values)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        """The same rows once more, weighted by the upstream gradient: those where it is 0 are not computed."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_divergence_per_token: double backward (create_graph=True) is not supported; "
                "schedule='reference' has it"
            )
        flat = (x if tensor is None else tensor for tensor, x in zip(ctx.saved_tensors, ctx.options, strict=True))
        leaves = [next(flat) if n is None else [next(flat) for _ in range(n)] for n in ctx.lengths]
        problem: Problem = unflatten(iter(leaves))
        _, *needed = ctx.needs_input_grad
        wanted = [needed[i] for i in WRT]
        finite = upstream.isfinite()
        all_finite = finite.all()
        if problem.part is not None and problem.part.sequence_parallel:
            shard = Shard(problem.part, problem.student.head.weight.shape[0])
            all_finite = shard.gather(all_finite.long().unsqueeze(0)).bool().all()
        upstream = torch.where(finite, upstream, 0.0)
        weighted = problem._replace(token_weight=upstream * problem.token_weight)
        if (policy := problem.policy) is not None:
            weighted = weighted._replace(policy=policy._replace(coefficient=upstream * policy.coefficient))
        outcome = _outcome(_operator(*flatten(weighted), wanted))
        poison = torch.where(all_finite, 1.0, torch.nan)  # after an overflown loss scale no gradient is finite
        if leaves[_MAIN_GRAD] is not None and needed[_WEIGHT]:
            main_grad.add(_rows_that_count(leaves), outcome.gradients.weight, poison)
            needed[_WEIGHT] = False
        given = [
            (gradient * poison).to(leaves[i].dtype) if needed[i] else None
            for i, gradient in zip(WRT, outcome.gradients, strict=True)
        ]
        return None, *_at_inputs(given, len(needed))


_operator = _define(
    "divergence",
    f"({SCHEMA}, bool[] wanted) -> ({', '.join(['Tensor'] * _RESULTS)})",
    _operator_forward,
    _operator_fake,
    _Divergence,
)
_per_token_operator = _define(
    "divergence_per_token", f"({SCHEMA}) -> Tensor", _per_token_forward, _per_token_fake, _PerToken
)


def divergence(problem: Problem) -> tuple[Tensor, Scalars, Tensor]:
    """The loss and, detached, what is known of every token, and its metrics; empty where they were not asked for."""
    leaves = flatten(problem)
    differentiable = torch.is_grad_enabled()
    wanted = [differentiable and leaves[i] is not None and leaves[i].requires_grad for i in WRT]
    outcome = _outcome(_operator(*leaves, wanted))
    if outcome.loss.requires_grad and not torch.compiler.is_compiling():
        outcome.loss.grad_fn.sole_holder = True  # the gradients are dropped here, so backward may scale them in place
    return outcome.loss, outcome.scalars, outcome.metrics


def divergence_per_token(problem: Problem) -> Tensor:
    """(...,) importance ratio · divergence, and coefficient · policy loss."""
    return _per_token_operator(*flatten(problem))
