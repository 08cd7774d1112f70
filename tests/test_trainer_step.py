"""benchmarks/smollm2.py and benchmarks/trainer_step.py on a tiny model: what is asked, sampled, run and written."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl: pip install '.[trl]'")

import word_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import report
import smollm2
import trainer_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return word_model.save(tmp_path_factory.mktemp("tiny"))


def test_problems_are_verified():
    asked = smollm2.problems(50)
    assert len({x.question for x in asked}) == 50 and asked == smollm2.problems(50)
    for problem in asked:
        assert problem.is_solved_by(problem.solution) and not problem.is_solved_by(problem.mistake)
        calculated = [part.split(" = ") for part in problem.solution.split(". ")[:2]]
        for text, result in calculated:  # "On the shelves there are 5 × 23 = 115 cards"
            words = text.replace("×", "*").split()
            sum_of = [word for word in words if word.isdigit() or word in "+-*"]
            while sum_of[1] not in "+-*":  # a number that is told before the sum
                sum_of.pop(0)
            assert eval("".join(sum_of)) == int(result.split()[0]), problem
        assert problem.solution in problem.with_solution()[0]["content"]


@pytest.mark.parametrize("zeros, count", [(0.0, 0), (0.63, 20), (0.75, 24), (0.78, 25)])
def test_outcomes_have_the_share_that_is_asked_for(zeros, count):
    found = trainer_step.outcomes(32, zeros)
    flat = [set(x) for x in found if len(set(x)) == 1]
    assert len(found) == 32 and len(flat) == count
    assert flat.count({True}) == count // 4 * 2 + count % 2 and flat.count({False}) == count - flat.count({True})
    if count % 2 == 0:  # two processes are in step
        assert found[:16] == found[16:]
    else:
        assert sum(a != b for a, b in zip(found[:16], found[16:], strict=True)) == 1


def test_states_of_a_model_as_its_own_teacher(folder):
    """After the final norm, at the tokens that predict the answer, of the same answer on both sides."""
    student, head, teacher = smollm2.self_teacher_states(20, longest=6, where=folder)
    model = smollm2.model(where=folder)
    assert student.shape == teacher.shape == (20, 32) and torch.equal(head, model.lm_head.weight)
    assert (student - teacher).norm() > 0.1 * student.norm()
    prompt = smollm2.tokenizer(folder).apply_chat_template(
        smollm2.problems(7)[0].messages, add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        first = model.model(prompt).last_hidden_state[0, -1]
    torch.testing.assert_close(student[0], first, rtol=1e-4, atol=1e-4)


def test_a_step_of_every_trainer(folder, monkeypatch, tmp_path):
    """Written and shown; ours and the stock trainer filtered by hand have the same loss, and run fewer tokens."""
    arguments = ["--questions", "8", "--processes", "1", "--per-device", "1", "4", "--zeros", "0.75"]
    monkeypatch.setattr(sys, "argv", ["trainer_step.py", "--model", str(folder), "--output", str(tmp_path), *arguments])
    trainer_step.main()
    (path,) = report.results(trainer_step, tmp_path)
    result = json.loads(path.read_text())
    assert [trainer_step.key(x) for x in result["cases"]] == [(1, 1, 0.75), (1, 4, 0.75)]
    for case in result["cases"]:
        stock, by_hand, ours = (case["trainers"][name] for name in trainer_step.TRAINERS)
        assert len({len(x["seconds"]) for x in case["trainers"].values()} | {1}) == 1
        assert ours["loss"] == pytest.approx(by_hand["loss"], rel=0.02) and ours["loss"] > 0  # bf16
        assert abs(stock["loss"] / ours["loss"] - 1) > 0.1  # it has no weights
        assert ours["tokens"] <= by_hand["tokens"] < 0.5 * stock["tokens"]
        assert ours["tokens"] == pytest.approx(0.25 * stock["tokens"], rel=0.15)
    shown = trainer_step.table(result)
    assert shown.count("| 75% |") == 2 and "| 1 | 4 |" in shown


def test_two_processes(folder):
    """They run the same tokens together as one does alone."""
    (one,), (two,) = (
        [x["trainers"] for x in trainer_step.measure(processes, 2, [0.5], ["stock", "ours"], folder, 8, 1)]
        for processes in (1, 2)
    )
    for name, alone in one.items():
        assert two[name]["tokens"] == pytest.approx(alone["tokens"], rel=0.1), name
        assert two[name]["loss"] == pytest.approx(alone["loss"], rel=0.02), name
