"""Heads and adapters that are more than a matrix: right, beside the model's own logits and gradients, or refused."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scsdpo import head as scsdpo_head
from scsdpo import measured
from scsdpo.head import distill, head_of, hidden_states, patch_lm_head, question_numbers, unpatch_lm_head
from scsdpo_kernels import linear_divergence

peft = pytest.importorskip("peft", reason="peft: pip install '.[trl]'")
tr = pytest.importorskip("transformers", reason="transformers: pip install '.[transformers]'")

T = 5
VOCABULARY = 151
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 8}  # fmt: skip
BOTH = {"target_modules": ["q_proj", "lm_head"]}


def llama(seed=0, **options):
    torch.manual_seed(seed)
    return tr.LlamaForCausalLM(tr.LlamaConfig(**{**TEXT, **options}))


def batch(rows=2, padded=True):
    ids = torch.randint(20, 120, (rows, 11), generator=torch.Generator().manual_seed(0))
    attention = torch.ones_like(ids)
    attention[0, : 2 * padded] = 0  # on the left
    return ids, attention


def kl(log_q, log_p):
    return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)


def own_log_p(model, ids, attention, **inputs):
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False, **inputs).logits
    return logits[:, -T - 1 : -1].double().log_softmax(-1)


def is_right(model, padded=True, **inputs):
    """Log-probabilities, loss and every gradient of a student; log-probabilities of a teacher. Oracle: own logits."""
    model.eval()
    ids, attention = batch(1 if inputs else 2, padded and not inputs)
    if inputs:
        ids[0, 2:6] = 5  # where the image goes
    target = ids[:, -T:]
    other = llama(7)
    with torch.no_grad():
        log_q = own_log_p(other, ids, attention)
    log_p = own_log_p(model, ids, attention, **inputs)
    loss = kl(log_q, log_p).sum()
    loss.backward()
    expected = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()

    with torch.no_grad():
        hidden = hidden_states(other, ids, attention, T)
    result = distill(model, ids, attention, T, mask=torch.ones(len(ids), T), question_weight=torch.ones(len(ids)),
                     reduction="sum", teacher_hidden=hidden, teacher_head=head_of(other), beta=0.0, target_ids=target,
                     backbone=inputs)  # fmt: skip
    chosen = log_p.gather(-1, target[..., None])[..., 0]
    torch.testing.assert_close(result.student_logp.double(), chosen, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(result.loss.double(), loss, rtol=1e-4, atol=2e-5)
    result.loss.backward()
    got = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    missing = [name for name, x in expected.items() if name not in got and x.abs().max() > 1e-7]
    assert not missing, f"no gradient: {missing}"
    for name, x in expected.items():
        if name in got:
            assert (got[name] - x).norm() <= 1e-4 * x.norm() + 1e-5, name
    model.zero_grad()

    with torch.no_grad():
        hidden = hidden_states(model, ids, attention, T, backbone=inputs)
        result = distill(other, ids, attention, T, mask=None, teacher_hidden=hidden, teacher_head=head_of(model),
                         target_ids=target)  # fmt: skip
    torch.testing.assert_close(result.teacher_logp.double(), chosen.detach(), rtol=1e-4, atol=2e-5)


def is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        patch_lm_head(model)
    with pytest.raises(ValueError, match=message):
        head_of(model)


# ---------------------------------------------------------------------------------------------------------------------
# What stands before and behind a head.


ENCODER = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
           "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip


def modernbert():
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return tr.ModernBertDecoderForCausalLM(tr.ModernBertDecoderConfig(**ENCODER, **ids))


BEFORE = {
    "bert": lambda: tr.BertLMHeadModel(tr.BertConfig(**ENCODER, is_decoder=True)),
    "roberta": lambda: tr.RobertaForCausalLM(tr.RobertaConfig(**ENCODER, is_decoder=True)),
    "electra": lambda: tr.ElectraForCausalLM(tr.ElectraConfig(**ENCODER, embedding_size=16, is_decoder=True)),
    "modernbert-decoder": modernbert,
}


@pytest.mark.parametrize("name", BEFORE)
def test_layers_between_backbone_and_head(name):
    torch.manual_seed(0)
    is_right(BEFORE[name]())


def test_an_encoder_decoder_is_refused():
    config = tr.T5Config(vocab_size=VOCABULARY, d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2,
                         decoder_start_token_id=0)  # fmt: skip
    is_refused(tr.T5ForConditionalGeneration(config), "encoder-decoder")


def vision(config, model, **options):
    text = tr.Cohere2Config(**TEXT, head_dim=16)
    return model(config(text_config=text, vision_config=tr.SiglipVisionConfig(**VISION), **options))


def gemma3():
    text = tr.Gemma3TextConfig(**TEXT, head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=3.0)
    config = tr.Gemma3Config(text_config=text, vision_config=tr.SiglipVisionConfig(**VISION), mm_tokens_per_image=4)
    return tr.Gemma3ForConditionalGeneration(config)


BEHIND = {
    "a scaling that multiplies": lambda: tr.HyperCLOVAXForCausalLM(tr.HyperCLOVAXConfig(**TEXT, logits_scaling=0.125)),
    "a scaling that divides": lambda: tr.GraniteForCausalLM(tr.GraniteConfig(**TEXT, logits_scaling=8.0)),
    "a scale that the class has not": lambda: vision(tr.Cohere2VisionConfig, tr.Cohere2VisionForConditionalGeneration),
    "a scale that the class has not, Aya": lambda: vision(tr.AyaVisionConfig, tr.AyaVisionForConditionalGeneration),
    "a softcap that the class has not": gemma3,
    "a scale of no known name": lambda: scaled_behind(llama()),
    "a scale and a softcap": lambda: scaled_behind(llama(), cap=2.5),
}


def scaled_behind(model, cap=None):
    class Behind(type(model)):
        def forward(self, *arguments, **options):
            result = super().forward(*arguments, **options)
            result.logits = result.logits * self.config.of_no_known_name
            if cap is not None:
                result.logits = cap * torch.tanh(result.logits / cap)
            return result

    model.__class__ = Behind
    model.config.of_no_known_name = 0.37
    return model


@pytest.mark.parametrize("name", BEHIND)
def test_scales_and_softcaps_are_measured(name):
    torch.manual_seed(0)
    is_right(BEHIND[name]())


def test_a_scale_is_that_of_the_config_to_the_last_digit():
    model = scaled_behind(llama().bfloat16(), cap=2.5)
    assert head_of(model).logit_scale == 0.37 and head_of(model).softcap == 2.5


def changed_behind(change):
    def build():
        model = llama()

        class Behind(type(model)):
            def forward(self, *arguments, **options):
                result = super().forward(*arguments, **options)
                result.logits = change(result.logits)
                return result

        model.__class__ = Behind
        return model

    return build


REFUSED_BEHIND = {
    "a vocabulary that is cut": (changed_behind(lambda z: z[..., :140]), "shape that its head gives"),
    "tokens that are forbidden": (
        changed_behind(lambda z: z.index_fill(-1, torch.tensor([3, 4]), -1e9)), "got 2 of 151 others"),
    "a softmax": (changed_behind(lambda z: z.log_softmax(-1)), "others"),
    "a cube": (changed_behind(lambda z: z**3), "does something else"),
    "a scale of some tokens": (
        changed_behind(lambda z: torch.cat([z[..., :9], 1.5 * z[..., 9:]], -1)), "does something else"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_BEHIND)
def test_what_else_stands_behind_a_head_is_refused(name):
    build, message = REFUSED_BEHIND[name]
    is_refused(build(), message)


# ---------------------------------------------------------------------------------------------------------------------
# Heads that are more than their weight.


class Quarter(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 4


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), self.weight)


def of_class(kind, seed=0):
    model = llama(seed)
    model.lm_head.__class__ = kind
    return model


def dory():
    if not hasattr(tr, "DoryForCausalLM"):
        pytest.skip("this transformers has no Dory")
    torch.manual_seed(0)
    model = tr.DoryForCausalLM(tr.DoryConfig(**TEXT, head_dim=16))
    model.lm_head.logit_scale.data.mul_(1 + 0.5 * torch.rand(VOCABULARY))
    return model


def with_layer(layer):
    model = llama()
    model.lm_head = layer
    return model


MORE = {
    "a subclass of Linear": lambda: of_class(Quarter),
    "a scale per token": dory,
    "a sequence": lambda: with_layer(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, VOCABULARY))),
    "a parametrised weight": lambda: with_layer(
        nn.utils.parametrizations.weight_norm(nn.Linear(32, VOCABULARY))),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_a_head_that_is_more_than_its_weight(name):
    is_right(MORE[name](), padded=name != "a scale per token")  # whose class takes no padding


@pytest.mark.parametrize("build", [
    lambda: of_class(Cosine),
    lambda: with_layer(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, VOCABULARY))),
])  # fmt: skip
def test_a_head_that_is_not_affine_is_refused(build):
    is_refused(build(), r"away from it on 8 tokens .* may not be affine")


def test_a_hook_that_changes_logits_is_refused():
    model = llama()
    patch_lm_head(model)
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    ids, attention = batch()
    with pytest.raises(ValueError, match="a hook changes it"):
        hidden_states(model, ids, attention, T)


class InEightBits(nn.Module):
    """As quantised layers store their weight."""

    def __init__(self, dtype):
        super().__init__()
        self.register_buffer("weight", torch.zeros(VOCABULARY, 32).to(dtype))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
@pytest.mark.parametrize("under_lora", [False, True])
def test_a_quantised_head_is_refused_by_that_name(dtype, under_lora):
    model = with_layer(InEightBits(dtype))
    if under_lora:
        head = nn.Module()
        head.base_layer, head.disable_adapters, head.merged = model.lm_head, False, False
        model.lm_head = head
    is_refused(model, f"quantised one .InEightBits, buffer weight in {str(dtype).removeprefix('torch.')}")


AFTER = {
    "never patched": lambda model: model,
    "more tokens": lambda model: (model.resize_token_embeddings(160), model)[1],
    "another layer": lambda model: (model.set_output_embeddings(nn.Linear(32, VOCABULARY)), model)[1],
    "LoRA": lambda model: shaken(peft.get_peft_model(model, peft.LoraConfig(**BOTH))),
    "LoRA, merged and unloaded": lambda model: shaken(
        peft.get_peft_model(model, peft.LoraConfig(**BOTH))).merge_and_unload().requires_grad_(),
    "another scale": lambda model: (scaled_behind(model), model)[1],
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
def test_what_comes_after_patching(name):
    model = llama()
    if name != "never patched":
        patch_lm_head(model)
    if name == "more tokens":
        model = AFTER[name](model).eval()
        ids, attention = batch()
        log_p = own_log_p(model, ids, attention).gather(-1, ids[:, -T:, None])[..., 0]
        result = distill(model, ids, attention, T, mask=None, target_ids=ids[:, -T:],
                         teacher_hidden=hidden_states(model, ids, attention, T).detach())  # fmt: skip
        torch.testing.assert_close(result.student_logp.double(), log_p, rtol=1e-4, atol=1e-5)
    else:
        is_right(AFTER[name](model))


# ---------------------------------------------------------------------------------------------------------------------
# PEFT on the head.


def shaken(model, by=0.3):
    """Trainable parameters away from where an adapter starts, at which it changes nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


def added(config):
    def then(model):
        model.add_adapter("later", config)
        model.set_adapter("later")
        shaken(model)

    return then


def two_active(model):
    model.add_adapter("later", peft.LoraConfig(**BOTH, r=4))
    model.base_model.set_adapter(["default", "later"])
    shaken(model)


def frozen(model):
    model.merge_adapter()
    for x in model.parameters():
        x.requires_grad_(False)
    model.model.model.embed_tokens.weight.requires_grad_()


def lora(**options):
    return peft.LoraConfig(**BOTH, **options)


ADAPTERS = {  # adapter, what happens after patch_lm_head
    "LoRA": (lora(), None),
    "IA3": (peft.IA3Config(**BOTH, feedforward_modules=[]), None),
    "LoHa": (peft.LoHaConfig(**BOTH), None),
    "LoKr": (peft.LoKrConfig(**BOTH), None),
    "VeRA": (peft.VeraConfig(**BOTH), None),
    "OFT": (peft.OFTConfig(**BOTH, r=0, oft_block_size=8), None),
    "BOFT": (peft.BOFTConfig(**BOTH, boft_block_size=4), None),
    "RandLoRA": (peft.RandLoraConfig(**BOTH, r=4), None),
    "VBLoRA": (peft.VBLoRAConfig(**BOTH, vector_length=1, num_vectors=8, topk=2), None),
    "FourierFT": (peft.FourierFTConfig(**BOTH, n_frequency=20), None),
    "HRA": (peft.HRAConfig(**BOTH), None),
    "DeLoRA": (peft.DeloraConfig(**BOTH), None),
    "OSF": (peft.OSFConfig(**BOTH), None),
    "MiSS": (peft.MissConfig(**BOTH, r=4), None),
    "LN": (peft.LNTuningConfig(target_modules=["norm"]), None),
    "AdaLoRA": (peft.AdaLoraConfig(**BOTH, init_r=6, target_r=4, total_step=10), None),
    "LoRA, rank-stabilised": (lora(use_rslora=True, lora_alpha=4), None),
    "LoRA with a bias": (lora(lora_bias=True), None),
    "LoRA, DoRA": (lora(use_dora=True), None),
    "LoRA beside a trained copy of the head": (
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), None),
    "LoRA beside trained tokens": (
        peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 30, 40]}), None),
    "LoRA, merged later": (lora(), frozen),
    "LoRA, DoRA activated later": (lora(), added(lora(use_dora=True))),
    "LoRA, another rank activated later": (lora(), added(lora(r=3))),
    "LoRA, one without the head later": (lora(), added(peft.LoraConfig(target_modules=["q_proj"]))),
    "LoRA, two active later": (lora(), two_active),
    "prefix tuning": (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_right(name):
    config, then = ADAPTERS[name]
    model = shaken(peft.get_peft_model(llama(), config), by=0.01 if name == "RandLoRA" else 0.3).eval()
    patch_lm_head(model)
    if then is not None:
        then(model)
    is_right(model)


@pytest.mark.parametrize("name", ["LoHa", "VeRA", "LoRA, DoRA"])
def test_an_adapter_that_changes_nothing_yet_is_trained(name):
    """At its start, where no comparison of values would see it."""
    model = peft.get_peft_model(llama(), ADAPTERS[name][0]).eval()
    ids, attention = batch()
    result = distill(model, ids, attention, T, mask=None, teacher_hidden=torch.randn(2, T, 32),
                     teacher_head=llama(3).lm_head.weight.detach())  # fmt: skip
    result.loss.backward()
    gradients = [x.grad for key, x in model.named_parameters() if "lm_head" in key and x.requires_grad]
    assert any(x is not None and x.abs().max() > 0 for x in gradients)


def invoked():
    config = lora(task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8])
    return shaken(peft.get_peft_model(llama(), config)).eval()


def prompted():
    return peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def merged_and_disabled():
    model = shaken(peft.get_peft_model(llama(), lora()))
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    return model


REFUSED = {
    "aLoRA": (invoked, "further arguments"),
    "prompt tuning": (prompted, "prompt learning"),
    "dropout": (lambda: peft.get_peft_model(llama().train(), lora(lora_dropout=0.1)), "without dropout"),
    "merged and disabled": (merged_and_disabled, "merged and disabled at once"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_cannot_be_right_are_refused(name):
    build, message = REFUSED[name]
    is_refused(build(), message)


def test_dropout_is_refused_when_training_starts():
    """In evaluation mode it does nothing."""
    model = peft.get_peft_model(llama(), lora(lora_dropout=0.1)).eval()
    patch_lm_head(model)
    is_right(model)
    ids, attention = batch()
    with pytest.raises(ValueError, match="without dropout in training"):
        distill(model.train(), ids, attention, T, mask=None)


def test_the_model_without_its_adapters_as_teacher():
    model = shaken(peft.get_peft_model(llama(), lora())).eval()
    ids, attention = batch()
    target = ids[:, -T:]
    with torch.no_grad(), model.disable_adapter():
        log_q = own_log_p(model, ids, attention).gather(-1, target[..., None])[..., 0]
        hidden, head = hidden_states(model, ids, attention, T), head_of(model)
    result = distill(model, ids, attention, T, mask=None, teacher_hidden=hidden, teacher_head=head, target_ids=target)
    torch.testing.assert_close(result.teacher_logp.double(), log_q, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"teacher_head: expected head_of\(teacher\), got None"):
        distill(model, ids, attention, T, mask=None, teacher_hidden=hidden)


# ---------------------------------------------------------------------------------------------------------------------
# Images.


def llava():
    text = tr.LlamaConfig(**{**TEXT, "pad_token_id": None})
    config = tr.LlavaConfig(text_config=text, vision_config=tr.CLIPVisionConfig(**VISION), image_token_index=5)
    return tr.LlavaForConditionalGeneration(config), {"pixel_values": torch.randn(1, 3, 16, 16)}


def qwen3_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    images = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    config = tr.Qwen3VLConfig(text_config={**TEXT, "head_dim": 16, "rope_parameters": rope}, vision_config=images,
                              image_token_id=5, video_token_id=6, vision_start_token_id=7,
                              vision_end_token_id=8)  # fmt: skip
    kinds = torch.zeros(1, 11, dtype=torch.int)
    kinds[0, 2:6] = 1
    inputs = {"pixel_values": torch.randn(16, 3 * 2 * 16), "image_grid_thw": torch.tensor([[1, 4, 4]]),
              "mm_token_type_ids": kinds}  # fmt: skip
    return tr.Qwen3VLForConditionalGeneration(config), inputs


@pytest.mark.parametrize("build", [llava, qwen3_vl])
def test_images_are_seen(build):
    torch.manual_seed(0)
    model, inputs = build()
    is_right(model, **inputs)


# ---------------------------------------------------------------------------------------------------------------------
# The measurement.


def measurements(monkeypatch):
    """A list that grows with each."""
    found, original = [], measured._measure
    monkeypatch.setattr(measured, "_measure", lambda *arguments: found.append(1) or original(*arguments))
    return found


def step(model):
    ids, attention = batch()
    hidden = hidden_states(model, ids, attention, T).detach()
    return distill(model, ids, attention, T, mask=None, teacher_hidden=hidden)


def test_it_is_measured_once_for_each_state(monkeypatch):
    found = measurements(monkeypatch)
    model = shaken(peft.get_peft_model(llama(), lora())).eval()
    patch_lm_head(model)
    assert len(found) == 1
    step(model)
    model.train()
    step(model).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    step(model)
    assert len(found) == 1  # modes and steps of the optimiser change no head
    changes = [
        lambda: model.add_adapter("other", lora(r=2)),
        lambda: model.set_adapter("other"),
        lambda: model.merge_adapter(),
        lambda: model.unmerge_adapter(),
        lambda: setattr(model.model.config, "of_no_known_name", 2.0),
        lambda: scaled_behind(model.model),
        lambda: setattr(model.model, "lm_head", nn.Linear(32, VOCABULARY)),
    ]
    for number, change in enumerate(changes):
        before = len(found)
        change()
        step(model)
        step(model)
        assert len(found) - before == (0 if number == 3 else 1), number  # unmerged, it is where it was
    before = len(found)
    for _ in range(3):
        with model.disable_adapter():
            hidden_states(model, *batch(), T)
        step(model)
    assert len(found) - before <= 1  # going back and forth costs nothing


def test_counters_describe_no_head(monkeypatch):
    """A forward that counts, as under ZeRO-3: one measurement, and hidden states stay those of the same head."""
    model = llama()
    for module in (model, model.lm_head):
        module.register_forward_pre_hook(lambda module, _: setattr(module, "passes", getattr(module, "passes", 0) + 1))
    found = measurements(monkeypatch)
    ids, attention = batch()
    for _ in range(3):
        with torch.no_grad():
            hidden = hidden_states(model, ids, attention, T)
        distill(model, ids, attention, T, mask=None, teacher_hidden=hidden).loss.backward()
    assert len(found) == 1 and model.passes > 3 and model.lm_head.passes > 3
    model.lm_head.of_no_known_name = 2.0
    step(model)
    assert len(found) == 2


def test_it_leaves_no_trace():
    model = peft.get_peft_model(llama(), lora(lora_dropout=0.0)).train()
    model.model.model.layers[0].eval()
    modes = [x.training for x in model.modules()]
    hooks = [(len(x._forward_hooks), len(x._forward_pre_hooks)) for x in model.modules()]
    random, values = torch.get_rng_state(), {key: x.clone() for key, x in model.state_dict().items()}
    names, attributes = list(dict(model.named_modules())), {*vars(model), *vars(model.model)}
    patch_lm_head(model)
    head_of(model)
    assert torch.equal(torch.get_rng_state(), random) and [x.training for x in model.modules()] == modes
    assert [(len(x._forward_hooks), len(x._forward_pre_hooks)) for x in model.modules()] == hooks
    assert list(dict(model.named_modules())) == names and {*vars(model), *vars(model.model)} == attributes
    assert all(torch.equal(x, values[key]) for key, x in model.state_dict().items())
    assert all(x.grad is None for x in model.parameters())


def test_a_failed_measurement_leaves_no_trace_either():
    model = of_class(Cosine).train()
    head = model.lm_head
    with pytest.raises(ValueError, match="affine"):
        patch_lm_head(model)
    assert model.lm_head is head and all(x.training for x in model.modules()) and "forward" not in vars(model)
    assert model(*batch()).logits.shape == (2, 11, VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_rounding_passes_and_little_more_does_not(dtype, seed):
    """In 16 bits a scale of 1.02 inside the head shows, in fp32 one of 1.00001; the formula's own rounding does not."""
    patch_lm_head(shaken(peft.get_peft_model(llama(seed, vocab_size=700), lora())).to(dtype))
    patch_lm_head(llama(seed, vocab_size=700).to(dtype))
    model = llama(seed, vocab_size=700).to(dtype)
    by = {torch.float32: 1.00001, torch.bfloat16: 1.05, torch.float16: 1.01}[dtype]
    model.lm_head.register_forward_hook(lambda module, args, output: by * output)
    with pytest.raises(ValueError, match=r"away from it on 8 tokens \(root mean square; rounding gives"):
        patch_lm_head(model)


def test_autocast_is_that_of_the_models_own_forward():
    """As Accelerate puts it around a forward that distill replaces: the whole pass runs in it, the head's loss too."""
    model = llama()
    forward = model.forward

    def in_autocast(*arguments, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*arguments, **options)

    model.forward = in_autocast
    ids, attention = batch()
    target = ids[:, -T:]
    with torch.no_grad():
        log_p = own_log_p(model, ids, attention).gather(-1, target[..., None])[..., 0]
    dtypes = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, output: dtypes.append(output.dtype))
    hidden = hidden_states(model, ids, attention, T).detach()
    result = distill(model, ids, attention, T, mask=None, teacher_hidden=hidden, target_ids=target)
    assert set(dtypes) == {torch.bfloat16}
    torch.testing.assert_close(result.student_logp.double(), log_p, rtol=0.01, atol=0.05)
    result.loss.backward()


def test_a_measurement_is_two_forwards_of_eight_tokens_in_evaluation_mode():
    model, seen = llama().train(), []
    model.model.embed_tokens.register_forward_hook(lambda m, args, output: seen.append((m.training, args[0].shape)))
    patch_lm_head(model)
    head_of(model)
    assert seen == [(False, (1, 8))] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Lifetime.


def test_a_patched_model_is_freed_by_del():
    gc.collect()
    gc.disable()
    try:
        model = llama()
        patch_lm_head(model)
        step(model)
        weight = weakref.ref(model.lm_head.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_copies_and_pickles_have_their_own_heads():
    model = llama()
    patch_lm_head(model)
    ids, attention = batch()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.lm_head.forward.head() is other.lm_head
        with torch.no_grad():
            other.lm_head.weight.mul_(2)
        torch.testing.assert_close(other(ids, attention).logits, 2 * model(ids, attention).logits)
        is_right(other)


def test_a_patched_head_is_called_as_before():
    model = llama()
    patch_lm_head(model)
    x = torch.randn(3, 32)
    assert torch.equal(model.lm_head(input=x), model.lm_head(x))
    model.config.return_dict = False
    with pytest.raises(ValueError, match=r"expected config\.return_dict=True, got False"):
        step(model)
    model.config.return_dict = True
    hidden_states(model, *batch(), T, backbone={"return_dict": False})


def test_unpatching_gives_back_what_was_there():
    model = llama()
    patch_lm_head(model)
    unpatch_lm_head(model)
    assert "forward" not in vars(model.lm_head)

    def own(x):
        return F.linear(x, model.lm_head.weight) / 2

    model.lm_head.forward = own
    is_right(model)
    unpatch_lm_head(model)
    assert model.lm_head.forward is own


# ---------------------------------------------------------------------------------------------------------------------
# Arguments.


@pytest.mark.parametrize("tokens, error, message", [
    (0, ValueError, "tokens: expected 1 to 10, of sequences of 11 tokens, got 0"),
    (-1, ValueError, "got -1"),
    (11, ValueError, "got 11"),
    (True, TypeError, "expected an int, or positions"),
    (5.0, TypeError, "got float"),
    (torch.tensor(5), ValueError, r"got shape \(\) and torch.int64"),
    (torch.tensor([1.0]), ValueError, "torch.float32"),
    (torch.tensor([0, -1]), ValueError, "positions from 0 to 21, got -1 to 0"),
    (torch.tensor([22]), ValueError, "got 22 to 22"),
])  # fmt: skip
def test_tokens_that_are_not_there_are_refused(tokens, error, message):
    model, (ids, attention) = llama(), batch()
    with pytest.raises(error, match=message):
        hidden_states(model, ids, attention, tokens)
    with pytest.raises(error, match=message):
        distill(model, ids, attention, tokens, mask=None)


def test_positions_are_those_of_the_tokens():
    model, (ids, attention) = llama(), batch()
    positions = torch.cat([torch.arange(5, 10), torch.arange(16, 21)])
    by_number, by_position = (hidden_states(model, ids, attention, x) for x in (T, positions))
    assert torch.equal(by_number.flatten(0, 1), by_position)
    assert torch.equal(model.lm_head(by_number), model(ids, attention).logits[:, -T - 1 : -1])


def test_a_mask_is_required():
    model, (ids, attention) = llama(), batch()
    with pytest.raises(TypeError, match="mask"):
        distill(model, ids, attention, T)
    with pytest.raises(ValueError, match="mask: expected None with positions"):
        distill(model, ids, attention, torch.tensor([3]), mask=torch.ones(2, T))
    with pytest.raises(ValueError, match="question_ids: expected None with mask=None"):
        distill(model, ids, attention, T, mask=None, question_ids=[1, 1])


def test_a_batch_that_is_padded_on_the_right_is_refused():
    """As student or as teacher; the end of a response may be padding where the mask is 0."""
    model, (ids, attention) = llama(), batch()
    lengths = torch.tensor([5, 3])
    mask = (torch.arange(T) < lengths[:, None]).long()
    inside = attention.clone()
    inside[:, -T:] = mask
    given = {"question_weight": torch.ones(2)}
    hidden = hidden_states(model, ids, inside, T).detach()
    distill(model, ids, inside, T, mask=mask, teacher_hidden=hidden, **given).loss.backward()
    right = torch.ones_like(attention)
    right[1, -3:] = 0  # prompt and response are shorter
    message = "mask: expected response tokens among the last 5 of a sequence, got 1 that are padding .* row 1"
    with pytest.raises(ValueError, match=message):
        distill(model, ids, right, T, mask=mask, teacher_hidden=hidden, **given)
    other = hidden_states(model, ids, right, T).detach()
    with pytest.raises(ValueError, match="got 1 that are padding"):
        distill(model, ids, inside, T, mask=mask, teacher_hidden=hidden_states(model, ids, right, T), **given)
    distill(model, ids, inside, T, mask=mask, teacher_hidden=other, **given)  # a copy: nobody knows whose it is
    full = torch.ones(2, 11).long()
    full[0, :7] = 0
    with pytest.raises(ValueError, match="pad prompts on the left"):
        distill(model, ids, full, T, mask=torch.ones(2, T), **given)


def test_a_teachers_head_that_is_forgotten_is_refused():
    student, teacher, (ids, attention) = llama(), llama(1), batch()
    hidden = hidden_states(teacher, ids, attention, T)
    with pytest.raises(ValueError, match=r"teacher_head: expected head_of\(teacher\), got None"):
        distill(student, ids, attention, T, mask=None, teacher_hidden=hidden)
    distill(student, ids, attention, T, mask=None, teacher_hidden=hidden, teacher_head=head_of(teacher))


def test_question_ids_of_any_kind():
    same = [[7, 7, 9], ["a", "a", "b"], [("u", 1), ("u", 1), ("u", 2)], torch.tensor([7, 7, 9])]
    for ids in same:
        numbers = question_numbers(ids)
        assert numbers.dtype == torch.int64 and numbers[0] == numbers[1] != numbers[2]
    assert question_numbers([7, 7, 9]).tolist() == [7, 7, 9]
    assert question_numbers(["a", "b", "a"])[0] == question_numbers(["c", "a"])[1]  # in every process
    for wrong in ([1.0, 1.0], torch.tensor([1.0]), torch.tensor([[1], [1]])):
        with pytest.raises(TypeError, match="question_ids: expected integers"):
            question_numbers(wrong)


def test_questions_of_strings_have_the_weights_of_numbers():
    model, (ids, attention) = llama(), batch()
    mask, rewards = torch.ones(2, T), torch.tensor([1.0, 0.0])
    hidden, head = hidden_states(llama(1), ids, attention, T), head_of(llama(1))
    losses = [
        distill(model, ids, attention, T, mask=mask, teacher_hidden=hidden, teacher_head=head, rewards=rewards,
                question_ids=questions).loss.item()
        for questions in (["q", "q"], torch.tensor([3, 3]))
    ]  # fmt: skip
    assert losses[0] == losses[1] > 0


def test_one_warning_where_no_question_occurs_twice():
    scsdpo_head._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        question_numbers(["a", "a", "b"])
        assert not seen
        for _ in range(2):
            question_numbers(["a", "b", "c"])
    (warning,) = seen
    assert "none of 3 occurs twice, so every question has one rollout" in str(warning.message)


def test_a_head_is_what_the_operator_takes():
    model, (ids, attention) = scaled_behind(llama(), cap=2.5), batch()
    hidden = hidden_states(model, ids, attention, T)
    log_p = own_log_p(model, ids, attention).gather(-1, ids[:, -T:, None])[..., 0]
    result = linear_divergence(hidden, head_of(model), hidden, target_ids=ids[:, -T:])
    torch.testing.assert_close(result.student_logp.double(), log_p, rtol=1e-4, atol=1e-5)
