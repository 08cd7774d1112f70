"""SC-SDPO in verl: a sampler, an advantage estimator, losses and an FSDP engine, with no change to its trainer.

    VERL_ENGINE_VENDOR=scsdpo                          in every worker's environment: `SCSDPOEngine`
    algorithm.adv_estimator=sc_sdpo                    question weights, from `uid` and rewards, in `advantages`
    actor_rollout_ref.actor.policy_loss.loss_mode=scsdpo_jsd               or scsdpo_forward_kl, scsdpo_reverse_kl
    trainer.v1.sampler.custom_sampler.path=pkg://scsdpo.verl               `TeacherPrompts`: what the self-teacher sees
    trainer.v1.sampler.custom_sampler.name=TeacherPrompts                  in place of each rollout's prompt

verl imports this module by its entry point `verl.plugins`, in every process, as soon as it is imported itself.
"""

import logging
import os
from importlib import metadata
from typing import Any

from ..advantages import question_weight_advantages, unit_advantages

TESTED = ">=0.9,<0.10"
SEAMS = ("forward_backward_batch", "prepare_model_inputs", "_build_fsdp_module", "_gradient_sync_context",
         "optimizer_step", "lr_scheduler_step", "save_checkpoint", "load_checkpoint")  # fmt: skip

try:
    from verl.workers.engine import FSDPEngineWithLMHead

    if missing := [name for name in SEAMS if not hasattr(FSDPEngineWithLMHead, name)]:
        raise ImportError(f"FSDPEngine of verl {metadata.version('verl')} has no {', '.join(missing)}")
    from .engine import SCSDPOEngine
    from .losses import SelfDistillation
    from .prompts import Attempt, successful_siblings
except ImportError as error:
    problem = f"scsdpo.verl is made for verl{TESTED} (pip install 'scsdpo-kernels[verl]'): {error}"
    if os.environ.get("VERL_ENGINE_VENDOR") == "scsdpo":  # verl logs a plug-in's failure at DEBUG only
        logging.getLogger(__name__).error("VERL_ENGINE_VENDOR=scsdpo: expected to find its engine; %s", problem)
    raise ImportError(problem) from error


def __getattr__(name: str) -> Any:
    """The sampler, when it is asked for: it needs verl's trainer and TransferQueue, which workers may lack."""
    if name == "TeacherPrompts":
        from .sampler import TeacherPrompts

        return TeacherPrompts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Attempt",
    "SCSDPOEngine",
    "SelfDistillation",
    "TeacherPrompts",
    "question_weight_advantages",
    "successful_siblings",
    "unit_advantages",
]
