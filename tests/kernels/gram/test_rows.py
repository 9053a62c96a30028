"""`row_gram` in Triton: explicit rows."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.truth import relative_error

pytest.importorskip("triton", reason="needs Triton")
from mtu_fast.kernels import blocks as kernel_blocks
from mtu_fast.kernels import explicit as kernels
from mtu_fast.kernels import plans
from tests.kernels.gram.blocks import (
    DEVICES,
    DTYPES,
    check,
    draw,
    explicit,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("device", DEVICES)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[1], [3, 14], [30, 0, 3], [70]])
def test_row_gram(device: str, dtype: torch.dtype, counts: list[int]) -> None:
    """Float64 sums whatever the dtype: as exact as one float64 product."""
    rows = [draw(device, r, 333, dtype=dtype) for r in counts]
    check(
        f"row_gram {counts} {dtype}",
        kernels.row_gram(rows),
        lambda to: [t.to(to) for t in rows],
        torch.float64,
    )


@pytest.mark.parametrize("counts", [[9], [20, 13], [70, 80]])
@pytest.mark.parametrize("part", [0.2, 0.6, 1.0])
def test_row_gram_leaves_out_what_is_known(device: str, counts: list[int], part: float) -> None:
    rows = [draw(device, r, 77).round() for r in counts]
    fresh = sum(counts) - round(part * sum(counts))
    expected = explicit(rows)
    expected[fresh:, fresh:] = 0
    assert torch.equal(kernels.row_gram(rows, sum(counts) - fresh), expected)


def test_row_gram_of_other_dtypes_strides_and_many_blocks(device: str) -> None:
    rows = [
        draw(device, 3, 40, dtype=torch.bfloat16), draw(device, 2, 40), draw(device, 1, 40, dtype=torch.float16),
        draw(device, 40, 3).T, draw(device, 2, 80)[:, ::2], draw(device, 1, 40).expand(3, 40),
        draw(device, 1, 1).expand(2, 40),
    ]  # fmt: skip
    check("views", kernels.row_gram(rows), lambda to: [t.to(to) for t in rows], torch.float64)
    many = [draw(device, 1, 50) for _ in range(kernel_blocks.MANY + 1)]
    check("many", kernels.row_gram(many), lambda to: [t.to(to) for t in many], torch.float64)
    columns = [draw(device, 40, 5).T, draw(device, 40, 5).T]
    check(
        "columns", kernels.row_gram(columns), lambda to: [t.to(to) for t in columns], torch.float64
    )


def test_row_gram_of_nothing(device: str) -> None:
    assert kernels.row_gram([draw(device, 0, 5)]).shape == (0, 0)
    assert torch.equal(
        kernels.row_gram([draw(device, 3, 0)]),
        torch.zeros(3, 3, dtype=torch.float64, device=device),
    )
    assert kernels.row_gram([torch.ones(2, 3, dtype=torch.int64, device=device)]) is NotImplemented


def test_row_gram_keeps_what_is_not_finite_in_its_row(device: str) -> None:
    rows = draw(device, 5, 70)
    rows[3, 69] = float("nan")
    found = kernels.row_gram([rows])
    assert found[3].isnan().all() and found.isnan().sum() == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_gram_without_fast_float64(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of float32 products, sums in float64: the error of a short float32 sum, however long the rows."""
    monkeypatch.setattr(plans, "FAST_FLOAT64", ())
    rows = [draw(device, 6, 3_000, dtype=dtype)]
    found = kernels.row_gram(rows)
    check("float32 blocks", found, lambda to: [t.to(to) for t in rows], torch.float32)
    assert relative_error(found, explicit(rows)) <= 8 * torch.finfo(torch.float32).eps
