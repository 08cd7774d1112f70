"""What holds of the package as a whole: the import law, the memory bound, the public names."""

import ast
import graphlib
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from inside import Inside
from torch.utils._pytree import tree_leaves

import scsdpo_kernels
from scsdpo_kernels import linear_divergence, linear_divergence_per_token, scsdpo_loss
from scsdpo_kernels.arguments import DivergenceOptions
from scsdpo_kernels.kernels import native
from scsdpo_kernels.schedules import chunked

ROOT = Path(__file__).parents[1]
PACKAGES = {"scsdpo": ROOT / "python" / "scsdpo", "scsdpo_kernels": ROOT / "scsdpo_kernels"}
MODULES = {
    ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
    for package, folder in PACKAGES.items()
    for path in folder.rglob("*.py")
}

# Everything imports only from below; the modules of one package here import each other, in no circle.
LAW = (
    "scsdpo",  # knows public names of scsdpo_kernels
    "__init__ > scsdpo_loss > linear_divergence > trust_region, pass_rates > question_weights",
    "arguments, ops > checks, main_grad > vocab_shard",
    "schedules",  # chunked and reference know neither each other nor torch.library
    "kernels",  # native alone knows _C
    "problem",  # torch only
)
DEPTHS = {name: depth for depth, names in enumerate(" > ".join(LAW).split(" > ")) for name in names.split(", ")}
SCHEDULES = {f"scsdpo_kernels.schedules.{name}" for name in ("chunked", "reference")}


def imports(module):
    """Dotted names of the modules that a module imports, wherever in it that stands."""
    path, known = MODULES[module], {*MODULES, "scsdpo_kernels._C"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: None if path.stem == "__init__" else -1]
            source = [*package[: len(package) - node.level + 1], node.module] if node.level else [node.module]
            source = ".".join(filter(None, source))
            for name in (alias.name for alias in node.names):
                public = source == "scsdpo_kernels" and not node.level and name in scsdpo_kernels.__all__
                is_module = f"{source}.{name}" in known and not public
                yield f"{source}.{name}" if is_module else source


def in_law(module):
    """The name that the law has for a module."""
    package, *rest = module.split(".")
    return package if package == "scsdpo" else rest[0] if rest else "__init__"


def test_import_law():
    assert set(DEPTHS) == {in_law(module) for module in MODULES}
    graph = {module: {x for x in imports(module) if x.startswith("scsdpo")} for module in MODULES}
    for module in MODULES:
        for imported in graph[module] - {"scsdpo_kernels._C"}:
            above, below = in_law(module), in_law(imported)
            assert above == below or DEPTHS[above] < DEPTHS[below], f"{module} imports {imported}"
            assert not {module, imported} <= SCHEDULES, f"{module} imports {imported}"
    graphlib.TopologicalSorter(graph).prepare()  # raises for a circle


def test_operators_are_defined_above_schedules():
    for module, path in MODULES.items():
        if in_law(module) in ("schedules", "kernels", "problem"):
            used = [ast.unparse(x) for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.Attribute)]
            assert not [x for x in (*imports(module), *used) if x.startswith("torch.library")], module


def test_a_problem_knows_torch_only():
    others = {name.split(".")[0] for name in imports("scsdpo_kernels.problem")} - sys.stdlib_module_names
    assert others == {"torch"}


def test_the_python_in_dev_runs():
    """It names the lesser instruction sets, at which `./dev test` runs what depends on them."""
    (code,) = re.findall(r"-c '(.*?)'", (ROOT / "dev").read_text())
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed.split() == list(native.instruction_sets()[:-1])


def test_only_native_imports_the_compiled_module_and_only_bindings_knows_python():
    assert [x for x in MODULES if "scsdpo_kernels._C" in set(imports(x))] == ["scsdpo_kernels.kernels.native"]
    knows = [path.name for path in (ROOT / "csrc").glob("*.[ch]*") if "pybind11" in path.read_text()]
    assert knows == ["bindings.cpp"]
    assert not any("torch/" in path.read_text() for path in (ROOT / "csrc").glob("*.[ch]*"))


def test_trainer_side_imports_only_public_names():
    for module in MODULES:
        if module.split(".")[0] == "scsdpo":
            assert {x for x in imports(module) if x.startswith("scsdpo_kernels")} <= {"scsdpo_kernels"}, module


def test_import_brings_torch_and_nothing_else_heavy():
    code = (
        "import sys, {}; print([m for m in ('transformers', 'trl', 'triton', 'scsdpo_kernels._C') if m in sys.modules])"
    )
    run = [
        subprocess.check_output([sys.executable, "-c", code.format(module)], text=True)
        for module in ("scsdpo_kernels", "torch")
    ]
    assert run[0] == run[1]


def test_public_signatures():
    """The contract that other people's scripts call."""
    heads = ["student_hidden", "student_head", "teacher_hidden", "teacher_head"]
    options = [
        "beta", "divergence", "temperature", "support", "entry_clip", "target_ids", "old_logp", "importance_clip",
        "policy", "metrics", "schedule", "rows", "shard", "shared_prefix",
    ]  # fmt: skip
    signatures = {
        function.__name__: inspect.signature(function).parameters
        for function in (linear_divergence, linear_divergence_per_token, scsdpo_loss, scsdpo_kernels.question_weights)
    }
    names = {name: list(parameters) for name, parameters in signatures.items()}
    assert names == {
        "linear_divergence": [*heads, "token_weight", *options],
        "linear_divergence_per_token": [*heads, "options"],
        "scsdpo_loss": [
            *heads, "rewards", "question_ids", "question_weight", "mask", "reduction", "denominator", "exponent",
            "success_threshold", "group", "token_weight", "options",
        ],
        "question_weights": ["rewards", "question_ids", "exponent", "success_threshold", "group"],
    }  # fmt: skip
    for name in ("linear_divergence", "linear_divergence_per_token", "scsdpo_loss"):
        kinds = [parameter.kind for parameter in signatures[name].values()]
        assert {*kinds[:4]} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}, name
        assert {*kinds[4:]} <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}, name
    defaults = {
        name: parameter.default
        for parameters in signatures.values()
        for name, parameter in parameters.items()
        if parameter.default is not None and parameter.default is not inspect.Parameter.empty
    }
    assert defaults == {"beta": 0.5, "temperature": 1.0, "importance_clip": 2.0, "schedule": "auto",
                        "reduction": "token-mean", "exponent": 0.5, "shared_prefix": False,
                        "divergence": "jensen_shannon", "metrics": ()}  # fmt: skip
    assert scsdpo_kernels.LinearDivergence._fields == (
        "loss", "divergence", "student_entropy", "teacher_entropy", "student_logp", "teacher_logp",
        "importance_ratio", "policy_loss", "policy_clipped", "metrics",
    )  # fmt: skip
    for name in scsdpo_kernels.__all__:
        assert getattr(scsdpo_kernels, name).__doc__


def test_public_heads_and_supports():
    """Named tuples that other people's scripts make, in this order."""
    fields = {
        name: (getattr(scsdpo_kernels, name)._fields, getattr(scsdpo_kernels, name)._field_defaults)
        for name in ("Head", "LoRA", "RoutedHeads", "TopK", "TopLogprobs", "SampledToken", "PolicyGradient")
    }
    assert fields == {
        "Head": (
            ("weight", "bias", "lora", "logit_scale", "softcap", "main_grad"),
            {"bias": None, "lora": None, "logit_scale": 1.0, "softcap": None, "main_grad": None},
        ),
        "LoRA": (("a", "b", "scale"), {"scale": 1.0}),
        "RoutedHeads": (("heads", "index"), {}),
        "TopK": (("k", "tail"), {"tail": "bucket"}),
        "TopLogprobs": (("ids", "logp", "tail"), {"tail": "bucket"}),
        "SampledToken": ((), {}),
        "PolicyGradient": (
            ("advantages", "clip_low", "clip_high", "coefficient", "ratio"),
            {"clip_low": 0.2, "clip_high": 0.2, "coefficient": 1.0, "ratio": None},
        ),
    }


def test_options_that_are_passed_on_are_linear_divergences():
    """What a type checker sees of `**options`: names and types as linear_divergence has them."""
    hints = typing.get_type_hints(linear_divergence)
    keywords = inspect.signature(linear_divergence).parameters.values()
    keywords = {x.name: hints[x.name] for x in keywords if x.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords.pop("token_weight") == torch.Tensor | None
    assert typing.get_type_hints(DivergenceOptions) == keywords
    assert DivergenceOptions.__required_keys__ == frozenset()
    for function in (scsdpo_loss, linear_divergence_per_token):
        assert function.__annotations__["options"] == "Unpack[DivergenceOptions]", function


@pytest.mark.parametrize("function", [linear_divergence, linear_divergence_per_token, scsdpo_loss])
def test_a_typo_names_the_function_that_was_called(function):
    hidden, head = torch.zeros(2, 4), torch.zeros(8, 4)
    own = {"mask": torch.ones(2), "question_weight": torch.ones(2)} if function is scsdpo_loss else {}
    message = rf"^{function.__name__}\(\) got an unexpected keyword argument 'tmperature'"
    with pytest.raises(TypeError, match=message):
        function(hidden, head, hidden, **own, tmperature=2.0)


class LargestTensor(Inside):
    """Numbers in the largest tensor that is made; what lies in an argument's memory is not."""

    numel = 0

    def saw(self, func, args, out):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, x.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_tensor_of_rows_by_vocabulary(monkeypatch, dtype):
    monkeypatch.setattr(chunked, "MIN_ROWS", 16)
    monkeypatch.setitem(chunked.BUFFER_BYTES, "cpu", 0)
    rows, vocabulary, width = 400, 3000, 8
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    with LargestTensor() as largest:
        linear_divergence(hidden, weight, -hidden).loss.backward()
    # two fp32 buffers; as bf16 they count twice as many numbers
    assert largest.numel <= 2 * 16 * 3008 * (2 if dtype == torch.bfloat16 else 1) < rows * vocabulary


PEAK = """
import sys, torch
from scsdpo_kernels import Head, TopK, linear_divergence
from scsdpo_kernels.kernels import native
rows, dtype, what = int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]
bias = torch.zeros(151936, requires_grad=True)
options = {"support": TopK(100)} if what == "top_k" else {}
def read(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024
hidden = torch.randn(rows, 64).to(dtype).requires_grad_()
weight = (torch.randn(151936, 64) / 8).to(dtype).requires_grad_()
teacher = hidden.detach() + 0.1
linear_divergence(hidden[:2], weight[:50], teacher[:2]).loss.backward()
hidden.grad = weight.grad = None
open("/proc/self/clear_refs", "w").write("5")
before = read("VmRSS")
head = Head(weight, bias=bias) if what == "bias" else weight
linear_divergence(hidden, head, teacher, **options).loss.backward()
print(read("VmHWM") - before - (hidden.grad.nbytes + weight.grad.nbytes) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of /proc/self/status")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_does_not_grow_with_rows(dtype):
    """MiB over inputs and gradients, each in a fresh process; the logits of 1024 rows alone would be 1187 a side."""
    peaks = [
        float(subprocess.check_output([sys.executable, "-c", PEAK, str(rows), dtype, "plain"], text=True))
        for rows in (768, 1536)
    ]
    assert max(peaks) < 600, peaks
    assert abs(peaks[1] - peaks[0]) < 60, peaks


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of /proc/self/status")
@pytest.mark.parametrize("what", ["top_k", "bias"])
def test_objectives_and_heads_copy_no_chunk(what):
    """A bf16 gradient lies over fp32 logits: a copy of it in fp32 would be 213 MiB more."""
    peaks = [
        float(subprocess.check_output([sys.executable, "-c", PEAK, "768", "bfloat16", which], text=True))
        for which in ("plain", what)
    ]
    assert peaks[1] < peaks[0] + 100, peaks
