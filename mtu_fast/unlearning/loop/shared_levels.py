"""Levels of a run on several ranks: rows are ranked, and counted, among those of all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mtu_fast._distributed.crew import Crew
from mtu_fast.unlearning.loop.levels import Held, Levels

WHAT = "unlearn: levels"  # what errors of an exchange are of


def left_of_all(
    levels: Levels,
    crew: Crew,
    losses: Mapping[str, Tensor],
    gone: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """`levels.left` of this rank's rows, ranked among the rows to forget that all ranks have in this step."""
    before, after = _of_other_ranks(levels, crew, losses, gone, present)
    return crew.agreed(WHAT, lambda: levels.left(losses, gone, present, before=before, after=after))


def held_by_all(levels: Levels, crew: Crew) -> Held:
    """What levels hold, with the rows that all ranks have seen."""
    mine = levels.held
    if crew.size == 1:
        return mine
    # as plain numbers, which can be sent
    counts = [{task: int(n) for task, n in part.items()} for part in (mine.left, mine.seen)]
    left: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for of_left, of_seen in crew.objects(WHAT, counts):
        left.update(of_left)
        seen.update(of_seen)
    return replace(mine, left=_tensors(left), seen=_tensors(seen))


def _of_other_ranks(
    levels: Levels,
    crew: Crew,
    losses: Mapping[str, Tensor],
    gone: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """{task: losses of rows to forget} in this step, of the ranks before this one and of those after it."""
    if crew.size == 1 or not levels.options["quantiles"]:
        return {}, {}
    mine = {}
    for task, loss in losses.items():
        counted = (gone[task] & present[task]).cpu()
        mine[task] = loss.detach().double().cpu()[counted]
    ranks = crew.objects(WHAT, mine)
    before, after = ranks[: crew.rank], ranks[crew.rank + 1 :]
    return _behind_one_another(before), _behind_one_another(after)


def _behind_one_another(ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for of_rank in ranks:
        for task, losses in of_rank.items():
            found.setdefault(task, []).append(losses)
    return {task: torch.cat(pieces) for task, pieces in found.items()}


def _tensors(counts: Mapping[str, int]) -> dict[str, Tensor]:
    return {task: torch.tensor(count) for task, count in counts.items()}
