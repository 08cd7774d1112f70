"""scsdpo.head on sharded models: two processes on a CPU against one, in float64, that sees the whole batch."""

import copy
import math
import time
import traceback
import uuid
from datetime import timedelta
from multiprocessing.connection import wait

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

pytest.importorskip("transformers", reason="transformers: pip install '.[demo]'")

from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

from scsdpo.head import distill, hidden_states, patch_lm_head, teacher_arguments

WORLD, ROLLOUTS, TOKENS, VOCABULARY, BETA = 2, 6, 5, 101, 0.3  # an odd vocabulary: shards of 51 and 50 rows
TOLERANCE = 2e-6  # absolute; the largest gradients are between 0.1 and a few
SECONDS = 60  # after which a rank that has not answered waits for the other


def tiny(seed: int, *, tied: bool = False, bias: bool = False, width: int = 32) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0,
        bos_token_id=None, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).train()
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY))
    return model


# Layouts: each wraps a model and returns what the trainer then calls.


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def _layers(model: nn.Module) -> None:
    for layer in model.model.layers:
        fully_shard(layer)


def _is_tied(model: nn.Module) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def root(model: nn.Module) -> nn.Module:
    """The head in the root unit, which stays gathered from its first forward to its backward."""
    _layers(model)
    return fully_shard(model)


def norm_and_head(model: nn.Module) -> nn.Module:
    """One unit of the last norm and the head, as accelerate 1.15 and prime-rl shard; tied, the embeddings belong to it."""
    _layers(model)
    tail = [model.model.norm, model.lm_head]
    if _is_tied(model):
        tail.insert(1, model.model.embed_tokens)
    else:
        fully_shard(model.model.embed_tokens)
    fully_shard(tail, reshard_after_forward=False)
    return fully_shard(model)


def own_unit(model: nn.Module) -> nn.Module:
    """The head its own unit, as verl shards; tied, together with the embeddings. Gathered for the head's forward only."""
    _layers(model)
    if _is_tied(model):
        fully_shard([model.model.embed_tokens, model.lm_head])
    else:
        fully_shard(model.model.embed_tokens)
        fully_shard(model.lm_head)
    return fully_shard(model)


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
    log_m = torch.logaddexp(log_p + math.log(1 - BETA), log_q + math.log(BETA))
    divergence = (1 - BETA) * log_p.exp() * (log_p - log_m) + BETA * log_q.exp() * (log_q - log_m)
    mask = batch["mask"].double()
    return (batch["weight"].double()[:, None] * mask * divergence.sum(-1)).sum() / mask.sum()


def doubled(student: nn.Module, teacher: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Copies in float64; a teacher that is the student stays so."""
    copies = copy.deepcopy((student, teacher))
    return copies[0].double(), copies[1].double()


# One rank of two.


def local_loss(student: nn.Module, teacher: nn.Module, batch: dict[str, torch.Tensor], count) -> torch.Tensor:
    """This rank's share of the token mean, times the number of ranks, over which DDP and FSDP2 average."""
    with torch.no_grad():
        hidden = hidden_states(teacher, batch["teacher_ids"], batch["teacher_mask"])[:, -TOKENS - 1 : -1]
    result = distill(
        student,
        batch["student_ids"],
        batch["student_mask"],
        TOKENS,
        teacher_hidden=hidden,
        token_weight=batch["weight"][:, None] * batch["mask"],
        beta=BETA,
        **teacher_arguments(teacher, student),
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
) -> dict[str, object]:
    """Loss and gradients of one step (the last of several) of both ways, and how far they are apart.

    live: the teacher is the student, on the teacher's prompts. Otherwise a frozen model of another width, sharded too.
    """
    student = tiny(1, tied=tied, bias=bias)
    teacher = student if live else tiny(2, tied=tied, bias=bias, width=48).requires_grad_(False)
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
    count = total(own["mask"].sum())
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (wrapped, oracle)]
    for step in range(optimiser_steps):
        if step > 0:
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
        loss = expected_loss(oracle, oracle_teacher, batch)
        loss.backward()
        ours = torch.zeros(())
        for number in range(micro_batches):
            last = number == micro_batches - 1
            if layout == "ddp":
                wrapped.require_backward_grad_sync = last
            else:
                wrapped.set_requires_gradient_sync(last)
            part = local_loss(wrapped, teacher, rows_of(own, slice(number, None, micro_batches)), count)
            part.backward()
            ours += part.detach()
    expected = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    return {
        "loss": abs(total(ours).item() / WORLD - loss.item()),
        "gradients": errors(gradients(wrapped), expected),
        "sizes": {name: value.abs().max().item() for name, value in expected.items()},
    }


def agrees(results: list[dict]) -> None:
    """On both ranks, the loss and the gradient of every parameter; and those of the head and below are not small."""
    for result in results:
        assert result["loss"] < TOLERANCE
        assert max(result["gradients"].values()) < TOLERANCE, result["gradients"]
        assert result["sizes"]["model.embed_tokens.weight"] > 0.05
        assert result["sizes"].get("lm_head.weight", 1) > 0.05


# Two processes that stay, since starting takes longer than a step.


def serve(rank: int, rendezvous: str, pipe) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=timeout)
    while (task := pipe.recv()) is not None:
        case, arguments = task
        try:
            pipe.send((case(**arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Runs a function of this module in both processes; returns what rank 0 and rank 1 have returned."""

    def __init__(self, folder):
        self.folder, self.processes, self.pipes = folder, [], []

    def start(self) -> None:
        context, rendezvous = mp.get_context("spawn"), f"file://{self.folder}/{uuid.uuid4().hex}"
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, rendezvous, theirs), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(ours)

    def __call__(self, case, **arguments) -> list:
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((case, arguments))
        answers, deadline = {}, time.monotonic() + SECONDS
        while len(answers) < WORLD:
            missing = [pipe for pipe in self.pipes if pipe not in answers]
            for pipe in wait(missing, max(0, deadline - time.monotonic())):
                answers[pipe], error = pipe.recv()
                if error is not None:
                    self.stop()  # the other rank may wait for this one
                    raise RuntimeError(f"rank {missing.index(pipe)}:\n{error}")
            if time.monotonic() > deadline:
                self.stop()
                raise TimeoutError(
                    f"{WORLD - len(answers)} of {WORLD} ranks have not answered: one waits for the other"
                )
        return [answers[pipe] for pipe in self.pipes]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("rendezvous"))
    yield ranks
    ranks.stop()


# The head runs inside its own forward.


@pytest.mark.parametrize("live", [True, False], ids=["live teacher", "frozen teacher"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_parameter(ranks, layout, tied, live):
    """Loss and gradients are one process's; the two ranks' token counts differ."""
    agrees(ranks(sharded_step, layout=layout, tied=tied, live=live))
