"""The CUDA row kernel's own source, compiled for the host (gpu_on_host.h): what is tested where there is no GPU."""

import functools
import importlib.util
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pybind11

from scsdpo_kernels.kernels import native

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"


@functools.cache
def module(source: Path = CSRC / "row_divergence_cuda.cu") -> ModuleType:
    """The source's kernels, compiled."""
    folder = Path(tempfile.mkdtemp(prefix="cuda_on_host"))
    library = folder / f"cuda_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    files = [TESTS / "cuda_on_host.cpp", TESTS / "entry_on_cpu.cpp", CSRC / "mixture.cpp", CSRC / "row_geometry.cpp"]
    includes = [f"-I{x}" for x in (pybind11.get_include(), sysconfig.get_path("include"), CSRC)]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", f'-DSOURCE="{source}"']
    subprocess.run(["c++", *flags, *includes, *files, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("cuda_on_host", library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def install(monkeypatch, *, capability=9, shared=227 * 1024, largest_cluster=16, clusters=2, seed=0,
            source=CSRC / "row_divergence_cuda.cu") -> None:  # fmt: skip
    """native.row_divergence_cuda takes CPU tensors, on a machine with so many bytes of shared memory to a block."""
    compiled_kernels = module(source)
    compiled_kernels.machine(capability, shared, largest_cluster, clusters, seed)
    compiled = SimpleNamespace(**{name: getattr(native._C, name) for name in dir(native._C) if name[0] != "_"})
    compiled.row_divergence_cuda = compiled_kernels.row_divergence_cuda
    monkeypatch.setattr(native, "_C", compiled)
    monkeypatch.setattr(native, "_stream", lambda device: (0, 0))
