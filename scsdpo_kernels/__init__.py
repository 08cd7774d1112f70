"""Fused self-distillation loss for reinforcement learning of language models (SC-SDPO, arXiv 2605.27765)."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "scsdpo_kernels needs PyTorch, which it does not install by itself: install the build that fits this machine, "
        'or take the tested one with `pip install "scsdpo-kernels[torch]"`'
    ) from error

from .linear_divergence import LinearDivergence, linear_divergence, linear_divergence_per_token
from .pass_rates import PassRates
from .problem import METRICS, Head, LoRA, PolicyGradient, RoutedHeads, SampledToken, TopK, TopLogprobs
from .question_weights import question_weights
from .scsdpo_loss import scsdpo_loss, step_denominator
from .trust_region import TrustRegionTeacher
from .vocab_shard import VocabShard

__version__ = "0.1.0"
__all__ = [
    "METRICS",
    "Head",
    "LinearDivergence",
    "LoRA",
    "PassRates",
    "PolicyGradient",
    "RoutedHeads",
    "SampledToken",
    "TopK",
    "TopLogprobs",
    "TrustRegionTeacher",
    "VocabShard",
    "linear_divergence",
    "linear_divergence_per_token",
    "question_weights",
    "scsdpo_loss",
    "step_denominator",
]
