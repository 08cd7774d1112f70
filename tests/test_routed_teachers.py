"""Several teachers, one for each token: against each of them alone, by the oracle, the reference and the operator."""

import dataclasses
import functools
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import relative_error
from problems import Problem, head_of, known, problem
from ranks import over
from torch import Tensor
from torch.utils._pytree import tree_map_only

from scsdpo_kernels import (
    Head,
    LoRA,
    PolicyGradient,
    RoutedHeads,
    SampledToken,
    TopK,
    TopLogprobs,
    VocabShard,
    linear_divergence,
    linear_divergence_per_token,
    scsdpo_loss,
)
from scsdpo_kernels.arguments import problem_of
from scsdpo_kernels.linear_divergence import DEFAULTS
from scsdpo_kernels.problem import flatten
from scsdpo_kernels.schedules import chunked, products

V, D, WIDTHS = 307, 24, (24, 16, 40)
FORMS = ("one tensor", "all tokens", "own tokens")


@dataclasses.dataclass(frozen=True)
class Routed:
    """A student, and for each of K teachers hidden states of all tokens and a head."""

    student: Problem  # without a teacher
    teachers: list[tuple[Tensor, Tensor | Head]]
    index: Tensor  # (...,)

    def but(self, **changed: Any) -> "Routed":
        return dataclasses.replace(self, **changed)

    def given(self, form: str = "all tokens") -> Problem:
        """What the operator takes: in a list, tokens of other teachers are NaN or are not there."""
        hidden, own = [x for x, _ in self.teachers], [self.index == k for k in range(len(self.teachers))]
        if form == "one tensor":
            (width,) = {x.shape[-1] for x in hidden}
            hidden = functools.reduce(lambda before, x: torch.where(x[1][..., None], x[0], before),
                                      zip(hidden, own, strict=True), torch.full((*self.index.shape, width), torch.nan,
                                                                                 dtype=hidden[0].dtype))  # fmt: skip
        elif form == "own tokens":
            hidden = [x[some] for x, some in zip(hidden, own, strict=True)]
        else:
            hidden = [x.masked_fill(~some[..., None], torch.nan) for x, some in zip(hidden, own, strict=True)]
        return self.student.but(teacher=hidden, teacher_head=RoutedHeads([x for _, x in self.teachers], self.index))

    def alone(self, k: int) -> tuple[Problem, Tensor]:
        """The tokens of one teacher, with that one alone, and which tokens these are."""
        some, (hidden, head) = self.index == k, self.teachers[k]
        weight = self.student.token_weight
        weight = None if weight is None else weight[some]
        own = Problem(self.student.hidden[some], self.student.head, hidden[some], head, weight)
        return own, some


def routed(rows=(5, 9), widths=WIDTHS, vocabulary=V, distance=0.5, scale=2.0, dtype=torch.float32, head="plain",
           kinds=("plain",), seed=0, weighted=True) -> Routed:  # fmt: skip
    """Teachers of these widths and kinds of heads, in turns; one of the student's width is `distance` away."""
    student = problem(rows, D, vocabulary, scale=scale, dtype=dtype, head=head, weighted=weighted, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    weight = student.head if isinstance(student.head, Tensor) else student.head.weight
    teachers = []
    for k, width in enumerate(widths):
        noise = torch.randn(*student.hidden.shape[:-1], width, generator=generator).to(dtype)
        own = torch.randn(vocabulary, width, generator=generator).to(dtype) * width**-0.5
        near = width == D and k == 0
        hidden = student.hidden + distance * noise if near else scale * noise
        teachers.append((hidden, head_of(kinds[k % len(kinds)], weight.clone() if near else own, seed=k + 3)))
    index = torch.randint(len(widths), student.hidden.shape[:-1], generator=generator)
    return Routed(student.but(teacher=None), teachers, index)


def in_dtype(given: Problem, dtype: torch.dtype) -> Problem:
    """Also the teachers' heads; not the numbers of teachers."""
    sides = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tuple(given))
    return Problem(*sides, given.token_weight)


def of_tokens(options: dict, some: Tensor) -> dict:
    """Options with the tokens that a mask has."""
    return tree_map_only(Tensor, lambda x: x[some] if x.shape[: some.dim()] == some.shape else x, options)


def by_teacher(case: Routed, run: Any, **options: Any) -> tuple:
    """A result's fields and all gradients, of a run of each teacher's tokens alone."""
    fields: dict[str, Tensor] = {}
    loss, of_hidden, of_head = 0.0, torch.zeros(case.student.hidden.shape, dtype=torch.float64), None
    for k in range(len(case.teachers)):
        own, some = case.alone(k)
        result, hidden, *head = run(own, **of_tokens(options, some))
        loss = loss + result.loss
        for name, x in known(result).items():
            fields.setdefault(name, torch.zeros(case.index.shape, dtype=torch.float64))[some] = x.double()
        of_hidden[some] = hidden.double()
        of_head = head if of_head is None else [x + y for x, y in zip(of_head, head, strict=True)]
    return result._replace(loss=loss, **fields), of_hidden, *of_head


exactly = functools.partial(by_teacher, run=oracle.expected)


def eagerly(case: Routed, beta: float = 0.5, temperature: float = 1.0) -> tuple:
    """PyTorch's own, in the dtype of the tensors, with softmaxes in fp32: the measuring stick."""

    def run(own: Problem) -> tuple:
        leaves = own.leaves()
        logits = oracle.logits(leaves.hidden, leaves.head), oracle.logits(leaves.teacher, leaves.teacher_head)
        log_p, log_q = (F.log_softmax(x.float() / temperature, dim=-1) for x in logits)
        value = oracle.between(log_p, log_q.detach(), beta)
        loss = (value if own.token_weight is None else value * own.token_weight).sum()
        result = oracle.Expected(loss.detach(), value.detach(), *[None] * 7)
        return result, *torch.autograd.grad(loss, leaves.trained)

    return by_teacher(case, run)


def assert_within(got: tuple, exact: tuple, stick: tuple, times: float = 3.0) -> None:
    """Divergences and gradients have at most so many times the stick's error, or a few units of fp32's last digit."""
    names = ["divergence", *(f"gradient {x}" for x in range(len(exact) - 1))]
    for name, x, y, z in zip(names, *((r[0].divergence, *r[1:]) for r in (got, exact, stick)), strict=True):
        limit = times * relative_error(z, y) + 4 * torch.finfo(torch.float32).eps
        assert relative_error(x, y) <= limit, (name, relative_error(x, y), limit)


def assert_fields(got: Any, exact: Any, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    fields = known(got)
    assert fields.keys() == known(exact).keys()
    for name, x in fields.items():
        torch.testing.assert_close(x.double(), getattr(exact, name), rtol=rtol, atol=atol, msg=name)


@pytest.fixture
def chunks(monkeypatch):
    """Chunks of five tokens, so that they and the slices of teachers overlap in every way."""
    monkeypatch.setattr(chunked, "MIN_ROWS", 5)
    monkeypatch.setattr(chunked, "BUFFER_BYTES", dict.fromkeys(chunked.BUFFER_BYTES, 0))


# Numbers.


def forbidding(case: Routed) -> Routed:
    """The teachers forbid tokens, each its own, and the student one that all of them do."""
    teachers = []
    for k, (hidden, head) in enumerate(case.teachers):
        bias = torch.zeros(V)
        bias[0] = bias[10 * k + 5 : 10 * k + 9] = -torch.inf
        teachers.append((hidden, Head(head, bias=bias)))
    bias = torch.zeros(V)
    bias[0] = -torch.inf
    return case.but(teachers=teachers, student=case.student.but(head=Head(case.student.head, bias=bias)))


CASES = {
    "far": lambda: routed(),
    "near": lambda: routed(distance=1e-3, widths=(D, D, 16)),
    "peaked": lambda: routed(scale=12.0),
    "forbidden tokens": lambda: forbidding(routed()),
    "odd vocabulary": lambda: routed(vocabulary=31),
    "one teacher": lambda: routed(widths=(16,)),
    "one teacher with the student's head": lambda: same_head(routed(widths=(D,), distance=1e-3)),
    "a teacher without tokens": lambda: (lambda x: x.but(index=torch.where(x.index == 1, 2, x.index)))(routed()),
    "one of three has all tokens": lambda: (lambda x: x.but(index=torch.full_like(x.index, 1)))(routed()),
    "bytes as numbers": lambda: (lambda x: x.but(index=x.index.byte()))(routed()),
    "the student's head among them": lambda: same_head(routed()),
    "heads of all kinds": lambda: routed(head="all", kinds=("softcap", "lora", "bias")),
    "scales": lambda: routed(head="logit_scale", kinds=("logit_scale", "all", "plain")),
    "adapters on one weight": lambda: one_weight(routed(head="lora", widths=(16, 16, 16))),
    "bf16": lambda: routed(dtype=torch.bfloat16),
    "bf16, heads of all kinds": lambda: routed(dtype=torch.bfloat16, head="bias", kinds=("softcap", "bias", "plain")),
    "fp16": lambda: routed(dtype=torch.float16),
}  # fmt: skip


def same_head(case: Routed) -> Routed:
    """The first teacher has the student's head."""
    (hidden, _), *others = case.teachers
    return case.but(teachers=[(hidden, case.student.head), *others])


def one_weight(case: Routed) -> Routed:
    weight, teachers = case.teachers[0][1], []
    for k, (hidden, _) in enumerate(case.teachers):
        lora = LoRA(torch.randn(3, weight.shape[1]) * 0.2, torch.randn(V, 3), 0.5) if k else None
        teachers.append((hidden, Head(weight, lora=lora)))
    return case.but(teachers=teachers)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0], ids="beta {}".format)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(chunks, name, beta):
    case = CASES[name]()
    if name == "forbidden tokens" and beta == 1.0:
        beta = 0.7  # the reverse KL is infinite where the teacher alone forbids
    options = {"beta": beta}
    exact = exactly(case, **options)
    reference = in_dtype(case.given(), torch.float64).run(**options, schedule="reference")
    for x, y in zip((reference[0].divergence, *reference[1:]), (exact[0].divergence, *exact[1:]), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-9, atol=1e-11)
    got = case.given().run(**options)
    assert_within(got, exact, eagerly(case, beta))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule", ["chunked", "reference"])
def test_every_form_of_hidden_states(chunks, form, schedule):
    """Tokens of other teachers hold NaN, or are left out; with tokens of weight 0 among them."""
    case = routed(widths=(16, 16, 16) if form == "one tensor" else WIDTHS, weighted=True)
    case.student.token_weight[1:3] = 0
    got, exact = case.given(form).run(schedule=schedule), exactly(case)
    assert_fields(got[0], exact[0])
    for x, y in zip(got[1:], exact[1:], strict=True):
        assert relative_error(x, y) < 2e-6


@pytest.mark.parametrize("schedule", ["chunked", "reference"])
def test_numbers_of_tokens_that_are_not_computed_are_not_looked_at(schedule):
    case = routed()
    case.student.token_weight[0] = case.student.token_weight[:, 3] = 0
    exact = case.given().run(schedule=schedule)
    case.index[0], case.index[:, 3] = -100, 7
    got = case.given().run(schedule=schedule)
    own = case.given("own tokens").run(schedule=schedule)
    for x, y, z in zip((*known(exact[0]).values(), *exact[1:]), (*known(got[0]).values(), *got[1:]),
                       (*known(own[0]).values(), *own[1:]), strict=True):  # fmt: skip
        assert torch.equal(x, y) and torch.equal(x, z)


def test_dtypes_of_their_own(chunks):
    """A teacher in bf16 and one in fp32 beside a student in fp32."""
    case = routed()
    (first, head), *others = case.teachers
    case = case.but(teachers=[(first.bfloat16(), head.bfloat16()), *others])
    exact = exactly(case.but(teachers=[(first.bfloat16().double(), head.bfloat16().double()), *others]))
    got = case.given().run()
    assert_fields(got[0], exact[0])
    for x, y in zip(got[1:], exact[1:], strict=True):
        assert relative_error(x, y) < 2e-6


OPTIONS = {
    "jeffreys": lambda n: {"divergence": "jeffreys", "beta": 0.4},
    "skewed forward": lambda n: {"divergence": "skewed_forward", "beta": 0.4},
    "beta of each token": lambda n: {"beta": torch.linspace(0, 1, n.numel()).view(n.shape)},
    "top 9": lambda n: {"support": TopK(9)},
    "top 9, renormalize": lambda n: {"support": TopK(9, "renormalize"), "beta": 0.0},
    "sampled token": lambda n: {"support": SampledToken(), "beta": 1.0, **target(n)},
    "importance ratios": lambda n: {**target(n), "importance_clip": 1.5},
    "policy": lambda n: {**target(n), "policy": PolicyGradient(torch.randn(n.shape), ratio=torch.rand(n.shape) + 0.5)},
    "entry clip": lambda n: {"entry_clip": 0.02, "beta": 0.0},
    "temperature": lambda n: {"temperature": 0.7, "beta": 0.0},
}


def target(index: Tensor) -> dict:
    return {"target_ids": torch.randint(V, index.shape), "old_logp": torch.randn(index.shape) - 5}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(chunks, kernels, name):
    case = routed((3, 5), widths=(16, 24))
    case.student.token_weight[0, 2] = 0
    options = OPTIONS[name](case.index)
    got, exact = case.given().run(**options), exactly(case, **options)
    assert_fields(got[0], exact[0], rtol=1e-4)
    for x, y in zip(got[1:], exact[1:], strict=True):
        assert relative_error(x, y) < 2e-5


@pytest.mark.parametrize("name", ["far", "heads of all kinds", "bf16", "the student's head among them"])
def test_triton_kernels(chunks, gpu_kernels, name):
    case = CASES[name]()
    assert_within(case.given("own tokens").run(), exactly(case), eagerly(case))


@pytest.mark.parametrize("longer", [0, 1, None], ids=["first teacher", "second teacher", "student"])
@pytest.mark.parametrize("schedule", ["chunked", "reference"])
def test_shared_prefix(longer, schedule):
    """Every head is cut to the shortest, and one of unequal length is refused without it."""
    case = routed(widths=(16, 24))

    def more(head: Tensor) -> Tensor:
        return torch.cat([head, head[:7]])

    teachers = [(x, more(head) if k == longer else head) for k, (x, head) in enumerate(case.teachers)]
    student = case.student.but(head=more(case.student.head)) if longer is None else case.student
    longer_case = case.but(student=student, teachers=teachers)
    got, exact = longer_case.given().run(shared_prefix=True, schedule=schedule), case.given().run(schedule=schedule)
    assert torch.equal(got[0].divergence, exact[0].divergence) and torch.equal(got[1], exact[1])
    assert torch.equal(got[2][:V], exact[2]) and (got[2][V:] == 0).all()
    which = 0 if longer is None else longer
    with pytest.raises(ValueError, match=rf"teacher_head\.heads\[{which}\]: expected the \d+ rows of student_head, or"):
        longer_case.given().call(schedule=schedule)


@pytest.mark.parametrize("options", [{}, {"support": TopK(7)}, {"beta": 1.0, "temperature": 0.8}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tokens_values_have_the_bits_of_its_own_teacher_alone(chunks, dtype, options):
    case = routed(dtype=dtype, head="bias", kinds=("lora", "plain", "softcap"))
    options = options | {"target_ids": torch.randint(V, case.index.shape)}
    together = known(case.given().call(**options))
    for k, (hidden, head) in enumerate(case.teachers):
        alone = known(case.student.but(teacher=hidden, teacher_head=head).call(**options))
        for name, x in together.items():
            assert torch.equal(x[case.index == k], alone[name][case.index == k]), (k, name)


@pytest.mark.parametrize("form", FORMS)
def test_one_teacher_is_the_call_without_a_route(form):
    """With the digits that a shared fp32 head keeps of near sides."""
    case = same_head(routed(widths=(D,), distance=1e-5))
    ((hidden, head),) = case.teachers
    plain, got = case.student.but(teacher=hidden, teacher_head=head).run(), case.given(form).run()
    for x, y in zip((*known(plain[0]).values(), *plain[1:]), (*known(got[0]).values(), *got[1:]), strict=True):
        assert torch.equal(x, y)


def test_rows_that_the_caller_knows(chunks):
    case = routed()
    case.student.token_weight[2] = 0
    rows = case.student.token_weight.flatten().nonzero().squeeze(1)
    rows = torch.cat([rows, torch.tensor([20])])[torch.randperm(len(rows) + 1)]  # one of weight 0 is listed
    expected, got = case.given().run(), case.given("own tokens").run(rows=rows)
    for x, y in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    has_weight = case.student.token_weight != 0
    for x, y in zip(known(got[0]).values(), known(expected[0]).values(), strict=True):
        assert torch.equal(x[has_weight], y[has_weight])
    assert got[0].divergence.flatten()[20] > 0


def test_per_token(chunks):
    case = routed(weighted=False)
    upstream = torch.randn(case.index.shape)
    upstream[1] = 0

    def above(out: Tensor) -> Tensor:
        return (torch.sin(out) * upstream).sum()

    leaves = case.given("own tokens").leaves()
    out = leaves.call(linear_divergence_per_token, target_ids=torch.zeros_like(case.index))
    gradients = [torch.autograd.grad(above(out), leaves.trained, retain_graph=True) for _ in range(2)]

    def run(own: Problem, up: Tensor) -> tuple:
        return oracle.expected(own, lambda result: (torch.sin(result.divergence) * up).sum())

    exact = by_teacher(case, lambda own, upstream: run(own, upstream), upstream=upstream)
    torch.testing.assert_close(out.double(), exact[0].divergence, rtol=2e-5, atol=1e-7)
    for x, again, y in zip(*gradients, exact[1:], strict=True):
        assert torch.equal(x, again) and relative_error(x, y) < 2e-6


def test_the_loss_of_a_batch():
    case = routed()
    mask = torch.ones(case.index.shape)
    mask[:, 6:] = 0
    given = case.given("own tokens").but(token_weight=None)
    weight = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0])
    options = {"mask": mask, "question_weight": weight}
    got = scsdpo_loss(*given, **options)
    expected = linear_divergence(*given, token_weight=weight[:, None] * mask / mask.sum())
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.divergence, expected.divergence)


@pytest.mark.parametrize("tokens", [(), (0,), (1, 1)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_few_tokens(tokens, form):
    case = routed(tokens, widths=(16, 16), weighted=False)
    got, *gradients = case.given(form).run()
    exact, *exact_gradients = exactly(case)
    torch.testing.assert_close(got.divergence.double(), exact.divergence, rtol=2e-5, atol=1e-7)
    for x, y in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-6)


def test_hidden_states_without_a_view():
    case = routed((4, 6, 3))
    student = case.student.but(hidden=case.student.hidden.transpose(0, 1).contiguous().transpose(0, 1))
    teachers = [(x.movedim(-1, 0).contiguous().movedim(0, -1), head) for x, head in case.teachers]
    got, expected = case.but(student=student, teachers=teachers).given().run(), case.given().run()
    for x, y in zip((*known(got[0]).values(), *got[1:]), (*known(expected[0]).values(), *expected[1:]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


# What a call costs.


def test_a_token_is_projected_once(chunks, monkeypatch):
    """Every computed token by the student's head and by its own teacher's, whatever the number of teachers."""
    case, projected = routed(), []
    case.student.token_weight[0] = 0
    project = products.project

    def counted(hidden: Tensor, weight: Tensor, logits: Tensor) -> None:
        projected.append((weight.data_ptr(), len(hidden)))
        project(hidden, weight, logits)

    monkeypatch.setattr(products, "project", counted)
    case.given().run()
    rows = {pointer: sum(n for other, n in projected if other == pointer) for pointer, _ in projected}
    computed = case.student.token_weight != 0
    expected = {head.data_ptr(): int((computed & (case.index == k)).sum()) for k, (_, head) in enumerate(case.teachers)}
    expected[case.student.head.data_ptr()] = int(computed.sum())
    leaves = [case.student.head.data_ptr(), *(head.data_ptr() for _, head in case.teachers)]
    assert sorted(rows.values()) == sorted(expected.values())
    assert sum(rows.values()) == 2 * int(computed.sum()) and len(leaves) == len(rows)
    chunk_count = -(-int(computed.sum()) // 5)
    assert len(projected) <= 2 * chunk_count + len(case.teachers) - 1  # no chunk begins because of a teacher


def test_the_host_waits_once(monkeypatch):
    case, transfers, tolist = routed(), [], Tensor.tolist
    given = case.given("own tokens")
    monkeypatch.setattr(Tensor, "tolist", lambda self: transfers.append(len(self)) or tolist(self))
    given.call(target_ids=torch.zeros_like(case.index))
    assert len(transfers) == 1


# Beside torch.compile and autocast.


@pytest.mark.parametrize("operator, rest", [("divergence", ([True] * 5,)), ("divergence_per_token", ())])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, operator, rest):
    case = routed((7,), widths=(6, 6), vocabulary=31, head="all", kinds=("all", "bias"))
    leaves = flatten(problem_of(*case.given(form).leaves(), None, DEFAULTS | {"support": TopK(4)}))
    torch.library.opcheck(getattr(torch.ops.scsdpo_kernels, operator).default, (*leaves, *rest))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", [linear_divergence, linear_divergence_per_token])
def test_compiled_has_the_bits_of_eager(op, form):
    case = routed((2, 9), widths=(16, 16), vocabulary=101, kinds=("softcap", "bias"))
    given = case.given(form).but(token_weight=None)
    weight = torch.randn(2, 9).relu()
    backend = "inductor" if form == FORMS[0] else "aot_eager"

    def step(hidden, head, teacher, heads, index):
        routed_heads = RoutedHeads(heads, index)
        if op is linear_divergence:
            return op(hidden, head, teacher, routed_heads, token_weight=weight).loss * 3
        return (op(hidden, head, teacher, routed_heads) * weight).sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        leaves = given.leaves()
        loss = run(leaves.hidden, leaves.head, leaves.teacher, *leaves.teacher_head)
        results.append((loss, *torch.autograd.grad(loss, leaves.trained)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-9)


def test_compiled_with_other_numbers_of_tokens_and_caps():
    case = routed((12,), widths=(16, 16), vocabulary=101, weighted=False)

    def step(hidden, head, teacher, other, index, softcap):
        heads = RoutedHeads([Head(head, softcap=softcap), other], index)
        return linear_divergence(hidden, head, teacher, heads).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (teacher, head), (_, other) = case.teachers
    for tokens, softcap in ((12, 3.0), (5, 4.0), (7, 5.0), (1, 5.0), (0, 7.0)):
        some = slice(tokens)
        given = case.student.hidden[some, :16], head, teacher[some], other, case.index[some], softcap
        assert torch.equal(step(*given), compiled(*given)), (tokens, softcap)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(compiled):
    """Heads and hidden states are cast, a weight that two teachers have once."""
    case = routed(widths=(16, 16, 16))
    weight = case.teachers[0][1]
    heads = Head(weight), Head(weight, softcap=3.0), Head(weight, logit_scale=0.5)
    case = case.but(teachers=[(x, head) for (x, _), head in zip(case.teachers, heads, strict=True)])
    given = case.given("one tensor")
    expected = in_dtype(given, torch.bfloat16).run()

    def run(hidden: Tensor, head: Tensor):
        return given.but(hidden=hidden, head=head).call()

    inputs = given.hidden.requires_grad_(), given.head.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = (torch.compile(run, fullgraph=True) if compiled else run)(*inputs)
        prepared = problem_of(*given, None, DEFAULTS)
    assert torch.equal(result.divergence, expected[0].divergence)
    for x, y in zip(torch.autograd.grad(result.loss, inputs), expected[1:], strict=True):
        assert torch.equal(x, y.float())
    assert len({x.head.weight.data_ptr() for x in prepared.teachers}) == 1
    assert len({x.hidden.data_ptr() for x in prepared.teachers}) == 1


# A vocabulary over processes.

SHARD_V = 67
ENDS = {1: (67,), 2: (50, 67), 3: (10, 10, 67)}


def part_of(case: Routed, start: int, stop: int) -> Routed:
    """This process's part of all heads."""

    def own(x: Tensor) -> Tensor:
        return x[start:stop] if len(x) == SHARD_V else x

    head, teachers = tree_map_only(Tensor, own, (case.student.head, [x for _, x in case.teachers]))
    hidden = [x for x, _ in case.teachers]
    return case.but(student=case.student.but(head=head), teachers=list(zip(hidden, teachers, strict=True)))


def of_process(group: dist.ProcessGroup) -> tuple[int, int]:
    ends = (0, *ENDS[dist.get_world_size(group)])
    return ends[dist.get_rank(group)], ends[dist.get_rank(group) + 1]


def shard_case(head: str = "plain", **more: Any) -> Routed:
    case = routed((29,), vocabulary=SHARD_V, head=head, kinds=("bias", "lora", "plain"), **more)
    case.student.token_weight[::4] = 0
    return case


SHARDED = {
    "whole vocabulary": {},
    "top 5": {"support": TopK(5)},
    "forward KL": {"beta": 0.0},
    "policy": {"target_ids": torch.arange(29), "policy": PolicyGradient(torch.linspace(-1, 1, 29))},
}


@over(1, 2, 3)
@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("own_tokens", [False, True], ids=["", "own tokens"])
@pytest.mark.parametrize("form", ["all tokens", "own tokens"])
def test_parts_are_the_whole(group, name, own_tokens, form):
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    case, (start, stop) = shard_case("lora"), of_process(group)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    exact = exactly(case, **SHARDED[name])
    ends = [29 * r // max(1, world - 1) for r in range(world)] + [29]
    tokens = slice(ends[rank], ends[rank + 1]) if own_tokens else slice(None)  # the last process has none
    mine = part_of(case, start, stop)
    student = mine.student.but(hidden=mine.student.hidden[tokens], token_weight=mine.student.token_weight[tokens])
    teachers = [(x[tokens], head) for x, head in mine.teachers]
    mine = mine.but(student=student, teachers=teachers, index=mine.index[tokens]).given(form)
    mine = Problem(*tree_map_only(Tensor, lambda x: x.to(device), tuple(mine)), mine.token_weight.to(device))
    options = tree_map_only(Tensor, lambda x: x[tokens].to(device), SHARDED[name])
    shard = VocabShard(start, stop, group, sequence_parallel=own_tokens, check=True)
    got, of_hidden, of_weight, *of_lora = mine.run(**options, shard=shard)
    torch.testing.assert_close(got.loss.double().cpu(), exact[0].loss, rtol=1e-4, atol=1e-5)
    for field, x in known(got).items():
        torch.testing.assert_close(x.double().cpu(), getattr(exact[0], field)[tokens], rtol=1e-4, atol=2e-6, msg=field)
    a, b = of_lora
    expected = exact[1][tokens], exact[2][start:stop], exact[3], exact[4][start:stop]
    for x, y in zip((of_hidden, of_weight, a, b), expected, strict=True):
        assert (x.double().cpu() - y).norm() <= 2e-5 * y.norm() + 1e-9


@over(2)
def test_processes_that_differ_in_the_route(group):
    case, (start, stop) = part_of(shard_case(), *of_process(group)), of_process(group)
    shard, other = VocabShard(start, stop, group, check=True), case.index.clone()
    other[1] = (other[1] + dist.get_rank(group)) % 3
    with pytest.raises(ValueError, match=r"teacher_head\.index's numbers"):
        case.but(index=other).given().call(shard=shard)
    fewer = case.teachers[: 3 - dist.get_rank(group)]
    with pytest.raises(ValueError, match=r"teacher_h"):
        case.but(teachers=fewer, index=case.index.clamp(max=1)).given().call(shard=shard)
    case.given().call(shard=shard)  # and they go on


@over(2)
def test_dtensors(group):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    case = shard_case("bias")
    mesh = DeviceMesh.from_group(group, "cuda" if dist.get_backend(group) == "nccl" else "cpu")
    exact, given = exactly(case), case.given()
    head, (first, *others) = given.head, given.teacher_head.heads
    head, first = tree_map_only(Tensor, lambda x: distribute_tensor(x, mesh, [Shard(0)]), (head, first))
    got = given.but(head=head, teacher_head=RoutedHeads([first, *others], case.index)).call()  # the others are whole
    torch.testing.assert_close(got.divergence.double(), exact[0].divergence, rtol=1e-4, atol=1e-6)


# Errors.


BAD = {
    "no list": (lambda x: x.but(teacher_head=RoutedHeads(x.teacher_head.heads[0], x.teacher_head.index)), TypeError,
                r"teacher_head\.heads: expected a list of tensors and Heads, got Tensor"),
    "a Head as list": (lambda x: x.but(teacher_head=RoutedHeads(Head(x.head), x.teacher_head.index)), TypeError,
                       r"teacher_head\.heads: expected a list .* got Head"),
    "no heads": (lambda x: x.but(teacher_head=RoutedHeads([], x.teacher_head.index)), ValueError,
                 r"teacher_head\.heads: expected at least one"),
    "no head": (lambda x: heads(x, "W"), TypeError, r"teacher_head\.heads\[1\]: expected a tensor or a Head, got str"),
    "bias": (lambda x: heads(x, Head(x.teacher_head.heads[1], bias=torch.zeros(3))), ValueError,
             r"teacher_head\.heads\[1\]\.bias: expected shape \(307,\), got \(3,\)"),
    "width": (lambda x: heads(x, x.teacher_head.heads[1][:, :5]), ValueError,
              r"teacher_head\.heads\[1\]: expected shape \(V, 16\) after teacher_hidden\[1\] \(.*\), got \(307, 5\)"),
    "dtype": (lambda x: heads(x, x.teacher_head.heads[1].half()), TypeError,
              r"teacher_head\.heads\[1\]: expected teacher_hidden\[1\]'s dtype torch.float32, got torch.float16"),
    "floating-point numbers": (lambda x: index(x, x.teacher_head.index.float()), TypeError,
                               r"teacher_head\.index: expected integers, got torch.float32"),
    "shape": (lambda x: index(x, x.teacher_head.index[0]), ValueError,
              r"teacher_head\.index: expected shape \(5, 9\), got \(9,\)"),
    "too large": (lambda x: index(x, x.teacher_head.index + 1), ValueError,
                  r"teacher_head\.index: expected numbers in \[0, 3\), .* got 1 to 3"),
    "negative": (lambda x: index(x, x.teacher_head.index - 1), ValueError, r"teacher_head\.index: .* got -1 to 1"),
    "no tensor": (lambda x: x.but(teacher=7), TypeError, r"teacher_hidden: expected a tensor, or a list .* got int"),
    "none": (lambda x: x.but(teacher=None), ValueError, r"teacher_hidden: expected a tensor"),
    "fewer tensors": (lambda x: x.but(teacher=x.teacher[:2]), ValueError,
                      r"teacher_hidden: expected 3 tensors, one for each head, got 2"),
    "no tensor in the list": (lambda x: x.but(teacher=[*x.teacher[:2], None]), TypeError,
                              r"teacher_hidden\[2\]: expected a tensor, got NoneType"),
    "one tensor of other tokens": (lambda x: x.but(teacher=x.teacher[0][0]), ValueError,
                                   r"teacher_hidden: expected shape .* leading shape of student_hidden \(5, 9\)"),
    "other tokens": (lambda x: x.but(teacher=[x.teacher[0][None], *x.teacher[1:]]), ValueError,
                     r"teacher_hidden\[0\]: expected shape .* leading shape of student_hidden \(5, 9\)"),
    "too many of its own": (lambda x: x.but(teacher=[*x.teacher[:2], torch.zeros(46, 40)]), ValueError,
                            r"teacher_hidden\[2\]: expected shape \(\d+, 40\), of the tokens whose teacher_head\.index "
                            r"is 2, or student_hidden's leading shape \(5, 9\), got \(46, 40\)"),
}  # fmt: skip


def heads(given: Problem, second: Any) -> Problem:
    first, _, third = given.teacher_head.heads
    return given.but(teacher_head=RoutedHeads([first, second, third], given.teacher_head.index))


def index(given: Problem, other: Tensor) -> Problem:
    return given.but(teacher_head=given.teacher_head._replace(index=other))


@pytest.mark.parametrize("schedule", ["chunked", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_raises_by_name(name, schedule):
    change, error, message = BAD[name]
    given = routed().given()
    given.call(schedule=schedule)
    with pytest.raises(error, match=message):
        change(given).call(schedule=schedule)


def test_a_wrong_number_of_its_own_tokens_among_none():
    given = routed((0,)).given()
    with pytest.raises(ValueError, match=r"teacher_hidden\[1\]: expected shape \(0, 16\)"):
        given.but(teacher=[given.teacher[0], torch.zeros(2, 16), given.teacher[2]]).call()


def test_a_server_is_a_teacher_already():
    given = routed().given()
    named = TopLogprobs(torch.zeros(5, 9, 1).long(), torch.full((5, 9, 1), -1.0))
    with pytest.raises(ValueError, match="TopLogprobs: expected no teacher_h"):
        given.call(support=named)
    with pytest.raises(ValueError, match="TopLogprobs: expected no teacher_head"):
        given.but(teacher=None).call(support=named)


def test_a_list_needs_its_route():
    given = routed().given()
    with pytest.raises(TypeError, match="teacher_hidden: expected a tensor, got list"):
        given.but(teacher_head=given.teacher_head.heads[0]).call()
    with pytest.raises(TypeError, match="student_head: expected a tensor or a Head, got RoutedHeads"):
        given.but(head=given.teacher_head).call()
