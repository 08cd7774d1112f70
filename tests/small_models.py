"""Every causal-LM and image-text class of the installed transformers, as small as its config can be made by rules."""

import contextlib
import inspect
import io
import re
import warnings

import torch
import transformers
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY, WIDTH, LAYERS, HEADS = 199, 32, 2, 2
MOST = 20_000_000  # parameters

# The first pattern that a number's name in a config matches says how small it becomes.
SIZES = [
    (r"^(vocab_size|text_vocab_size|backbone_vocab_size|vocab_size_per_layer_input|unpadded_vocab_size)$", VOCABULARY),
    (r"^(type_vocab_size|task_type_vocab_size)$", 2),
    (r"^(intermediate_size|n_inner|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|.*_ffn_dim|mlp_dim)$", 48),
    (r"^(moe_|expert_|shared_|.*expert.*_)*intermediate_size$|^moe_hidden_size$|^expert_dim$", 16),
    (r"^(hidden_size|d_model|n_embd|embed_dim|embedding_size|dim|model_dim|attention_hidden_size|width)$", WIDTH),
    (r"^(out_hidden_size|projection_dim|text_hidden_size|output_hidden_size|mm_hidden_size|hidden_dim)$", WIDTH),
    (r"^(rnn_)?(lru_width)$", WIDTH),
    (r"^(num_hidden_layers|n_layers?|num_layers|.*decoder_layers|.*encoder_layers|depth|.*num_layers)$", LAYERS),
    (r"^(n_heads?|num_heads|.*attention_heads|.*num_key_value_heads|n_kv_heads|num_kv_heads)$", HEADS),
    (r"^(head_dim|attention_head_dim|v_head_dim|qk_nope_head_dim|kv_channels|swa_head_dim|d_head)$", 16),
    (r"^(qk_rope_head_dim|rotary_dim)$", 8),
    (r"^(kv_lora_rank|q_lora_rank|o_lora_rank|.*_lora_rank|.*_rank)$", 8),
    (r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|.*num_experts)$", 4),
    (r"^(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_?k_experts|num_selected_experts)$", 2),
    (r"^(n_group|topk_group|num_expert_group|moe_num_shared_experts|n_shared_experts|num_shared_experts)$", 1),
    (r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_sequence_length)$", 128),
    (r"^(image_size)$", 32),
    (r"^(patch_size)$", 8),
    (r"^(mamba_d_state|state_size|ssm_state_size|mamba_state_dim)$", 8),
    (r"^(index_n_heads|index_head_dim|index_topk)$", 8),
    (r"^(num_nextn_predict_layers|first_k_dense_replace)$", 0),
]
WIDE = [(r".*(hidden_size|embed_dim|channels)$", WIDTH), (r".*(layers|depth)$", LAYERS)]
LATENT = [(r"^(head_dim)$", 8), (r"^(qk_head_dim)$", 24), (r"^(num_key_value_heads)$", HEADS)]
WINDOWED = [(r"^(sliding_window|.*window_size|.*window_len)$", 8), (r"^(d_rel|rel_extent)$", 16)]
RULES = {"": SIZES, "wide": [*SIZES, *WIDE], "latent": [*LATENT, *SIZES], "windowed": [*WINDOWED, *SIZES, *WIDE]}
SECTIONS = (None, [2, 3, 3], [1, 1, 2])  # rotary embeddings in three dimensions
# What no rule says.
EXPLICIT = {
    "BambaForCausalLM": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": 50},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 5, "IMGIMGA": 6}},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2, "head_dim": 8},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 5}},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nForCausalLM": {
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "GraniteMoeHybridForCausalLM": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 16},
    "Inkling2ForCausalLM": {"rel_extent": 16, "unpadded_vocab_size": VOCABULARY},
    "InklingForCausalLM": {"rel_extent": 16},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 16},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "MinistralForCausalLM": {"head_dim": 16, "sliding_window": 8},
    "MusicgenForCausalLM": {"num_codebooks": 1},
    "NemotronForCausalLM": {"num_key_value_heads": 2, "head_dim": 16},
    "ReformerModelWithLMHead": {"axial_pos_embds": False, "is_decoder": True, "attn_layers": ["local", "local"]},
    "XLMWithLMHeadModel": {"emb_dim": 32},
    "XmodForCausalLM": {"default_language": "en_XX"},
}
TOKEN = re.compile(r"_(token_id|token_index)$|^(pad|bos|eos|image|video|audio|sep|cls|boi|eoi)_(token_)?(id|index)$")


def classes() -> list[str]:
    names: list[str] = []
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for value in mapping.values():
            names += [value] if isinstance(value, str) else list(value)
    return sorted(set(names))


def config_of(name: str) -> type[PretrainedConfig]:
    return getattr(transformers, name).config_class


def shrunk(kind: type[PretrainedConfig], sizes: list, changes: dict, sections: list[int] | None = None) -> dict:
    """Keyword arguments of a config by which it becomes small."""
    try:
        defaults = vars(kind())
    except Exception:  # a config that has no defaults
        parameters = inspect.signature(kind.__init__).parameters
        defaults = {name: x.default for name, x in parameters.items() if x.default is not inspect.Parameter.empty}
    small, token = {}, 3
    for name, value in defaults.items():
        if isinstance(value, bool):
            continue
        if TOKEN.search(name):
            if isinstance(value, int):
                small[name], token = token, token + 1
            elif isinstance(value, list):
                small[name], token = [token], token + 1
        elif isinstance(value, int):
            for pattern, size in sizes:
                if re.search(pattern, name):
                    small[name] = min(size, value) if value > 0 else value
                    break
        elif name == "rope_parameters" and sections is not None:
            small[name] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
        if name in changes and value is not None:
            small[name] = changes[name]
    for name, sub in getattr(kind, "sub_configs", {}).items():
        if isinstance(sub, type) and sub.__name__ != "AutoConfig":
            small[name] = shrunk(sub, sizes, changes, sections)
        elif isinstance(defaults.get(name), PretrainedConfig):
            of = type(defaults[name])
            small[name] = {"model_type": of.model_type, **shrunk(of, sizes, changes, sections)}
    return small


def build(name: str, seed: int = 0, changes: dict | None = None) -> torch.nn.Module:
    """A small model in evaluation mode that gives finite logits, its parameters away from where they start.

    Raises:
        RuntimeError: no rule makes one; the message is the first rule's.
    """
    changes = changes or {}
    kind, model, reasons = config_of(name), getattr(transformers, name), []
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sizes in RULES.values():
            for sections in SECTIONS:
                try:
                    small = {**shrunk(kind, sizes, changes, sections), **EXPLICIT.get(name, {})}
                    small |= {key: changes[key] for key in small.keys() & changes.keys()}
                    return _built(model, kind(**small), seed)
                except Exception as error:
                    text = str(error).strip().splitlines() or [""]
                    reasons.append(f"{type(error).__name__}: {text[-1].strip()}")
    raise RuntimeError(reasons[0])


def _built(model: type, config: PretrainedConfig, seed: int) -> torch.nn.Module:
    for sub in (config, config.get_text_config()):
        if hasattr(sub, "is_decoder") and not config.is_encoder_decoder:
            sub.is_decoder = True
    with torch.device("meta"):
        count = sum(x.numel() for x in model(config).parameters())
    if count > MOST:
        raise ValueError(f"it has {count} parameters")
    torch.manual_seed(seed)
    built = model(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for x in built.parameters():
        if x.is_floating_point():
            x.data.add_(0.02 * torch.randn(x.shape, generator=generator).to(x.dtype))
    if not config.is_encoder_decoder and not own_logits(built, *batch()).isfinite().all():
        raise ValueError("its logits are not finite")
    return built


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(30, VOCABULARY - 9, (2, 11), generator=torch.Generator().manual_seed(5))
    return ids, torch.ones_like(ids)


def own_logits(model: torch.nn.Module, ids: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=attention, use_cache=False).logits


def numbers(name: str) -> set[str]:
    """Names of what is set in a class's config and the configs in it."""

    def of(config: PretrainedConfig) -> set[str]:
        found = {key for key, value in vars(config).items() if value is not None}
        return found.union(*(of(x) for x in vars(config).values() if isinstance(x, PretrainedConfig)))

    kind = config_of(name)
    try:
        return of(kind())
    except Exception:  # a config that has no defaults
        return set()
