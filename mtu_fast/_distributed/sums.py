"""Sums over ranks of what each computed from its own rows: gradients, and directional derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mtu_fast._distributed.ranks import Ranks, attempt

# Numbers that are summed in one call; a larger tensor goes alone, without a copy.
BUCKET = 1 << 20
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Gradients = dict[Tensor, Tensor]


def summed(
    ranks: Ranks,
    what: str,
    own: Callable[[], Mapping[Tensor, Tensor]],
    parameters: Sequence[Tensor],
) -> Gradients:
    """{parameter: gradient} summed over ranks, the same bits on each.

    Args:
        ranks: who takes part.
        what: the call, for errors.
        own: gives this rank's gradients; without collectives.
        parameters: all that a rank may have one of, in one order.

    Returns:
        Gradients of the parameters that a rank has one of.

    Raises:
        ValueError: a rank has sparse gradients, or another number of parameters.
        Exception: of the kind that `own` raised on a rank.
    """
    value, error = attempt(lambda: _dense(own()))
    mine: Mapping[Tensor, Tensor] = value or {}
    # 0 for none: the largest code of a parameter is the widest dtype that a rank has
    codes = [1 + _DTYPES.index(mine[p].dtype) if p in mine else 0 for p in parameters]
    told = ranks.told(what, error, codes)
    wanted: dict[int, list[Tensor]] = {}
    for parameter, codes_of_ranks in zip(parameters, zip(*told, strict=True), strict=True):
        wanted.setdefault(max(codes_of_ranks), []).append(parameter)
    wanted.pop(0, None)  # of which no rank has any
    found: Gradients = {}
    reduce = partial(ranks.sum, f"{what}: sum")
    for code, those in wanted.items():
        found |= in_buckets(reduce, those, mine, _DTYPES[code - 1])
    return {parameter: found[parameter] for parameter in parameters if parameter in found}


def in_buckets(
    reduce: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    mine: Mapping[Tensor, Tensor],
    dtype: torch.dtype,
) -> Gradients:
    """Gradients of some parameters, zero where this rank has none, reduced over ranks in few calls."""
    found: Gradients = {}
    for bucket in buckets(parameters):
        pieces = [_flat(mine.get(parameter), parameter, dtype) for parameter in bucket]
        whole = reduce(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
        split = whole.split([parameter.numel() for parameter in bucket])
        for parameter, g in zip(bucket, split, strict=True):
            g = g.view(parameter.shape)
            # a view would keep the whole bucket in memory
            found[parameter] = g if len(bucket) == 1 else g.clone()
    return found


def _flat(g: Tensor | None, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient as a vector; zeros where there is none."""
    if g is None:
        return parameter.new_zeros(parameter.numel(), dtype=dtype)
    return g.to(dtype).reshape(-1)


def buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    some: list[Tensor] = []
    for parameter in parameters:
        if some and sum(p.numel() for p in some) + parameter.numel() > BUCKET:
            yield some
            some = []
        some.append(parameter)
    if some:
        yield some


def _dense(gradients: Mapping[Tensor, Tensor]) -> Mapping[Tensor, Tensor]:
    for parameter, g in gradients.items():
        if g.is_sparse:
            raise ValueError(
                f"found a sparse gradient of a parameter of shape {tuple(parameter.shape)}, expected "
                "dense ones where ranks are summed; make the embedding with sparse=False."
            )
    return gradients
