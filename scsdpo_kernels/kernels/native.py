"""The compiled module's Python side: checks, pointers, threads. The only importer of `_C`."""

import functools
import os

import torch
from torch import Tensor

from ..problem import Objective
from .contract import Logits, PerRow, RowStatistics, Scalars

try:
    from .. import _C
except ImportError as error:  # a source tree that was never built, or a build for another Python
    raise ImportError(
        "scsdpo_kernels._C, the compiled part of this package, cannot be imported; build it with `pip install .` "
        "from a source checkout, or install a wheel for this Python"
    ) from error

_DTYPES = {
    torch.float32: _C.DType.float32,
    torch.bfloat16: _C.DType.bfloat16,
    torch.float16: _C.DType.float16,
    torch.float64: _C.DType.float64,
}


# The widest instruction set that kernels may use: "" is all that the processor has. ATEN_CPU_CAPABILITY,
# ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS do the same to PyTorch and the libraries that it calls.
CPU_CAPABILITY = os.environ.get("SCSDPO_CPU_CAPABILITY", "")
WITH_BF16 = ("avx512_bf16", "amx_bf16")  # have products of bf16 numbers; their other kernels are avx512's


@functools.cache
def instruction_sets(widest: str | None = None) -> tuple[str, ...]:
    """Names of the SIMD instruction sets that kernels can use here, narrowest first, up to `widest`.

    widest: None is CPU_CAPABILITY, "" all that the processor has.

    Raises:
        ValueError: this build or this processor does not have the widest one.
    """
    best = int(_C.best_instruction_set())
    names = tuple(name for name, value in _C.InstructionSet.__members__.items() if int(value) <= best)
    widest = CPU_CAPABILITY if widest is None else widest
    if widest and widest not in names:
        raise ValueError(f"SCSDPO_CPU_CAPABILITY: expected one of {', '.join(names)} on this processor, got {widest!r}")
    return names[: names.index(widest) + 1] if widest else names


def multiplies_bf16() -> bool:
    """Whether kernels and PyTorch's library both have instructions for products of bf16 numbers.

    Without them PyTorch's bf16 products are a loop: 300 times slower than fp32 ones on AVX2.
    """
    return instruction_sets()[-1] in WITH_BF16 and torch.backends.cpu.get_cpu_capability() == "AVX512"


def row_divergence(
    logits: Logits,  # fp32, bf16 or, without `difference`, float64
    rows: PerRow,
    objective: Objective,
    gradient: Tensor | None = None,  # (C, V) fp32 or bf16 out; may lie over the student, row by row. None: values only
    *,
    instruction_set: str | None = None,  # None: the widest
) -> Scalars:
    """Divergence, entropies and log-probabilities of each row of logits, and its weighted gradient into `gradient`.

    csrc/row_divergence.h has the contract, csrc/divergence.h the equations.
    """
    weight, target, old_logp, _, policy = rows
    _check_gradient(logits, gradient)
    for tensor in (logits.teacher, weight, target, old_logp, gradient):
        assert tensor is None or tensor.device == logits.student.device
    assert policy is None or target is not None
    assert weight.dtype == torch.float32 and weight.is_contiguous()
    assert target is None or (target.dtype == torch.int64 and target.is_contiguous())
    assert old_logp is None or (target is not None and old_logp.dtype == torch.float32 and old_logp.is_contiguous())
    scalars = torch.empty(rows.scalars, len(weight), dtype=torch.float32)
    _C.row_divergence(
        _logits(logits),
        _objective(objective),
        _per_row(rows),
        _matrix(scalars),
        _matrix(gradient),
        _processor(logits.student.device, instruction_set),
    )
    return Scalars.of(scalars)


def row_statistics(logits: Logits, temperature: float, *, instruction_set: str | None = None) -> RowStatistics:
    """Statistics of rows, or of the part of each that is here. Where nothing counts the log-sum-exp is -inf."""
    rows = logits.student.shape[0]
    lse, others = torch.empty(2, rows, dtype=torch.float64), torch.empty(5, rows, dtype=torch.float32)
    result = RowStatistics(*lse, *others)
    processor = _processor(logits.student.device, instruction_set)
    _C.row_statistics(_logits(logits), temperature, _statistics(result), processor)
    return result


def row_terms(
    logits: Logits,  # fp32, some entries of each row
    objective: Objective,
    statistics: RowStatistics,  # whole rows'
    *,
    instruction_set: str | None = None,
) -> Tensor:
    """(4, C) float64, what these entries add to the sums that a row's divergence is made of."""
    terms = torch.zeros(_C.most_terms, logits.student.shape[0], dtype=torch.float64)
    processor = _processor(logits.student.device, instruction_set)
    _C.row_terms(_logits(logits), _objective(objective), _statistics(statistics), _matrix(terms), processor)
    return terms


def row_gradient(
    logits: Logits,  # fp32, some entries of each row
    objective: Objective,
    statistics: RowStatistics,  # whole rows'
    terms: Tensor,  # (4, C) float64, whole rows'
    rows: PerRow,  # the weight, and a policy's coefficient and target: csrc/row_divergence.h
    gradient: Tensor | None = None,  # (C, V) fp32 or bf16 out; may lie over the student, row by row. None: values only
    *,
    instruction_set: str | None = None,
) -> Tensor:
    """(C,) fp32, the divergence of the whole rows, and these entries' weighted gradient into `gradient`."""
    weight = rows.weight
    assert weight.dtype == torch.float32 and weight.is_contiguous()
    assert terms.dtype == torch.float64 and terms.is_contiguous() and terms.shape == (_C.most_terms, len(weight))
    _check_gradient(logits, gradient)
    divergence = torch.empty(1, len(weight), dtype=torch.float32)
    _C.row_gradient(
        _logits(logits),
        _objective(objective),
        _statistics(statistics),
        _matrix(terms),
        _per_row(rows),
        _matrix(divergence),
        _matrix(gradient),
        _processor(logits.student.device, instruction_set),
    )
    return divergence[0]


def shares(kind: str, beta: Tensor) -> Tensor:
    """(K,) float64 as they are: a row's constants are made where it is computed."""
    return beta


def _logits(logits: Logits) -> _C.Logits:
    student, teacher, difference, softcap = logits
    assert student.shape == teacher.shape and student.dtype == teacher.dtype and student.dtype != torch.float16
    assert student.stride(1) == teacher.stride(1) == 1
    assert not (difference and student.dtype == torch.float64)
    rows, vocabulary = student.shape
    return _C.Logits(rows, vocabulary, _matrix(student), _matrix(teacher), difference, softcap)


def _objective(objective: Objective) -> _C.Objective:
    kind, *numbers, token_beta = objective
    assert token_beta is None or (token_beta.dtype == torch.float64 and token_beta.is_contiguous())
    return _C.Objective(_C.Kind.__members__[kind], *numbers, _address(token_beta))


def _per_row(rows: PerRow) -> _C.PerRow:
    *tensors, importance_clip, policy = rows
    *of_policy, lowest, highest = (None, None, None, 0.0, 0.0) if policy is None else policy
    for tensor in of_policy:
        assert tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous())
    own = _C.Policy(*map(_address, of_policy), lowest, highest)
    return _C.PerRow(*map(_address, tensors), importance_clip, own)


def _statistics(statistics: RowStatistics) -> _C.Statistics:
    for name in ("student_lse", "teacher_lse", "centre", "log_ratio"):  # the others are only written
        tensor = getattr(statistics, name)
        assert tensor.is_contiguous() and tensor.dtype == (torch.float64 if "lse" in name else torch.float32), name
    return _C.Statistics(*map(_address, statistics))


def _check_gradient(logits: Logits, gradient: Tensor | None) -> None:
    if gradient is not None:
        assert gradient.shape == logits.student.shape and gradient.stride(1) == 1
        assert gradient.dtype == torch.float32 or logits.student.dtype != torch.float64


def head_logits(
    logits: Tensor,  # (C, V) fp32, unit stride along V: changed in place
    bias: Tensor | None,  # (V,) fp32
    scale: float,
    softcap: float,  # 0: none
    *,
    instruction_set: str | None = None,
) -> None:
    """logits = softcap tanh(scale (logits + bias) / softcap). csrc/logits.h has the contract."""
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
    task = _C.HeadLogits(
        rows=logits.shape[0],
        vocabulary=logits.shape[1],
        logits=_matrix(logits),
        bias=_address(bias),
        scale=scale,
        softcap=softcap,
    )
    _C.head_logits(task, _processor(logits.device, instruction_set))


def tail_gradient(
    logits: Logits,  # fp32; the student's are read
    base: Tensor,  # (C,) fp32
    factor: Tensor,  # (C,) fp32
    temperature: float,
    gradient: Tensor,  # (C, V) fp32 or bf16 out; may lie over the student, row by row
    *,
    instruction_set: str | None = None,
) -> None:
    """gradient = factor e^((logits - base) / temperature), through the softcap. csrc/logits.h has the contract."""
    assert base.dtype == factor.dtype == torch.float32 and base.is_contiguous() and factor.is_contiguous()
    task = _C.TailGradient(
        rows=len(base),
        vocabulary=gradient.shape[1],
        logits=_matrix(logits.student),
        base=_address(base),
        factor=_address(factor),
        temperature=temperature,
        softcap=logits.softcap,
        gradient=_matrix(gradient),
    )
    _C.tail_gradient(task, _processor(gradient.device, instruction_set))


def _processor(device: torch.device, instruction_set: str | None) -> _C.Processor:
    assert device.type == "cpu"
    name = instruction_set or instruction_sets()[-1]
    return _C.Processor(torch.get_num_threads(), _C.InstructionSet.__members__[name])


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """torch.empty for hundreds of megabytes on the CPU: on huge pages where the system has them to give."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def matmul(
    left: Tensor,  # (C, K) fp32 | bf16 | fp16
    right: Tensor,  # (K, V) fp32 | bf16 | fp16
    out: Tensor,  # (C, V) fp32 out, unit stride along V
    *,
    add: bool = False,  # to what `out` holds
    instruction_set: str | None = None,  # None: the widest
) -> None:
    """out = left right, summed in fp32; an entry has the same bits whichever rows and columns stand beside it.

    csrc/matmul.h has the contract.
    """
    task, processor = _matmul_task(left, right, out, add=add), _processor(out.device, instruction_set)
    has_instructions = multiplies_bf16() if instruction_set is None else instruction_set in WITH_BF16
    are_bf16 = left.dtype == right.dtype == torch.bfloat16 and left.stride(1) == right.stride(0) == 1
    if has_instructions and are_bf16 and not add:
        _C.matmul_bf16(task, processor)
    else:
        _C.matmul(task, processor)


def _matmul_task(left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> _C.Matmul:
    rows, depth = left.shape
    assert right.shape == (depth, out.shape[1]) and out.shape[0] == rows
    assert out.dtype == torch.float32 and out.stride(1) == 1
    assert torch.float64 not in (left.dtype, right.dtype)
    return _C.Matmul(
        rows=rows,
        columns=out.shape[1],
        depth=depth,
        left=_factor(left),
        right=_factor(right.t()),
        out=_matrix(out),
        add=add,
    )


def _factor(lines: Tensor) -> _C.Factor:
    return _C.Factor(_matrix(lines), lines.stride(1))


def _matrix(tensor: Tensor | None) -> _C.Matrix:
    if tensor is None:
        return _C.Matrix(0, 0, _C.DType.float32)
    return _C.Matrix(tensor.data_ptr(), tensor.stride(0), _DTYPES[tensor.dtype])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
