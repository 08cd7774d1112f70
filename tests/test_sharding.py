"""scsdpo.head on sharded models: two processes on a CPU against one, in float64, that sees the whole batch."""

import copy
import math
import os

import pytest
import torch
import torch.distributed as dist
from oracle import between
from ranks import Ranks
from torch import nn

pytest.importorskip("transformers", reason="transformers: pip install '.[demo]'")

from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

from scsdpo.head import base_model, distill, head_of, hidden_states, inside_forward, patch_lm_head
from scsdpo_kernels import Head, linear_divergence, question_weights

WORLD, ROLLOUTS, TOKENS, BETA = 2, 6, 5, 0.3
VOCABULARY = 101  # odd: shards of 51 and 50 rows
SCALE = 20  # multiplies the loss: gradients are between 0.1 and 1
TOLERANCE = 2e-6  # absolute
ENDS = ("model.embed_tokens.weight", "lm_head.weight")  # the last and the first to get a gradient


def tiny(seed: int, *, tied: bool = False, bias: bool = False, width: int = 32) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0,
        bos_token_id=None, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).train()
    if bias:
        model.lm_head.bias = nn.Parameter(0.3 * torch.randn(VOCABULARY))
    return model


# Layouts: each wraps a model and returns what the trainer then calls. options: of fully_shard.


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def _layers(model: nn.Module, **options) -> None:
    for layer in model.model.layers:
        fully_shard(layer, **options)


def _is_tied(model: nn.Module) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def root(model: nn.Module, **options) -> nn.Module:
    """The head in the root unit, which stays gathered from its first forward to its backward."""
    _layers(model, **options)
    return fully_shard(model, **options)


def norm_and_head(model: nn.Module, **options) -> nn.Module:
    """One unit of the last norm and the head, as accelerate 1.15 and prime-rl shard; tied, the embeddings are in it."""
    _layers(model, **options)
    tail = [model.model.norm, model.lm_head]
    if _is_tied(model):
        tail.insert(1, model.model.embed_tokens)
    else:
        fully_shard(model.model.embed_tokens, **options)
    fully_shard(tail, reshard_after_forward=False, **options)
    return fully_shard(model, **options)


def own_unit(model: nn.Module, **options) -> nn.Module:
    """The head its own unit, as verl shards, gathered for its forward only; tied, the embeddings are in it."""
    _layers(model, **options)
    if _is_tied(model):
        fully_shard([model.model.embed_tokens, model.lm_head], **options)
    else:
        fully_shard(model.model.embed_tokens, **options)
        fully_shard(model.lm_head, **options)
    return fully_shard(model, **options)


LAYOUTS = {"ddp": ddp, "root": root, "norm and head": norm_and_head, "own unit": own_unit}
FSDP2 = [name for name in LAYOUTS if name != "ddp"]


# The batch, the same in every process; a rank has ROLLOUTS // WORLD rollouts of it.


def whole_batch() -> dict[str, torch.Tensor]:
    """Student's and self-teacher's prompts of different lengths, padded on the left, with the same response."""
    generator = torch.Generator().manual_seed(5)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(2, VOCABULARY, (ROLLOUTS, length), generator=generator)

    response, batch = ids(TOKENS), {}
    for side, prompt in (("student", 7), ("teacher", 11)):
        padding = torch.randint(0, 4, (ROLLOUTS, 1), generator=generator)
        batch[f"{side}_ids"] = torch.cat([ids(prompt), response], dim=1)
        batch[f"{side}_mask"] = (torch.arange(prompt + TOKENS) >= padding).long()
    lengths = torch.tensor([[5], [2], [4], [1], [3], [1]])  # unlike on the two ranks
    batch["mask"] = (torch.arange(TOKENS) < lengths).float()
    batch["weight"] = torch.tensor([1.5, 0.5, 2.0, 0.7, 1.2, 3.0])
    return batch


def rows_of(batch: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: values[rows] for name, values in batch.items()}


def own_rows() -> slice:
    share = ROLLOUTS // WORLD
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


# One process: logits in full, in float64, and autograd.


def expected_loss(student: nn.Module, teacher: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    def log_softmax(model: nn.Module, side: str) -> torch.Tensor:
        logits = model(batch[f"{side}_ids"], attention_mask=batch[f"{side}_mask"]).logits
        return logits[:, -TOKENS - 1 : -1].log_softmax(-1)

    with torch.no_grad():
        log_q = log_softmax(teacher, "teacher")
    log_p = log_softmax(student, "student")
    mask = batch["mask"].double()
    return (batch["weight"].double()[:, None] * mask * between(log_p, log_q, BETA)).sum() / mask.sum()


def doubled(student: nn.Module, teacher: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Copies in float64; a teacher that is the student stays so."""
    copies = copy.deepcopy((student, teacher))
    return copies[0].double(), copies[1].double()


# One rank of two.


def head_of_teacher(teacher: nn.Module, student: nn.Module) -> Head | None:
    """None: both share one, of which nothing is gathered."""
    return None if teacher is student else head_of(teacher)


def local_loss(student, teacher, batch: dict[str, torch.Tensor], count: torch.Tensor, distil) -> torch.Tensor:
    """This rank's share of the token mean, times the number of ranks, over which DDP, FSDP2 and ZeRO average."""
    with torch.no_grad():
        hidden = hidden_states(teacher, batch["teacher_ids"], batch["teacher_mask"], TOKENS)
    result = distil(
        student,
        batch["student_ids"],
        batch["student_mask"],
        TOKENS,
        mask=None,
        teacher_hidden=hidden,
        token_weight=batch["weight"][:, None] * batch["mask"],
        beta=BETA,
        teacher_head=head_of_teacher(teacher, student),
    )
    return result.loss / count * WORLD


def total(value: torch.Tensor) -> torch.Tensor:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def in_full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {
        name.removeprefix("module."): None if parameter.grad is None else in_full(parameter.grad)
        for name, parameter in model.named_parameters()
    }


def errors(found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest absolute error of each tensor; infinite where there is none."""
    assert found.keys() == expected.keys()
    return {
        name: math.inf if found[name] is None else (found[name] - value).abs().max().item()
        for name, value in expected.items()
    }


def sharded_step(
    layout: str,
    *,
    tied: bool = False,
    live: bool = True,
    bias: bool = False,
    checkpointing: bool = False,
    patch_after: bool = False,
    micro_batches: int = 1,
    optimiser_steps: int = 1,
    weight: list[float] | None = None,
    questions: tuple[list[float], list[int]] | None = None,
    distil=distill,
    head: type[nn.Linear] | None = None,
) -> dict[str, object]:
    """The last step's loss and gradients: how far two ranks and one process are apart, and how large they are.

    live: the teacher is the student, on the teacher's prompts. Otherwise a frozen model of another width, sharded too.
    questions: rewards and ids; the ranks weight by `question_weights(..., group=)`, one process as the paper says.
    """
    student = tiny(1, tied=tied, bias=bias)
    teacher = student if live else tiny(2, tied=tied, bias=bias, width=48).requires_grad_(False)
    if head is not None:
        student.lm_head.__class__ = teacher.lm_head.__class__ = head
    oracle, oracle_teacher = doubled(student, teacher)
    if checkpointing:
        student.gradient_checkpointing_enable()
    if not patch_after:
        patch_lm_head(student)
    wrapped = LAYOUTS[layout](student)
    teacher = wrapped if live else LAYOUTS["root" if layout == "ddp" else layout](teacher)
    if patch_after:
        patch_lm_head(wrapped)

    batch = whole_batch()
    if weight is not None:
        batch["weight"] = torch.tensor(weight)
    own = rows_of(batch, own_rows())
    if questions is not None:
        batch["weight"] = weights_of_questions(*questions)
        rewards, ids = (torch.tensor(x)[own_rows()] for x in questions)
        own["weight"] = question_weights(rewards, ids, group=dist.group.WORLD)
    count = total(own["mask"].sum())
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (wrapped, oracle)]
    for step in range(optimiser_steps):
        if step > 0:
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
        loss = expected_loss(oracle, oracle_teacher, batch)
        (SCALE * loss).backward()
        ours = torch.zeros(())
        for number in range(micro_batches):
            synchronise_gradients(wrapped, number == micro_batches - 1)
            part = local_loss(wrapped, teacher, rows_of(own, slice(number, None, micro_batches)), count, distil)
            (SCALE * part).backward()
            ours += part.detach()
    return compared(ours, gradients(wrapped), loss, oracle)


def weights_of_questions(rewards: list[float], ids: list[int]) -> torch.Tensor:
    """(p (1 - p))^(1/2) over its mean over the questions where it is not 0."""
    raw = {}
    for question in set(ids):
        own = [reward for reward, number in zip(rewards, ids, strict=True) if number == question]
        rate = sum(own) / len(own)
        raw[question] = math.sqrt(rate * (1 - rate))
    positive = [value for value in raw.values() if value > 0]
    return torch.tensor([raw[question] / (sum(positive) / len(positive)) for question in ids])


def synchronise_gradients(model: nn.Module, on: bool) -> None:
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
    else:
        model.require_backward_grad_sync = on


def compared(ours: torch.Tensor, found: dict[str, torch.Tensor | None], loss: torch.Tensor, oracle: nn.Module) -> dict:
    expected = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    return {
        "loss": abs(total(ours).item() / WORLD - loss.item()),
        "gradients": errors(found, expected),
        "sizes": {name: value.abs().max().item() for name, value in expected.items()},
    }


def agrees(results: list[dict]) -> None:
    """On both ranks the loss and the gradient of every parameter are one process's, and are not small."""
    for result in results:
        assert result["loss"] < TOLERANCE
        name, error = max(result["gradients"].items(), key=lambda pair: pair[1])
        assert error < TOLERANCE, name
        assert all(size > 0.1 for name, size in result["sizes"].items() if name in ENDS), result["sizes"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("rendezvous"), WORLD)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def ranks_with_deepspeed(tmp_path_factory):
    """Processes of its own: importing DeepSpeed changes torch."""
    pytest.importorskip("deepspeed", reason="deepspeed: pip install deepspeed")
    ranks = Ranks(tmp_path_factory.mktemp("rendezvous"), WORLD)
    yield ranks
    ranks.stop()


# The head runs inside its own forward.


@pytest.mark.parametrize("live", [True, False], ids=["live teacher", "frozen teacher"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_parameter(ranks, layout, tied, live):
    """Two ranks, whose token counts differ, get one process's loss and gradients."""
    agrees(ranks(sharded_step, layout=layout, tied=tied, live=live))


@pytest.mark.parametrize("live", [True, False], ids=["live teacher", "frozen teacher"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_without_weighted_rows_joins(ranks, layout, live):
    """Its backward reaches every parameter: the other rank waits for none, and the mean has its zeros."""
    agrees(ranks(sharded_step, layout=layout, live=live, weight=[1.5, 0.5, 2.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_weighted_rows_at_all(ranks, layout):
    """Every parameter has a gradient, and it is exactly 0."""
    for result in ranks(sharded_step, layout=layout, weight=[0.0] * ROLLOUTS):
        assert {*result["gradients"].values()} == {0.0} == {*result["sizes"].values()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_optimiser_step(ranks, layout, tied):
    """Nothing is kept from the step before: the live teacher has the weights that the first step left."""
    agrees(ranks(sharded_step, layout=layout, tied=tied, optimiser_steps=2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches(ranks, layout):
    """Gradients that are reduced with the last of three backward passes only."""
    agrees(ranks(sharded_step, layout=layout, micro_batches=3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_patched_after_wrapping(ranks, layout):
    agrees(ranks(sharded_step, layout=layout, patch_after=True))


@pytest.mark.parametrize("layout", ["ddp", "own unit"])
def test_gradient_checkpointing(ranks, layout):
    """Layers run again in backward; the head does not."""
    agrees(ranks(sharded_step, layout=layout, checkpointing=True))


@pytest.mark.parametrize("live", [True, False], ids=["live teacher", "frozen teacher"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bias(ranks, layout, live):
    """A bias of the head is gathered and reduced with its weight; a sharded teacher's is gathered."""
    agrees(ranks(sharded_step, layout=layout, bias=True, live=live))


def test_questions_that_straddle_the_ranks(ranks):
    """Pass rates are over both ranks' rollouts: on rank 0 alone, question 0 would have been solved always."""
    questions = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0, 1, 1, 1, 1, 0]
    agrees(ranks(sharded_step, layout="own unit", questions=questions))


def by_scsdpo_loss(model, input_ids, attention_mask, tokens, *, mask, token_weight, **distill_args):
    """As `distill`, with each row's weight split into its rollout's and a mask."""
    mask = (token_weight != 0).float()
    weight = token_weight.amax(dim=1)
    given = {"question_weight": weight, "mask": mask, "denominator": 1.0, **distill_args}
    return distill(model, input_ids, attention_mask, tokens, **given)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scsdpo_loss_in_the_head(ranks, layout):
    """With `mask` among its arguments the head computes scsdpo_loss."""
    agrees(ranks(sharded_step, layout=layout, distil=by_scsdpo_loss))


def gathered_teacher(layout: str, after_forward: bool) -> tuple[bool, bool]:
    teacher = tiny(2, bias=True, width=48).requires_grad_(False)
    weight, bias = teacher.lm_head.weight.detach().clone(), teacher.lm_head.bias.detach().clone()
    teacher, batch = LAYOUTS[layout](teacher), whole_batch()
    if after_forward:
        with torch.no_grad():
            hidden_states(teacher, batch["teacher_ids"], batch["teacher_mask"], TOKENS)
    found = head_of(teacher)
    assert found == Head(found.weight, found.bias) and not found.weight.requires_grad and not found.bias.requires_grad
    return torch.equal(found.weight, weight), torch.equal(found.bias, bias)


@pytest.mark.parametrize("after_forward", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("layout", FSDP2)
def test_a_teachers_head_is_in_full(ranks, layout, after_forward):
    """Before the teacher's forward, when everything is sharded, and after it, when some units are still gathered."""
    for weight, bias in ranks(gathered_teacher, layout=layout, after_forward=after_forward):
        assert weight and bias


def in_bfloat16(layout: str, live: bool) -> tuple[float, float]:
    """How far the importance ratio is from 1 on policy, and the loss from the sum that its fields make."""
    options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    student = tiny(1)
    patch_lm_head(student)
    student = LAYOUTS[layout](student, **options)
    teacher = student if live else LAYOUTS[layout](tiny(2, width=48).requires_grad_(False), **options)
    batch = rows_of(whole_batch(), own_rows())
    weight = batch["weight"][:, None] * batch["mask"] / 3
    given = {"teacher_head": head_of_teacher(teacher, student)}
    with torch.no_grad():
        hidden = hidden_states(teacher, batch["teacher_ids"], batch["teacher_mask"], TOKENS)
    inputs = student, batch["student_ids"], batch["student_mask"], TOKENS
    given |= {"target_ids": batch["student_ids"][:, -TOKENS:], "teacher_hidden": hidden, "token_weight": weight}
    given["mask"] = None
    with torch.no_grad():
        old = distill(*inputs, **given).student_logp
    result = distill(*inputs, **given, old_logp=old)
    result.loss.backward()
    ratio = (result.importance_ratio - 1)[weight > 0].abs().max()
    total = (weight * result.importance_ratio * result.divergence).sum()
    return ratio.item(), (result.loss / total - 1).abs().item()


@pytest.mark.parametrize(("layout", "live"), [(layout, live) for layout in FSDP2 for live in (True, False)])
def test_mixed_precision(ranks, layout, live):
    """Parameters in bfloat16, weights and log-probabilities of the tokens as they were given."""
    for ratio, loss in ranks(in_bfloat16, layout=layout, live=live):
        assert ratio < 1e-5 and loss < 1e-5


def plain_forward(layout: str) -> float:
    model, batch = tiny(1), rows_of(whole_batch(), own_rows())
    given = {"input_ids": batch["student_ids"], "attention_mask": batch["student_mask"]}
    expected = model(**given).logits
    patch_lm_head(model)
    return (LAYOUTS[layout](model)(**given).logits - expected).abs().max().item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_forward_is_untouched(ranks, layout):
    """The patched head of a sharded model gives logits where it is not asked to distil."""
    assert max(ranks(plain_forward, layout=layout)) < 1e-5


class Doubled(nn.Linear):
    """A head with a forward of its own."""

    def forward(self, hidden):
        return super().forward(hidden) * 2


class Squared(nn.Linear):
    """A head that is not affine."""

    def forward(self, hidden):
        return super().forward(hidden) ** 2


@pytest.mark.parametrize("live", [True, False], ids=["live teacher", "frozen teacher"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_that_is_taken_by_its_own_forward(ranks, layout, live):
    """On unit vectors, inside the wrapper's forward; a sharded teacher's in full."""
    agrees(ranks(sharded_step, layout=layout, live=live, head=Doubled))


def refusals(layout: str) -> list[str]:
    """What each call says of a head that is not affine; which is once measured, at the first."""
    model, batch = tiny(1), rows_of(whole_batch(), own_rows())
    model.lm_head.__class__ = Squared
    wrapped = LAYOUTS[layout](model)
    if layout != "ddp":
        patch_lm_head(wrapped)  # its weights are not here
    inputs = wrapped, batch["student_ids"], batch["student_mask"], TOKENS
    calls = [lambda: hidden_states(*inputs), lambda: distill(*inputs, mask=None), lambda: head_of(wrapped)]
    found = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sharded_head_is_refused_on_all_ranks(ranks, layout):
    for found in ranks(refusals, layout=layout):
        assert len(found) == 3 and all("may not be affine" in message for message in found)


# COUNTEREXAMPLES: what this file would notice if the head's weight were read outside of the head's forward.


def with_the_shard(model, input_ids, attention_mask, tokens, *, mask, **distill_args):
    """The weight as the module has it, after the wrapper's forward."""
    hidden = hidden_states(model, input_ids, attention_mask, tokens)
    return linear_divergence(hidden, base_model(model).lm_head.weight, **distill_args)


def with_the_gathered_weight(model, input_ids, attention_mask, tokens, *, mask, **distill_args):
    """The weight gathered by hand, inside the root's forward but not the head's."""

    def student(inner: nn.Module):
        hidden = inner.model(input_ids, attention_mask, use_cache=False).last_hidden_state
        return linear_divergence(hidden[:, -tokens - 1 : -1], inner.lm_head.weight.full_tensor(), **distill_args)

    return inside_forward(model, student)


def test_counterexample_weight_of_the_module(ranks):
    """Not what scsdpo.head does: the shard is refused."""
    with pytest.raises(RuntimeError, match="DTensor"):
        ranks(sharded_step, layout="own unit", distil=with_the_shard)


def test_counterexample_weight_gathered_by_hand(ranks):
    """Not what scsdpo.head does: the loss is right, and the head's gradient is one rank's own, not the ranks' mean."""
    results = ranks(sharded_step, layout="own unit", distil=with_the_gathered_weight)
    with pytest.raises(AssertionError, match=r"lm_head\.weight"):
        agrees(results)
    for result in results:
        wrong = result["gradients"].pop("lm_head.weight")
        assert wrong > 0.1 and result["loss"] < TOLERANCE and max(result["gradients"].values()) < TOLERANCE


# DeepSpeed, where it is installed.


def zero3(model: nn.Module, *, trained: bool) -> nn.Module:
    """A ZeRO-3 engine that partitions every parameter, also those that are so small that it would keep them whole."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": ROLLOUTS // WORLD,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_model_persistence_threshold": 0,
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0) if trained else None
    return deepspeed.initialize(model=model, config=config, optimizer=optimiser, dist_init_required=False)[0]


def zero3_step(*, tied: bool, live: bool) -> dict[str, object]:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(dist.get_rank()), LOCAL_WORLD_SIZE=str(WORLD))
    from deepspeed.utils import safe_get_full_grad

    student = tiny(1, tied=tied)
    teacher = student if live else tiny(2, tied=tied, width=48).requires_grad_(False)
    oracle, oracle_teacher = doubled(student, teacher)
    patch_lm_head(student)
    engine = zero3(student, trained=True)
    teacher = engine if live else zero3(teacher, trained=False)
    assert base_model(engine).lm_head.weight.numel() == 0  # partitioned

    batch = whole_batch()
    own = rows_of(batch, own_rows())
    loss = expected_loss(oracle, oracle_teacher, batch)
    (SCALE * loss).backward()
    ours = local_loss(engine, teacher, own, total(own["mask"].sum()), distill)
    engine.backward(SCALE * ours)
    found = {name: safe_get_full_grad(parameter) for name, parameter in engine.module.named_parameters()}
    return compared(ours, found, loss, oracle)


@pytest.mark.parametrize("live", [True, False], ids=["live teacher", "frozen teacher"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_deepspeed_zero3(ranks_with_deepspeed, tied, live):
    """As FSDP2, with partitioned parameters that DeepSpeed gathers around each module's forward."""
    agrees(ranks_with_deepspeed(zero3_step, tied=tied, live=live))
