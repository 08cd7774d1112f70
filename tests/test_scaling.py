"""The gradients' last kernel: times the loss's own gradient, in place, unless that is 1."""

import pytest
import torch
from conftest import DEVICE

from scsdpo_kernels.kernels import scaling_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 2.5, -0.75, 0.0, float("nan")])
@pytest.mark.parametrize("count", [0, 1, 4097, 12_345])
def test_every_entry_is_multiplied_once(monkeypatch, dtype, factor, count):
    monkeypatch.setattr(scaling_triton, "PROGRAMS", 2)  # each takes several blocks
    gradient = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(DEVICE, dtype)
    expected = (gradient.float() * factor).to(dtype)
    got = scaling_triton.multiply(gradient, torch.tensor(factor, device=DEVICE))
    assert got.data_ptr() == gradient.data_ptr()
    # Triton's interpreter cuts bf16 numbers off where hardware rounds.
    tolerance = 8e-3 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0, equal_nan=True)


def test_nothing_is_written_where_the_factor_is_1():
    """A product makes a quiet NaN of a signalling one."""
    bits = torch.full((100,), 0x7F801234, dtype=torch.int32, device=DEVICE)
    scaling_triton.multiply(bits.view(torch.float32), torch.ones((), device=DEVICE))
    assert (bits == 0x7F801234).all()
