"""All Gram kernels: the same bits twice, large offsets, dispatch, no spills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtu_fast._ops._library import ops
from tests.helpers.truth import relative_error

pytest.importorskip("triton", reason="needs Triton")
from mtu_fast.kernels import explicit, rank_one
from mtu_fast.kernels import gram as kernels
from mtu_fast.kernels.device import FAST_FLOAT64
from tests.helpers.triton import SHARED, compiled, table
from tests.kernels.gram.blocks import DEVICES, check, conv_blocks, draw, geometry, lefts, outer_rows

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("device", DEVICES)]

LAUNCHERS = {"row_gram": explicit, "rank_one_gram": rank_one}
OPS = [*LAUNCHERS, "outer_ghost", "conv_ghost", "gather_gram"]


def calls(device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of each op, by its name."""
    g = geometry("2d")
    xs, bs = conv_blocks(device, g, [(2, 1, 4, 4)], torch.float32)
    walk = [list(part) for part in (g.kernel, g.stride, g.padding, g.dilation)]
    index = torch.randint(0, 3, (2, 3)).to(device)
    sides = [draw(device, 4, 40), draw(device, 4, 16)]
    left = lefts(device, "three tasks", torch.float32)
    return {
        "row_gram": ([draw(device, 3, 400), draw(device, 20, 400)],),
        "rank_one_gram": (sides, sides[::-1], 2),
        "outer_ghost": (left, [draw(device, *t.shape[:2], 7) for t in left], "highest"),
        "conv_ghost": (xs, bs, *walk, "highest"),
        "gather_gram": ([index, index], [draw(device, 2, 3, 4), draw(device, 2, 3, 4)], "highest"),
    }


@pytest.mark.parametrize("name", OPS)
def test_the_same_bits_twice(device: str, name: str) -> None:
    arguments, launch = calls(device)[name], getattr(LAUNCHERS.get(name, kernels), name)
    assert torch.equal(launch(*arguments), launch(*arguments))


def sparse(tmp_path: Path, device: str, elements: int) -> Tensor:
    """Float32 memory that is not there until written: a file with a hole, or the GPU's."""
    if device == "cuda":
        return torch.zeros(elements, device=device)
    path = tmp_path / "hole"
    with path.open("wb") as file:
        file.truncate(4 * elements)
    return torch.from_file(str(path), shared=True, size=elements)


def test_offsets_beyond_two_to_the_31(device: str, tmp_path: Path) -> None:
    """Rows, positions and features lie further apart than 32-bit offsets reach."""
    far = (1 << 31) + 16
    memory = sparse(tmp_path, device, far + 64)

    def apart(axis: int, *shape: int) -> Tensor:
        strides = [8, 4, 1]
        strides[axis] = far
        view = memory.as_strided(shape, strides[: len(shape)])
        return view.copy_(draw(device, *shape))

    rows = apart(0, 2, 5)
    check("rows apart", explicit.row_gram([rows]), lambda to: [rows.to(to)], torch.float64)
    rows = apart(1, 3, 2)
    check("columns apart", explicit.row_gram([rows]), lambda to: [rows.to(to)], torch.float64)
    for axis in range(3):
        left, right = apart(axis, 2, 2, 2), draw(device, 2, 2, 3)
        check(
            f"axis {axis}",
            kernels.outer_ghost([left], [right], "highest"),
            outer_rows([left], [right]),
            torch.float64,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_the_ops_dispatch_here_and_do_not_synchronise(
    device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, function = calls(device)[name], ops()[name]
    torch.library.opcheck(function.overload, arguments)
    assert function.has_kernel("CUDA")
    expected = function(*arguments)
    assert relative_error(expected, function.reference(*arguments)) <= 1e-6

    def refused(*_: object) -> Tensor:
        raise AssertionError("the reference served")

    monkeypatch.setattr(function, "reference", refused)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = function(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, expected)


@pytest.mark.slow
def test_compiles_without_spills(device: str) -> None:
    builds = compiled("tests.kernels.specimens:GRAM")
    print(table(builds))
    assert {build.kernel for build in builds} == {
        "_row_gram", "_add_splits", "_sides", "_multiply_sides", "_ghost", "_collect",
    }  # fmt: skip
    # a kernel of another number of rows is the same one
    assert not {build.specimen for build in builds} & {
        "row_gram, 3 × 8 rows",
        "rank_one_gram, 9 rows",
        "outer_ghost, 3 tasks of 6",
    }
    assert not [build for build in builds if build.spills]
    assert all(build.shared <= SHARED[build.arch] for build in builds)
    rows = [b for b in builds if b.kernel == "_row_gram" and "bfloat16" not in b.specimen]
    # of 16 bytes, ahead of the products
    assert rows and all(b.loads == ("cp.async.cg.shared.global",) for b in rows)
    # of sides, too; those that are no multiple of 16 bytes are a launch of their own
    sides = [b for b in builds if b.kernel == "_sides" and "bfloat16" not in b.specimen]
    assert sides
    for specimen, arch in {(b.specimen, b.arch) for b in sides}:
        of = {b.loads for b in sides if (b.specimen, b.arch) == (specimen, arch)}
        assert of == {("cp.async.cg.shared.global",), ("cp.async.ca.shared.global",)}
    wide = [
        b
        for b in builds
        if b.specimen.endswith("float32 highest")
        and b.kernel == "_ghost"
        and b.arch in FAST_FLOAT64
    ]
    assert wide and all(
        any("f64" in product for product in b.products if product.startswith("mma")) for b in wide
    )
