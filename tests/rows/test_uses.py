"""The kinds of use: one matrix of rows each, whatever is asked of it, alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mtu_fast._ops import explicit
from mtu_fast._ops._convolution import Geometry
from mtu_fast._rows import products
from mtu_fast._rows.uses import Chain, Common, Conv, Dense, Gather, Outer, Several, Stacked, Use
from tests.helpers.checks import random_weights
from tests.helpers.truth import relative_error

R = 4
KINDS = ["dense", "outer", "conv", "gather", "common", "several", "blocks"]
CLOSE = 1e-13


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make(kind: str, rows: int = R) -> Use:
    """A use of each kind, of a parameter [6, 4] (of [6, 4, 1] for a convolution)."""
    if kind == "dense":
        return Dense((6, 4), draw(rows, 6, 4))
    if kind == "outer":
        return Outer((6, 4), draw(rows, 3, 6), draw(rows, 3, 4))
    if kind == "gather":
        return Gather((6, 4), torch.randint(0, 6, (rows, 5)), draw(rows, 5, 4))
    if kind == "common":
        return Common((6, 4), draw(rows, 2), draw(2, 6, 4))
    if kind == "several":
        return Several((6, 4), tuple(make(part, rows) for part in ("gather", "outer", "common")))
    if kind == "blocks":
        return Stacked(
            (6, 4), (Dense((4,), draw(rows, 4)), Common((4,), draw(rows, 2), draw(2, 4))), (4, 1)
        )
    geometry = Geometry((6, 4, 1), (1,), (0,), (1,), False, (0,), 1)
    return Conv((6, 4, 1), draw(rows, 1, 4, 7), draw(rows, 1, 6, 7), geometry)


def rows_of(use: Use) -> Tensor:
    """The rows straight from the definition, [R, 24]."""
    if isinstance(use, Dense):
        return use.rows.flatten(1)
    if isinstance(use, Outer):
        return torch.einsum("rsa,rsb->rab", use.left, use.right).flatten(1)
    if isinstance(use, Gather):
        hot = torch.nn.functional.one_hot(use.index, use.shape[0]).double()
        return torch.einsum("rsv,rsd->rvd", hot, use.values).flatten(1)
    if isinstance(use, Common):
        return torch.einsum("rk,k...->r...", use.scale, use.direction).flatten(1)
    if isinstance(use, Several):
        return torch.stack([rows_of(part) for part in use.parts]).sum(0)
    if isinstance(use, Stacked):
        found = torch.zeros(use.count, *use.shape, dtype=torch.float64)
        for e, part in zip(use.at, use.parts, strict=True):
            found[:, e] = rows_of(part).view(use.count, *use.shape[1:])
        return found.flatten(1)
    assert isinstance(use, Conv)
    return torch.einsum("rfcp,rfop->roc", use.x, use.b).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_use_is_its_rows(kind: str) -> None:
    use = make(kind)
    J, w = rows_of(use), random_weights(R)
    assert use.count == R and use.dtype == torch.float64
    assert relative_error(use.matrix(), J) <= CLOSE
    assert use.vjp(w).shape == use.shape
    assert relative_error(use.vjp(w).flatten(), w @ J) <= CLOSE
    assert relative_error(use.vjp(None).flatten(), J.sum(0)) <= CLOSE
    assert relative_error(use.dense().rows.flatten(1), J) <= CLOSE
    d = draw(*use.shape)
    assert use.jvp(d).dtype == torch.float64
    assert relative_error(use.jvp(d), J @ d.flatten()) <= CLOSE
    assert relative_error(products.gram([use]), J @ J.T) <= CLOSE
    assert use.rows_bytes() == J.numel() * 8


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_use_holds(kind: str) -> None:
    use = make(kind)
    parts = use.parts if isinstance(use, Several | Stacked) else (use,)
    tensors = [t for part in parts for t in vars(part).values() if isinstance(t, Tensor)]
    assert use.held == sum(t.numel() * t.element_size() for t in tensors)
    before = use.versions
    tensors[-1].add_(1)
    assert use.versions != before


@pytest.mark.parametrize("kind", KINDS)
def test_some_rows_of_a_use(kind: str) -> None:
    """A row that is left out leaves nothing behind, be it finite or not."""
    use, chosen = make(kind), torch.tensor([3, 1])
    J = rows_of(use)[chosen]
    # an index, or directions that all rows share
    whole = [t.dtype == torch.int64 or len(t) != R for t in use.tensors]
    broken = [t.clone() if w else t.clone().index_fill(0, torch.tensor([0]), torch.nan)
              for t, w in zip(use.tensors, whole, strict=True)]  # fmt: skip
    some = use.with_tensors(*broken).select(chosen)
    assert some.count == 2 and type(some) is type(use)
    assert relative_error(some.matrix(), J) <= CLOSE
    assert relative_error(products.gram([some]), J @ J.T) <= CLOSE
    assert relative_error(some.vjp(random_weights(2)).flatten(), random_weights(2) @ J) <= CLOSE


@pytest.mark.parametrize(
    ("geometry", "image", "grid"),
    [
        (Geometry((6, 4, 3, 2), (2, 1), (1, 0), (1, 2), False, (0, 0), 1), (7, 5), (4, 3)),
        (Geometry((6, 2, 3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0), 2), (5, 4), (5, 4)),
        (Geometry((4, 6, 3, 2), (2, 1), (1, 0), (1, 1), True, (1, 0), 1), (4, 3), (8, 4)),
        (Geometry((4, 3, 2, 2), (2, 2), (0, 0), (1, 1), True, (0, 0), 2), (3, 3), (6, 6)),
        (Geometry((6, 4, 3), (1,), (2,), (1,), False, (0,), 1), (5,), (7,)),
        (
            Geometry((6, 4, 2, 2, 2), (1, 1, 1), (0, 0, 0), (1, 1, 1), False, (0, 0, 0), 1),
            (3, 4, 3),
            (2, 3, 2),
        ),
    ],
    ids=["strided and dilated", "grouped", "transposed", "transposed and grouped", "1d", "3d"],
)
def test_convolutions_are_pushed_by_their_geometry(
    geometry: Geometry,
    image: tuple[int, ...],
    grid: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two images a row; whole, and a row at a time."""
    use = Conv(geometry.weight, draw(R, 2, 4, *image), draw(R, 2, 6, *grid), geometry)
    d = draw(*geometry.weight)
    truth = use.matrix() @ d.flatten()
    assert relative_error(use.jvp(d), truth) <= CLOSE
    monkeypatch.setattr(explicit, "PIECE", 1)
    assert relative_error(use.jvp(d), truth) <= CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_float32_rows_are_pushed_in_float64(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and sums: the inner product with a d that the rows nearly cancel keeps its digits, in any piece."""
    use = make(kind)
    use = use.with_tensors(*(t if t.dtype == torch.int64 else t.float() for t in use.tensors))
    exact = use.with_tensors(*(t if t.dtype == torch.int64 else t.double() for t in use.tensors))
    J = rows_of(exact)
    d = draw(J.shape[1])
    # J d is a millionth of what it was
    d = (d - torch.linalg.pinv(J) @ (J @ d) * (1.0 - 1e-6)).view(use.shape)
    assert relative_error(use.jvp(d), J @ d.flatten()) <= 1e-8  # eps / 1e-6, and the sums
    monkeypatch.setattr(explicit, "PIECE", 1)
    assert relative_error(use.jvp(d), J @ d.flatten()) <= 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cast_on_the_way_does_not_round_what_is_pushed(dtype: torch.dtype) -> None:
    """A bfloat16 copy of a part of the parameter: d has more digits than the copy could hold."""
    chain = Chain(
        ("cast", "slice"), lambda g: torch.nn.functional.pad(g.bfloat16(), (0, 0, 0, 4)).to(dtype)
    )
    use = replace(make("outer"), chain=chain)
    d = draw(10, 4).to(dtype)
    # Three times the 8 bits of bfloat16, which is all that a float32 has.
    assert relative_error(use.jvp(d), rows_of(use) @ d[:6].double().flatten()) <= 2.0**-23


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_a_cast_of_little_range_does_not_flush_what_is_pushed(size: float) -> None:
    """A float16 copy, as under autocast: what is pushed is J d at any scale of d."""
    chain = Chain(("cast",), lambda g: g.half().to(torch.float32))
    use = replace(make("outer"), chain=chain)
    d = size * draw(6, 4).float()
    assert relative_error(use.jvp(d), rows_of(use) @ d.double().flatten()) <= 2.0**-23


def test_a_transposed_use() -> None:
    use = make("outer")
    assert isinstance(use, Outer)
    turned = use.transposed()
    assert turned.shape == (4, 6)
    assert relative_error(turned.matrix().view(R, 4, 6), rows_of(use).view(R, 6, 4).mT) <= CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_those_of_the_rows(kind: str) -> None:
    use = make(kind)
    J, step = rows_of(use), use.unit
    for start in range(0, J.shape[1], step):
        for stop in range(start + step, J.shape[1] + 1, step):
            assert relative_error(use.columns(start, stop), J[:, start:stop]) <= CLOSE


def test_what_common_rows_cancel_to_keeps_its_digits() -> None:
    """Weights that remove the direction but for a millionth: float32 rows, summed, would keep one digit."""
    scale, direction = torch.tensor([[1.0], [1.0 - 2.0**-20]]), torch.randn(1, 300)
    found = Common((300,), scale, direction).weighted(torch.tensor([1.0, -1.0]))
    assert relative_error(found, 2.0**-20 * direction[0].double()) <= 1e-7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_lengths_of_rows_by_no_gram(kind: str, scale: float) -> None:
    """Within a factor of four: what weights of a check are chosen by. Rows of nothing have none."""
    for seed in range(20):
        torch.manual_seed(seed)
        use = make(kind)
        few = torch.ones(R, dtype=torch.float64)
        few[1], few[2] = scale, 0
        use = weighed(use, few)
        found, true = use.lengths(), rows_of(use).norm(dim=1)
        assert found.dtype == torch.float64 and found[2] == 0
        assert (found[few > 0] / true[few > 0]).log2().abs().max() <= 2


def weighed(use: Use, w: Tensor) -> Use:
    """The use of rows that are multiplied by these numbers."""
    if isinstance(use, Several | Stacked):
        return replace(use, parts=tuple(weighed(part, w) for part in use.parts))
    if isinstance(use, Common):
        return replace(use, scale=use.scale * w[:, None])
    *others, last = use.tensors
    return use.with_tensors(*others, last * w.view(-1, *[1] * (last.dim() - 1)))
