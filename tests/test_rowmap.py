"""Which row an element belongs to, from the gradients under ones and under powers of two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtu_fast.rowmap import RowMap, digits, infer

CPU = torch.device("cpu")


def scaled(b: Tensor, owner: Tensor, count: int, base: int) -> list[Tensor]:
    """The gradients that passes under weights 2**digit return, for elements with these owners."""
    return [b * torch.exp2(d[owner].to(b.dtype)) for d in digits(count, base, CPU)]


@pytest.mark.parametrize(("count", "base"), [(1, 32), (32, 32), (33, 32), (1025, 32), (9, 8), (64, 8), (65, 8)])
def test_digits_make_the_number(count: int, base: int) -> None:
    found = digits(count, base, CPU)
    assert len(found) == 1 or base ** (len(found) - 1) < count
    assert base ** len(found) >= count
    number = sum(d * base**i for i, d in enumerate(found))
    assert torch.equal(number, torch.arange(count))
    assert all(int(d.min()) >= 0 and int(d.max()) < base for d in found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [4, 40])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_one_dimension(dtype: torch.dtype, count: int, dim: int) -> None:
    shape = [3, 5, 7]
    shape[dim] = count
    owner = torch.arange(count).view([-1 if d == dim else 1 for d in range(3)]).expand(shape)
    b, base = torch.randn(shape).to(dtype), 8 if dtype == torch.float16 else 32
    found = infer(b, scaled(b, owner, count, base), base, count)
    assert found is not None and found.dim == dim and found.inner == 1 and not found.gaps
    assert torch.equal(found.ids, torch.arange(count))


@pytest.mark.parametrize(
    ("ids", "inner"),
    [
        ([0, 0, 0, 1, 1, 1, 2, 2, 2], 3),
        ([0, 1, 2, 0, 1, 2, 0, 1, 2], 1),
        ([0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2], 2),
        ([2, 0, 0, 1, 1, 1, 0, 2, 2], 0),
        ([0, 0, 1, 2, 2], 0),
        ([0, 1, 2], 1),
        ([2, 1, 0], 0),
    ],
)
def test_split_gives_each_row_its_positions(ids: list[int], inner: int) -> None:
    owner = torch.tensor(ids)
    b = torch.randn(len(ids), 4, dtype=torch.float64)
    found = infer(b, scaled(b, owner[:, None].expand(-1, 4), 3, 32), 32, 3)
    assert found is not None and found.inner == inner
    for dim, x in ((0, b), (1, b.T.contiguous())):
        parts = found.split(x, dim)
        assert parts.shape[0] == 3
        truth = torch.stack([b[owner == r].sum(0) for r in range(3)])
        assert torch.allclose(parts.sum(1), truth, rtol=1e-14)


def test_elements_of_their_own() -> None:
    owner = torch.tensor([[0, 1, 2], [1, 2, 0]])
    b = torch.randn(2, 3, dtype=torch.float64)
    found = infer(b, scaled(b, owner, 3, 32), 32, 3)
    assert found is not None and found.dim is None and torch.equal(found.ids, owner)
    for row in range(3):
        assert torch.equal(found.only(b, row), torch.where(owner == row, b, 0.0))


@pytest.mark.parametrize("share", [1.0, -0.5, 1e-6, 1e-12])
@pytest.mark.parametrize("whole", [True, False])
def test_rows_that_mix_are_seen(share: float, whole: bool) -> None:
    """Row 1 with a share of row 2, in one element or in all of its line."""
    b = torch.ones(3, 2, dtype=torch.float64)
    spoilt = scaled(b, torch.arange(3)[:, None].expand(3, 2), 3, 32)
    where = (1,) if whole else (1, 1)
    b[where] += share
    spoilt[0][where] += 4 * share
    assert infer(b, spoilt, 32, 3) is None


def test_cancelling_rows_are_no_row() -> None:
    """Under ones two rows cancel to zero, under powers of two they do not."""
    b = torch.tensor([[1.0], [0.0], [2.0]], dtype=torch.float64)
    spoilt = b * torch.tensor([[1.0], [2.0], [4.0]])
    spoilt[1] = 2.0 - 4.0
    assert infer(b, [spoilt], 32, 3) is None


def test_not_finite_is_no_row() -> None:
    b = torch.randn(3, 2)
    spoilt = scaled(b, torch.arange(3)[:, None].expand(3, 2), 3, 32)
    spoilt[0][0, 0] = torch.nan
    assert infer(b, spoilt, 32, 3) is None


def test_gaps_are_known_and_filled() -> None:
    b = torch.randn(4, 2, dtype=torch.float64)
    b[1] = 0.0
    found = infer(b, scaled(b, torch.arange(4)[:, None].expand(4, 2), 4, 32), 32, 4)
    assert found is not None and found.gaps and found.ids.tolist() == [0, -1, 2, 3]
    assert found.fits(b)
    assert not found.fits(torch.ones(4, 2, dtype=torch.float64))
    full = RowMap.along(torch.arange(4), 0, 4)
    assert not full.gaps and full.fits(torch.ones(4, 2)) and torch.equal(found.filled(full).ids, full.ids)
    assert found.filled(RowMap.along(torch.arange(2), 1, 4)) is found
