"""The names that verl's configuration has for this package's losses and advantages, and what goes with them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from verl.trainer.distillation.losses import DistillationLossSettings, register_distillation_loss
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss
from verl.workers.config import PolicyLossConfig

from ..advantages import ESTIMATORS

BETA = {"scsdpo_forward_kl": 0.0, "scsdpo_jsd": 0.5, "scsdpo_reverse_kl": 1.0}
TEACHERS = ("live", "ema", "base")
LOGGED = ("top1_agreement", "support_mass", "importance_clipped")  # of linear_divergence's metrics


@dataclass
class SelfDistillation(PolicyLossConfig):
    """verl's config of a policy loss with what a self-distillation can be told beyond its name.

        actor_rollout_ref.actor.policy_loss._target_=scsdpo.verl.SelfDistillation
        +actor_rollout_ref.actor.policy_loss.teacher=ema

    Args:
        beta: divergence between forward KL (0) and reverse KL (1). None: that of loss_mode.
        top_k: the student's most likely tokens, in place of the whole vocabulary.
        tail: with top_k, "bucket" for the other tokens together, or "renormalize".
        importance_clip: of the ratio against old_log_probs; None: no ratio.
        teacher: "live", the model itself; "ema", a moving average of it, as in SDPO; "base", it without its LoRA.
        teacher_update_rate: of "ema", by which it moves to the model after each of the actor's updates.
        metrics: names of `linear_divergence`'s metrics, to be logged.

    Raises:
        ValueError: a value outside of these.
    """

    loss_mode: str = "scsdpo_jsd"
    beta: float | None = None
    top_k: int | None = None
    tail: str = "bucket"
    importance_clip: float | None = 2.0
    teacher: str = "live"
    teacher_update_rate: float = 0.05
    metrics: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.teacher not in TEACHERS:
            raise ValueError(f"actor.policy_loss.teacher: expected one of {TEACHERS}, got {self.teacher!r}")
        if not 0 <= self.teacher_update_rate <= 1:
            raise ValueError(
                f"actor.policy_loss.teacher_update_rate: expected a number in [0, 1], got {self.teacher_update_rate}"
            )
        for name in self.metrics:
            if name not in LOGGED:
                raise ValueError(f"actor.policy_loss.metrics: expected some of {LOGGED}, got {name!r}")


class Objective(NamedTuple):
    """What an actor's loss function asks for."""

    actor: Any  # verl's config
    options: SelfDistillation
    beta: float
    from_server: bool  # the teacher is verl's teacher server


def objective_of(loss_function: Callable | None) -> Objective | None:
    """None of a loss that is none of this package's.

    Raises:
        ValueError: one of this package's, and beside it something else that verl would add to the loss.
    """
    given = getattr(loss_function, "keywords", {})
    actor, distillation = given.get("config"), given.get("distillation_config")
    policy = getattr(actor, "policy_loss", None)
    mode = policy.get("loss_mode", "vanilla") if policy is not None else None
    from_server = distillation is not None and distillation.distillation_loss.loss_mode in BETA
    if from_server:
        loss = distillation.distillation_loss
        _expect(
            "distillation.distillation_loss",
            loss,
            {"use_task_rewards": False, "use_policy_gradient": False, "loss_max_clamp": None},
        )
        mode = loss.loss_mode
    elif mode in BETA and distillation is not None:
        raise ValueError(
            f"actor.policy_loss.loss_mode: expected none of scsdpo.verl's beside distillation, got {mode}; set "
            "distillation.distillation_loss.loss_mode"
        )
    if mode not in BETA:
        return None
    _expect("actor", actor, {"entropy_coeff": 0, "use_kl_loss": False})
    if actor.loss_agg_mode == "seq-mean-token-sum-norm" and actor.loss_scale_factor is None:
        raise ValueError(
            "actor.loss_scale_factor: expected a number with loss_agg_mode=seq-mean-token-sum-norm, got None, for "
            "which verl takes the width of each micro-batch"
        )
    options = policy if isinstance(policy, SelfDistillation) else SelfDistillation()
    return Objective(actor, options, BETA[mode] if options.beta is None else options.beta, from_server)


def _expect(name: str, config: Any, expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if getattr(config, key) != value:
            raise ValueError(
                f"{name}.{key}: expected {value} with a loss of scsdpo.verl, got {getattr(config, key)}; the "
                "divergence is the whole loss, and log-probabilities beside it have no gradient"
            )


def _needs_the_engine(*_: Any, **__: Any):
    raise RuntimeError(
        "a loss of scsdpo.verl is computed by its engine, where hidden states are: set VERL_ENGINE_VENDOR=scsdpo in "
        "the environment of every worker, with actor.strategy=fsdp2 or fsdp"
    )


for _name, _estimator in ESTIMATORS.items():
    register_adv_est(_name)(_estimator)
register_distillation_loss(DistillationLossSettings(names=list(BETA), use_topk=True))(_needs_the_engine)
for _name in BETA:
    register_policy_loss(_name)(_needs_the_engine)


__all__ = ["BETA", "TEACHERS", "Objective", "SelfDistillation", "objective_of"]
