"""Before torch and Triton are imported: what both do in the tests is set here."""

import os

# Compile afresh, since torch.compile's cache on disk does not see an operator's backward.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch

# Triton kernels run on the GPU, or without one on CPU tensors in Triton's interpreter.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def untuned(monkeypatch):
    """One configuration a kernel: nothing is timed on the first call of each shape."""
    from scsdpo_kernels import tiled

    for key, choice in tiled.TILES.items():
        monkeypatch.setitem(tiled.TILES, key, choice[:1])
