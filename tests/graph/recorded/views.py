"""Views and copies."""

from __future__ import annotations

import itertools

import torch

from tests.graph.recorded.cases import (
    case,
    x,
)

case(
    "T",
    lambda: torch.t(x(3, 3)),
    lambda: torch.t(x(3, 4)),
    lambda: torch.t(x(4)),
    lambda: torch.t(x(1, 3)),
    lambda: torch.t(x()),
)
for _one, _other in ((0, 1), (0, -1), (-2, -1), (1, 1), (2, 0)):
    case(
        "Transpose",
        lambda a=_one, b=_other: x(2, 3, 4).transpose(a, b),
        lambda a=_one, b=_other: x(3, 3, 3).transpose(a, b),
    )
case("Transpose", lambda: x(3, 4).mT, lambda: x(1, 3, 1).mT)
for _order in itertools.permutations(range(3)):
    case(
        "Permute",
        lambda o=_order: x(2, 3, 4).permute(o),
        lambda o=_order: x(3, 3, 3).permute([d - 3 for d in o]),
    )
case("Permute", lambda: x(2, 3, 1, 4).permute(0, -1, 1, 2))
for _from, _to in (
    ((2, 3, 4), (6, 4)), ((6, 4), (2, 3, 4)), ((4, 6), (6, 4)), ((2, 3, 4), (4, 3, 2)), ((2, 3, 4), (24,)),
    ((12,), (3, 1, 4)), ((1, 3), (3,)), ((), (1, 1)), ((4, 4), (4, 4)), ((2, 1, 6), (4, 3)), ((4, 9), (6, 6)),
    ((2, 3, 1, 4), (2, 12)), ((8,), (2, 2, 2)), ((3, 0), (0, 2)),
):  # fmt: skip
    case("View", lambda a=_from, b=_to: x(*a).view(b))
    case("UnsafeView", lambda a=_from, b=_to: torch.ops.aten._unsafe_view(x(*a), b))
    case(
        "ReshapeAlias",
        lambda a=_from, b=_to: torch.ops.aten._reshape_alias(x(*a), b, torch.empty(b).stride()),
    )
case("UnsafeView", lambda: x(2, 3, 4) @ x(4, 5), lambda: x(2, 3, 4).transpose(0, 1).reshape(6, 4))
for _dim in (0, 1, 2, -1, -3):
    case("Unsqueeze", lambda d=_dim: x(3, 4).unsqueeze(d))
case(
    "Squeeze",
    lambda: x(1, 3, 1).squeeze(),
    lambda: x(1, 3, 1).squeeze(-1),
    lambda: x(2, 3).squeeze(0),
)
case(
    "Squeeze",
    lambda: x(1, 3, 1, 2).squeeze((0, -2)),
    lambda: x(3, 1, 3).squeeze(1),
    lambda: x(1, 1).squeeze(),
)
for _dim in (0, 1, -1):
    for _at in (0, 1, -1, -2):
        case(
            "Select",
            lambda d=_dim, i=_at: x(2, 3, 4).select(d, i),
            lambda d=_dim, i=_at: x(3, 3).select(d, i),
        )
    for _cut in (
        slice(1),
        slice(1, None),
        slice(-1, None),
        slice(0, None, 2),
        slice(1, 3, 2),
        slice(5, 9),
    ):
        case(
            "Slice",
            lambda d=_dim, c=_cut: x(3, 4, 3).movedim(0, d)[(slice(None),) * (d % 3) + (c,)],
        )
        case(
            "Slice",
            lambda d=_dim, c=_cut: torch.ops.aten.slice(
                x(3, 3, 3), d, c.start, c.stop, c.step or 1
            ),
        )
    case("Unbind", lambda d=_dim: x(2, 3, 2).unbind(d), lambda d=_dim: x(1, 3, 1).unbind(d))
    case(
        "Stack",
        lambda d=_dim: torch.stack([x(2, 3), x(2, 3)], d),
        lambda d=_dim: torch.stack([x(2, 2), x(2, 2)], d),
    )
    case(
        "Stack", lambda d=_dim: torch.stack([torch.ones(2, 3), x(2, 3).float(), x(2, 3).float()], d)
    )
    case("Stack", lambda d=_dim: torch.stack([x(3)], min(d, 1)))
    case("Split", lambda d=_dim: x(4, 5, 3).split(2, d), lambda d=_dim: x(3, 3, 3).split(3, d))
    case("UnsafeSplit", lambda d=_dim: x(4, 5, 3).unsafe_split(2, d))
    case(
        "SplitWithSizes",
        lambda d=_dim: x(4, 4, 4).split([1, 3], d),
        lambda d=_dim: x(4, 4, 4).split([2, 0, 2], d),
    )
    case(
        "UnsafeSplitWithSizes",
        lambda d=_dim: torch.ops.aten.unsafe_split_with_sizes(x(4, 4, 4), [3, 1], d),
    )
    case("Flip", lambda d=_dim: x(2, 3, 4).flip(d), lambda d=_dim: x(3, 3).flip(d))
    for _shift in (1, -1, 2, 7):
        case(
            "Roll",
            lambda d=_dim, k=_shift: x(2, 3, 4).roll(k, d),
            lambda d=_dim, k=_shift: x(3, 3).roll(k, d),
        )
case("Flip", lambda: x(2, 3, 4).flip((0, -1)))
case(
    "Roll",
    lambda: x(2, 3, 4).roll((1, -1), (0, -1)),
    lambda: x(3, 4).roll(2),
    lambda: x(3, 3).roll((1, 1), (0, 0)),
)
