"""The Gram of explicit rows, as dispatched (the kernel, where it is built) and as the reference, against the truth.

Small integers multiply and add without rounding in any order, so most comparisons are for equality.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from mtu_fast._ops import _library, _tiles
from mtu_fast._ops.gram import row_gram
from tests.helpers.tolerance import assert_as_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Run = Callable[..., Tensor]
IMPLEMENTATIONS: dict[str, Run] = {"dispatched": row_gram, "reference": row_gram.reference}


@pytest.fixture(params=IMPLEMENTATIONS)
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(_tiles, "TILE", 1 << 12)  # the reference's: several tiles
    return IMPLEMENTATIONS[request.param]


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-8, 9, shape).to(dtype)


def exact(rows: Sequence[Tensor]) -> Tensor:
    J = torch.cat([t.double() for t in rows])
    return J @ J.T


def true_gram(rows: Sequence[Tensor]) -> Tensor:
    """J Jᵀ in extended precision."""
    J = torch.cat([t.double() for t in rows]).numpy().astype(np.longdouble)
    return torch.from_numpy((J @ J.T).astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("counts", "width"),
    [([16], 64), ([9, 7], 20_000), ([48], 5_000), ([1], 100_000), ([90, 33], 3_000)],
)
def test_errs_at_most_twice_what_one_float64_product_errs(
    run: Run, dtype: torch.dtype, counts: list[int], width: int
) -> None:
    rows = [torch.randn(r, width, dtype=torch.float64).to(dtype) for r in counts]
    assert_as_accurate(f"{counts} x {width}, {dtype}", run(rows), exact(rows), true_gram(rows))


@pytest.mark.parametrize("common", [1e2, 1e4])
def test_rows_that_are_almost_the_same(run: Run, common: float) -> None:
    rows = [torch.randn(8, 3_000) + common * torch.randn(1, 3_000)]
    difference = torch.eye(8).double() - torch.ones(8, 8).double() / 8

    def apart(G: Tensor) -> Tensor:
        return difference @ G @ difference

    name = f"common part {common:g}, {rows[0].dtype}"
    J = difference.numpy().astype(np.longdouble) @ rows[0].double().numpy().astype(np.longdouble)
    truth = torch.from_numpy((J @ J.T).astype(np.float64))
    assert_as_accurate(name, apart(run(rows)), apart(exact(rows)), truth)


@pytest.mark.parametrize(
    "counts", [[0], [0, 0], [1], [3], [4], [5], [3, 1, 4], [0, 3], [2, 0], [17, 16]]
)
@pytest.mark.parametrize("width", [0, 1, 7, 8, 9, 63, 256, 257, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape(run: Run, counts: list[int], width: int, dtype: torch.dtype) -> None:
    rows = [integers(r, width, dtype=dtype) for r in counts]
    found = run(rows)
    assert found.dtype == torch.float64
    assert torch.equal(found, exact(rows))


@pytest.mark.parametrize("counts", [[0], [1], [5], [8], [3, 1, 9], [130], [60, 3, 70, 1, 66]])
@pytest.mark.parametrize("width", [0, 9, 300])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_known_rows_meet_the_others_only(
    run: Run, counts: list[int], width: int, part: float
) -> None:
    rows = [integers(r, width) for r in counts]
    known = round(part * sum(counts))
    expected = exact(rows)
    expected[sum(counts) - known :, sum(counts) - known :] = 0
    assert torch.equal(run(rows, known), expected)


def test_known_rows_that_are_not_finite(run: Run) -> None:
    rows = integers(6, 21)
    rows[4, 20] = float("nan")
    found = run([rows], 3)
    assert found[:3, 4].isnan().all() and found.isnan().sum() == 6 and not found[3:, 3:].any()


@pytest.mark.parametrize("known", [-1, 4])
def test_more_known_rows_than_rows_are_refused(known: int) -> None:
    with pytest.raises(
        ValueError, match=rf"known: found {known}, expected a number of rows, from 0 to 3"
    ):
        row_gram([integers(3, 5)], known)


@pytest.mark.parametrize("count", [2, 5, 130, 261])
@pytest.mark.parametrize("width", [4_096, 4_097, 20_011])
def test_several_chunks_and_panels(run: Run, count: int, width: int) -> None:
    rows = [integers(count, width)]
    assert torch.equal(run(rows), exact(rows))


def test_views(run: Run) -> None:
    rows = [
        integers(30, 5).T,
        integers(2, 60)[:, ::2],
        integers(30)[None].expand(3, 30),
        integers(8, 40)[::3, 7:37],
        integers(1, 1).expand(2, 30),
    ]
    assert torch.equal(run(rows), exact(rows))
    one = [integers(4, 6)[:, 2:3], integers(1, 3).T]
    assert torch.equal(run(one), exact(one))


@pytest.mark.parametrize("count", [2, 31])
def test_blocks_of_different_dtypes(run: Run, count: int) -> None:
    rows = [integers(count, 77, dtype=dtype) for dtype in DTYPES]
    assert torch.equal(run(rows), exact(rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_half_precision(run: Run, dtype: torch.dtype) -> None:
    """All 65536, with subnormal numbers, infinity and NaN, times 1; a vector of columns at a time and one by one."""
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(256, 256)
    for column, place in ((0, 0), (3, 4), (8, 8)):
        for part in numbers:
            rows = torch.zeros(257, 9, dtype=dtype)
            rows[:256, column], rows[256, place] = part, 1
            found = run([rows])[:256, 256]
            finite = part.isfinite()
            expected = part.double() * float(column == place)
            assert torch.equal(found[finite], expected[finite])
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.isinf(), expected.isinf())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(run: Run, value: float) -> None:
    rows = integers(6, 21) + 0.5
    rows[4, 20] = value
    found = run([rows])
    others = torch.tensor([0, 1, 2, 3, 5])
    assert not found[4].isfinite().any() and not found[:, 4].isfinite().any()
    assert torch.equal(found[others][:, others], exact([rows[others]]))


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float64, torch.bfloat16)]
)
def test_opcheck(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    rows = [integers(3, 40, dtype=dtypes[0]), integers(2, 40, dtype=dtypes[1])]
    torch.library.opcheck(row_gram.overload, (rows,))


built = pytest.mark.skipif(_library.EXTENSION is None, reason=_library.MISSING or "built")


@built
def test_the_kernel_is_what_runs() -> None:
    assert row_gram.has_kernel("CPU")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        row_gram([torch.randn(5, 100), torch.randn(3, 100)])
    names = {event.key for event in profile.key_averages()}
    assert "mtu_fast::row_gram" in names
    assert not names & {"aten::addmm_", "aten::cat", "aten::copy_"}  # what the reference is made of


@built
def test_the_kernel_is_exactly_symmetric() -> None:
    found = row_gram([torch.randn(19, 1_003), torch.randn(6, 1_003)])
    assert torch.equal(found, found.T)


@built
@pytest.mark.parametrize(("count", "width"), [(18, 100_003), (101, 20_011)])
def test_the_same_bits_whatever_the_threads_and_the_blocks(count: int, width: int) -> None:
    rows = torch.randn(count, width)
    several = row_gram([rows])
    assert torch.equal(row_gram([rows]), several)
    assert torch.equal(row_gram([rows[:5], rows[5:6].clone(), rows[6:]]), several)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(row_gram([rows]), several)
    finally:
        torch.set_num_threads(threads)


@built
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([torch.ones(2, 3), torch.ones(2, 4)], "one width, got 3 and 4"),
        ([torch.ones(3)], "got 1 dimensions"),
        ([torch.ones(2, 3, 4)], "got 3 dimensions"),
    ],
)
def test_the_kernel_checks_its_own_arguments(rows: list[Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        row_gram.overload(rows)
