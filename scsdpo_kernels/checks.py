"""Every error that a caller's arguments can raise, by the name of the argument: what was expected and what came."""

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .problem import (
    ENDS,
    METRICS,
    Head,
    LoRA,
    PolicyGradient,
    Problem,
    RoutedHeads,
    SampledToken,
    Side,
    TopK,
    TopLogprobs,
    share_range,
)
from .vocab_shard import VocabShard, check_lengths, name_of

SCHEDULES = ("auto", "chunked", "reference")
# Asked here, since PyTorch 2.11's torch.compile traces neither question.
HAS_TRITON = importlib.util.find_spec("triton") is not None
_COMPILED_WITH_AUTOCAST = {x for x in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(x)}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_LEAST, _MOST = 2.0**-126, 2.0**126  # normal in fp32, and their inverses


# ---------------------------------------------------------------------------------------------------------------------
# Types, before anything of an argument is read.


def check_tensor(name: str, tensor: Any, device: torch.device | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected student_hidden's device {device}, got {tensor.device}")


def check_number(name: str, number: Any) -> None:
    if not isinstance(number, int | float) or isinstance(number, bool):
        raise TypeError(f"{name}: expected a number, got {type(number).__name__}")


def _check_above_0(name: str, number: Any) -> None:
    check_number(name, number)
    if not (_LEAST <= number <= _MOST or number == math.inf):
        raise ValueError(f"{name}: expected a number above 0, normal in fp32, got {number}")


def _check_finite(name: str, number: Any) -> None:
    check_number(name, number)
    if not -_MOST <= number <= _MOST:
        raise ValueError(f"{name}: expected a finite number, normal in fp32, got {number}")


def as_head(name: str, head: Tensor | Head) -> Head:
    """A head whose parts are of the right types."""
    if isinstance(head, Tensor):
        return Head(head)
    if not isinstance(head, Head):
        raise TypeError(f"{name}: expected a tensor or a Head, got {type(head).__name__}")
    check_tensor(name, head.weight)
    if head.bias is not None:
        _check_floats(f"{name}.bias", head.bias)
    if head.lora is not None:
        if not isinstance(head.lora, LoRA):
            raise TypeError(f"{name}.lora: expected a LoRA, got {type(head.lora).__name__}")
        _check_floats(f"{name}.lora.a", head.lora.a)
        _check_floats(f"{name}.lora.b", head.lora.b)
        _check_finite(f"{name}.lora.scale", head.lora.scale)
        head = head._replace(lora=head.lora._replace(scale=float(head.lora.scale)))
    if head.main_grad is not None:
        check_tensor(f"{name}.main_grad", head.main_grad)
    _check_finite(f"{name}.logit_scale", head.logit_scale)
    if head.softcap is not None:
        _check_above_0(f"{name}.softcap", head.softcap)
    softcap = None if head.softcap in (None, math.inf) else float(head.softcap)
    return head._replace(logit_scale=float(head.logit_scale), softcap=softcap)


def as_teacher_head(name: str, head: Tensor | Head) -> Head:
    head = as_head(name, head)
    if head.main_grad is not None:
        raise ValueError(f"{name}.main_grad: expected None, since a teacher has no gradient, got a tensor")
    return head


def as_routed(hidden: Any, given: RoutedHeads, leading: torch.Size) -> tuple[tuple[Side, ...], Tensor]:
    """A side for each teacher, and which of them each token has; `leading`: the shape of student_hidden without D."""
    heads, index = given
    if not isinstance(heads, list | tuple) or isinstance(heads, Head):
        raise TypeError(f"teacher_head.heads: expected a list of tensors and Heads, got {type(heads).__name__}")
    if len(heads) == 0:
        raise ValueError("teacher_head.heads: expected at least one head, got none")
    check_tensor("teacher_head.index", index)
    if index.dtype not in _INTEGERS:
        raise TypeError(f"teacher_head.index: expected integers, got {index.dtype}")
    if isinstance(hidden, Tensor):
        _check_leading("teacher_hidden", hidden, leading)
        hidden = [hidden] * len(heads)
    elif not isinstance(hidden, list | tuple):
        got = type(hidden).__name__
        raise TypeError(f"teacher_hidden: expected a tensor, or a list of one for each head, got {got}")
    if len(hidden) != len(heads):
        raise ValueError(f"teacher_hidden: expected {len(heads)} tensors, one for each head, got {len(hidden)}")
    for number, tensor in enumerate(hidden):
        check_tensor(f"teacher_hidden[{number}]", tensor)
    names = (name_of(("teachers", number, "head", "weight"), numbered=True) for number in range(len(heads)))
    checked = (as_teacher_head(name, head) for name, head in zip(names, heads, strict=True))
    return tuple(map(Side, hidden, checked)), index


def _check_floats(name: str, tensor: Any) -> None:
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected floating-point numbers, got {tensor.dtype}")


def check_support(support: Any) -> None:
    if support is None or isinstance(support, SampledToken):
        return
    if not isinstance(support, TopK | TopLogprobs):
        got = type(support).__name__
        raise TypeError(f"support: expected TopK, TopLogprobs, SampledToken or None, got {got}")
    name = type(support).__name__
    if support.tail not in ("bucket", "renormalize"):
        raise ValueError(f"{name}: expected tail 'bucket' or 'renormalize', got {support.tail!r}")
    if isinstance(support, TopLogprobs):
        check_tensor("support.ids", support.ids)
        check_tensor("support.logp", support.logp)
        if support.ids.dtype not in _INTEGERS:
            raise TypeError(f"support.ids: expected integers, got {support.ids.dtype}")
        _check_floats("support.logp", support.logp)
        return
    if not isinstance(support.k, int) or isinstance(support.k, bool):
        raise TypeError(f"TopK: expected an integer as k, got {type(support.k).__name__}")
    if support.k < 1:
        raise ValueError(f"TopK: expected k of at least 1, got {support.k}")


def check_policy(policy: Any) -> None:
    if policy is None:
        return
    if not isinstance(policy, PolicyGradient):
        raise TypeError(f"policy: expected a PolicyGradient or None, got {type(policy).__name__}")
    tensors = {"advantages": policy.advantages, "ratio": policy.ratio}
    if isinstance(policy.coefficient, Tensor):
        tensors["coefficient"] = policy.coefficient
    else:
        _check_finite("policy.coefficient", policy.coefficient)
    for name, tensor in tensors.items():
        if tensor is not None or name == "advantages":
            _check_floats(f"policy.{name}", tensor)
    for name in ("clip_low", "clip_high"):
        number = getattr(policy, name)
        check_number(f"policy.{name}", number)
        if not number >= 0:
            raise ValueError(f"policy.{name}: expected a number of at least 0, got {number}")


# ---------------------------------------------------------------------------------------------------------------------
# What goes together.


def check_options(options: Mapping[str, Any]) -> None:
    """Numbers, and which objectives exist."""
    beta, temperature, support = options["beta"], options["temperature"], options["support"]
    entry_clip, target_ids, old_logp = options["entry_clip"], options["target_ids"], options["old_logp"]
    _check_share(beta, options["divergence"])
    check_number("temperature", temperature)
    if not _LEAST <= temperature <= _MOST:
        raise ValueError(
            f"temperature: expected a number above 0, it and its inverse normal in fp32, got {temperature}"
        )
    _check_above_0("importance_clip", options["importance_clip"])
    if old_logp is not None and target_ids is None:
        raise ValueError("old_logp: expected target_ids with it, whose log-probabilities these were")
    check_policy(options["policy"])
    if options["policy"] is not None and target_ids is None:
        raise ValueError("policy: expected target_ids with it, whose log-probabilities it is made of")
    check_support(support)
    if isinstance(support, SampledToken):
        if target_ids is None:
            raise ValueError("SampledToken: expected target_ids with it, which were sampled")
        _check_plain("SampledToken", 1, beta, options["divergence"])
    check_metrics(options["metrics"], options)
    if entry_clip is None:
        return
    _check_above_0("entry_clip", entry_clip)
    if support is not None:
        name = type(support).__name__
        raise ValueError(f"entry_clip: expected no {name} with it, since it clips the entries of the whole vocabulary")
    _check_plain("entry_clip", 0, beta, options["divergence"])


def check_metrics(metrics: Any, options: Mapping[str, Any]) -> None:
    """Names that there are, with what each needs."""
    if not isinstance(metrics, list | tuple):
        raise TypeError(f"metrics: expected a list or tuple of names, got {type(metrics).__name__}")
    support = options["support"]
    got = None if support is None else type(support).__name__
    needs = {
        "top1_agreement": (not isinstance(support, TopLogprobs), "the teacher's logits", got),
        "support_mass": (isinstance(support, TopK | TopLogprobs), "support=TopK(...) or TopLogprobs(...)", got),
        "entry_clipped": (options["entry_clip"] is not None, "entry_clip", None),
        "importance_clipped": (options["old_logp"] is not None, "old_logp", None),
    }
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics: expected some of {', '.join(METRICS)}, got {name!r}")
        is_there, expected, got = needs[name]
        if not is_there:
            raise ValueError(f"metrics: expected {expected} with {name!r}, got {got}")


def _check_share(beta: Any, divergence: Any) -> None:
    """A number in the divergence's range, or a tensor, whose values `schedules.rows` looks at."""
    if not isinstance(divergence, str):
        raise TypeError(f"divergence: expected a string, got {type(divergence).__name__}")
    if divergence not in ENDS:
        raise ValueError(f"divergence: expected one of {', '.join(ENDS)}, got {divergence!r}")
    if isinstance(beta, Tensor):
        return _check_floats("beta", beta)
    check_number("beta", beta)
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
    at_0, at_1 = ENDS[divergence]
    if (beta == 0 and at_0 is None) or (beta == 1 and at_1 is None):
        raise ValueError(
            f"beta: expected a number in {share_range(divergence)} with divergence={divergence!r}, which "
            f"is 0 whatever the student does at the other end, got {beta}"
        )


def _check_plain(name: str, end: int, beta: float | Tensor, divergence: str) -> None:
    """What goes with one of the KLs alone."""
    if isinstance(beta, Tensor) or beta != end:
        got = f"a tensor of shape {tuple(beta.shape)}" if isinstance(beta, Tensor) else f"beta={beta}"
        raise ValueError(f"{name}: expected beta={end} with it, got {got}")
    if divergence != "jensen_shannon":
        raise ValueError(f"{name}: expected no divergence with it, got {divergence!r}")


def check_teacher(teacher_hidden: Any, teacher_head: Any, support: Any, shared_prefix: Any) -> None:
    """One of hidden states and a support that the teacher has named."""
    given = isinstance(support, TopLogprobs)
    if not isinstance(shared_prefix, bool):
        raise TypeError(f"shared_prefix: expected True or False, got {type(shared_prefix).__name__}")
    if given and shared_prefix:
        raise ValueError("TopLogprobs: expected shared_prefix=False with it, since there is one head, got True")
    if teacher_hidden is None and not given:
        raise ValueError("teacher_hidden: expected a tensor, or support=TopLogprobs(...) in place of it, got None")
    for name, value in (("teacher_hidden", teacher_hidden), ("teacher_head", teacher_head)):
        if given and value is not None:
            raise ValueError(f"TopLogprobs: expected no {name} with it, whose logits it stands for")


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and dtypes.


def check_problem(
    problem: Problem, shares_head: bool, schedule: str, shard: VocabShard | None, shared_prefix: bool
) -> None:
    """Everything that needs tensors. `shares_head`: the teacher has the student's head, which errors then name."""
    dtypes = (*_DTYPES, torch.float64) if schedule == "reference" else _DTYPES
    student, support, target = problem.student, problem.support, problem.target
    device, leading = student.hidden.device, student.hidden.shape[:-1]
    _check_side("student_hidden", student, problem, "student_head", dtypes, shard)
    apart = any(x.hidden is not problem.teachers[0].hidden for x in problem.teachers)
    for number, teacher in enumerate(problem.teachers):
        hidden, head = "teacher_hidden", "teacher_head"
        if problem.route is not None:
            hidden = name_of(("teachers", number, "hidden"), numbered=apart)
            head = name_of(("teachers", number, "head", "weight"), numbered=True)
        named = "student_head (which the teacher shares)" if shares_head else head
        _check_side(hidden, teacher, problem, named, dtypes, shard)
        if shard is None:
            check_lengths(head, len(student.head.weight), len(teacher.head.weight), shared_prefix)
    per_token = {"token_weight": problem.token_weight, "teacher_head.index": problem.route}
    per_token["beta"] = problem.objective.token_beta
    if target is not None:
        per_token |= {"target_ids": target.ids, "old_logp": target.old_logp}
    if problem.policy is not None:
        names = ("advantages", "coefficient", "ratio")
        per_token |= {f"policy.{name}": getattr(problem.policy, name) for name in names}
    for name, tensor in per_token.items():
        if tensor is None:
            continue
        check_tensor(name, tensor, device)
        if tensor.shape != leading:
            raise ValueError(f"{name}: expected shape {tuple(leading)}, got {tuple(tensor.shape)}")
    if problem.token_weight.is_complex():
        raise TypeError(f"token_weight: expected real numbers, got {problem.token_weight.dtype}")
    if target is not None and target.ids.dtype not in _INTEGERS:
        raise TypeError(f"target_ids: expected integers, got {target.ids.dtype}")
    if target is not None and target.old_logp is not None:
        _check_floats("old_logp", target.old_logp)
    if support is not None and support.ids is not None:
        ids, logp = support.ids, support.logp
        check_tensor("support.ids", ids, device)
        check_tensor("support.logp", logp, device)
        if ids.shape[:-1] != leading or ids.dim() != student.hidden.dim() or ids.shape[-1] == 0:
            raise ValueError(f"support.ids: expected shape {(*leading, 'K')}, got {tuple(ids.shape)}")
        if logp.shape != ids.shape:
            raise ValueError(f"support.logp: expected support.ids' shape {tuple(ids.shape)}, got {tuple(logp.shape)}")
    _check_rows(problem, device)


def _check_rows(problem: Problem, device: torch.device) -> None:
    rows, count = problem.rows, problem.token_weight.numel()
    if rows is None:
        return
    check_tensor("rows", rows, device)
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows: expected shape (R,) and dtype int64, got {tuple(rows.shape)} and {rows.dtype}")
    if rows.numel() > count:
        raise ValueError(f"rows: expected at most the {count} rows that there are, got {rows.numel()}")


def _check_side(
    hidden_name: str,
    given: Side,
    problem: Problem,
    name: str,
    dtypes: tuple[torch.dtype, ...],
    shard: VocabShard | None,
) -> None:
    hidden, head = given
    weight, bias, lora, main_grad = head.weight, head.bias, head.lora, head.main_grad
    device, leading = problem.student.hidden.device, problem.student.hidden.shape[:-1]
    check_tensor(hidden_name, hidden, device)
    check_tensor(name, weight, device)
    if hidden.dtype not in dtypes:
        raise TypeError(f"{hidden_name}: expected one of {_names(dtypes)}, got {hidden.dtype}")
    of_its_own = problem.route is not None and hidden.dim() == 2  # `schedules.rows` looks at how many these are
    if given is problem.student or not of_its_own:
        _check_leading(hidden_name, hidden, leading)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name}: expected shape (V, {hidden.shape[-1]}) after {hidden_name} {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    vocabulary = len(weight) if shard is None else shard.stop - shard.start
    if len(weight) < vocabulary:
        raise ValueError(
            f"{name}: expected the {shard.stop - shard.start} rows of {shard.start} to {shard.stop}, or more that are "
            f"padding, got shape {tuple(weight.shape)}"
        )
    if vocabulary == 0 and shard is None:
        raise ValueError(f"{name}: expected a vocabulary of at least one entry, got shape {tuple(weight.shape)}")
    if weight.dtype not in dtypes or (weight.dtype != hidden.dtype and not in_autocast(hidden.device.type)):
        raise TypeError(f"{name}: expected {hidden_name}'s dtype {hidden.dtype}, got {weight.dtype}")
    if bias is not None:
        check_tensor(f"{name}.bias", bias, device)
        if bias.shape != (vocabulary,):
            raise ValueError(f"{name}.bias: expected shape {(vocabulary,)}, got {tuple(bias.shape)}")
    if main_grad is not None:
        _check_main_grad(f"{name}.main_grad", main_grad, weight)
    if lora is None:
        return
    check_tensor(f"{name}.lora.a", lora.a, device)
    check_tensor(f"{name}.lora.b", lora.b, device)
    if lora.a.dim() != 2 or lora.a.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{name}.lora: expected A of shape (r, {hidden.shape[-1]}), got {tuple(lora.a.shape)}")
    if lora.b.shape != (vocabulary, lora.a.shape[0]):
        raise ValueError(
            f"{name}.lora: expected B of shape ({vocabulary}, {lora.a.shape[0]}) after A {tuple(lora.a.shape)}, "
            f"got {tuple(lora.b.shape)}"
        )


def _check_main_grad(name: str, main_grad: Tensor, weight: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise ValueError(f"{name}: expected None under torch.compile, which does not see that backward changes it")
    if main_grad.dtype != torch.float32:
        raise TypeError(f"{name}: expected torch.float32, got {main_grad.dtype}")
    check_tensor(name, main_grad, weight.device)
    if main_grad.shape != weight.shape:
        raise ValueError(f"{name}: expected the weight's shape {tuple(weight.shape)}, got {tuple(main_grad.shape)}")
    if main_grad.requires_grad:
        raise ValueError(f"{name}: expected a buffer that does not require grad, got one that does")
    if not weight.requires_grad:
        raise ValueError(f"{name}: expected None, or a weight that requires grad with it, got one that does not")
    rows, columns = main_grad.stride()
    if main_grad.numel() and (columns != 1 or rows < main_grad.shape[1]):
        raise ValueError(f"{name}: expected rows of unit stride that do not overlap, got strides {(rows, columns)}")
    if getattr(weight, "overwrite_main_grad", False):
        raise ValueError(f"{name}: expected None, or a weight without overwrite_main_grad, since gradients are added")


def _check_leading(name: str, hidden: Tensor, leading: torch.Size) -> None:
    if hidden.dim() < 1 or hidden.shape[:-1] != leading:
        raise ValueError(
            f"{name}: expected shape (..., D) with the leading shape of student_hidden {tuple(leading)}, "
            f"got {tuple(hidden.shape)}"
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def in_autocast(device: str) -> bool:
    if torch.compiler.is_compiling():
        return device in _COMPILED_WITH_AUTOCAST and torch.is_autocast_enabled(device)
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules.


def check_schedule(name: str, problem: Problem) -> None:
    """ValueError, with the reason, where a schedule does not exist or cannot do what is asked for."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    reason = why_not(name, problem.student.hidden.device)
    if reason:
        raise ValueError(f"schedule={name!r}: {reason}")
    if name == "reference" and problem.part is not None:
        raise ValueError("schedule='reference': it does not have shard; schedule='chunked' does")
    if name == "reference" and problem.student.head.main_grad is not None:
        raise ValueError("student_head.main_grad: expected None with schedule='reference'; schedule='chunked' has it")


def why_not(name: str, device: torch.device) -> str | None:
    """Why a schedule does not run on a device; None: it does."""
    if name == "reference" or device.type == "cpu":
        return None
    if not HAS_TRITON:
        return f"its kernels for device {device.type!r} need Triton, which is not installed"
    if device.type not in ("cuda", "xpu"):
        return f"it has no kernels for device {device.type!r}, only for 'cuda', 'xpu' and 'cpu'"
    return None
