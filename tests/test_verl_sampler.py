"""scsdpo.verl.TeacherPrompts by itself: what it reads, writes and refuses. In verl: tests/test_verl_main_ppo.py."""

import pytest
import torch

pytest.importorskip("verl_on_cpu", reason="verl: ./dev verl", exc_type=ImportError)

import transfer_queue
from omegaconf import OmegaConf
from tensordict import NonTensorStack, TensorDict
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from scsdpo.verl import Attempt, TeacherPrompts, successful_siblings
from scsdpo.verl.prompts import default_prompt


class Words:
    """A tokenizer: words are numbered as they come."""

    def __init__(self):
        self.words = []

    def ids(self, text):
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids, skip_special_tokens):
        return " ".join(self.words[i] for i in ids)

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt, return_dict, thinking=""):
        assert tokenize and add_generation_prompt and return_dict is False
        return self.ids(" ".join(f"<{m['role']}> {m['content']}" for m in messages) + f" <assistant> {thinking}")


def trainer(changes: dict | None = None, **sampler_kwargs):
    config = OmegaConf.create(
        {
            "algorithm": {"filter_groups": {"enable": False}},
            "data": {"apply_chat_template_kwargs": {"thinking": "off"}},
            "reward": {"reward_model": {"enable": False, "enable_resource_pool": False}},
            "trainer": {"v1": {"trainer_mode": "sync", "sampler": {"sampler_kwargs": sampler_kwargs}}},
        }
    )
    for name, value in (changes or {}).items():
        OmegaConf.update(config, name, value, force_add=True)

    class Trainer:
        def refill(self):
            pass

    found = Trainer()
    found.config, found.tokenizer = config, Words()
    return found


def sampler_of(owner) -> TeacherPrompts:
    v1 = owner.config.trainer.v1
    return TeacherPrompts(
        trainer_mode=v1.trainer_mode, trainer_config=OmegaConf.create({}), max_off_policy_threshold=8,
        max_off_policy_strategy="drop", sampler_kwargs=v1.sampler.sampler_kwargs, refill_fn=owner.refill,
    )  # fmt: skip


# Two questions of three rollouts, and one of a single one.
RESPONSES = ["r0", "r1", "r2", "s0", "s1", "s2", "t0"]
REWARDS = [0.0, 1.0, 0.6, 0.0, 0.0, 0.0, 1.0]
FEEDBACK = [None, None, None, "no unit", " ", None, None]


class Batch:
    """TransferQueue's, as far as a sampler looks at it."""

    def __init__(self, keys):
        self.keys = keys

    def __len__(self):
        return len(self.keys)


@pytest.fixture
def sampled(monkeypatch):
    """What a sampler puts into the queue, as lists of words; and its metrics."""

    def run(owner, partition="train"):
        keys = [f"uid_{i}_0" for i in range(len(RESPONSES))]
        questions = [[{"role": "system", "content": "sys"}, {"role": "user", "content": f"q{x[0]}"}] for x in RESPONSES]
        data = TensorDict(
            {
                "uid": NonTensorStack(*[x[0] for x in RESPONSES]),
                "raw_prompt": NonTensorStack(*questions),
                "responses": torch.nested.as_nested_tensor(
                    [torch.tensor(owner.tokenizer.ids(x)) for x in RESPONSES], layout=torch.jagged
                ),
                "rm_scores": torch.nested.as_nested_tensor([torch.tensor([x]) for x in REWARDS], layout=torch.jagged),
                "reward_model": NonTensorStack(*[{"ground_truth": x} for x in RESPONSES]),
                "extra_fields": NonTensorStack(
                    *[{"reward_extra_info": {} if x is None else {"feedback": x}} for x in FEEDBACK]
                ),
            },
            batch_size=[len(RESPONSES)],
        )
        put = {}
        batch = Batch(keys)
        monkeypatch.setattr(ReplayBuffer, "sample", lambda self, **given: (batch, {"verls": 1}))
        monkeypatch.setattr(transfer_queue, "kv_batch_get", lambda *, select_fields, **_: data.select(*select_fields))
        monkeypatch.setattr(transfer_queue, "kv_batch_put", lambda *, fields, **_: put.update(fields) or batch)
        _, metrics = sampler_of(owner).sample(global_steps=1, partition_id=partition, batch_size=3)
        if partition != "train":
            return put, metrics
        assert put["teacher_prompts"].dtype == torch.int64
        return [owner.tokenizer.decode(x, False) for x in put["teacher_prompts"].unbind()], metrics

    return run


def test_a_teacher_sees_the_question_a_solution_and_feedback(sampled):
    """The text is this package's own: the test has its parts and their order."""
    prompts, metrics = sampled(trainer())
    assert [bool(x) for x in prompts] == [True, True, True, True, False, False, False]
    for i, solution in {0: "r1", 1: "r2", 2: "r1"}.items():
        words = prompts[i].split()
        assert words[:4] == ["<system>", "sys", "<user>", "qr"] and words[-2:] == ["<assistant>", "off"]
        assert solution in words and not {"r0", "r1", "r2"} - {solution} & set(words)
    assert "no unit" in prompts[3] and prompts[3].startswith("<system> sys <user> qs ")
    assert metrics == {
        "verls": 1,
        "scsdpo/pass_rate": pytest.approx(3 / 7),
        "scsdpo/zero_weight_questions": pytest.approx(2 / 3),
        "scsdpo/with_teacher": pytest.approx(4 / 7),
    }


def test_validation_is_left_alone(sampled):
    assert sampled(trainer(), "val") == ({}, {"verls": 1})


def test_a_success_is_what_the_weights_count_as_one(sampled):
    prompts, metrics = sampled(trainer({"algorithm.question_success_threshold": 0.7}))
    assert prompts[1] == ""  # the only success has no sibling
    assert metrics["scsdpo/pass_rate"] == pytest.approx(2 / 7)
    prompts, _ = sampled(trainer({"algorithm.question_success_threshold": 0.7}, success_threshold=0.5))
    assert "r2" in prompts[1]


SEEN: list[Attempt] = []


def own_prompt(tokenizer, attempt):
    SEEN.append(attempt)
    return tokenizer.ids(f"{attempt.messages[-1]['content']} {attempt.solution}") if attempt.solution else []


def no_ids(tokenizer, attempt):
    return [[1, 2]]


def test_a_function_of_ones_own(sampled):
    SEEN.clear()
    prompts, _ = sampled(trainer(prompt=f"{__name__}:own_prompt"))
    assert prompts == ["qr r1", "qr r2", "qr r1", "", "", "", ""]
    assert [x.response for x in SEEN] == RESPONSES and [x.reward for x in SEEN] == pytest.approx(REWARDS)
    assert SEEN[3].feedback == "no unit" and SEEN[4].feedback is None
    assert SEEN[5].reward_model == {"ground_truth": "s2"}
    with pytest.raises(ValueError, match=r"sampler_kwargs\.prompt: expected a function that returns token ids"):
        sampled(trainer(prompt=f"{__name__}:no_ids"))
    for name in ("nowhere", f"{__name__}:nothing"):
        with pytest.raises(ValueError, match=r"sampler_kwargs\.prompt: expected 'module:function', got"):
            sampler_of(trainer(prompt=name))


def test_long_prompts_have_no_teacher(sampled):
    prompts, _ = sampled(trainer(prompt=f"{__name__}:own_prompt", max_length=1))
    assert prompts == [""] * len(RESPONSES)


@pytest.mark.parametrize(
    "name, value",
    {
        "trainer.v1.trainer_mode": "colocate_async",
        "algorithm.filter_groups.enable": True,
        "trainer.v1.sampler.sync_refill_failed_groups": True,
        "reward.reward_model.enable": True,
    }.items(),
)
def test_what_a_custom_sampler_does_not_see_is_refused(name, value):
    with pytest.raises(
        ValueError, match=rf"^{name.rsplit('.', 1)[0]}.*: expected .* with scsdpo.verl's TeacherPrompts"
    ):
        sampler_of(trainer({name: value}))


def test_other_settings_are_refused():
    with pytest.raises(
        ValueError, match=r"sampler_kwargs: expected prompt, success_threshold, max_length, got treshold"
    ):
        sampler_of(trainer(treshold=1.0))
    owner = trainer()
    owner.refill = lambda count: None
    with pytest.raises(ValueError, match="not made for this release of verl"):
        sampler_of(owner)


def test_a_question_that_is_no_text_is_refused():
    attempt = Attempt([{"role": "user", "content": [{"type": "image"}]}], "", 0.0, "solution", None, None)
    with pytest.raises(ValueError, match="raw_prompt: expected a text of the user's as its last message, got list"):
        default_prompt(Words(), attempt)


def test_a_demonstration_is_another_rollout_that_succeeded():
    uid, rewards = ["a", "a", "b", "a", "b", "c"], [1, 0, 1, 1, 0, 0]
    assert successful_siblings(uid, rewards) == [3, 0, None, 0, 2, None]
