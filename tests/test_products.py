"""Groups of chunks whose logit gradients are kept, and the products that a GPU's library is asked for.

Those take a result dtype that PyTorch has no CPU kernel for; here they are made of fp32 products.
"""

import os
import subprocess
import sys

import oracle
import pytest
import torch
from oracle import relative_error
from problems import problem

from scsdpo_kernels import Head, LoRA
from scsdpo_kernels.problem import Gradients
from scsdpo_kernels.schedules import chunked, products

V, D = 197, 16


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The GPU's branches, in small: chunks of 5 tokens, groups of up to 32, or of 16 where there are several."""
    monkeypatch.setattr(products, "on_cpu", lambda tensor: False)
    monkeypatch.setattr(
        products, "mm_fp32", lambda left, right, out=None: torch.mm(left.float(), right.float(), out=out)
    )

    def addmm_fp32(total, left, right, beta=1, out=None):
        out.copy_(torch.mm(left.float(), right.float()) if beta == 0 else total + left.float() @ right.float())

    monkeypatch.setattr(products, "addmm_fp32", addmm_fp32)
    monkeypatch.setattr(chunked, "MIN_ROWS", 5)
    monkeypatch.setitem(chunked.BUFFER_BYTES, "cpu", 0)
    monkeypatch.setattr(chunked, "GROUP_ROWS", 16)
    monkeypatch.setattr(products, "HIDDEN_ROWS", 7)


@pytest.mark.parametrize("rows", [3, 20, 32, 33, 70], ids="{} tokens".format)
@pytest.mark.parametrize("own", [False, True], ids=["shared head", "own head"])
@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_the_products_of_a_gpu(request, rows, own, kind, dtype):
    """One group of one chunk, of several, as many as may be kept, one more, and several groups."""
    given = problem(rows, D, V, dtype=dtype, seed=rows, head=kind, teacher_width=D if own else None, weighted=True)
    exact, plain = oracle.expected(given), given.run()
    request.getfixturevalue("on_a_gpu")
    gpu = given.run()
    of_each = ((result.divergence, *rest) for result, *rest in (gpu, plain, exact))
    for got, stick, want in zip(*of_each, strict=True):
        assert got.dtype == stick.dtype and got.shape == stick.shape
        # fp32 logit gradients of a CPU without bf16 instructions are the better ones.
        rounding = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}[dtype]
        assert relative_error(got, want) <= max(2 * relative_error(stick, want), rounding)


@pytest.mark.parametrize("rows", [1, 256, 4096, 8192, 8193, 100_000], ids="{} rows".format)
@pytest.mark.parametrize("width", [128, 896, 1024, 4096], ids="width {}".format)
def test_a_group_is_no_larger_than_the_sum_that_it_replaces(rows, width):
    group = min(rows, chunked._group_rows(rows, width))
    assert 2 * group <= 4 * width
    assert rows > 2 * width or group == rows  # one product, and no sum


def test_the_last_entries_of_an_odd_vocabulary_are_a_product_of_their_own(on_a_gpu):
    def ends(rows, dtype=torch.bfloat16):
        return [(part.start, part.stop) for part in products._parts(torch.empty(rows, 1, dtype=dtype))]

    assert ends(50257) == [(0, 50240), (50240, 50257)]
    assert ends(151936) == [(0, 151936)] and ends(50257, torch.float32) == [(0, 50257)]
    assert ends(17) == [(0, 17)] and ends(0) == [(0, 0)]


@pytest.mark.parametrize(
    "rows, trained, gigabytes",
    [(2048, True, 1.0), (8192, True, 2.9), (256, False, 0.4), (8192, False, 0.4), (100_000, False, 0.4)],
)
def test_memory_of_a_call_on_a_gpu(rows, trained, gigabytes):
    """By count, over inputs and gradients, for Qwen3-8B's head in bf16; test_gpu.py measures the same."""
    vocabulary, width = 151936, 4096
    chunk = chunked._chunk_rows(vocabulary, torch.device("cuda"))
    group = min(rows, chunked._group_rows(rows, width) if trained else chunk)
    logits = 2 * 4 * min(chunk, group) * vocabulary
    kept = 2 * group * (vocabulary + chunked.ALIGNMENT) if group > chunk else 0
    hidden = (4 + 2) * min(group, products.HIDDEN_ROWS) * width
    assert logits + kept + hidden <= gigabytes * 1e9


def test_a_setting_for_small_cards():
    script = """
from torch import device
from scsdpo_kernels.schedules import chunked
print(chunked._chunk_rows(2**17, device("cuda")))
"""
    environment = {**os.environ, "SCSDPO_BUFFER_MIB": "64"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 64


@pytest.mark.parametrize("device, bound", [("gpu", 2**-14), ("cpu", 2**-18)])  # a bf16 factor is 2^-9 off
def test_an_adapters_gradient_keeps_what_bf16_would_round_off(request, device, bound):
    if device == "gpu":
        request.getfixturevalue("on_a_gpu")
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(40, V, generator=generator).bfloat16()
    adapted, lora = torch.randn(40, 3, generator=generator), LoRA(torch.zeros(3, D), torch.zeros(V, 3), 0.5)
    head = Head(torch.zeros(V, D, dtype=torch.bfloat16), lora=lora)
    sums = products.head_sums(head, Gradients(None, None, None, None, torch.float32), None, 1)
    products.add_gradients(gradient, torch.zeros(40, D).bfloat16(), adapted, head, torch.arange(40), sums)
    exact = gradient.double().T @ (adapted.double() * 0.5)
    assert relative_error(sums.lora_b.result(), exact) < bound
