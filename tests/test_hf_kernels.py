"""The layout of Hugging Face's kernels: a build of its own beside the installed package, with Triton and without _C."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from conftest import DEVICE
from problems import problem

import scsdpo_kernels

tomllib = pytest.importorskip("tomllib", reason="tomllib: Python 3.11")
pytest.importorskip("triton", reason="triton: pip install '.[tests]'")

ROOT = Path(__file__).parents[1]

# What kernel-builder writes: a namespace that no other build has.
OPS = """
import torch

def add_op_namespace_prefix(op_name):
    return f"{_OPS_NAME}::{op_name}"

_OPS_NAME = "_scsdpo_kernels_cuda_0a1b2c3"
ops = getattr(torch.ops, _OPS_NAME)
"""


def imported_as(name: str, path: Path):
    """A module or package under any name; its folder is on no path."""
    given = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(given)
    sys.modules[name] = module
    given.loader.exec_module(module)
    return module


hf_kernels = imported_as("hf_kernels", ROOT / "packaging" / "hf_kernels.py")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    (hf_kernels.assemble(folder, "someone/scsdpo-kernels") / "_ops.py").write_text(OPS)
    return folder


@pytest.fixture(scope="module")
def build(tree):
    return imported_as("scsdpo_kernels_0a1b2c3", tree / "torch-ext" / "scsdpo_kernels" / "__init__.py")


def test_what_kernel_builder_reads(tree):
    """build.toml has the sections that a noarch kernel has to have; no build of this machine is along."""
    found = tomllib.loads((tree / "build.toml").read_text())
    assert found["torch-noarch"] == {} and found["general"]["hub"] == {"repo-id": "someone/scsdpo-kernels"}
    assert found["general"]["name"].replace("-", "_") == "scsdpo_kernels"
    assert (tree / "flake.nix").exists() and not list(tree.rglob("*.so"))


def test_a_folder_that_holds_something_is_refused(tree):
    with pytest.raises(FileExistsError, match="folder: expected an empty one"):
        hf_kernels.assemble(tree)


def test_everything_is_imported_relatively(tree):
    """The folder is on no path, so an absolute import would find the installed package, or nothing."""
    for path in tree.rglob("*.py"):
        lines = [line.strip() for line in path.read_text().splitlines()]
        assert not [x for x in lines if x.startswith(("import scsdpo", "from scsdpo"))], path


def triton_on_the_cpu(monkeypatch, package: str) -> None:
    """Where there is no GPU: Triton's interpreter beside PyTorch's matmuls, as on a GPU."""
    chunked, products, kernels = (
        importlib.import_module(f"{package}.{name}") for name in ("schedules.chunked", "schedules.products", "kernels")
    )
    monkeypatch.setattr(chunked, "kernels_of", lambda device: kernels.triton_kernels())
    monkeypatch.setattr(products, "on_cpu", lambda tensor: False)
    empty = lambda *shape, dtype, device: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    monkeypatch.setattr(products, "empty", empty)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_build_computes_without_the_compiled_module(build, monkeypatch, beta):
    """Loss and gradients, with operators of its own beside the installed package's."""
    if DEVICE == "cpu":
        triton_on_the_cpu(monkeypatch, build.__name__)
    given = problem(9, 24, 307, 0.5, scale=2.0, weighted=True)
    on_device = given.but(
        hidden=given.hidden.to(DEVICE),
        head=given.head.to(DEVICE),
        teacher=given.teacher.to(DEVICE),
        token_weight=given.token_weight.to(DEVICE),
    )
    result, *gradients = on_device.run(build.linear_divergence, beta=beta)
    got = result._replace(loss=result.loss.cpu()), *(x.cpu() for x in gradients)
    oracle.assert_near(got, oracle.expected(given, beta=beta))
    assert torch.ops._scsdpo_kernels_cuda_0a1b2c3.divergence.default is not torch.ops.scsdpo_kernels.divergence.default
    assert f"{build.__name__}.kernels.native" not in sys.modules
    assert build.linear_divergence is not scsdpo_kernels.linear_divergence


def test_a_cpu_is_refused_by_name(build):
    """No fallback: the compiled module that a CPU needs is not there."""
    given = problem(3, 8, 20)
    with pytest.raises(ImportError, match=r"scsdpo_kernels\._C, the compiled part of this package"):
        given.run(build.linear_divergence)


def test_the_script(tmp_path):
    script = [sys.executable, str(ROOT / "packaging" / "hf_kernels.py"), str(tmp_path / "new")]
    printed = subprocess.check_output(script, text=True).strip()
    assert Path(printed) == tmp_path / "new" / "torch-ext" / "scsdpo_kernels"
    assert (tmp_path / "new" / "build.toml").read_text().endswith("\n[torch-noarch]\n")
