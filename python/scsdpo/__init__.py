"""SC-SDPO and SDPO in trainers: what knows transformers, TRL and verl; the arithmetic is in ``scsdpo_kernels``.

Its public names are here, too. Trainers are imported where they are asked for: scsdpo.head, scsdpo.trl, scsdpo.verl.
"""

from scsdpo_kernels import (
    Head,
    LinearDivergence,
    LoRA,
    SampledToken,
    TopK,
    TopLogprobs,
    TrustRegionTeacher,
    VocabShard,
    linear_divergence,
    linear_divergence_per_token,
    question_weights,
    scsdpo_loss,
    step_denominator,
)

__all__ = [
    "Head",
    "LinearDivergence",
    "LoRA",
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
