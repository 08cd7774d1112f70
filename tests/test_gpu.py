"""On a real GPU, at real sizes: `pytest -m gpu`. Float64 is the GPU's own here.

The kernels' own tests (test_row_divergence.py, test_question_weights.py) run there too.
"""

import warnings

import numpy as np
import oracle
import pytest
import torch
from oracle import relative_error

from scsdpo_kernels import (
    Head,
    LoRA,
    PolicyGradient,
    RoutedHeads,
    SampledToken,
    TopK,
    TopLogprobs,
    linear_divergence,
    question_weights,
    scsdpo_loss,
)
from scsdpo_kernels.kernels.contract import Logits, PerRow
from scsdpo_kernels.kernels.row_divergence_triton import row_divergence
from scsdpo_kernels.problem import objective_of
from scsdpo_kernels.schedules import chunked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
    pytest.mark.timeout(300),
]
VOCABULARY, WIDTH = 151936, 4096  # Qwen3-8B


def problem(rows, dtype=torch.bfloat16, vocabulary=VOCABULARY, width=WIDTH, distance=0.1, own=False, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    hidden, weight = randn(rows, width), randn(vocabulary, width) * (2 * width**-0.5)
    teacher = hidden + distance * randn(rows, width)
    head = (weight * (1 + distance * randn(1, width))).to(dtype) if own else None
    return hidden.to(dtype), weight.to(dtype), teacher.to(dtype), head


def fused(hidden, weight, teacher, teacher_head=None, *, head=None, **options):
    """head: what the student's head has beside its weight."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    result = linear_divergence(hidden, Head(weight, **(head or {})), teacher, teacher_head, **options)
    return result, *torch.autograd.grad(result.loss, (hidden, weight))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("own", [False, True], ids=["shared head", "own head"])
def test_bf16_contract(beta, own):
    """At Qwen3-8B's head: values to fp32 rounding, gradients within 2× of rounding the exact logit gradient to bf16."""
    hidden, weight, teacher, head = problem(150, own=own)
    ids = torch.randint(VOCABULARY, (150,), device="cuda")
    exact, exact_hidden, exact_weight = fused(
        *(x if x is None else x.double() for x in (hidden, weight, teacher, head)),
        beta=beta, target_ids=ids, schedule="reference",
    )  # fmt: skip
    result, grad_hidden, grad_weight = fused(hidden, weight, teacher, head, beta=beta, target_ids=ids)
    for name in ("divergence", "student_entropy", "teacher_entropy", "student_logp", "teacher_logp"):
        assert relative_error(getattr(result, name), getattr(exact, name)) < 1e-4, name
    logits = hidden.double() @ weight.double().T
    teacher_logits = teacher.double() @ (weight if head is None else head).double().T
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(teacher_logits, -1)
    p, q = log_p.exp(), log_q.exp()
    if beta == 0.0:
        gradient = p - q
    elif beta == 1.0:
        gradient = p * (log_p - log_q - (p * (log_p - log_q)).sum(-1, keepdim=True))
    else:
        log_m = torch.log((1 - beta) * p + beta * q)
        gradient = (1 - beta) * p * (log_p - log_m - (p * (log_p - log_m)).sum(-1, keepdim=True))
    rounded = gradient.bfloat16().double()
    sticks = (rounded @ weight.double()).bfloat16(), (rounded.T @ hidden.double()).bfloat16()
    for got, stick, expected in zip((grad_hidden, grad_weight), sticks, (exact_hidden, exact_weight), strict=True):
        assert relative_error(got, expected) <= 2 * relative_error(stick, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("own", [False, True], ids=["shared head", "own head"])
def test_other_dtypes(dtype, own):
    tensors = problem(200, dtype=dtype, vocabulary=50257, width=1024, own=own)
    exact, *exact_gradients = fused(*(x if x is None else x.double() for x in tensors), schedule="reference")
    result, *gradients = fused(*tensors)
    assert relative_error(result.divergence, exact.divergence) < 1e-4
    for got, expected in zip(gradients, exact_gradients, strict=True):
        assert got.dtype == dtype and relative_error(got, expected) < {torch.float32: 1e-4, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize("group", [4096, 300], ids=["one group", "three groups"])
def test_several_chunks(monkeypatch, group):
    """Logit gradients are kept over chunks, and the head's gradient is summed over groups in fp32."""
    tensors = problem(700, vocabulary=100278, width=2048)
    monkeypatch.setitem(chunked.BUFFER_BYTES, "gpu", 2**33)
    exact, *expected = fused(*tensors)
    monkeypatch.setitem(chunked.BUFFER_BYTES, "gpu", 0)
    monkeypatch.setattr(chunked, "_group_rows", lambda *_: group)
    result, *gradients = fused(*tensors)
    torch.testing.assert_close(result.divergence, exact.divergence, rtol=1e-4, atol=1e-7)
    for got, want in zip(gradients, expected, strict=True):
        assert relative_error(got, want) < 4e-3


@pytest.mark.parametrize("rows", [500, 5000], ids=["factors", "a sum"])
def test_main_grad(rows):
    """An fp32 buffer takes two micro-batches without rounding them to bf16, as long as .grad's rounding is larger."""
    tensors = [x if x is None else x.detach() for x in problem(2 * rows, vocabulary=50257, width=1024)]
    hidden, weight, teacher, _ = tensors
    buffer, plain = torch.zeros(weight.shape, device="cuda"), weight.clone().requires_grad_()
    for some in (slice(rows), slice(rows, None)):
        head = Head(weight.clone().requires_grad_(), main_grad=buffer)
        linear_divergence(hidden[some].clone().requires_grad_(), head, teacher[some]).loss.backward()
        linear_divergence(hidden[some], plain, teacher[some]).loss.backward()
    _, _, exact = fused(*(x if x is None else x.double() for x in tensors), schedule="reference")
    assert relative_error(buffer, exact) < 0.9 * relative_error(plain.grad, exact)


def test_same_bits_from_run_to_run():
    tensors = problem(500, width=1024)
    token_weight = torch.randn(500, device="cuda") * (torch.arange(500, device="cuda") % 3 > 0)
    first = fused(*tensors, token_weight=token_weight)
    again = fused(*tensors, token_weight=token_weight)
    assert torch.equal(first[0].divergence, again[0].divergence)
    assert torch.equal(first[1], again[1]) and torch.equal(first[2], again[2])


@pytest.mark.parametrize("trained", [False, True], ids=["one chunk", "one group"])
def test_more_than_2_to_the_31_logits(monkeypatch, trained):
    """In one chunk, or kept in a group of chunks: the last rows are those of a call of their own."""
    rows = 14400
    hidden, weight, teacher, _ = problem(rows, width=8192 if trained else 128)
    assert rows * VOCABULARY > 2**31
    if not trained:
        monkeypatch.setitem(chunked.BUFFER_BYTES, "gpu", 2 * 4 * rows * (VOCABULARY + 64))

    def run(hidden, teacher):
        hidden = hidden.detach().requires_grad_()
        result = linear_divergence(hidden, weight.requires_grad_(trained), teacher)
        return result.divergence, torch.autograd.grad(result.loss, [hidden] + [weight] * trained)[0]

    divergence, grad_hidden = run(hidden, teacher)
    tail, tail_hidden = run(hidden[-100:], teacher[-100:])
    torch.testing.assert_close(divergence[-100:], tail, rtol=1e-4, atol=1e-7)
    assert relative_error(grad_hidden[-100:], tail_hidden) < 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_may_be_scaled(dtype):
    """Whether it was is asked on the device."""
    hidden, weight, teacher, _ = problem(300, dtype, vocabulary=5003, width=256)
    gradients = []
    for factor in (1.0, 2.5, torch.tensor(2.5, device="cuda", dtype=torch.bfloat16)):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        (linear_divergence(*inputs, teacher).loss * factor).backward()
        gradients.append([x.grad for x in inputs])
    plain, *scaled = gradients
    for x, *others in zip(plain, *scaled, strict=True):
        for y in others:
            torch.testing.assert_close(y, (x.float() * 2.5).to(dtype))


VOCABULARIES = (1, 7, 50257, 100278, 151936, 152064, 262144)


def given(student, teacher, weight, beta, target=None, temperature=1.0):
    """What a row kernel takes."""
    logits = Logits(student, teacher, difference=False, softcap=0.0)
    return logits, PerRow(weight, target), objective_of(beta, temperature)


def row_logits(rows, vocabulary, start=0, width=None, dtype=torch.float32, seed=0):
    """Student and teacher, whose rows begin `start` entries into rows of `width`."""
    generator = torch.Generator("cuda").manual_seed(seed)
    width = width or -(-vocabulary // 64) * 64
    student, noise = torch.randn(2, rows, width + start, generator=generator, device="cuda")
    teacher = 3 * student + 0.3 * noise
    return (x.to(dtype)[:, start : start + vocabulary] for x in (3 * student, teacher))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_kernel_against_long_double(vocabulary, beta, dtype):
    """The precision contract, at real vocabularies and more rows than run at once."""
    student, teacher = row_logits(260, vocabulary, dtype=dtype)
    weight, target = torch.randn(260, device="cuda"), torch.arange(260, device="cuda") % vocabulary
    gradient = torch.full(student.shape, torch.nan, device="cuda")
    scalars = row_divergence(*given(student, teacher, weight, beta, target, 0.75), gradient)
    some = [0, 1, 131, 132, 258, 259]
    expected = oracle.rows(student[some].float().cpu(), teacher[some].float().cpu(), beta, 0.75)
    at = range(len(some)), target[some].cpu().numpy()
    exact = (expected.divergence, expected.student_entropy, expected.teacher_entropy, expected.log_p[at],
             expected.log_q[at])  # fmt: skip
    for got, want in zip(scalars[:5], exact, strict=True):  # a sixth would be an importance ratio
        np.testing.assert_allclose(got[some].cpu().numpy(), want.astype(float), rtol=1e-5, atol=2e-6)
    want = torch.tensor((expected.gradient * weight[some].cpu().numpy()[:, None]).astype(float))
    error = (gradient[some].cpu().double() - want).norm(dim=1)
    assert (error <= 1e-5 * want.norm(dim=1)).all()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_row_kernel_in_place(vocabulary, beta):
    """A bf16 gradient over the student's rows has the bits of one elsewhere: an fp32 gradient but for rounding.

    The other one's rows stand as far apart: Triton compiles another kernel, whose bits may differ, for strides that 16
    does not divide.
    """
    student, teacher = row_logits(300, vocabulary)
    weight = torch.randn(300, device="cuda")
    exact = torch.full_like(student, torch.nan)
    row_divergence(*given(student, teacher, weight, beta), exact)
    over = student.view(torch.bfloat16)[:, :vocabulary]
    gradient = torch.full((300, over.stride(0)), torch.nan, dtype=torch.bfloat16, device="cuda")[:, :vocabulary]
    assert gradient.stride() == over.stride() and gradient.data_ptr() % 16 == over.data_ptr() % 16 == 0
    expected = row_divergence(*given(student, teacher, weight, beta), gradient)[:3]
    scalars = row_divergence(*given(student, teacher, weight, beta), over)[:3]
    assert all(torch.equal(x, y) for x, y in zip(scalars, expected, strict=True))
    assert torch.equal(over, gradient)
    if vocabulary > 1:
        assert relative_error(over, exact) < 4e-3


def peak_bytes(rows, trained):
    """Over inputs and gradients, of a second call: the library's workspace is there already."""
    hidden, weight, teacher, _ = problem(rows)
    leaves = [hidden.requires_grad_(), *([weight.requires_grad_()] if trained else [])]
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = torch.autograd.grad(linear_divergence(hidden, weight, teacher).loss, leaves)
        peak = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in gradients)
        del gradients
    return peak


@pytest.mark.parametrize(
    "rows, trained, gigabytes",
    [(2048, True, 1.0), (8192, True, 2.9), (256, False, 0.4), (8192, False, 0.4), (30_000, False, 0.4)],
)
def test_memory(rows, trained, gigabytes):
    assert peak_bytes(rows, trained) <= gigabytes * 1e9


def waits(run):
    """How often the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def test_the_host_waits_once_or_never():
    hidden, weight, teacher, _ = problem(64, vocabulary=5003, width=256)
    weight.requires_grad_()
    hidden, teacher = hidden.view(8, 8, 256).requires_grad_(), teacher.view(8, 8, 256)
    rewards = (torch.arange(8, device="cuda") % 3 == 0).float()
    batch = {
        "rewards": rewards,
        "question_ids": torch.arange(8, device="cuda") // 4,
        "mask": torch.ones(8, 8, device="cuda"),
        "target_ids": torch.zeros(8, 8, dtype=torch.long, device="cuda"),
    }
    rows = torch.arange(64, device="cuda")

    def step(**options):
        scsdpo_loss(hidden, weight, teacher, **batch, **options).loss.backward()

    def shifted(**options):  # no view of these is a matrix
        linear_divergence(hidden[:, :-1], weight, teacher[:, 1:], **options).loss.backward()

    for run, every in ((step, rows), (shifted, rows[:56])):
        run()  # compiles
        run(rows=every)
        assert waits(run) == 1
        assert waits(lambda run=run, every=every: run(rows=every)) == 0
    assert waits(lambda: question_weights(rewards, batch["question_ids"])) == 0


def test_several_teachers_are_waited_for_once():
    """For the number of each one's tokens, with `rows` too, which then is right or refused."""
    hidden, weight, teacher, head = problem(64, vocabulary=5003, width=256, own=True)
    index, rows = torch.arange(64, device="cuda") % 3, torch.arange(64, device="cuda")
    own = [teacher[index == k] for k in range(3)]
    heads = [weight, head, head * 2]

    def run(index=index, **options):
        return fused(hidden, weight, own, RoutedHeads(heads, index), **options)

    together, *_ = run()
    for k in range(3):
        alone, *_ = fused(hidden, weight, teacher, heads[k])
        mine = index == k
        torch.testing.assert_close(together.divergence[mine], alone.divergence[mine], rtol=1e-3, atol=1e-6)
    assert waits(run) == 1 and waits(lambda: run(rows=rows)) == 1
    for x, y in zip(run(rows=rows)[1:], run()[1:], strict=True):
        assert relative_error(x, y) < 2e-3
    with pytest.raises(ValueError, match=r"teacher_head\.index: .* got 0 to 3"):
        run(index=torch.where(rows == 5, 3, index), rows=rows)


@pytest.mark.parametrize("count", [0, 1, 8, 256, 3000])
@pytest.mark.parametrize("options", [{}, {"exponent": 1.0}, {"success_threshold": 0.5}], ids=str)
def test_question_weights_have_the_cpus_values(count, options):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(2, (count,), generator=generator).float()
    ids = torch.randint(-50, 50, (count,), generator=generator)
    expected = question_weights(rewards, ids, **options)
    got = question_weights(rewards.cuda(), ids.cuda(), **options).cpu()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_what_would_have_raised_is_nan_with_rows():
    hidden, weight, teacher, _ = problem(20, vocabulary=301, width=64)
    token_weight, ids = torch.ones(20, device="cuda"), torch.zeros(20, dtype=torch.long, device="cuda")
    ids[3] = 301
    rows = torch.arange(20, device="cuda")
    result, *gradients = fused(hidden, weight, teacher, target_ids=ids, rows=rows)
    assert result.student_logp[3].isnan() and result.student_logp[4].isfinite()
    assert all(x.isfinite().all() for x in gradients)
    result, *gradients = fused(hidden, weight, teacher, token_weight=token_weight, rows=rows[:-1])
    assert result.loss.isnan() and all(x.isnan().any() for x in gradients)


def test_compiles_into_one_graph():
    hidden, weight, teacher, _ = problem(40, vocabulary=3001, width=64)

    def step(hidden, weight):
        return linear_divergence(hidden, weight, teacher).loss * 3

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = run(*inputs)
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_two_streams_at_once():
    problems = [problem(200, vocabulary=20011, width=512, seed=seed) for seed in (0, 1)]
    expected = [fused(*tensors) for tensors in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    got = []
    for stream, tensors in zip(streams, problems, strict=True):
        with torch.cuda.stream(stream):
            got.append(fused(*tensors))
    torch.cuda.synchronize()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one[0].divergence, other[0].divergence)
        assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


def _objectives():
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary, width = 64, 20011, 512

    def randn(*shape):
        return torch.randn(*shape, generator=generator).cuda()

    target = {"target_ids": torch.randint(vocabulary, (rows,), generator=generator).cuda()}
    ids = torch.arange(rows * 12, device="cuda").view(rows, 12)
    ids[3, 4:] = -1
    return {
        "top_k": {"support": TopK(100)},
        "renormalize": {"support": TopK(20, "renormalize"), "beta": 1.0, **target},
        "support": {"support": TopLogprobs(ids, torch.full((rows, 12), -3.0, device="cuda"))},
        "sampled": {"support": SampledToken(), "beta": 1.0, "old_logp": torch.full((rows,), -9.0).cuda(), **target},
        "clip": {"entry_clip": 0.01, "beta": 0.0},
        "bias": {"head": {"bias": randn(vocabulary)}, "beta": 0.0},
        "softcap": {"head": {"softcap": 5.0, "logit_scale": 0.7}},
        "softcap, clip": {"head": {"softcap": 5.0}, "entry_clip": 0.01, "beta": 0.0},
        "lora": {"head": {"lora": LoRA(randn(8, width) * 0.05, randn(vocabulary, 8) * 0.2, 0.5)}, "support": TopK(50)},
        "jeffreys": {"divergence": "jeffreys", "beta": torch.linspace(0, 1, rows).cuda()},
        "skewed reverse": {"divergence": "skewed_reverse", "beta": 0.3},
        "policy": {"policy": PolicyGradient(randn(rows)), "old_logp": torch.full((rows,), -9.0).cuda(), **target},
    }


OBJECTIVES = (
    "top_k", "renormalize", "support", "sampled", "clip", "bias", "softcap", "softcap, clip", "lora", "jeffreys",
    "skewed reverse", "policy",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_and_heads(dtype, objective, monkeypatch):
    """Against float64 on full logits, with several chunks, no wait for the host but one."""
    monkeypatch.setattr(chunked, "MIN_ROWS", 25)
    monkeypatch.setitem(chunked.BUFFER_BYTES, "gpu", 0)
    hidden, weight, teacher, _ = problem(64, dtype, 20011, 512, distance=0.3)
    options = _objectives()[objective]
    own = None if objective == "support" else teacher
    result, *gradients = fused(hidden, weight, own, **options)
    exact, *expected = fused(hidden.double(), weight.double(), None if own is None else own.double(), **options,
                             schedule="reference")  # fmt: skip
    # The sampled token's is a difference of log-probabilities, rounded at their own size, times one of them.
    atol = 1e-5 if objective == "sampled" else 1e-6
    torch.testing.assert_close(result.divergence.double(), exact.divergence, rtol=1e-4, atol=atol)
    for got, want in zip(gradients, expected, strict=True):
        assert relative_error(got, want) < (8e-3 if dtype == torch.bfloat16 else 1e-4)
    silent = fused(hidden, weight, own, **options, rows=torch.arange(64, device="cuda"))
    assert all(torch.equal(x, y) for x, y in zip(silent[1:], gradients, strict=True))
