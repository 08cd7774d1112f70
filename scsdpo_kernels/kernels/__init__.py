"""Which kernels a device has, all with the contracts of csrc/row_divergence.h and csrc/logits.h."""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch


class Kernels(NamedTuple):
    row_divergence: Callable
    row_statistics: Callable
    row_terms: Callable
    row_gradient: Callable
    shares: Callable  # what these take as the β of each row: once for all chunks
    head_logits: Callable
    tail_gradient: Callable


def kernels_of(device: torch.device) -> Kernels:
    """C++ on a CPU, Triton elsewhere."""
    return native_kernels() if device.type == "cpu" else triton_kernels()


def native_kernels() -> Kernels:
    from . import native

    return _kernels(native, native)


def triton_kernels() -> Kernels:
    from . import logits_triton, row_divergence_triton

    return _kernels(row_divergence_triton, logits_triton)


def _kernels(rows: ModuleType, logits: ModuleType) -> Kernels:
    return Kernels(
        rows.row_divergence,
        rows.row_statistics,
        rows.row_terms,
        rows.row_gradient,
        rows.shares,
        logits.head_logits,
        logits.tail_gradient,
    )
