"""SC-SDPO in TRL: its SDPOTrainer with question weights and the fused loss, as a drop-in. And two others, fused.

    from scsdpo.trl import SCSDPOConfig, SCSDPOTrainer

    trainer = SCSDPOTrainer(model, reward_funcs, SCSDPOConfig(...), train_dataset=...)

The loss is TRL's times the weight of the rollout's question (arXiv 2605.27765, eq. 15-16), which is computed once a
generation batch, over all processes. How it is computed, and for which rollouts, is in `scsdpo.self_distillation`.
`FusedSDFTTrainer` is SDFTTrainer likewise, without weights, and `FusedDistillationTrainer` is DistillationTrainer.
"""

from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from scsdpo_kernels import question_weights

TESTED = ">=1.6,<1.17"

try:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    from .self_distillation import SEAMS, DealingOptions, FusedSelfDistillation
except ImportError as error:
    raise ImportError(f"scsdpo.trl is made for trl{TESTED} (pip install 'scsdpo-kernels[trl]'): {error}") from error

for _trainer in (SDPOTrainer, SDFTTrainer):
    if _missing := [name for name in SEAMS if not hasattr(_trainer, name)]:
        raise ImportError(
            f"scsdpo.trl is made for trl{TESTED}; {_trainer.__name__} of trl {metadata.version('trl')} has no "
            f"{', '.join(_missing)}"
        )


@dataclass
class SCSDPOConfig(DealingOptions, SDPOConfig):
    """TRL's SDPOConfig, how questions are weighted, and how rollouts are run."""

    question_weighting: str = field(
        default="sc-sdpo", metadata={"help": "'sc-sdpo': w = (p̂ (1 - p̂))^exponent, normalised. 'none': plain SDPO."}
    )
    question_weight_exponent: float = field(
        default=0.5, metadata={"help": "α of SC-SDPO's weights; the paper's is 1/2."}
    )
    question_success_threshold: float | None = field(
        default=None,
        metadata={"help": "Reward from which a rollout counts as a success. None: success_reward_threshold."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.question_weighting not in ("sc-sdpo", "none"):
            raise ValueError(f"question_weighting: expected 'sc-sdpo' or 'none', got {self.question_weighting!r}")


class SCSDPOTrainer(FusedSelfDistillation, SDPOTrainer):
    """TRL's SDPOTrainer with question weights and the fused loss. Takes what SDPOTrainer takes.

        loss = 1/B Σ_b w̄_b Σ_t m_{b,t} D_{b,t} / Σ_t m_{b,t}

    over the B rollouts of an optimiser step: m is 1 at tokens of a rollout that has a teacher, D the divergence of
    `distillation_mode` and `distillation_alpha`, w̄ SC-SDPO's weight of the rollout's question (eq. 16). With
    `distillation_weight` below 1 it is that times it, and the rest times TRL's policy loss, which w̄ does not weigh.
    """

    config_cls = SCSDPOConfig
    _tag_names = ["trl", "sdpo", "sc-sdpo"]  # noqa: RUF012
    _paper = {  # noqa: RUF012
        "title": "Restoring the Sweet Spot: Pass-Rate Weighted Self-Distillation for LLM Reasoning",
        "id": "2605.27765",
        "citation": """\
@article{liu2026scsdpo,
    title        = {{Restoring the Sweet Spot: Pass-Rate Weighted Self-Distillation for LLM Reasoning}},
    author       = {Zehao Liu and Yuanpu Cao and Jinghui Chen and Vasant G. Honavar},
    year         = 2026,
    eprint       = {arXiv:2605.27765}
}
"""
        + SDPOTrainer._paper["citation"],
    }

    def _weigh(self, batch: dict[str, Any]) -> Tensor:  # (B,)
        """Over the generation batch of all processes in training; in evaluation each question for itself.

        Evaluation takes w = (p̂ (1 - p̂))^α (eq. 15) without its mean over a batch (eq. 16), so that a loss does not
        depend on which other questions were in the batch.
        """
        mode = "train" if self.model.training else "eval"
        generations = self.num_generations if mode == "train" else self.num_generations_eval
        rewards = self.accelerator.gather(batch["rewards"])  # groups are contiguous here, and may straddle processes
        threshold = self.args.question_success_threshold
        threshold = self.args.success_reward_threshold if threshold is None else threshold
        exponent = self.args.question_weight_exponent
        if mode == "train":
            questions = torch.arange(len(rewards), device=rewards.device) // generations
            weights = question_weights(rewards, questions, exponent=exponent, success_threshold=threshold)
        else:
            rates = (rewards >= threshold).double().view(-1, generations).mean(1)
            variance = rates * (1 - rates)
            weights = torch.where(variance > 0, variance**exponent, 0.0).float().repeat_interleave(generations)
        self._metrics[mode]["scsdpo/pass_rate"].append((rewards >= threshold).float().mean().item())
        self._metrics[mode]["scsdpo/zero_weight_questions"].append((weights == 0).float().mean().item())
        if self.args.question_weighting == "none":
            weights = torch.ones_like(weights)
        start = self.accelerator.process_index * len(batch["rewards"])
        return weights[start : start + len(batch["rewards"])]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        self._name = "SC-SDPO"  # elsewhere it is the prefix of TRL's metrics
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            del self._name


@dataclass
class FusedSDFTConfig(DealingOptions, SDFTConfig):
    """TRL's SDFTConfig, and how rollouts are run."""


class FusedSDFTTrainer(FusedSelfDistillation, SDFTTrainer):
    """TRL's SDFTTrainer with the fused loss. Takes what SDFTTrainer takes; every question has weight 1."""

    config_cls = FusedSDFTConfig


def __getattr__(name: str) -> Any:  # only when asked for, since older releases of TRL have no such trainer
    if name not in ("FusedDistillationConfig", "FusedDistillationTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import distillation

    return getattr(distillation, name)


__all__ = ["FusedSDFTConfig", "FusedSDFTTrainer", "SCSDPOConfig", "SCSDPOTrainer"]
