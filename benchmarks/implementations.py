"""The fused loss and its peers, as one kind of function: (hidden, weight, teacher's hidden, beta) -> Σ_n D(p_n, q_n).

Student and teacher share the head. Each peer gets its documented best settings; one that is not installed, or cannot
run on a device, says why.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor

from scsdpo_kernels import linear_divergence
from scsdpo_kernels.ops import why_not


@dataclass(frozen=True)
class Implementation:
    loss: Callable[..., Tensor]
    package: str | None = None  # the distribution that it is of, where that is not this one
    betas: tuple[float, ...] = (0.0, 0.5, 1.0)
    schedule: str | None = None

    def why_not(self, device: torch.device) -> str | None:
        """Why it does not run on a device; None: it does."""
        if self.package is not None and not _is_installed(self.package):
            return f"{self.package} is not installed"
        if self.loss is liger_fused and device.type == "cpu":
            return "its kernel is Triton only"
        return why_not(self.schedule, device) if self.schedule else None

    @property
    def version(self) -> str:
        return metadata.version(self.package or "scsdpo-kernels")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def scsdpo(schedule: str) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
        return linear_divergence(hidden, weight, teacher, beta=beta, schedule=schedule).loss

    return loss


def eager(hidden: Tensor, weight: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """Full logits and their log-softmaxes, as trainers write it."""
    log_p = F.log_softmax((hidden @ weight.T).float(), dim=-1)
    with torch.no_grad():
        log_q = F.log_softmax((teacher @ weight.T).float(), dim=-1)
    if beta == 0:
        return F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    if beta == 1:
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    shares = torch.tensor([1 - beta, beta], device=hidden.device).log()
    log_m = torch.logsumexp(torch.stack([log_p, log_q]) + shares[:, None, None], dim=0)
    kl_p = F.kl_div(log_m, log_p, log_target=True, reduction="sum")
    kl_q = F.kl_div(log_m, log_q, log_target=True, reduction="sum")
    return (1 - beta) * kl_p + beta * kl_q


@functools.cache
def _compiled_eager() -> Callable[..., Tensor]:
    return torch.compile(eager)


def compiled_eager(hidden: Tensor, weight: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    return _compiled_eager()(hidden, weight, teacher, beta)


@functools.cache
def _liger_chunked(beta: float) -> Callable[..., Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=True)


def liger_chunked(hidden: Tensor, weight: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)  # all count; the hard loss has weight 0
    return _liger_chunked(beta)(hidden, weight, teacher, weight.detach(), labels) * len(hidden)


def liger_fused(hidden: Tensor, weight: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=beta)(hidden, weight, teacher, weight.detach()) * len(hidden)


def trl(hidden: Tensor, weight: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(hidden, weight, None, teacher, weight.detach(), None, beta)[0].sum()


IMPLEMENTATIONS = {
    "chunked": Implementation(scsdpo("chunked"), schedule="chunked"),
    "tiled": Implementation(scsdpo("tiled"), schedule="tiled"),
    "reference": Implementation(scsdpo("reference"), schedule="reference"),
    "eager PyTorch": Implementation(eager, "torch"),
    "torch.compile'd eager": Implementation(compiled_eager, "torch"),
    "fused_linear_jsd": Implementation(liger_fused, "liger-kernel"),
    "chunked JSD, compiled": Implementation(liger_chunked, "liger-kernel"),
    "chunked_divergence": Implementation(trl, "trl"),
}


def label(name: str) -> str:
    """As tables name it, with its version."""
    implementation = IMPLEMENTATIONS[name]
    if implementation.package in (None, "torch"):
        return f"scsdpo_kernels, {name}" if implementation.package is None else name
    return f"{implementation.package} {implementation.version} {name}"
