"""Uses of one parameter by several tasks: where a convolution's input is one and the same, they are one use.

Rows of task t are `b_t` against patches of x, so that those of all tasks are `b_1, b_2, …` side by side,
as output channels, against patches that are laid out once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtu_fast._rows.uses import DIRECT, Conv, Use


@dataclass(frozen=True)
class Joined:
    """Rows of some uses, `[R, P]` of each.

    Attributes:
        use: the one that stands for all, with their rows side by side.
        of: which uses they are.
    """

    use: Use
    of: list[int]

    def rows(self) -> Tensor:
        """`[T, R, P]` for the T uses."""
        found = self.use.grounded().matrix()
        return found.view(len(found), len(self.of), -1).transpose(0, 1)

    def sums(self) -> Tensor:
        """`[T, P]`: of each the sum of its rows, of which none is formed."""
        # in channels-last memory, or turned by a chain, the sum is no vector yet
        return self.use.vjp(None).reshape(len(self.of), -1)


def joined(uses: Sequence[Use], at: Sequence[Tensor]) -> list[Joined]:
    """All uses, some of them as one; of each only the rows `at`."""
    found: dict[object, list[int]] = {}
    for i, use in enumerate(uses):
        found.setdefault(_key(use, at[i]) or i, []).append(i)
    return [
        Joined(_selected(_beside([uses[i] for i in of]), at[of[0]]), of) for of in found.values()
    ]


def _key(use: Use, at: Tensor) -> object:
    """What uses that are joined have in common; None for one that is not."""
    if not isinstance(use, Conv) or not use.geometry.plain or use.chain != DIRECT:
        return None
    x = use.x
    # output channels are joined: their number may differ in nothing, or rows would be of two lengths
    return x.data_ptr(), x.shape, x.stride(), x.dtype, use.b.shape, use.geometry, tuple(at.tolist())


def _beside(uses: Sequence[Use]) -> Use:
    first = uses[0]
    if not isinstance(first, Conv) or len(uses) == 1:
        return first
    weight = (len(uses) * first.geometry.weight[0], *first.geometry.weight[1:])
    b = torch.cat([use.b for use in uses if isinstance(use, Conv)], 2)
    return replace(first, shape=weight, b=b, geometry=replace(first.geometry, weight=weight))


def _selected(use: Use, at: Tensor) -> Use:
    return use if len(at) == use.count else use.select(at)
