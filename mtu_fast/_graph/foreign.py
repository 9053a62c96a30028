"""Whether rows come out of a backward of somebody's own as they would alone: an experiment beside `reach.py`.

An adjoint is linear, and where it moves rows shows all of it. A `torch.autograd.Function` need not
be: one that divides by the norm of the batch keeps rows apart, and makes of a row something else
beside others than alone. Such a node is asked whether all rows together give what either half of
them gives: at several scales, since a bound is seen from one side of it only, and beside rows that
are not finite, which a guard may set to zero. Where they do not, rows meet in it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from mtu_fast._graph.carry import stem
from mtu_fast._graph.nodes import is_foreign, outputs
from mtu_fast._graph.reach import Experiment, Grads, Probes, Reached
from mtu_fast._graph.rowmap import MEET, Ids

# Powers of two; half precision has no room for more.
SCALES, SCALES_OF_HALF = (2.0**30, 2.0**-30), (2.0**8, 2.0**-8)
NOT_FINITE = float("nan")


def foreign(node: Any) -> bool:
    """Whether the node's backward is somebody's own, and thus need not be linear."""
    return is_foreign(node, stem(node.name()))


def settled(
    node: Any, maps: Sequence[Ids | None], found: Reached, count: int, probes: Probes
) -> Reached:
    """What `reach` found for a node, or that rows meet where they come out otherwise together than alone."""
    apart = [slot for slot, ids in found.items() if ids is not MEET]
    if not apart or not foreign(node):
        return found
    # together against halves; then across scales; then beside what is not finite
    odd = _beside_others(Experiment(node, maps, count, probes), apart)
    odd |= _unlike(node, maps, apart, count, probes, every=True)
    odd |= _spoiled(node, maps, apart, count, probes)
    return found | dict.fromkeys(odd, MEET)


def moved(
    node: Any, maps: Sequence[Ids | None], slots: Collection[int], count: int, probes: Probes
) -> bool:
    """Whether rows come out of a node of a later step otherwise together than alone."""
    return foreign(node) and bool(_unlike(node, maps, slots, count, probes))


def _beside_others(experiment: Experiment, slots: Collection[int]) -> set[int]:
    """The slots at which all rows together give something else than the two halves by some digit."""
    whole = experiment.whole(slots)
    found: set[int] = set()
    for _, on, off in experiment.runs(slots):
        found |= _differing(whole, on, off)
    return found


def _unlike(
    node: Any,
    maps: Sequence[Ids | None],
    slots: Collection[int],
    count: int,
    probes: Probes,
    every: bool = False,
) -> set[int]:
    """The slots at which far larger or smaller rows change those beside them; by the first digit, or by every one."""
    half = any(meta.dtype == torch.float16 for meta in outputs(node))
    up, down = SCALES_OF_HALF if half else SCALES
    large = Experiment(node, maps, count, probes, up)
    small = Experiment(node, maps, count, probes, down)
    found: set[int] = set()
    for of_large, of_small in zip(large.runs(slots), small.runs(slots), strict=True):
        digit, *larger = of_large
        _, *smaller = of_small
        # with the half of either value large, and the other one small
        mixed = {value: large.beside(small, digit, value, slots) for value in (1, 0)}
        for value, big, little in zip((1, 0), larger, smaller, strict=True):
            found |= _changed(mixed[value], big, little)
            found |= _changed(mixed[1 - value], little, big)
        if not every:
            break
    return found


def _changed(beside: Grads, alone: Grads, again: Grads) -> set[int]:
    """The slots at which rows are not what they are alone; where they are shows there, or at another scale."""
    found: set[int] = set()
    for slot, g in alone.items():
        # elements that the alive rows reach
        theirs = g != 0
        if slot in again:
            theirs |= again[slot] != 0
        if slot not in beside or not _alike(g[theirs], beside[slot][theirs]):
            found.add(slot)
    return found


def _spoiled(
    node: Any, maps: Sequence[Ids | None], slots: Collection[int], count: int, probes: Probes
) -> set[int]:
    """The slots at which rows are others where those beside them are not finite."""
    _, *alone = next(Experiment(node, maps, count, probes).runs(slots))
    _, *beside = next(Experiment(node, maps, count, probes, others=NOT_FINITE).runs(slots))
    found: set[int] = set()
    for one, two in zip(alone, beside, strict=True):
        found |= _changed(two, one, {})
    return found


def _differing(whole: Grads, on: Grads, off: Grads) -> set[int]:
    """The slots at which the whole is not the sum of its halves, one of which is zero in every element."""
    found: set[int] = set()
    for slot, g in whole.items():
        halves = [half[slot] for half in (on, off) if slot in half]
        # a sum with zeros rounds nothing
        if not halves or not _alike(g, sum(halves[1:], halves[0])):
            found.add(slot)
    return found


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether numbers are the same but for rounding."""
    # relative only: an absolute slack would hide what is lost at small scales
    rounding = 16 * torch.finfo(one.dtype).eps
    return torch.allclose(one, other, rtol=rounding, atol=0, equal_nan=True)
