"""Before torch and Triton are imported: what both do in the tests is set here."""

import os
import sys
from pathlib import Path

# Compile afresh, since torch.compile's cache on disk does not see an operator's backward.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import levels

os.environ |= levels.environment(os.environ.get("SCSDPO_CPU_CAPABILITY", ""))

import pytest
import torch

# Triton kernels run on the GPU, or without one on CPU tensors in Triton's interpreter.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


# Files that run the CPU's own kernels, and do not choose the instruction set themselves.
ON_PROCESSOR = {
    "test_entry_clip",
    "test_linear_divergence",
    "test_objectives",
    "test_operator",
    "test_per_token",
    "test_properties",
    "test_scsdpo_loss",
    "test_shared_prefix",
    "test_transformers",
    "test_trust_region",
}


def pytest_collection_modifyitems(items):
    """Marks what `./dev test` runs again at every lesser instruction set."""
    for item in items:
        if item.path.stem in ON_PROCESSOR and "triton" not in item.name:
            item.add_marker("processor")


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def ranks(request, tmp_path_factory):
    """Four processes, or under `-m gpu` as many as there are GPUs, if those are fewer."""
    from ranks import Ranks

    most = 4 if request.param == "gloo" else min(4, torch.cuda.device_count())
    ranks = Ranks(tmp_path_factory.mktemp("rendezvous"), most, request.param)
    yield ranks
    ranks.stop()
