"""A run on several ranks: loaders that go together, and a checkpoint that another number of ranks can go on from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast._distributed.chunks import is_cut
from mtu_fast._distributed.crew import Crew
from mtu_fast._rows.inner import inner
from mtu_fast.unlearning.loaders import length_of
from mtu_fast.unlearning.loop.copies import copied
from mtu_fast.unlearning.loop.dealing import Kept, memory_of, subspace_of
from mtu_fast.unlearning.loop.settings import Settings

OWN = ("random", "forget_place", "retain_place", "buffers")  # of each rank
LOADERS = ("forget", "retain", "monitor", "validation")


def check_loaders(crew: Crew, settings: Settings) -> None:
    """Passes have as many batches on every rank, so that all reach each exchange.

    Raises:
        ValueError: one has not.
    """
    mine = [length_of(getattr(settings, name)) for name in LOADERS]
    every = crew.every("unlearn", mine)
    is_shared = len(every) > crew.size
    wanted = (
        "the same on each rank of a tensor parallel model: give all one sampler."
        if is_shared
        else "as many on each: give it a torch.utils.data.distributed.DistributedSampler."
    )
    for name, lengths in zip(LOADERS, zip(*every, strict=True), strict=True):
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{name}: found {list(lengths)} batches on the ranks, expected {wanted}"
            )


def describe(crew: Crew, settings: Settings) -> dict[str, Any]:
    """`settings.describe()` for any number of ranks: samples stand for batches, of which each rank has its share."""
    found = settings.describe()
    if crew.size > 1 or _is_shared(settings):
        sizes = {}
        for name in ("forget", "retain"):
            sizes[name] = length_of(getattr(getattr(settings, name), "dataset", None))
        found["batches"] = sizes
    return found


def _is_shared(settings: Settings) -> bool:
    """Whether a loader takes a share of its dataset, if only that of one rank."""
    sampler = getattr(settings.retain, "sampler", None)
    return hasattr(sampler, "num_replicas")


def own_buffers(crew: Crew, model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are not the same on all ranks, as statistics of each rank's batches; this rank's.

    Args:
        crew: of the run.
        model: on every rank.

    Returns:
        {name: buffer}, of the same names on every rank.
    """
    if crew.size == 1:
        return {}
    held = inner(model).state_dict(keep_vars=True)
    mine = {name: t for name, t in held.items() if _is_buffer(t)}
    # sums travel: few buffers differ, if any
    sums = crew.objects("unlearn: checkpoint", {name: _sum_of(t) for name, t in mine.items()})
    return {name: t for name, t in mine.items() if len({each.get(name) for each in sums}) > 1}


def _is_buffer(t: object) -> bool:
    return isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and not is_cut(t)


def _sum_of(t: Tensor) -> str:
    numbers = t.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(numbers.numpy().data).hexdigest()


def own_of(state: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """What of a rank's state is its own."""
    return {name: state[name] for name in (*OWN, *kept)}


def joined(crew: Crew, state: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """The state of a run from that of each rank: the first one's, and of the others what is theirs."""
    _, *others = crew.objects("unlearn: checkpoint", own_of(state, kept))
    return {**state, "others": others}


def own(
    crew: Crew, state: Mapping[str, Any], kept: Sequence[str], lengths: Mapping[str, int | None]
) -> dict[str, Any]:
    """What of a run's state is this rank's, on as many ranks as wrote it or on others.

    Args:
        crew: of the run.
        state: that was read.
        kept: names of what holds rows of earlier steps.
        lengths: {name of a place: batches of a pass} now.

    Returns:
        The state with what is this rank's.
    """
    before, of_rank = _ranks(state, kept)
    # ranks that were not there before begin where the last one was
    mine = dict(of_rank(min(crew.rank, before - 1)))
    held = [of_rank(r) for r in _taken_over(crew, before)]
    # each rank's share is another now: places scale, and kept rows move
    if before != crew.size:
        mine |= _moved_places(mine, lengths, before, crew.size)
        if "subspace" in kept:
            of_held = [each["subspace"] for each in held]
            mine["subspace"] = subspace_of(of_held, of_rank(0)["subspace"])
    if "memory" in kept:
        of_held = [each["memory"] for each in held]
        as_many, like = before == crew.size, of_rank(0)["memory"]
        mine["memory"] = _memory(crew, mine["memory"], of_held, like, as_many)
    # a file may be removed before its tensors are
    mine = copied(mine, strict=False)
    return {**state, **mine, "model": {**state["model"], **mine["buffers"]}}


def _ranks(
    state: Mapping[str, Any], kept: Sequence[str]
) -> tuple[int, Callable[[int], Mapping[str, Any]]]:
    """How many shares of the data there were, and what one of them had of its own."""
    if "pieces" in state:
        return state["pieces"].shares, state["pieces"].own_of
    ranks = [own_of(state, kept), *state["others"]]
    return len(ranks), ranks.__getitem__


def _memory(
    crew: Crew, mine: Kept, held: Sequence[Kept], like: Kept, as_many: bool
) -> Mapping[str, Any]:
    """What is this rank's of a memory; as it is where as many ranks wrote it in the same way."""
    in_parts = like["block"] is not None and "parts" in like["block"]
    if as_many and (in_parts == crew.is_ranked or like["block"] is None):
        return mine
    return memory_of(held, like, alone=not crew.is_ranked)


def _moved_places(
    mine: Mapping[str, Any], lengths: Mapping[str, int | None], before: int, now: int
) -> dict[str, Any]:
    """Places in passes of which each rank reads another share: as far in, rounded down to batches."""
    found = {}
    for name, length in lengths.items():
        place = mine[name]
        was = place["length"]
        # the lengths know whether batches are others, too
        parts = (length, was) if was and length is not None else (before, now)
        found[name] = {**place, "given": place["given"] * parts[0] // parts[1]}
    return found


def _taken_over(crew: Crew, before: int) -> list[int]:
    """Which of the ranks of before this one stands for."""
    return [
        rank for rank in range(before) if rank * crew.size // max(before, crew.size) == crew.rank
    ]
