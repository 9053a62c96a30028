"""Gram ops against explicit rows in float64: every route, odd shapes, shared sides, half precision, and opcheck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtu_fast._ops import _tiles, routes
from mtu_fast._ops import explicit as rows_of
from mtu_fast._ops import gram as op
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._ops._convolution import Geometry, conv_weight_gradient
from mtu_fast._ops._prices import CUDA_KERNELS, OF_KERNELS, PLAIN_TORCH
from tests.helpers.tolerance import assert_as_accurate
from tests.helpers.truth import relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Blocks = list[Tensor]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def explicit(rows: Sequence[Tensor]) -> Tensor:
    """J Jᵀ of rows [R_i, ...], float64."""
    J = torch.cat([t.double().flatten(1) for t in rows])
    return J @ J.T


def plain_gram(rows: Sequence[Tensor]) -> Tensor:
    """What plain torch makes of rows in their own precision (float32 for half precision)."""
    J = torch.cat([t.to(working_dtype(t)).flatten(1) for t in rows])
    return J @ J.T


def check(name: str, found: Tensor, rows: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    """The one rule: at most twice the error of plain torch on the same inputs."""
    truth = explicit(rows)
    assert found.dtype == torch.float64
    assert_as_accurate(name, found, plain_gram(plain), truth)
    assert relative_error(found, found.T) <= 1e-15


# ---- explicit rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[1], [5], [3, 1, 4], [0, 3], [2, 0]])
@pytest.mark.parametrize("width", [1, 7, 130])
def test_row_gram(
    dtype: torch.dtype, counts: list[int], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tiles, "TILE", 100)  # several tiles
    rows = [draw(r, width, dtype=dtype, seed=i) for i, r in enumerate(counts)]
    check("row_gram", op.row_gram(rows), rows, rows)


def test_row_gram_sums_in_float64() -> None:
    """Rows that differ in the seventh digit: a float32 product would call them equal."""
    base = draw(1, 100_000, dtype=torch.float32)
    rows = torch.cat([base, base + 1e-3 * draw(1, 100_000, dtype=torch.float32, seed=1)])
    G, truth = op.row_gram([rows]), (rows[0].double() - rows[1].double()).square().sum()

    def distance(M: Tensor) -> Tensor:
        return M[0, 0] + M[1, 1] - 2 * M[0, 1]

    assert float((distance(G) - truth).abs() / truth) <= 1e-6
    plain = (rows @ rows.T).double()
    assert float((distance(plain) - truth).abs() / truth) > 1e-2


def test_row_gram_of_duplicates_and_zeros() -> None:
    row = draw(1, 33)
    G = op.row_gram([torch.cat([row, row, 0 * row]), row])
    assert torch.allclose(
        G,
        float(row.square().sum())
        * torch.tensor([1.0, 1, 0, 1]).outer(torch.tensor([1.0, 1, 0, 1])).double(),
    )


def test_row_gram_of_views() -> None:
    rows = [draw(9, 5).T, draw(2, 18)[:, ::2], draw(9)[None].expand(3, 9)]
    check("views", op.row_gram(rows), rows, rows)


# ---- outer products ------------------------------------------------------------------------------


def outer_truth(left: Blocks, right: Blocks) -> Blocks:
    return [
        torch.einsum("rsa,rsb->rab", x.double(), y.double())
        for x, y in zip(left, right, strict=True)
    ]


def outer_plain(left: Blocks, right: Blocks) -> Blocks:
    pairs = (
        (x.to(working_dtype(x)), y.to(working_dtype(y))) for x, y in zip(left, right, strict=True)
    )
    return [torch.einsum("rsa,rsb->rab", x, y) for x, y in pairs]


def outer_blocks(kind: str, dtype: torch.dtype) -> tuple[Blocks, Blocks]:
    """Left [R, S, 5] and right [R, S, 7]."""
    if kind == "one block":
        return [draw(4, 3, 5, dtype=dtype)], [draw(4, 3, 7, dtype=dtype)]
    if kind == "one row":
        return [draw(1, 6, 5, dtype=dtype)], [draw(1, 6, 7, dtype=dtype)]
    if kind == "unequal":
        sizes = [(4, 3), (2, 6), (1, 1), (3, 1)]
        pairs = [
            (draw(r, s, 5, dtype=dtype, seed=s), draw(r, s, 7, dtype=dtype, seed=r))
            for r, s in sizes
        ]
        return [a for a, _ in pairs], [b for _, b in pairs]
    if kind == "left shared":  # activations under three tasks, then another forward under two
        a, c = draw(4, 3, 5, dtype=dtype), draw(2, 6, 5, dtype=dtype)
        left = [a, a, a, c, c]
        return left, [
            draw(t.shape[0], t.shape[1], 7, dtype=dtype, seed=i) for i, t in enumerate(left)
        ]
    if kind == "right shared":
        left, right = outer_blocks("left shared", dtype)
        return right, left
    if kind == "interleaved":
        a, c = draw(4, 3, 5, dtype=dtype), draw(3, 2, 5, dtype=dtype)
        left = [a, c, a, c]
        return left, [
            draw(t.shape[0], t.shape[1], 7, dtype=dtype, seed=i) for i, t in enumerate(left)
        ]
    if kind == "views":
        return ([draw(3, 4, 5, dtype=dtype).transpose(0, 1), draw(1, 3, 5, dtype=dtype).expand(2, 3, 5)],
                [draw(4, 7, 3, dtype=dtype).mT, draw(2, 3, 14, dtype=dtype)[..., ::2]])  # fmt: skip
    if kind == "no position":
        return [draw(3, 0, 5, dtype=dtype), draw(2, 2, 5, dtype=dtype)], [
            draw(3, 0, 7, dtype=dtype),
            draw(2, 2, 7, dtype=dtype),
        ]
    assert kind == "duplicates"
    a, b = draw(2, 3, 5, dtype=dtype), draw(2, 3, 7, dtype=dtype)
    return [torch.cat([a, a, 0 * a])], [torch.cat([b, b, b])]


OUTER = [
    "one block",
    "one row",
    "unequal",
    "left shared",
    "right shared",
    "interleaved",
    "views",
    "no position",
    "duplicates",
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OUTER)
@pytest.mark.parametrize("route", ["ghost", "direct"])
@pytest.mark.parametrize("small_tiles", [False, True])
def test_outer_gram(
    dtype: torch.dtype, kind: str, route: str, small_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "outer_route", lambda left, right: route)
    if small_tiles:
        monkeypatch.setattr(_tiles, "TILE", 50)
        monkeypatch.setattr(_tiles, "BUFFER", 50)
    left, right = outer_blocks(kind, dtype)
    found = op.outer_gram(left, right)
    check(
        f"outer {route}, {kind}, {dtype}", found, outer_truth(left, right), outer_plain(left, right)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_gram_of_one_position(dtype: torch.dtype) -> None:
    left = [draw(r, 1, 5, dtype=dtype, seed=r) for r in (3, 2)]
    right = [draw(r, 1, 7, dtype=dtype, seed=r) for r in (3, 2)]
    assert op.outer_route(left, right) == "rank one"
    check(
        "rank one", op.outer_gram(left, right), outer_truth(left, right), outer_plain(left, right)
    )


RANK_ONE: dict[str, Callable[[torch.dtype], tuple[list[Blocks], list[Blocks]]]] = {
    "several parameters": lambda dtype: (
        [[draw(r, a, dtype=dtype, seed=a) for r in (3, 2)] for a in (5, 1, 130)],
        [[draw(r, b, dtype=dtype, seed=b) for r in (3, 2)] for b in (7, 4, 1)],
    ),
    "no rows in one block": lambda dtype: (
        ([[draw(0, 5, dtype=dtype), draw(2, 5, dtype=dtype)]],) * 2
    ),
}


def shared_sides(dtype: torch.dtype) -> tuple[list[Blocks], list[Blocks]]:
    """Two tasks on one activation; a third parameter whose rows are a side of the first, times one."""
    x, y = draw(4, 6, dtype=dtype, seed=1), draw(4, 9, dtype=dtype, seed=2)
    b = [draw(4, 9, dtype=dtype, seed=s) for s in (3, 4)]
    ones = x.new_ones(()).expand(4, 1)
    return [b, [y, y], b], [[x, x], [x, x], [ones, ones]]


def interleaved(dtype: torch.dtype) -> tuple[list[Blocks], list[Blocks]]:
    """A tensor on both sides of another with other rows, by columns, in unequal precision; a side used once more."""
    x, y = draw(3, 6, dtype=dtype, seed=1), draw(6, 2, dtype=dtype, seed=2).T
    b = [draw(r, 5, dtype=torch.float32, seed=s) for s, r in enumerate((3, 2, 3))]
    c = [draw(r, 4, dtype=dtype, seed=s) for s, r in enumerate((3, 2, 3))]
    return [b, c, b], [[x, y, x], b, c]


@pytest.mark.parametrize(
    "run", [op.rank_one_gram, op.rank_one_gram.reference], ids=["dispatched", "reference"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [*RANK_ONE.values(), shared_sides, interleaved])
def test_rank_one_gram(
    make: Callable[..., Any], dtype: torch.dtype, run: Callable[..., Tensor]
) -> None:
    left, right = make(dtype)
    found = run([t for side in left for t in side], [t for side in right for t in side], len(left))
    sides = list(zip(left, right, strict=True))
    rows = [
        torch.cat(
            [torch.einsum("ra,rb->rab", a[i].double(), b[i].double()).flatten(1) for a, b in sides],
            1,
        )
        for i in range(len(left[0]))
    ]
    check("rank one", found, rows, [t.to(working_dtype(left[0][0])) for t in rows])


@pytest.mark.parametrize(
    ("left", "right", "parameters", "message"),
    [
        ([], [], 1, "found 0 and 0 blocks"),
        ([draw(2, 3)], [draw(2, 3)] * 2, 1, "found 1 and 2 blocks"),
        ([draw(2, 3)] * 3, [draw(2, 3)] * 3, 2, "for each of the 2 parameters"),
        ([draw(2, 3)], [draw(2, 3)], 0, "for each of the 0 parameters"),
        (
            [draw(2, 3), draw(3, 3)],
            [draw(2, 3), draw(3, 3)],
            2,
            r"block 1 .*expected \(2, 3\) and \(2, 3\)",
        ),
        ([draw(2, 3)], [draw(2, 1, 3)], 1, "the sides of block 0"),
        ([torch.zeros(())], [draw(2, 3)], 1, "the sides of block 0"),
        (
            [draw(2, 3), draw(1, 3)],
            [draw(2, 3), draw(1, 4)],
            1,
            r"block 1 .*expected \(1, 3\) and \(1, 3\)",
        ),
    ],
)
def test_rank_one_gram_refuses(left: Blocks, right: Blocks, parameters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op.rank_one_gram(left, right, parameters)


def test_outer_route_prefers_what_is_cheaper() -> None:
    wide = [draw(4, 2, 256)], [draw(4, 2, 256)]
    long = [draw(4, 300, 4)], [draw(4, 300, 4)]
    assert op.outer_route(*wide) == "ghost" and op.outer_route(*long) == "direct"


# ---- convolutions --------------------------------------------------------------------------------


def geometry(weight: tuple[int, ...], **given: Any) -> Geometry:
    d = len(weight) - 2

    def spread(name: str, default: int) -> tuple[int, ...]:
        value = given.get(name, default)
        return (value,) * d if isinstance(value, int) else tuple(value)

    return Geometry(
        weight, spread("stride", 1), spread("padding", 0), spread("dilation", 1), given.get("transposed", False),
        spread("output_padding", 0), given.get("groups", 1),
    )  # fmt: skip


def conv_blocks(
    g: Geometry, sizes: Sequence[tuple[int, int, tuple[int, ...]]], dtype: torch.dtype
) -> tuple[Blocks, Blocks]:
    """Blocks of (R rows, F images a row, image size): inputs and output gradients of the right shapes."""
    xs, bs = [], []
    for i, (r, f, size) in enumerate(sizes):
        channels = g.weight[0] if g.transposed else g.weight[1] * g.groups
        x = draw(r, f, channels, *size, dtype=dtype, seed=i)
        y = forward(x.double().flatten(0, 1), torch.zeros(g.weight, dtype=torch.float64), g)
        xs.append(x)
        bs.append(draw(r, f, *y.shape[1:], dtype=dtype, seed=i + 9))
    return xs, bs


def forward(x: Tensor, w: Tensor, g: Geometry) -> Tensor:
    return torch.ops.aten.convolution(
        x, w, None, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups
    )


def conv_truth(xs: Blocks, bs: Blocks, g: Geometry, dtype: torch.dtype = torch.float64) -> Blocks:
    """Rows by one autograd backward each, through the forward."""
    found = []
    for x, b in zip(xs, bs, strict=True):
        rows = []
        for x_r, b_r in zip(x.to(dtype), b.to(dtype), strict=True):
            w = torch.zeros(g.weight, dtype=dtype, requires_grad=True)
            rows.append(torch.autograd.grad(forward(x_r, w, g), w, b_r)[0])
        found.append(torch.stack(rows))
    return found


CONVS: dict[str, tuple[Geometry, tuple[int, ...]]] = {
    "1d": (geometry((4, 3, 3), stride=2, padding=2, dilation=2), (9,)),
    "1d, wide padding": (geometry((4, 3, 2), padding=3), (4,)),
    "2d": (geometry((4, 3, 3, 2), stride=(1, 2), padding=(1, 2), dilation=(2, 1)), (7, 6)),
    "2d, pixels left over": (geometry((5, 2, 2, 3), stride=3), (7, 8)),
    "2d, pointwise": (geometry((5, 3, 1, 1)), (3, 5)),
    "2d, pointwise strided": (geometry((5, 3, 1, 1), stride=2), (4, 5)),
    "2d, kernel beyond the image": (geometry((2, 3, 5, 5), padding=2), (2, 3)),
    "2d, one position": (geometry((4, 2, 3, 4)), (3, 4)),
    "2d, patches": (geometry((6, 3, 2, 2), stride=2), (4, 6)),
    "3d": (
        geometry((4, 2, 2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2)),
        (3, 5, 4),
    ),
    "groups": (geometry((6, 2, 3, 3), padding=1, groups=2), (5, 4)),
    "depthwise": (geometry((6, 1, 3, 3), stride=2, groups=3), (5, 6)),
    "transposed": (
        geometry((4, 3, 3, 2), stride=2, padding=1, output_padding=1, groups=2, transposed=True),
        (3, 2),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("route", ["ghost", "direct"])
@pytest.mark.parametrize("small_tiles", [False, True])
def test_conv_gram(
    name: str, route: str, dtype: torch.dtype, small_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    g, size = CONVS[name]
    if route == "ghost" and not g.plain:
        # the only route there
        assert op.conv_route(*conv_blocks(g, [(2, 1, size)], dtype), g) == "direct"
        return
    monkeypatch.setattr(op, "conv_route", lambda x, b, geometry: route)
    if small_tiles:
        monkeypatch.setattr(_tiles, "TILE", 60)
        monkeypatch.setattr(_tiles, "BUFFER", 60)
    xs, bs = conv_blocks(g, [(3, 1, size), (2, 2, size)], dtype)
    work = working_dtype(xs[0])
    check(
        f"conv {route}, {name}, {dtype}",
        op.conv_gram(xs, bs, g),
        conv_truth(xs, bs, g),
        conv_truth(xs, bs, g, work),
    )


@pytest.mark.parametrize("route", ["ghost", "direct"])
@pytest.mark.parametrize("small_tiles", [False, True])
def test_conv_gram_of_shared_inputs_and_unequal_images(
    route: str, small_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tasks on one forward, two on another with images of another size, and channels-last memory."""
    monkeypatch.setattr(op, "conv_route", lambda x, b, geometry: route)
    if small_tiles:
        monkeypatch.setattr(_tiles, "TILE", 60)
    g = geometry((4, 3, 3, 2), padding=1, stride=(2, 1))
    (x, y), (b, c) = conv_blocks(g, [(3, 1, (5, 4)), (2, 2, (3, 6))], torch.float64)
    xs, bs = (
        [x, y, x, y, x],
        [b, c, draw(*b.shape, seed=3), draw(*c.shape, seed=4), draw(*b.shape, seed=5)],
    )
    check(
        f"conv {route}, shared",
        op.conv_gram(xs, bs, g),
        conv_truth(xs, bs, g),
        conv_truth(xs, bs, g),
    )
    last = [t.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for t in xs]
    assert relative_error(op.conv_gram(last, bs, g), op.conv_gram(xs, bs, g)) <= 1e-14


def test_conv_route_prefers_what_is_cheaper() -> None:
    g, tiny = geometry((64, 64, 3, 3), padding=1), [(2, 1, (2, 2))]
    assert op.conv_route(*conv_blocks(g, tiny, torch.float32), g) == "ghost"
    h, large = geometry((4, 3, 3, 3), padding=1), [(2, 1, (40, 40))]
    assert op.conv_route(*conv_blocks(h, large, torch.float32), h) == "direct"


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_without_a_kernel_plain_torch_is_charged(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op.outer_ghost, "why_no_kernel", lambda device: "none was built")
    assert op.prices(torch.device(device)) == PLAIN_TORCH
    monkeypatch.setattr(op.outer_ghost, "why_no_kernel", lambda device: "")
    if device in OF_KERNELS:
        assert op.prices(torch.device(device)) == OF_KERNELS[device]


def test_on_a_gpu_patches_are_charged_for_each_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    """6272 positions: products of 49-tap patches cost five times those of nine taps, and more than the rows."""
    monkeypatch.setattr(routes, "prices", lambda device: CUDA_KERNELS)
    for kernel, route in ((3, "ghost"), (7, "direct")):
        g = geometry((64, 64, kernel, kernel), padding=kernel // 2)
        assert op.conv_route(*conv_blocks(g, [(32, 1, (14, 14))], torch.float32), g) == route


@pytest.mark.skipif(not op.conv_ghost.has_kernel("CPU"), reason="the kernel's own rule")
def test_images_that_the_kernel_cuts_go_direct() -> None:
    dilated = geometry((64, 256, 3, 3), padding=6, dilation=6)
    for size, route in (((16, 16), "ghost"), ((17, 17), "direct")):
        assert op.conv_route(*conv_blocks(dilated, [(1, 1, size)], torch.float32), dilated) == route


# ---- table look-ups ------------------------------------------------------------------------------


def gather_truth(index: Blocks, values: Blocks, size: int) -> Blocks:
    hot = [F.one_hot(i, size).double() for i in index]
    return [torch.einsum("rsv,rsd->rvd", h, v.double()) for h, v in zip(hot, values, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[(3, 5)], [(1, 1)], [(3, 5), (2, 1), (4, 2)], [(2, 0), (3, 2)]])
@pytest.mark.parametrize("small_tiles", [False, True])
def test_gather_gram(
    dtype: torch.dtype,
    sizes: list[tuple[int, int]],
    small_tiles: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Indices repeat within a row and across rows and blocks."""
    if small_tiles:
        monkeypatch.setattr(_tiles, "BUFFER", 40)
    index = [torch.randint(0, 7, size) for size in sizes]
    values = [draw(*size, 4, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    truth = gather_truth(index, values, 7)
    plain = [t.to(working_dtype(values[0])) for t in truth]
    check(f"gather, {dtype}", op.gather_gram(index, values), truth, plain)


def test_gather_gram_of_a_large_table_reads_what_occurs() -> None:
    """Rows of a table of 10⁹ entries cannot be formed; the three that occur can."""
    index = torch.tensor([[5, 999_999_999], [7, 5]])
    values = draw(2, 2, 3)
    truth = gather_truth([torch.tensor([[0, 1], [2, 0]])], [values], 3)
    assert relative_error(op.gather_gram([index], [values]), explicit(truth)) <= 1e-14


# ---- outer products with table look-ups ----------------------------------------------------------


def met_blocks(kind: str, dtype: torch.dtype) -> tuple[Blocks, Blocks, Blocks, Blocks]:
    """Left [R, S, 5] and right [R, S, 7] of `outer_blocks`, look-ups in a table of five entries of seven numbers."""
    left, right = outer_blocks(kind, dtype)
    sizes = [(3, 4), (1, 1), (2, 0), (2, 9)]
    values = [draw(*size, 7, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    return left, right, [torch.randint(0, 5, size) for size in sizes], values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", ["one block", "unequal", "left shared", "right shared", "views", "no position"]
)
@pytest.mark.parametrize("tile", [1, 10, 1 << 20])
def test_outer_gather(
    kind: str, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By position, by positions of a row, by rows."""
    monkeypatch.setattr(_tiles, "TILE", tile)
    blocks = met_blocks("left shared" if kind == "right shared" else kind, dtype)
    if kind == "right shared":
        blocks = ([draw(*t.shape[:2], 5, dtype=dtype, seed=i) for i, t in enumerate(blocks[0])],
                  [draw(*t.shape[:2], 7, dtype=dtype) for t in blocks[0]], *blocks[2:])  # fmt: skip
    left, right, index, values = blocks

    def rows(exact: bool) -> tuple[Tensor, Tensor]:
        outers = outer_truth(left, right) if exact else outer_plain(left, right)
        scattered = gather_truth(index, values, 5)
        return (torch.cat([t.flatten(1) for t in outers]),
                torch.cat([t.flatten(1) for t in scattered]).to(outers[0].dtype))  # fmt: skip

    found, (J, K), (J_plain, K_plain) = (
        op.outer_gather(left, right, index, values),
        rows(True),
        rows(False),
    )
    assert found.dtype == torch.float64
    assert_as_accurate(f"outer_gather, {dtype}", found, J_plain @ K_plain.T, J @ K.T)


def test_outer_gather_of_a_large_table_reads_what_occurs() -> None:
    """A table of 10⁶ entries of 10⁴ numbers, 80 GB a row: the left sides are 10⁶ numbers a position."""
    left, right = torch.randn(2, 1, 10**6), torch.randn(2, 1, 10**4)
    index, values = torch.tensor([[5, 999_999]]), torch.randn(1, 2, 10**4)
    truth = (left[:, 0, index[0]].double() * (right[:, 0].double() @ values[0].double().T)).sum(
        1, keepdim=True
    )
    assert relative_error(op.outer_gather([left], [right], [index], [values]), truth) <= 1e-14


# ---- rows and single gradients -------------------------------------------------------------------


def test_outer_rows() -> None:
    left, right = outer_blocks("one block", torch.float64)
    assert (
        relative_error(rows_of.outer_rows(left[0], right[0]), outer_truth(left, right)[0]) <= 1e-15
    )


@pytest.mark.parametrize("name", CONVS)
def test_conv_rows(name: str) -> None:
    g, size = CONVS[name]
    xs, bs = conv_blocks(g, [(3, 2, size)], torch.float64)
    truth = conv_truth(xs, bs, g)[0]
    assert relative_error(rows_of.conv_rows(xs[0], bs[0], g), truth) <= 1e-14
    summed = conv_weight_gradient(xs[0].flatten(0, 1), bs[0].flatten(0, 1), g)
    assert relative_error(summed, truth.sum(0)) <= 1e-14


def test_gather_rows() -> None:
    index, values = torch.tensor([[1, 1, 0], [3, 2, 3]]), draw(2, 3, 4)
    assert (
        relative_error(rows_of.gather_rows(index, values, 5), gather_truth([index], [values], 5)[0])
        <= 1e-15
    )


# ---- the ops as torch sees them ------------------------------------------------------------------


def conv_arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    g, size = CONVS[name]
    xs, bs = conv_blocks(g, [(3, 1, size), (2, 2, size)], dtype)
    return xs, bs, list(g.kernel), list(g.stride), list(g.padding), list(g.dilation), "highest"


CALLS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "row_gram": lambda: (op.row_gram, ([draw(3, 7), draw(2, 7)],)),
    "rank_one_gram": lambda: (
        op.rank_one_gram,
        ([draw(3, 7), draw(3, 2)], [draw(3, 5), draw(3, 1)], 2),
    ),
    "outer_direct": lambda: (op.outer_direct, (*outer_blocks("unequal", torch.float64), "highest")),
    "conv_direct": lambda: (op.conv_direct, conv_arguments("2d", torch.float64)),
    "outer_ghost": lambda: (op.outer_ghost, (*outer_blocks("unequal", torch.float32), "highest")),
    "outer_ghost, shared": lambda: (
        op.outer_ghost,
        (*outer_blocks("left shared", torch.bfloat16), "highest"),
    ),
    "conv_ghost": lambda: (op.conv_ghost, conv_arguments("2d")),
    "gather_gram": lambda: (op.gather_gram, ([torch.randint(0, 7, (3, 5))], [draw(3, 5, 4)])),
    "outer_gather": lambda: (op.outer_gather, met_blocks("unequal", torch.float32)),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    function, arguments = CALLS[name]()
    torch.library.opcheck(function.overload, arguments)
    assert relative_error(function(*arguments), function.reference(*arguments)) <= 1e-14


@pytest.mark.parametrize("name", CALLS)
def test_ops_change_nothing_they_are_given(name: str) -> None:
    function, arguments = CALLS[name]()
    tensors = [
        t for part in arguments if isinstance(part, list) for t in part if isinstance(t, Tensor)
    ]
    before = [(t.clone(), t._version) for t in tensors]
    function(*arguments)
    assert all(
        torch.equal(t, old) and t._version == version
        for t, (old, version) in zip(tensors, before, strict=True)
    )


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_twice(name: str) -> None:
    function, arguments = CALLS[name]()
    assert torch.equal(function(*arguments), function(*arguments))


# ---- arguments -----------------------------------------------------------------------------------

ROUTES: dict[str, Callable[[Tensor, str], Tensor]] = {
    "row_gram": lambda t, precision: op.row_gram([t[:, 0]]),
    "rank_one_gram": lambda t, precision: op.rank_one_gram([t[:, 0]], [t[:, 0].abs()], 1),
    "outer_gram, rank one": lambda t, precision: op.outer_gram([t[:, :1]], [t[:, :1].abs()], precision),
    "outer_gram": lambda t, precision: op.outer_gram([t.abs()], [t], precision),
    "outer_direct": lambda t, precision: op.outer_direct([t], [t], precision),
    "outer_ghost": lambda t, precision: op.outer_ghost([t], [t], precision),
    "conv_gram": lambda t, precision: op.conv_gram(
        [t[:, None, :, :, None]], [t[:, None, :1, :, None].abs()],
        geometry((1, 3, 1, 1)), precision,
    ),
    "conv_direct": lambda t, precision: op.conv_direct(
        [t[..., None].abs()], [t[..., None]], [1], [1], [0], [1], precision=precision
    ),
    "conv_ghost": lambda t, precision: op.conv_ghost(
        [t[..., None].abs()], [t[..., None]], [1], [1], [0], [1], precision=precision
    ),
    "gather_gram": lambda t, precision: op.gather_gram([torch.zeros(t.shape[:2]).long()], [t], precision=precision),
    "outer_gather": lambda t, precision: op.outer_gather(
        [t.abs()], [t], [torch.zeros(t.shape[:2]).long()], [t], precision
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTES)
def test_complex_blocks_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"block of torch\.complex128, expected real ones"):
        ROUTES[name](torch.randn(2, 3, 5, dtype=torch.complex128), "highest")


@pytest.mark.parametrize(
    "name", [name for name in ROUTES if name not in ("row_gram", "rank_one_gram")]
)
def test_an_unknown_precision_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"precision: found 'fast', expected one of 'highest', 'high', 'medium'"
    ):
        ROUTES[name](torch.randn(2, 3, 5), "fast")


WRONG: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sides in number": (lambda: op.outer_ghost([draw(2, 3, 4)], [], "highest"), "found 1 blocks on one side and 0"),
    "positions": (lambda: op.outer_gram([draw(2, 1, 4)], [draw(2, 3, 4)]), r"block 0 .* \(2, 1, 4\) and \(2, 3"),
    "rows": (lambda: op.outer_ghost([draw(2, 3, 4)], [draw(3, 3, 4)], "highest"), "expected the same rows"),
    "widths": (
        lambda: op.outer_ghost([draw(2, 3, 4), draw(2, 3, 5)], [draw(2, 3, 4)] * 2, "highest"),
        r"block 1 has shape \(2, 3, 5\), the first one \(2, 3, 4\)",
    ),
    "axes": (lambda: op.outer_ghost([draw(2, 3)], [draw(2, 3)], "highest"), r"expected \[rows, positions, width"),
    "grid": (
        lambda: op.conv_ghost([draw(1, 1, 2, 4, 4)], [draw(1, 1, 2, 9, 9)], [3, 3], [1, 1], [1, 1], [1, 1], "highest"),
        r"gradients of \(9, 9\), expected \(4, 4\)",
    ),
    "stride": (
        lambda: op.conv_ghost([draw(1, 1, 2, 4)], [draw(1, 1, 2, 4)], [1], [0], [0], [1], "highest"), "only padding",
    ),
    "axes of the kernel": (
        lambda: op.conv_ghost([draw(1, 1, 2, 4)], [draw(1, 1, 2, 4)], [1, 1], [1], [0], [1], "highest"), "one number",
    ),
    "conv, rows": (
        lambda: op.conv_gram([draw(2, 1, 2, 4)], [draw(1, 1, 2, 4)], geometry((2, 2, 1), padding=0)), "the same rows",
    ),
    "values": (
        lambda: op.gather_gram([torch.zeros(2, 3).long()], [draw(2, 3)]), r"values \(2, 3\), expected \[rows, posi",
    ),
    "width of the table": (
        lambda: op.outer_gather([draw(2, 3, 4)], [draw(2, 3, 5)], [torch.zeros(2, 3).long()], [draw(2, 3, 4)]),
        r"right sides have shape \(2, 3, 5\) and the values \(2, 3, 4\), expected one width",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_blocks_that_do_not_fit_are_refused(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_index_of_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"index of torch\.float64, expected whole numbers"):
        op.gather_gram([draw(2, 3)], [draw(2, 3, 4)])


# ---- how exact -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "dtype", "precision", "expected"),
    [
        ((8, 0), torch.float32, "highest", False),
        ((9, 0), torch.float32, "highest", False),
        ((8, 9), torch.float32, "highest", True),  # no fast float64: blocks of float32 products
        ((9, 0), torch.float32, "high", True),
        ((9, 0), torch.float32, "medium", True),
        ((9, 0), torch.bfloat16, "highest", True),
        ((9, 0), torch.float64, "medium", False),
        ((8, 9), torch.float64, "highest", False),
    ],
)
def test_grams_are_inexact_where_the_kernels_sum_float32(
    arch: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setattr(op.outer_ghost, "why_no_kernel", lambda device: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: arch)
    assert op.inexact(torch.device("cuda"), dtype, precision) is expected
    assert not op.inexact(torch.device("cpu"), dtype, precision)
    monkeypatch.setattr(op.outer_ghost, "why_no_kernel", lambda device: "Triton does not work here")
    assert not op.inexact(torch.device("cuda"), dtype, precision)  # plain torch, in float64
