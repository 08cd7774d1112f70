"""Which kernels a device has, all with the contracts of csrc/row_divergence.h and csrc/logits.h."""

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

# Which kernel takes the rows on a GPU, and what CUDA's is told: a cluster of blocks to a row or one that streams it.
# auto is CUDA's where this package was built with it, on NVIDIA GPUs from compute capability 8.0, else Triton's.
ROW_KERNELS = {"auto": "auto", "cuda": "auto", "cuda-cluster": "cluster", "cuda-streaming": "streaming", "triton": None}
ROW_KERNEL = os.environ.get("SCSDPO_ROW_KERNEL", "auto")


class Kernels(NamedTuple):
    row_divergence: Callable
    short_row_divergence: Callable  # the same for rows of a few entries, in float64 too
    row_statistics: Callable
    row_terms: Callable
    row_gradient: Callable
    head_logits: Callable
    tail_gradient: Callable


def kernels_of(device: torch.device, name: str | None = None) -> Kernels:
    """A device's kernels; the rows' is of the name in ROW_KERNELS, or what ROW_KERNEL says."""
    from . import native

    name = name or ROW_KERNEL
    if name not in ROW_KERNELS:
        raise ValueError(f"SCSDPO_ROW_KERNEL: expected one of {', '.join(ROW_KERNELS)}, got {name!r}")
    if device.type == "cpu":
        return Kernels(
            native.row_divergence,
            native.row_divergence,
            native.row_statistics,
            native.row_terms,
            native.row_gradient,
            native.head_logits,
            native.tail_gradient,
        )
    why = native.why_not_cuda(device)
    if why and name.startswith("cuda"):
        raise ValueError(f"SCSDPO_ROW_KERNEL={name} cannot run: {why}")
    triton = triton_kernels()
    if why or name == "triton":
        return triton
    return triton._replace(row_divergence=partial(native.row_divergence_cuda, row_schedule=ROW_KERNELS[name]))


def triton_kernels() -> Kernels:
    from . import logits_triton, row_divergence_triton

    return Kernels(
        row_divergence_triton.row_divergence,
        row_divergence_triton.row_divergence,
        row_divergence_triton.row_statistics,
        row_divergence_triton.row_terms,
        row_divergence_triton.row_gradient,
        logits_triton.head_logits,
        logits_triton.tail_gradient,
    )
