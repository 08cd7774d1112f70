"""scsdpo.head on Hugging Face models: every part of a head."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from scsdpo.head import distill, head_of, hidden_states, patch_lm_head, unpatch_lm_head
from scsdpo_kernels import RoutedHeads

SIZES = {"vocab_size": 151, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}  # fmt: skip
MODELS = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen3, tied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "gemma2, softcap, tied": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 16, "final_logit_softcapping": 2.0}),
    "cohere, logit scale": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.3}),
    "granite, logits scaling": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 4.0}),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM, {}),
    "phi, bias": (PhiConfig, PhiForCausalLM, {}),
}


def build(name, seed=0, **options):
    config, model, own = MODELS[name]
    torch.manual_seed(seed)
    return model(config(**{**SIZES, **own, **options}))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 151, (3, 12), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, :3] = 0  # padded on the left
    return ids, attention


def kl(log_q, log_p):
    return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_gradient_is_that_of_full_logits(name, checkpointing):
    """A teacher of its own: loss and every parameter's gradient, whatever stands in the head."""
    model, teacher = build(name), build(name, seed=1)
    ids, attention = batch()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    tokens, weight = 5, torch.rand(3, 5)
    log_p = model(ids, attention_mask=attention).logits[:, -tokens - 1 : -1].log_softmax(-1)
    with torch.no_grad():
        log_q = teacher(ids, attention_mask=attention).logits[:, -tokens - 1 : -1].log_softmax(-1)
    loss = (kl(log_q, log_p) * weight).sum()
    loss.backward()
    expected = {key: x.grad.clone() for key, x in model.named_parameters()}
    model.zero_grad()

    head = patch_lm_head(model)
    assert patch_lm_head(model) is head
    with torch.no_grad():
        hidden = hidden_states(teacher, ids, attention, tokens)
    result = distill(model, ids, attention, tokens, mask=None, teacher_hidden=hidden, token_weight=weight,
                     beta=0.0, target_ids=ids[:, -tokens:], teacher_head=head_of(teacher))  # fmt: skip
    result.loss.backward()
    torch.testing.assert_close(result.loss, loss, rtol=1e-5, atol=1e-6)
    of_targets = log_p.gather(-1, ids[:, -tokens:, None])[..., 0]
    torch.testing.assert_close(result.student_logp, of_targets, rtol=1e-5, atol=2e-6)
    for key, x in model.named_parameters():
        assert (x.grad - expected[key]).norm() <= 2e-5 * expected[key].norm() + 1e-7, key

    unpatch_lm_head(model)
    assert "forward" not in vars(head)


@pytest.mark.parametrize("name", ["qwen3", "gemma2, softcap, tied", "phi, bias"])
def test_a_live_teacher_has_the_students_whole_head(name):
    model = build(name)
    patch_lm_head(model)
    ids, attention = batch()
    with torch.no_grad():
        hidden = hidden_states(model, ids, attention, 5)
    same = distill(model, ids, attention, 5, mask=None, teacher_hidden=hidden)
    assert (same.divergence == 0).all()
    head = head_of(build(name, seed=2))
    other = distill(model, ids, attention, 5, mask=None, teacher_hidden=hidden, teacher_head=head)
    assert (other.divergence > 0).all()


@pytest.mark.parametrize("own_head", [True, False])
def test_a_teacher_comes_in_another_precision(own_head):
    """Its head is rounded to its hidden states' dtype; hidden states without a head, to the student's."""
    model, teacher = build("phi, bias").bfloat16(), build("phi, bias", seed=1)
    patch_lm_head(model)
    ids, attention = batch()
    with torch.no_grad():
        hidden = hidden_states(teacher, ids, attention, 5)
    head = head_of(teacher) if own_head else None
    hidden = hidden.half() if own_head else hidden.clone()  # a copy of which nobody knows whose it is
    result = distill(model, ids, attention, 5, mask=None, teacher_hidden=hidden, teacher_head=head)
    with torch.no_grad():
        own = hidden_states(model, ids, attention, 5)
        log_p = F.linear(own.double(), *(x.double() for x in model.lm_head.parameters())).log_softmax(-1)
        parts = hidden, *(teacher if own_head else model).lm_head.parameters()
        rounded = (x.to(torch.float16 if own_head else torch.bfloat16).double() for x in parts)
        log_q = F.linear(*rounded).log_softmax(-1)
        log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    expected = 0.5 * (kl(log_p, log_m) + kl(log_q, log_m))
    torch.testing.assert_close(result.divergence.double(), expected, rtol=1e-4, atol=1e-5)


def test_generation_and_logits_are_untouched():
    model = build("qwen3")
    ids, attention = batch()
    before = model(ids, attention_mask=attention).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    patch_lm_head(model)
    after = model(ids, attention_mask=attention).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_copy_of_a_patched_model_has_its_own_head():
    model = build("qwen3")
    patch_lm_head(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    ids, attention = batch()
    logits, twice = (x(ids, attention_mask=attention).logits for x in (model, other))
    torch.testing.assert_close(twice, 2 * logits)
    result = distill(other, ids, attention, 5, mask=None, teacher_hidden=hidden_states(other, ids, attention, 5))
    result.loss.backward()
    assert other.lm_head.weight.grad is not None and model.lm_head.weight.grad is None


def test_a_failed_step_leaves_the_model_as_it_was():
    model = build("qwen3")
    patch_lm_head(model)
    ids, attention = batch()
    with pytest.raises(ValueError, match="teacher_hidden"):
        distill(model, ids, attention, 5, mask=None)
    assert "forward" not in vars(model) and model(ids, attention_mask=attention).logits.shape == (3, 12, 151)


def test_public_names_are_here_without_a_trainer():
    code = (
        "import sys, scsdpo, scsdpo_kernels;"
        "assert all(getattr(scsdpo, x) is getattr(scsdpo_kernels, x) for x in scsdpo_kernels.__all__);"
        "assert set(scsdpo.__all__) == set(scsdpo_kernels.__all__) and not {'transformers', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"expected a model with one output head, get_output_embeddings\(\) gave None"):
        patch_lm_head(build("qwen3").model)


def test_a_number_that_the_class_does_not_use_changes_nothing():
    model = build("qwen3")
    model.config.logits_mup_width_multiplier = 3.0
    assert head_of(model).logit_scale == 1.0


def peft_model(**options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model = peft.get_peft_model(build("qwen3"), peft.LoraConfig(r=4, **options))
    for key, x in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(x, std=0.1)
    return model


def test_lora_on_the_head_goes_the_operators_way():
    """Against full logits: gradients of A and B on the head and elsewhere, none of the frozen weights."""
    model = peft_model(target_modules=["q_proj", "lm_head"])
    teacher, (ids, attention) = build("qwen3", seed=1), batch()
    log_p = model(ids, attention_mask=attention).logits[:, -6:-1].log_softmax(-1)
    with torch.no_grad():
        log_q = teacher(ids, attention_mask=attention).logits[:, -6:-1].log_softmax(-1)
        hidden = hidden_states(teacher, ids, attention, 5)
    kl(log_q, log_p).sum().backward()
    expected = {key: x.grad.clone() for key, x in model.named_parameters() if x.grad is not None}
    assert any("lm_head.lora_A" in key for key in expected) and not any("base_layer" in key for key in expected)
    model.zero_grad()
    patch_lm_head(model)
    arguments = {"teacher_hidden": hidden, "beta": 0.0, "teacher_head": head_of(teacher)}
    distill(model, ids, attention, 5, mask=None, **arguments).loss.backward()
    got = {key: x.grad for key, x in model.named_parameters() if x.grad is not None}
    assert got.keys() == expected.keys()
    for key, x in got.items():
        assert (x - expected[key]).norm() <= 2e-5 * expected[key].norm(), key
    with torch.no_grad():
        own = hidden_states(model, ids, attention, 5)
    assert (distill(model, ids, attention, 5, mask=None, teacher_hidden=own).divergence == 0).all()


def test_several_teachers_are_refused_by_name():
    with pytest.raises(TypeError, match=r"teacher_head: expected .* got RoutedHeads; distill takes one teacher"):
        distill(nn.Linear(2, 2), torch.zeros(1, 2), None, 1, mask=None, teacher_head=RoutedHeads([], torch.zeros(1, 1)))
