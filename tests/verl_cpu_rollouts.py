"""A rollout engine of verl named `hf_cpu`, transformers in a Ray actor; and a record of what engines are given.

verl's processes import it by VERL_USE_EXTERNAL_MODULES. Its weights come from the actor after every step, as vLLM's do.
"""

import os
from pathlib import Path

import ray
import torch
import torch.distributed as dist
import verl_on_cpu  # noqa: F401
from verl.workers.engine import BaseEngine
from verl.workers.rollout import base as rollout_base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput


class Server:
    """One replica: the model, and what verl asks of a server."""

    def __init__(self, path, response_length):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.response_length, self.global_steps = response_length, 0
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def generate(self, prompt_ids, sampling_params, request_id=None, **_):
        limit = min(sampling_params.get("max_tokens") or self.response_length, self.response_length)
        step, past, tokens, logp = torch.tensor([list(prompt_ids)]), None, [], []
        for _ in range(limit):
            out = self.model(step, past_key_values=past, use_cache=True)
            past = out.past_key_values
            row = (out.logits[0, -1] / sampling_params.get("temperature", 1.0)).log_softmax(-1)
            token = int(torch.multinomial(row.exp(), 1, generator=self.generator))
            tokens.append(token)
            logp.append(row[token].item())
            if token == self.model.config.eos_token_id:
                break
            step = torch.tensor([[token]])
        steps = {f"{name}global_steps": self.global_steps for name in ("", "min_", "max_")}
        return TokenOutput(
            token_ids=tokens, log_probs=logp, stop_reason="completed", num_preempted=0, extra_fields=steps
        )

    def load(self, state, global_steps):
        found = self.model.load_state_dict(state, strict=False)
        assert not found.unexpected_keys, found.unexpected_keys
        self.global_steps = global_steps or self.global_steps

    def nothing(self, *_, **__):
        pass

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = nothing
    abort_all_requests = resume_generation = start_profile = stop_profile = nothing


class Replica(RolloutReplica):
    async def launch_servers(self):
        actor = ray.remote(Server).options(name=f"hf_cpu_{self.replica_rank}", num_cpus=0)
        self.servers = [actor.remote(self.model_config.get("path"), self.config.response_length)]
        self._server_handle, self._server_address = self.servers[0], f"hf_cpu:{self.replica_rank}"


class Adapter(BaseRollout):
    """The actor's side: sends the weights."""

    def __init__(self, config, model_config, device_mesh, **kwargs):
        super().__init__(config, model_config, device_mesh)
        self.rank = int(os.environ["RANK"])

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, global_steps=None, wire_format="named_tensors", **kwargs):
        state = {name: tensor.detach().cpu().clone() for name, tensor in weights}  # a collective: every process
        await ray.get_actor(f"hf_cpu_{self.rank}").load.remote(state, global_steps)


RolloutReplicaRegistry.register("hf_cpu", lambda: Replica)
rollout_base._ROLLOUT_REGISTRY["hf_cpu", "async"] = "verl_cpu_rollouts.Adapter"


def recorded(folder: Path, train_batch):
    """Each mini-batch that an engine trains on, with its parameters before, as STEP-PROCESS.pt."""

    def train_batch_and_record(self, data, loss_function):
        rank = dist.get_rank()
        rows = {name: list(x.unbind()) for name, x in data.items() if isinstance(x, torch.Tensor) and x.is_nested}
        full = {
            name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in self.module.state_dict().items()
        }
        kind = type(self).__module__ + "." + type(self).__name__
        average = getattr(self, "ema_teacher", None) and dict(self.ema_teacher.average)
        run: list[int] = []
        embedding = self.module.get_input_embeddings()
        hook = embedding.register_forward_pre_hook(
            lambda _, args: run.append(args[0].numel()) if torch.is_grad_enabled() else None
        )
        step = len(list(folder.glob(f"*-{rank}.pt")))
        record = {
            "engine": kind,
            "rows": rows,
            "state": {k: v.clone() for k, v in full.items()},
            "uid": list(data["uid"]),
        }
        output = train_batch(self, data, loss_function)
        hook.remove()
        after = getattr(self, "ema_teacher", None) and dict(self.ema_teacher.average)
        torch.save(record | {"average": average if average else after, "tokens": run}, folder / f"{step}-{rank}.pt")
        return output

    return train_batch_and_record


if where := os.environ.get("SCSDPO_TEST_RECORD"):
    BaseEngine.train_batch = recorded(Path(where), BaseEngine.train_batch)
