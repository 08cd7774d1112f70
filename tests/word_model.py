"""A tiny Llama in place of SmolLM2, whose tokens are the words and numbers of benchmarks/smollm2.py's problems."""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import smollm2

CHAT = (
    "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save(root: Path) -> Path:
    """Model and tokenizer as a folder."""
    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
    texts = " ".join(x.question + x.solution + x.mistake for x in smollm2.problems(200))
    before = pre_tokenizers.Whitespace()
    words = sorted({word for word, _ in before.pre_tokenize_str(texts)})
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate([*special, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = before
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        chat_template=CHAT,
    ).save_pretrained(root)  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, vocab_size=len(special) + len(words), pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.3, tie_word_embeddings=True,
    )).save_pretrained(root)  # fmt: skip
    return root
