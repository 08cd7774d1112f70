"""A GPU's kernels that find and read supports; test_objectives.py and test_ptx.py ask for what follows from them."""

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("triton", reason="triton: pip install '.[tests]'")

from scsdpo_kernels.kernels import support_torch, support_triton
from scsdpo_kernels.kernels.contract import Logits


def first_largest(row, k):
    """Of equal numbers the first, as no sort of PyTorch promises."""
    return sorted(sorted(range(len(row)), key=lambda v: (-row[v], v))[:k])


@pytest.mark.parametrize(
    "vocabulary, k",
    [(1, 1), (70, 70), (500, 100), (4097, 1), (9000, 7), (8200, 300), (9001, 1000)],
)
def test_likeliest(vocabulary, k):
    """Rows of equal numbers, of NaN and of forbidden entries among others; one set, and several."""
    generator = torch.Generator().manual_seed(vocabulary)
    z = torch.randn(4, vocabulary, generator=generator)
    z[1] = z[1].round()
    z[2, ::2] = -torch.inf
    z[3, [vocabulary // 3, vocabulary - 1]] = torch.tensor([torch.nan, torch.inf])
    storage = torch.full((4, vocabulary + 5), torch.inf)
    storage[:, :vocabulary] = z
    columns = support_triton.likeliest(storage.to(DEVICE)[:, :vocabulary], k).cpu()
    ranks = torch.where(z.isnan(), torch.finfo(torch.float32).max, z.clamp(max=1e30)).tolist()  # NaN is the largest
    assert columns.tolist() == [first_largest(row, k) for row in ranks]
    values = z.gather(1, support_torch.likeliest(z, k)).sort(1).values
    torch.testing.assert_close(z.gather(1, columns).sort(1).values, values, rtol=0, atol=0, equal_nan=True)


def test_many_likeliest_are_a_librarys():
    z = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    columns = support_triton.likeliest(z.to(DEVICE).repeat(1, 6), 17_000).cpu()
    assert columns.shape == (2, 17_000) and all(len(set(row)) == 17_000 for row in columns.tolist())
    z = z.repeat(1, 6)
    assert torch.equal(z.gather(1, columns).sort(1).values, z.sort(1).values[:, -17_000:])


@pytest.mark.parametrize("difference", [False, True], ids=["teacher", "difference"])
@pytest.mark.parametrize("forbid", [False, True], ids=["read", "forbid"])
def test_entries(difference, forbid):
    """Columns outside of the vocabulary, rows of nothing else, columns that are there twice."""
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 3, 301, generator=generator)
    columns = torch.randint(301, (3, 9), generator=generator)
    columns[0, :4] = torch.tensor([-1, 301, 5, 5])
    columns[1] = -1
    for teacher in (t, None):
        mine, theirs = (
            Logits(*(x if x is None else x.clone().to(device) for x in (z, teacher)), difference, 0.0)
            for device in (DEVICE, "cpu")
        )
        if teacher is None:
            mine, theirs = mine._replace(difference=False), theirs._replace(difference=False)
        got = support_triton.entries(mine, columns.to(DEVICE), -7.0, forbid=forbid)
        expected = support_torch.entries(theirs, columns, -7.0, forbid=forbid)
        assert torch.equal(got.cpu(), expected)
        assert (expected[:, 1] == -7.0).all()
        for x, y in zip(mine[:2], theirs[:2], strict=True):
            assert x is y is None or torch.equal(x.cpu(), y)
