"""Ops that read or write where an index says."""

from __future__ import annotations

import torch

from tests.graph.recorded.cases import (
    case,
    index,
    u,
    x,
)


def _without(dim: int, size: int) -> tuple[int, ...]:
    """[4, 4, 4] with another size of one dimension."""
    return tuple(size if k == dim % 3 else 4 for k in range(3))


for _dim in (0, 1, -1):
    case("Gather", lambda d=_dim: x(3, 4, 5).gather(d, index(3, 3, 4, 5)))
    case("Gather", lambda d=_dim: x(3, 4, 5).gather(d, index(3, 2, 3, 4)))
    case("Gather", lambda d=_dim: x(3, 1, 5).gather(d, index(1, 3, 1, 5)))
    case("IndexSelect", lambda d=_dim: x(3, 4, 5).index_select(d, index(3, 4)))
    case("IndexSelect", lambda d=_dim: x(3, 3, 3).index_select(d, index(3, 3)))
    case(
        "Scatter",
        lambda d=_dim: x(4, 4, 4).scatter(
            d, torch.randperm(4)[:, None, None].expand(4, 4, 4), x(4, 4, 4)
        ),
    )
    case("Scatter", lambda d=_dim: x(4, 4, 4).scatter(d, index(2, 2, 2, 2), x(2, 2, 2)))
    case("Scatter", lambda d=_dim: x(4, 4, 4).scatter(d, index(2, 2, 2, 2), 1.0))
    case("ScatterAdd", lambda d=_dim: x(4, 4, 4).scatter_add(d, index(4, 4, 4, 4), x(4, 4, 4)))
    case("ScatterAdd", lambda d=_dim: x(4, 4, 4).scatter_add(d, index(2, 2, 3, 4), x(2, 3, 4)))
    case("IndexAdd", lambda d=_dim: x(4, 4, 4).index_add(d, index(4, 4), x(4, 4, 4), alpha=2))
    case("IndexCopy", lambda d=_dim: x(4, 4, 4).index_copy(d, torch.randperm(4), x(4, 4, 4)))
    case(
        "IndexCopy",
        lambda d=_dim: x(4, 4, 4).index_copy(d, torch.randperm(4)[:2], x(*_without(d, 2))),
    )
    case("IndexFill", lambda d=_dim: x(4, 4, 4).index_fill(d, index(4, 2), x()))
    case("IndexFill", lambda d=_dim: x(4, 4, 4).index_fill(d, index(4, 2), 1.0))
    for _reduce in ("sum", "prod", "mean", "amax"):
        case(
            "ScatterReduce",
            lambda d=_dim, r=_reduce: u(4, 4, 4).scatter_reduce(
                d, index(4, 4, 4, 4), u(4, 4, 4), reduce=r
            ),
        )
case("Gather", lambda: x(4).gather(0, index(4, 3)))
case("IndexPut", lambda: x(4, 5).index_put((index(4, 3),), x(3, 5)))
case("IndexPut", lambda: x(5, 4).index_put((torch.tensor([3, 0, 4, 2, 1]),), x(5, 4)))
case("IndexPut", lambda: x(4, 5).index_put((index(4, 3), index(5, 3)), x(3), accumulate=True))
case("IndexPut", lambda: x(4, 5).index_put((torch.tensor([True, False, True, True]),), x(1, 5)))
case("MaskedScatter", lambda: x(3, 4).masked_scatter(torch.rand(3, 4) > 0.5, x(3, 4)))
case(
    "Put",
    lambda: x(3, 4).put(torch.randperm(12)[:5], x(5)),
    lambda: x(3, 4).put(index(12, 5), x(5), True),
)
