"""Small models, questions and settings under which a training of TRL's is over in seconds on a CPU, or on two."""

import json
import os
import subprocess
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WORDS = ["<pad>", "<eos>", "<unk>", *map(str, range(60))]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 1,
         "bos_token_id": None, "vocab_size": len(WORDS), "initializer_range": 0.3}  # fmt: skip
MODELS = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen3, tied": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM, {}),
}


def save(root):
    """Every model and its tokenizer: base and EMA teachers are read from there."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   padding_side="left")  # fmt: skip
    for name, (config, model, options) in MODELS.items():
        torch.manual_seed(1)
        model(config(**{**SIZES, **options})).save_pretrained(root / name)
        fast.save_pretrained(root / name)
    return root


def reward(completion_ids, **_):
    """Successful are sums of ids that 3 divides: some questions all, some none, most between."""
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


QUESTIONS = Dataset.from_list([{"prompt": f"{i} {i + 7} {2 * i}"} for i in range(20)])
BASE = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4, "max_steps": 3,
    "max_completion_length": 6, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
    "use_cpu": True, "bf16": False, "distillation_mode": "full_logits", "distillation_alpha": 0.5, "seed": 3,
    "lr_scheduler_type": "constant", "max_prompt_length": 32, "disable_tqdm": True, "diagnostics_warning_interval": 0,
    "gradient_checkpointing": False,
}  # fmt: skip


def run_two_processes(script, *arguments):
    """What the script, run by torchrun on two processes, hands to `finish`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    run = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = next(line for line in run.stdout.splitlines() if line.startswith("LOG "))
    return json.loads(found[4:])


def finish(found):
    """Prints it on the first process, and ends."""
    if os.environ["RANK"] == "0":
        print("LOG", json.dumps(found), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # past the destructors of libraries whose threads may still run


def sharded():
    """Options for FSDP2. Accelerate turns it on where there are GPUs; PyTorch's runs on gloo as well."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self, *arguments, **options):
        original(self, *arguments, **options)
        if options.get("fsdp_plugin") is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, options["fsdp_plugin"]

    AcceleratorState.__init__ = init
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}}
