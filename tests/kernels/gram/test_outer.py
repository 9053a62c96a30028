"""`outer_ghost` in Triton: linear layers by positions, and the plans of its launches."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.truth import relative_error

pytest.importorskip("triton", reason="needs Triton")
from mtu_fast.kernels import blocks as kernel_blocks
from mtu_fast.kernels import gram as kernels
from mtu_fast.kernels import plans
from tests.kernels.gram.blocks import (
    DEVICES,
    DTYPES,
    ROUNDS,
    check,
    draw,
    lefts,
    outer_rows,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("device", DEVICES)]


@pytest.mark.parametrize("kind", ["one", "three tasks"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_ghost(device: str, dtype: torch.dtype, kind: str) -> None:
    left = lefts(device, kind, dtype)
    right = [draw(device, *t.shape[:2], 19, dtype=dtype) for t in left]
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    check(
        f"{kind} {dtype}",
        kernels.outer_ghost(left, right, "highest"),
        outer_rows(left, right),
        precision,
    )
    if kind == "three tasks" and dtype == torch.float32:
        check(
            "right shared",
            kernels.outer_ghost(right, left, "highest"),
            outer_rows(right, left),
            torch.float64,
        )


@pytest.mark.parametrize("precision", ROUNDS)
def test_outer_ghost_of_unequal_forwards(device: str, precision: str) -> None:
    left = lefts(device, "unequal", torch.float32)
    right = [draw(device, *t.shape[:2], 7) for t in left]
    check(
        precision,
        kernels.outer_ghost(left, right, precision),
        outer_rows(left, right),
        ROUNDS[precision],
    )


def test_outer_ghost_of_views_and_mixed_dtypes(device: str) -> None:
    left = [
        draw(device, 4, 3, 5).transpose(0, 1),
        draw(device, 1, 3, 5).expand(2, 3, 5),
        draw(device, 2, 70, 10)[..., ::2],
    ]
    right = [
        draw(device, 3, 7, 4).mT, draw(device, 2, 3, 14)[..., ::2], draw(device, 2, 70, 7, dtype=torch.bfloat16),
    ]  # fmt: skip
    check(
        "views", kernels.outer_ghost(left, right, "highest"), outer_rows(left, right), torch.float64
    )
    a = draw(device, 2, 6, 5)
    right = [draw(device, 2, 6, 7), draw(device, 2, 7, 6).mT]
    check(
        "strides of two tasks",
        kernels.outer_ghost([a, a], right, "highest"),
        outer_rows([a, a], right),
        torch.float64,
    )


def test_outer_ghost_of_more_tasks_than_a_launch_takes(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_blocks, "MANY", 2)
    left = [draw(device, 2, 5, 3)] * 5
    right = [draw(device, 2, 5, 4) for _ in left]
    check(
        "five tasks",
        kernels.outer_ghost(left, right, "highest"),
        outer_rows(left, right),
        torch.float64,
    )


def test_outer_ghost_of_duplicates_and_zeros(device: str) -> None:
    a, b = draw(device, 2, 3, 5), draw(device, 2, 3, 7)
    left, right = [torch.cat([a, a, 0 * a])], [torch.cat([b, b, b])]
    found = kernels.outer_ghost(left, right, "highest")
    assert relative_error(found[:2], found[2:4]) <= 1e-15 and not found[4:].any()
    check("duplicates", found, outer_rows(left, right), torch.float64)


def test_outer_ghost_of_nothing(device: str) -> None:
    for shape, width in (((3, 0, 5), 3), ((0, 4, 5), 0), ((3, 4, 0), 3)):
        found = kernels.outer_ghost(
            [draw(device, *shape)], [draw(device, *shape[:2], 7)], "highest"
        )
        assert found.shape == (width, width) and not found.any()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's word for infinity times zero
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outer_ghost_shows_what_is_not_finite(device: str, value: float) -> None:
    left, right = draw(device, 4, 5, 3), draw(device, 4, 5, 3)
    left[2, 4, 0] = value
    found = kernels.outer_ghost([left], [right], "highest")
    others = torch.tensor([0, 1, 3], device=device)
    assert not found[2].isfinite().any() and found[others][:, others].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plans_know_the_architecture(device: str, dtype: torch.dtype) -> None:
    for arch in (80, 90):
        assert plans.ghost_plan(dtype, "highest", arch).sums == torch.float64
        assert plans.row_plan(dtype, 9, arch).sums == torch.float64
    for arch in (86, 89, 120):
        assert plans.ghost_plan(torch.float32, "highest", arch).mode == "ieee"
        assert plans.row_plan(torch.float32, 9, arch).sums == torch.float32
    assert plans.ghost_plan(torch.float32, "high", 90).mode == "tf32x3"
    assert plans.ghost_plan(torch.float32, "medium", 90).mode == "tf32"
