"""The fused loss and its peers, as one function of hidden states, head and options: Σ_n w_n D(p_n, q_n).

Student and teacher share the head. Each peer gets its documented best settings; one that is not installed, or cannot
run on a device or a case, says why.
"""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor

from scsdpo_kernels import TopK, linear_divergence
from scsdpo_kernels.checks import why_not

HAND_FILTERED, UNSLOTH = "hand-filtered eager", "fused_linear_jsd of Unsloth"


@dataclass(frozen=True)
class Implementation:
    """`loss`(hidden, weight, teacher, beta, token_weight, top_k): (N, D), (V, D), (N, D), β, (N,) | None, K | None."""

    loss: Callable[..., Tensor]
    package: str | None = None  # the distribution that it is of, where that is not this one
    schedule: str | None = None
    token_weights: bool = True  # False: all rows have weight 1, whatever they should have
    top_k: bool = False  # SDPO's top-K with a bucket for the rest
    triton: bool = False  # a peer's kernel that is
    sheets: int = 0  # (N, V) fp32 matrices that it holds at once

    def why_not(self, device: torch.device, top_k: int | None = None) -> str | None:
        """Why it does not run on a device, or a case; None: it does."""
        if self.package is not None and not _is_installed(self.package):
            return f"{self.package} is not installed"
        if self.triton and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "its kernel is Triton, and runs on a CPU in Triton's interpreter only"
        if top_k is not None and not self.top_k:
            return "it has no top-K objective"
        return why_not(self.schedule, device) if self.schedule else None

    @property
    def version(self) -> str:
        return metadata.version(self.package or "scsdpo-kernels")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def scsdpo(schedule: str) -> Callable[..., Tensor]:
    def loss(hidden, weight, teacher, beta=0.5, token_weight=None, top_k=None):
        support = None if top_k is None else TopK(top_k)
        options = {"beta": beta, "token_weight": token_weight, "support": support, "schedule": schedule}
        return linear_divergence(hidden, weight, teacher, **options).loss

    return loss


def eager(hidden, weight, teacher, beta=0.5, token_weight=None, top_k=None):
    """Full logits and their log-softmaxes, with as few of them as PyTorch's own functions allow."""
    log_p = F.log_softmax((hidden @ weight.T).float(), dim=-1)
    with torch.no_grad():
        log_q = F.log_softmax((teacher @ weight.T).float(), dim=-1)
    if beta == 0:
        divergence = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    elif beta == 1:
        divergence = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    else:
        shares = torch.tensor([1 - beta, beta], device=hidden.device).log()
        log_m = torch.logsumexp(torch.stack([log_p, log_q]) + shares[:, None, None], dim=0)
        kl_p = F.kl_div(log_m, log_p, log_target=True, reduction="none").sum(-1)
        kl_q = F.kl_div(log_m, log_q, log_target=True, reduction="none").sum(-1)
        divergence = (1 - beta) * kl_p + beta * kl_q
    return divergence.sum() if token_weight is None else (divergence * token_weight).sum()


def hand_filtered_eager(hidden, weight, teacher, beta=0.5, token_weight=None, top_k=None):
    """What one index in a training loop makes of eager PyTorch: tokens of weight 0 are removed before it."""
    if token_weight is not None:
        kept = token_weight != 0
        hidden, teacher, token_weight = hidden[kept], teacher[kept], token_weight[kept]
    return eager(hidden, weight, teacher, beta, token_weight)


@functools.cache
def _compiled_eager() -> Callable[..., Tensor]:
    return torch.compile(eager)


def compiled_eager(hidden, weight, teacher, beta=0.5, token_weight=None, top_k=None):
    return _compiled_eager()(hidden, weight, teacher, beta, token_weight)


def sdpo_of_trl(hidden, weight, teacher, beta=0.5, token_weight=None, top_k=None):
    """TRL's SDPOTrainer: its loss functions on full logits, in fp32, as accelerate hands a model's outputs over."""
    from trl.experimental.sdpo import loss_utils

    logits = (hidden @ weight.T).float()
    with torch.no_grad():
        teacher_logits = (teacher @ weight.T).float()
    if top_k:
        options = {"distillation_topk": top_k, "distillation_alpha": beta, "distillation_add_tail": True}
        divergence = loss_utils.compute_topk_self_distillation_loss(logits, teacher_logits, **options)
    else:
        divergence = loss_utils.compute_full_logit_self_distillation_loss(
            logits, teacher_logits, distillation_alpha=beta
        )
    return divergence.sum() if token_weight is None else (divergence * token_weight).sum()


@functools.cache
def _liger_chunked(beta: float) -> Callable[..., Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=True)


def liger_chunked(hidden, weight, teacher, beta=0.5, token_weight=None, top_k=None):
    labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)  # all count; the hard loss has weight 0
    return _liger_chunked(beta)(hidden, weight, teacher, weight.detach(), labels) * len(hidden)


def liger_fused(hidden, weight, teacher, beta=0.5, token_weight=None, top_k=None):
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=beta)(hidden, weight, teacher, weight.detach(), None) * len(hidden)


def trl_chunked(hidden, weight, teacher, beta=0.5, token_weight=None, top_k=None):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    if token_weight is not None and hidden.is_cuda:  # as its trainer does with a mask, on GPUs only
        valid = token_weight != 0
        hidden, teacher, token_weight = hidden[valid], teacher[valid], token_weight[valid]
    divergence = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher, weight.detach(), None, beta)[0]
    return divergence.sum() if token_weight is None else (divergence * token_weight).sum()


@functools.cache
def _unsloth_fused() -> Callable[..., Tensor]:
    """Read from the one file that has it, which needs PyTorch alone: the package wants Unsloth, and that a GPU."""
    if (name := "_fused_linear_of_unsloth_zoo") not in sys.modules:
        (folder,) = importlib.util.find_spec("unsloth_zoo").submodule_search_locations
        spec = importlib.util.spec_from_file_location(name, os.path.join(folder, "fused_losses", "fused_linear.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].fused_linear_jsd


def unsloth_fused(hidden, weight, teacher, beta=0.5, token_weight=None, top_k=None):
    mask = None if token_weight is None else token_weight != 0
    return _unsloth_fused()(hidden, weight, teacher, weight.detach(), mask=mask, beta=beta, num_items_in_batch=1)


IMPLEMENTATIONS = {
    "chunked": Implementation(scsdpo("chunked"), schedule="chunked", top_k=True),
    "reference": Implementation(scsdpo("reference"), schedule="reference", top_k=True, sheets=16),
    "eager PyTorch": Implementation(eager, "torch", sheets=9),
    HAND_FILTERED: Implementation(hand_filtered_eager, "torch", sheets=9),
    "torch.compile'd eager": Implementation(compiled_eager, "torch", sheets=5),
    "SDPO, eager": Implementation(sdpo_of_trl, "trl", top_k=True, sheets=9),
    "fused_linear_jsd": Implementation(liger_fused, "liger-kernel", token_weights=False, triton=True),
    "chunked JSD, compiled": Implementation(liger_chunked, "liger-kernel", token_weights=False),
    "chunked_divergence": Implementation(trl_chunked, "trl"),
    UNSLOTH: Implementation(unsloth_fused, "unsloth-zoo", token_weights=False),
}

COLOURS = {  # in every plot
    "chunked": "tab:blue",
    "reference": "tab:gray",
    "eager PyTorch": "tab:orange",
    HAND_FILTERED: "tab:brown",
    "torch.compile'd eager": "tab:green",
    "SDPO, eager": "tab:red",
    "fused_linear_jsd": "tab:purple",
    "chunked JSD, compiled": "tab:pink",
    "chunked_divergence": "tab:cyan",
    UNSLOTH: "tab:olive",
}


def label(name: str) -> str:
    """As tables name it, with its version."""
    implementation = IMPLEMENTATIONS[name]
    if implementation.package in (None, "torch"):
        return f"scsdpo_kernels, {name}" if implementation.package is None else name
    return f"{implementation.package} {implementation.version} {name.removesuffix(' of Unsloth')}"


def colour_of(text: str) -> str:
    """The colour of what `label` has named, with whatever version."""
    for name, implementation in IMPLEMENTATIONS.items():
        begins = {None: "scsdpo_kernels, ", "torch": ""}.get(implementation.package, f"{implementation.package} ")
        if text.startswith(begins) and text.endswith(name.removesuffix(" of Unsloth")):
            return COLOURS[name]
    raise KeyError(text)
