"""Before torch and Triton are imported: what both do in the tests is set here."""

import os

# Compile afresh, since torch.compile's cache on disk does not see an operator's backward.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

# As if the processor had less (SCSDPO_CPU_CAPABILITY is our kernels'): what PyTorch and the libraries it calls may use.
LIBRARIES = {
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
    },
}
os.environ |= LIBRARIES.get(os.environ.get("SCSDPO_CPU_CAPABILITY", ""), {})

import pytest
import torch

# Triton kernels run on the GPU, or without one on CPU tensors in Triton's interpreter.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "processor: its results depend on the processor's instruction set")


def pytest_collection_modifyitems(items):
    """`processor` is what runs the CPU's own kernels, but for those tests that choose the instruction set themselves."""
    for item in items:
        interpreted = any(name in item.name for name in ("triton", "tiled"))
        if item.path.stem in ON_PROCESSOR and not interpreted:
            item.add_marker("processor")


ON_PROCESSOR = {
    "test_benchmarks",
    "test_linear_divergence",
    "test_objectives",
    "test_operator",
    "test_package",
    "test_per_token",
    "test_properties",
    "test_scsdpo_loss",
    "test_shards",
    "test_transformers",
    "test_trl",
    "test_trust_region",
}


@pytest.fixture
def untuned(monkeypatch):
    """One configuration a kernel: nothing is timed on the first call of each shape."""
    from scsdpo_kernels import tiled

    for key, choice in tiled.TILES.items():
        monkeypatch.setitem(tiled.TILES, key, choice[:1])
