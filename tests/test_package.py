"""What holds of the package as a whole: the import law, the memory bound, the public names."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import scsdpo_kernels
from scsdpo_kernels import chunked, linear_divergence

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "scsdpo_kernels"

# Each module imports only from layers below its own.
LAYERS = [
    {"__init__"},
    {"scsdpo_loss"},
    {"linear_divergence", "weights", "trust_region"},
    {"ops"},
    {"chunked", "tiled", "reference"},
    {"support"},
    {"shards"},
    {"kernels"},
    {"native", "row_divergence_triton", "logits_triton", "question_weights_triton"},
    {"divergence_triton", "arguments", "rows"},
    {"_C"},
]


def imports(path):
    """(module, name) of the package's own imports in a file, wherever in it they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from ([node.module] if node.module else [alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scsdpo"):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("scsdpo"))


def test_import_law():
    layer = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    modules = {path.stem: path for path in PACKAGE.glob("*.py")}
    assert set(modules) == set(layer) - {"_C"}
    for name, path in modules.items():
        for imported in imports(path):
            assert layer[imported] > layer[name], f"{name} imports {imported}"


def test_only_native_imports_the_compiled_module_and_only_bindings_knows_python():
    assert [path.stem for path in PACKAGE.glob("*.py") if "_C" in set(imports(path))] == ["native"]
    knows = [path.name for path in (ROOT / "csrc").glob("*.[ch]*") if "pybind11" in path.read_text()]
    assert knows == ["bindings.cpp"]
    assert not any("torch/" in path.read_text() for path in (ROOT / "csrc").glob("*.[ch]*"))


def test_trainer_side_imports_only_public_names():
    for path in (ROOT / "python" / "scsdpo").rglob("*.py"):
        assert {name for name in imports(path) if name.startswith("scsdpo_kernels")} <= {"scsdpo_kernels"}, path


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
    linear = list(inspect.signature(scsdpo_kernels.linear_divergence).parameters)
    assert linear == [
        "student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "token_weight", "beta", "temperature",
        "target_ids", "old_logp", "importance_clip", "top_k", "tail", "support_ids", "support_logp", "sampled_token",
        "entry_clip", "student_bias", "teacher_bias", "student_softcap", "teacher_softcap", "student_logit_scale",
        "teacher_logit_scale", "student_lora", "teacher_lora", "schedule", "rows", "shard",
    ]  # fmt: skip
    weights = list(inspect.signature(scsdpo_kernels.question_weights).parameters)
    assert weights == ["rewards", "question_ids", "exponent", "success_threshold", "group"]
    assert scsdpo_kernels.LinearDivergence._fields == (
        "loss", "divergence", "student_entropy", "teacher_entropy", "student_logp", "teacher_logp",
        "importance_ratio",
    )  # fmt: skip
    loss = inspect.signature(scsdpo_kernels.scsdpo_loss).parameters
    assert list(loss)[:4] == linear[:4] and {
        "rewards",
        "question_ids",
        "mask",
        "reduction",
        "denominator",
        "group",
    } <= set(loss)
    defaults = {
        name: parameter.default
        for function in (scsdpo_kernels.linear_divergence, scsdpo_kernels.scsdpo_loss, scsdpo_kernels.question_weights)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not None and parameter.default is not inspect.Parameter.empty
    }
    assert defaults == {"beta": 0.5, "temperature": 1.0, "schedule": "auto", "reduction": "token-mean", "exponent": 0.5,
                        "sampled_token": False}  # fmt: skip
    shared = inspect.signature(scsdpo_kernels.linear_divergence.__globals__["_checked"]).parameters
    for name, parameter in inspect.signature(scsdpo_kernels.linear_divergence).parameters.items():
        assert name in list(linear[:4]) or shared[name].default == parameter.default, name
    for name in scsdpo_kernels.__all__:
        assert getattr(scsdpo_kernels, name).__doc__


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


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
from scsdpo_kernels import linear_divergence, native
rows, dtype, what = int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]
bias = torch.zeros(151936, requires_grad=True)
options = {"plain": {}, "top_k": {"top_k": 100}, "bias": {"student_bias": bias}}[what]
def read(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024
hidden = torch.randn(rows, 64).to(dtype).requires_grad_()
weight = (torch.randn(151936, 64) / 8).to(dtype).requires_grad_()
teacher = hidden.detach() + 0.1
linear_divergence(hidden[:2], weight[:50], teacher[:2]).loss.backward()
hidden.grad = weight.grad = None
open("/proc/self/clear_refs", "w").write("5")
before = read("VmRSS")
linear_divergence(hidden, weight, teacher, **options).loss.backward()
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
