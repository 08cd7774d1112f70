"""README.md and docs/: every Python block runs, every link leads somewhere, every table says what the files say."""

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import scsdpo_kernels

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
ADAPTERS = {"scsdpo.trl": "trl", "scsdpo.verl": "verl", "scsdpo.head": "transformers"}


class Block(NamedTuple):
    page: Path
    section: str
    line: int  # its first line of code, from 1
    code: str


def blocks(page: Path) -> list[Block]:
    """The fenced Python blocks of a page, each with the heading of level two that it stands under."""
    found, section, lines = [], "", page.read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("```")]
    assert len(starts) % 2 == 0, f"{page}: a fence is open"
    fences = dict(zip(starts[::2], starts[1::2], strict=True))
    end = -1
    for i, line in enumerate(lines):
        if i <= end:
            continue
        if line.startswith("## "):
            section = line[3:]
        if i in fences:
            end = fences[i]
            if line == "```python":
                found.append(Block(page, section, i + 2, "\n".join(lines[i + 1 : end])))
    return found


def sections() -> dict[str, list[Block]]:
    """Blocks that build on each other: those of one section."""
    found: dict[str, list[Block]] = {}
    for page in PAGES:
        for block in blocks(page):
            found.setdefault(f"{page.relative_to(ROOT)}: {block.section}", []).append(block)
    return found


SECTIONS = sections()


# What surrounds a block: rollouts, hidden states and tiny models, under the names that the pages use.


WORDS = ["<pad>", "<eos>", "<unk>", *map(str, range(60))]
ROLLOUTS, RESPONSE, VOCABULARY, WIDTH = 8, 5, len(WORDS), 32


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model and its tokenizer, as a trainer loads them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0,
        bos_token_id=None, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def tensors() -> dict[str, object]:
    """A batch of rollouts: two questions of four; the last rollout has no teacher."""
    generator = torch.Generator().manual_seed(0)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, shape, generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    response = ids(ROLLOUTS, RESPONSE)
    mask = (torch.arange(RESPONSE) < torch.tensor([5, 3, 4, 1, 5, 2, 5, 5])[:, None]).long()
    mask[-1] = 0
    support = torch.rand(ROLLOUTS, RESPONSE, VOCABULARY, generator=generator).topk(6).indices
    given = {
        "torch": torch,
        "T": RESPONSE,
        "c": 0.5,
        "input_ids": torch.cat([ids(ROLLOUTS, 4), response], dim=1),
        "teacher_input_ids": torch.cat([ids(ROLLOUTS, 7), response], dim=1),
        "response_ids": response,
        "rewards": torch.tensor([1, 0, 1, 0, 1, 0, 0, 0.0]),
        "question_ids": torch.arange(ROLLOUTS) // 4,
        "mask": mask,
        "old_logp": -1 - 3 * torch.rand(ROLLOUTS, RESPONSE, generator=generator),
        "student_hidden": normal(ROLLOUTS, RESPONSE, WIDTH).requires_grad_(),
        "student_weight": (normal(VOCABULARY, WIDTH) / WIDTH**0.5).requires_grad_(),
        "teacher_hidden": normal(ROLLOUTS, RESPONSE, WIDTH),
        "teacher_weight": normal(VOCABULARY, WIDTH) / WIDTH**0.5,
        "reference_hidden": normal(ROLLOUTS, RESPONSE, 24),
        "reference_weight": normal(VOCABULARY, 24) / 24**0.5,
        "own_hidden": normal(ROLLOUTS, RESPONSE, WIDTH),
        "bias": normal(VOCABULARY).requires_grad_(),
        "lora_a": normal(2, WIDTH).requires_grad_(),
        "lora_b": normal(VOCABULARY, 2).requires_grad_(),
        "top_ids": support,
        "top_logp": torch.full(support.shape, -3.0),
        "micro_batches": torch.arange(ROLLOUTS).split(2),
        "advantages": normal(ROLLOUTS, RESPONSE),
        "teacher_entropy": 2 * torch.rand(ROLLOUTS, RESPONSE, generator=generator),
    }
    for name in ("input_ids", "teacher_input_ids"):
        attention = torch.ones_like(given[name])
        attention[1, :2] = 0  # padded on the left
        given[name.replace("input_ids", "attention_mask")] = attention
    return given


def models(folder: Path) -> dict[str, object]:
    from transformers import AutoModelForCausalLM

    model, teacher = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return {"model": model, "teacher": teacher, "optimizer": torch.optim.SGD(model.parameters(), lr=1e-3)}


def batch_of_sdpos_fork(given: dict) -> SimpleNamespace:
    """The fields of its batch that the recipe reads; a reward stands at the last token of its response."""
    scores = torch.zeros(ROLLOUTS, RESPONSE)
    scores[:, -1] = given["rewards"]
    fields = {"token_level_scores": scores, "response_mask": torch.ones(ROLLOUTS, RESPONSE, dtype=torch.long)}
    return SimpleNamespace(batch=fields, non_tensor_batch={"uid": [f"q{i // 4}" for i in range(ROLLOUTS)]})


def for_trl(monkeypatch) -> dict[str, object]:
    """Prompts, a reward, and settings under which a training is over in two short steps on a CPU."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset

    import scsdpo.trl

    original = scsdpo.trl.SCSDPOConfig

    class Short(original):
        def __init__(self, **options):
            super().__init__(
                use_cpu=True, bf16=False, max_steps=2, num_generations=4, per_device_train_batch_size=4,
                max_completion_length=6, max_prompt_length=32, report_to="none", save_strategy="no",
                disable_tqdm=True, diagnostics_warning_interval=0, gradient_checkpointing=False, **options,
            )  # fmt: skip

    monkeypatch.setattr(scsdpo.trl, "SCSDPOConfig", Short)
    prompts = Dataset.from_list([{"prompt": f"{i} {i + 7} {2 * i}"} for i in range(20)])
    return {
        "dataset": prompts,
        "reward": lambda completion_ids, **_: [float(sum(ids) % 3 == 0) for ids in completion_ids],
    }


def imported(code: str) -> set[str]:
    """The modules that a block imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.fixture
def process_group(tmp_path):
    """This process alone, in a group of its own."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("section", SECTIONS)
def test_blocks_run(section, request, tmp_path, monkeypatch):
    """One after the other, in one namespace; the loss that they leave behind is a number."""
    modules = set().union(*(imported(block.code) for block in SECTIONS[section]))
    for module in sorted(modules):
        package = ADAPTERS.get(module, module.split(".")[0])
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    torch.manual_seed(0)
    names = tensors()
    used = "\n".join(block.code for block in SECTIONS[section])
    if re.search(r"\b(model|teacher)\b", used):
        names |= models(request.getfixturevalue("saved"))
    if "scsdpo.trl" in modules:
        names |= for_trl(monkeypatch)
    if re.search(r"\bbatch\b", used):
        names["batch"] = batch_of_sdpos_fork(names)
    if any(module.startswith("torch.distributed") for module in modules):
        group = request.getfixturevalue("process_group")
        names |= {"data_parallel_group": group, "tensor_parallel_group": group, "start": 0, "stop": VOCABULARY}
    monkeypatch.chdir(tmp_path)
    for block in SECTIONS[section]:
        code = "\n" * (block.line - 1) + block.code  # so that a traceback names the page's own line
        exec(compile(code, str(block.page), "exec"), names)
    for name in ("loss", "weight"):
        if isinstance(names.get(name), torch.Tensor):
            assert names[name].isfinite().all(), name


# What the pages say and show.


def test_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert any("GPU" in line and "Status" in line for line in lines[:10]), "the status stands in the first ten lines"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        where = (page.parent / path).resolve() if path else page
        assert where.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", where.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_every_page_is_reached_from_the_readme():
    linked = {(README.parent / x).resolve() for x in re.findall(r"\]\((docs/[\w.-]+\.md)", README.read_text())}
    assert linked == set(PAGES) - {README}


def test_tables_and_plots_are_those_of_the_result_files():
    import report  # conftest.py has put benchmarks/ on the path

    for page, text in report.pages().items():
        assert page.read_text() == text, f"{page.name}: run benchmarks/report.py"
    for benchmark in report.BENCHMARKS:
        files = report.results(benchmark)
        assert files, f"no result of {report.name_of(benchmark)}"
        for path in files if hasattr(benchmark, "plot") else ():
            assert Image.open(path.with_suffix(".png")).text["Source"] == report.digest(path), f"old plot of {path}"
    headline = report.headline
    assert Image.open(headline.PATH).text["Source"] == report.digest(*headline.SOURCES), "old headline.png"
    plots = re.findall(r"\]\(\.\./(benchmarks/results/[\w.-]+\.png)\)", (ROOT / "docs" / "benchmarks.md").read_text())
    assert len(plots) >= 3
    assert f"]({headline.PATH.relative_to(ROOT)})" in README.read_text()


def test_titles_of_the_figure_lie_beside_each_other():
    import headline

    figure = headline.plot(*(json.loads(path.read_text()) for path in headline.SOURCES))
    figure.draw_without_rendering()
    titles = [axes._left_title.get_window_extent() for axes in figure.axes]
    ends = [*(title.x0 for title in titles[1:]), figure.bbox.x1]
    assert all(title.x1 < end for title, end in zip(titles, ends, strict=True))


def test_public_names_are_in_the_docs():
    """Each in code of a page that explains it."""
    text = "\n".join(page.read_text() for page in PAGES)
    for name in scsdpo_kernels.__all__:
        assert re.search(rf"`{name}\b", text), name


@pytest.mark.parametrize("command", sorted(set(re.findall(r"\./dev ([\w-]+)", README.read_text()))))
def test_commands_exist(command):
    assert f"  {command})" in (ROOT / "dev").read_text()


def test_the_two_commands():
    assert {"./dev demo", "./dev test"} <= {line.split("  ")[0].strip() for line in README.read_text().splitlines()}
