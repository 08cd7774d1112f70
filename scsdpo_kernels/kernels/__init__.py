"""Which kernels a device has, with the contracts of csrc/row_divergence.h, csrc/logits.h and support_torch.py."""

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
    likeliest: Callable
    entries: Callable
    support_values: Callable
    support_gradient: Callable


def kernels_of(device: torch.device) -> Kernels:
    """C++ on a CPU, Triton elsewhere."""
    return native_kernels() if device.type == "cpu" else triton_kernels()


def native_kernels() -> Kernels:
    from . import native, support_torch

    return _kernels(native, native, support_torch)


def triton_kernels() -> Kernels:
    from . import logits_triton, row_divergence_triton, support_triton

    return _kernels(row_divergence_triton, logits_triton, support_triton)


def _kernels(rows: ModuleType, logits: ModuleType, support: ModuleType) -> Kernels:
    return Kernels(
        rows.row_divergence,
        rows.row_statistics,
        rows.row_terms,
        rows.row_gradient,
        rows.shares,
        logits.head_logits,
        support.likeliest,
        support.entries,
        support.support_values,
        support.support_gradient,
    )
