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
    return instruction_sets()[-1] == "avx512_bf16" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def row_divergence(
    logits: Logits,  # fp32, bf16 or float64 (that without `difference`)
    rows: PerRow,
    objective: Objective,
    gradient: Tensor | None = None,  # (C, V) fp32 or bf16 out; may lie over the student, row by row. None: values only
    *,
    instruction_set: str | None = None,  # None: the widest
) -> Scalars:
    """Divergence, entropies and log-probabilities of each row of logits, and its weighted gradient into `gradient`.

    csrc/row_divergence.h has the contract, csrc/divergence.h the equations.
    """
    task, scalars = _row_task(logits, rows, objective, gradient)
    _on_processor(_C.row_divergence_cpu, task, logits.student.device, instruction_set)
    return scalars


def row_statistics(logits: Logits, temperature: float, *, instruction_set: str | None = None) -> RowStatistics:
    """Statistics of rows, or of the part of each that is here. Where nothing counts the log-sum-exp is -inf."""
    rows = logits.student.shape[0]
    lse = torch.empty(2, rows, dtype=torch.float64).unbind()
    others = torch.empty(5, rows, dtype=torch.float32).unbind()
    result = RowStatistics(*lse, *others)
    task = _C.RowDivergence(
        stage=_C.Stage.statistics, **_logits(logits), temperature=temperature, **_addresses(result._asdict())
    )
    _on_processor(_C.row_divergence_cpu, task, logits.student.device, instruction_set)
    return result


def row_terms(
    logits: Logits,  # fp32, some entries of each row
    objective: Objective,
    statistics: RowStatistics,  # of the whole rows
    *,
    instruction_set: str | None = None,
) -> Tensor:
    """(4, C) float64, what these entries add to the sums that a row's divergence is made of."""
    terms = torch.zeros(_C.most_terms, logits.student.shape[0], dtype=torch.float64)
    task = _C.RowDivergence(
        stage=_C.Stage.terms,
        **_logits(logits),
        **_objective(objective),
        **_known(statistics),
        terms=terms.data_ptr(),
    )
    _on_processor(_C.row_divergence_cpu, task, logits.student.device, instruction_set)
    return terms


def row_gradient(
    logits: Logits,  # fp32, some entries of each row
    objective: Objective,
    statistics: RowStatistics,  # of the whole rows
    terms: Tensor,  # (4, C) float64, of the whole rows
    weight: Tensor,  # (C,) fp32
    gradient: Tensor | None = None,  # (C, V) fp32 or bf16 out; may lie over the student, row by row. None: values only
    *,
    instruction_set: str | None = None,
) -> Tensor:
    """(C,) fp32, the divergence of the whole rows, and these entries' weighted gradient into `gradient`."""
    assert weight.dtype == torch.float32 and weight.is_contiguous()
    assert terms.dtype == torch.float64 and terms.is_contiguous() and terms.shape == (_C.most_terms, len(weight))
    divergence = torch.empty(len(weight), dtype=torch.float32)
    task = _C.RowDivergence(
        stage=_C.Stage.gradient,
        **_logits(logits),
        **_objective(objective),
        **_known(statistics),
        terms=terms.data_ptr(),
        weight=weight.data_ptr(),
        divergence=divergence.data_ptr(),
        **_gradient(gradient),
    )
    _on_processor(_C.row_divergence_cpu, task, logits.student.device, instruction_set)
    return divergence


def _row_task(
    logits: Logits, rows: PerRow, objective: Objective, gradient: Tensor | None
) -> tuple[_C.RowDivergence, Scalars]:
    """The C++ struct of a call, and the tensors that it fills."""
    student, (weight, target, old_logp, importance_clip) = logits.student, rows
    assert gradient is None or (gradient.shape == student.shape and gradient.stride(1) == 1)
    for tensor in (logits.teacher, weight, target, old_logp, gradient):
        assert tensor is None or tensor.device == student.device
    if student.dtype == torch.float64:
        assert not logits.difference and (gradient is None or gradient.dtype == torch.float32)
    assert weight.dtype == torch.float32 and weight.is_contiguous()
    assert target is None or (target.dtype == torch.int64 and target.is_contiguous())
    assert old_logp is None or (target is not None and old_logp.dtype == torch.float32 and old_logp.is_contiguous())
    fields = torch.empty(rows.scalars, len(weight), dtype=torch.float32, device=student.device).unbind()
    scalars = Scalars(*fields, *[None] * (len(Scalars._fields) - len(fields)))
    task = _C.RowDivergence(
        **_logits(logits),
        **_objective(objective),
        **_addresses({"weight": weight, "target": target, "old_logp": old_logp}),
        importance_clip=importance_clip,
        **_addresses(scalars._asdict()),
        **_gradient(gradient),
    )
    return task, scalars


def _logits(logits: Logits) -> dict:
    student, teacher, difference, softcap = logits
    assert student.shape == teacher.shape and student.dtype == teacher.dtype
    assert student.stride(1) == teacher.stride(1) == 1
    return {
        "rows": student.shape[0],
        "vocabulary": student.shape[1],
        "logits_dtype": _DTYPES[student.dtype],
        **_matrix(student=student),
        **_matrix(teacher=teacher),
        "teacher_is_difference": difference,
        "student_softcap": softcap,
    }


def _objective(objective: Objective) -> dict:
    return {"beta": objective.beta, "temperature": objective.temperature, "entry_clip": objective.entry_clip}


def _known(statistics: RowStatistics) -> dict[str, int]:
    known = {name: getattr(statistics, name) for name in ("student_lse", "teacher_lse", "centre", "log_ratio")}
    for name, tensor in known.items():
        assert tensor.is_contiguous() and tensor.dtype == (torch.float64 if "lse" in name else torch.float32), name
    return _addresses(known)


def _gradient(gradient: Tensor | None) -> dict:
    return {} if gradient is None else {**_matrix(gradient=gradient), "gradient_dtype": _DTYPES[gradient.dtype]}


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
        **_matrix(logits=logits),
        bias=_address(bias),
        scale=scale,
        softcap=softcap,
    )
    _on_processor(_C.head_logits, task, logits.device, instruction_set)


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
        **_matrix(logits=logits.student),
        base=base.data_ptr(),
        factor=factor.data_ptr(),
        temperature=temperature,
        softcap=logits.softcap,
        **_gradient(gradient),
    )
    _on_processor(_C.tail_gradient, task, gradient.device, instruction_set)


def _on_processor(kernel, task, device: torch.device, instruction_set: str | None) -> None:
    assert device.type == "cpu"
    name = instruction_set or instruction_sets()[-1]
    kernel(task, torch.get_num_threads(), _C.InstructionSet.__members__[name])


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
    task = _matmul_task(left, right, out, add=add)
    if (
        instruction_set is None
        and not add
        and left.dtype == right.dtype == torch.bfloat16
        and left.stride(1) == right.stride(0) == 1
        and multiplies_bf16()
    ):
        _C.matmul_bf16(task, torch.get_num_threads())
    else:
        _on_processor(_C.matmul, task, out.device, instruction_set)


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
        **_matrix(out=out),
        add=add,
    )


def _factor(lines: Tensor) -> _C.Factor:
    line, depth = lines.stride()
    return _C.Factor(at=lines.data_ptr(), line_stride=line, depth_stride=depth, dtype=_DTYPES[lines.dtype])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    return {name: _address(tensor) for name, tensor in tensors.items()}


def _matrix(**named: Tensor) -> dict[str, int]:
    """Address and row stride of a matrix, under the names that the C++ structs give them."""
    ((name, tensor),) = named.items()
    return {name: tensor.data_ptr(), f"{name}_stride": tensor.stride(0)}
