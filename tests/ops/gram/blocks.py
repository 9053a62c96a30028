"""Blocks of rows and factors, what they make as explicit rows, and the one rule of accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtu_fast._ops._blocks import working_dtype
from mtu_fast._ops._convolution import Geometry
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


def gather_truth(index: Blocks, values: Blocks, size: int) -> Blocks:
    hot = [F.one_hot(i, size).double() for i in index]
    return [torch.einsum("rsv,rsd->rvd", h, v.double()) for h, v in zip(hot, values, strict=True)]


def met_blocks(kind: str, dtype: torch.dtype) -> tuple[Blocks, Blocks, Blocks, Blocks]:
    """Left [R, S, 5] and right [R, S, 7] of `outer_blocks`, look-ups in a table of five entries of seven numbers."""
    left, right = outer_blocks(kind, dtype)
    sizes = [(3, 4), (1, 1), (2, 0), (2, 9)]
    values = [draw(*size, 7, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    return left, right, [torch.randint(0, 5, size) for size in sizes], values
