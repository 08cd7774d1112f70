"""The demo's pieces on known answers, and a run of it that is too short to learn but not to report."""

import random
import re

import pytest
import torch

from scsdpo import demo


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return demo.build_model(len(demo.TOKENS))


def test_hidden_states_are_those_that_predict_the_response(model):
    """Prompts of different lengths side by side give each response what it gets alone."""
    response, _ = demo.encode(["4321.", "98765."], "right")
    prompts = ["1234=", "56789>98765="]
    together = demo.response_hidden(model, prompts, response)
    for row, prompt in enumerate(prompts):
        alone = torch.tensor([[demo.TOKENS.index(token) for token in prompt]])
        ids = torch.cat([alone, response[row : row + 1]], 1)
        hidden = model.model(input_ids=ids).last_hidden_state[:, alone.shape[1] - 1 : -1]
        torch.testing.assert_close(together[row : row + 1], hidden, rtol=1e-4, atol=1e-5)


def test_a_rollouts_own_success_is_not_its_teacher(monkeypatch, model):
    """One success among eight teaches the seven others; with none, or for itself, there is no teacher."""
    response, _ = demo.encode(["321."] + ["12."] * 7 + ["9.."] * 8, "right")
    monkeypatch.setattr(demo, "rollout", lambda *args: response)
    batch = demo.sample_batch(model, ["123", "456"], random.Random(0), torch.Generator())
    rewards, question_ids, mask = batch.outcome.values()
    assert rewards.tolist() == [1.0] + [0.0] * 15 and question_ids.tolist() == [0] * 8 + [1] * 8
    assert mask.sum(1).tolist() == [0.0] + [3.0] * 7 + [0.0] * 8
    assert batch.teacher_prompts[:2] == ["123=", "123>321="] and set(batch.teacher_prompts[8:]) == {"456="}


def test_sampling_follows_the_models_distribution(monkeypatch, model):
    """First tokens of many rollouts against the softmax of the same position."""
    prompts = ["12="] * 4000
    monkeypatch.setattr(demo, "V", len(demo.TOKENS))
    response = demo.rollout(model, prompts, torch.Generator().manual_seed(0))
    ids, _ = demo.encode(prompts[:1], "left")
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].softmax(-1)
    counts = torch.bincount(response[:, 0], minlength=len(demo.TOKENS)) / len(prompts)
    assert (counts - expected).abs().max() < 0.03


def test_a_short_run_reports(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "V", 600)
    path = tmp_path / "curves.png"
    arguments = ["demo", "--steps", "2", "--questions", "2", "--warmup-steps", "20", "--output", str(path)]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(demo, "peak_memory", lambda how, path: 0.0)
    monkeypatch.setattr(demo, "get_context", lambda method: InThisProcess())
    demo.main()
    out = capsys.readouterr().out
    for line in ("SC-SDPO", "SDPO", "fused", "eager", "eager, kept rows"):
        assert re.search(rf"^{line} +\d", out, re.MULTILINE), line
    assert path.stat().st_size > 10_000


class InThisProcess:
    """Stands for a pool of fresh processes, which would not see the small vocabulary."""

    def Pool(self, size):  # noqa: N802
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def apply(self, function, arguments):
        return function(*arguments)
