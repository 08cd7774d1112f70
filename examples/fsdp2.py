"""A training loop of one's own with FSDP2: weights and denominator over all processes, the live model as its teacher.

torchrun --nproc-per-node 2 examples/fsdp2.py Qwen/Qwen3-0.6B          (NCCL on GPUs, gloo without)
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from scsdpo.head import distill, hidden_states
from scsdpo_kernels import question_weights, step_denominator


def shard(model):
    """Layers and the LM head are gathered one by one; a head that is tied to the embeddings stays with the root."""
    for layer in model.model.layers:
        fully_shard(layer)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        fully_shard(model.lm_head)
    return fully_shard(model)


def backward(model, batch, micro_batch=2) -> torch.Tensor:
    """Adds the gradients of a step; returns its loss, which is the same on all processes.

    batch: this process's rollouts. Each process has as many; the rollouts of a question may be on several.
    """
    world = dist.group.WORLD
    weight = question_weights(batch["rewards"], batch["question_ids"], group=world)
    total = step_denominator(batch["mask"], group=world)
    tokens = batch["mask"].shape[1]
    step = torch.zeros((), device=weight.device)
    for part in torch.arange(len(weight), device=weight.device).split(micro_batch):
        some = {name: values[part] for name, values in batch.items()}
        with torch.no_grad():
            teacher_hidden = hidden_states(model, some["teacher_input_ids"], some["teacher_attention_mask"], tokens)
        loss = distill(
            model,
            some["input_ids"],
            some["attention_mask"],
            tokens,
            teacher_hidden=teacher_hidden,
            mask=some["mask"],
            question_weight=weight[part],
            denominator=total,
        ).loss
        (loss * dist.get_world_size()).backward()  # FSDP2 averages gradients over processes
        step += loss.detach()
    dist.all_reduce(step)
    return step


def rollouts(vocabulary: int, device, count=4, prompt=32, response=64) -> dict[str, torch.Tensor]:
    """Random tokens in place of what you sample: one question, of which every process has `count` rollouts."""
    torch.manual_seed(dist.get_rank())
    made = torch.randint(vocabulary, (count, 3 * prompt + response), device=device)
    given = {"input_ids": made[:, -prompt - response :], "teacher_input_ids": made}
    given |= {x.replace("input_ids", "attention_mask"): torch.ones_like(y) for x, y in given.items()}
    given["mask"] = torch.ones_like(made[:, -response:])
    given["rewards"] = (torch.arange(count, device=device) % 2).float()
    given["question_ids"] = torch.zeros(count, dtype=torch.long, device=device)
    return given


def main(model, steps=3) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model = shard(model.to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    log = []
    for _ in range(steps):
        loss = backward(model, rollouts(model.config.vocab_size, device))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        log.append((loss.item(), norm.item()))
    return log


if __name__ == "__main__":
    dist.init_process_group()
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    log = main(AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32))
    if dist.get_rank() == 0:
        print("\n".join(f"loss {loss:.3e}, gradient norm {norm:.3e}" for loss, norm in log))
    dist.destroy_process_group()
