"""A run on several ranks: loaders that go together, and a checkpoint that another number of ranks can go on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtu_fast._distributed.crew import Crew
from mtu_fast.unlearning.loaders import length_of
from mtu_fast.unlearning.loop.dealing import memory_of, subspace_of
from mtu_fast.unlearning.loop.settings import Settings

OWN = ("random", "forget_place", "retain_place")  # of each rank
LOADERS = ("forget", "retain", "monitor", "validation")


def check_loaders(crew: Crew, settings: Settings) -> None:
    """Passes have as many batches on every rank, so that all reach each exchange.

    Raises:
        ValueError: one has not.
    """
    mine = [length_of(getattr(settings, name)) for name in LOADERS]
    for name, lengths in zip(
        LOADERS, zip(*crew.objects("unlearn", mine), strict=True), strict=True
    ):
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{name}: found {list(lengths)} batches on the ranks, expected as many on each: give it a "
                "torch.utils.data.distributed.DistributedSampler."
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


def joined(crew: Crew, state: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """The state of a run from that of each rank: the first one's, and of the others what is theirs."""
    mine = {name: state[name] for name in (*OWN, *kept)}
    _, *others = crew.objects("unlearn: checkpoint", mine)
    return {**state, "others": others}


def own(crew: Crew, state: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """What of a run's state is this rank's, on as many ranks as wrote it or on others."""
    names = (*OWN, *kept)
    ranks = [{name: state[name] for name in names}, *state["others"]]
    # ranks that were not there before begin where the last one was
    mine = dict(ranks[min(crew.rank, len(ranks) - 1)])
    # each rank's share is another now: places scale, and kept rows move
    if len(ranks) != crew.size:
        for name in ("forget_place", "retain_place"):
            mine[name] = _moved(mine[name], len(ranks), crew.size)
        if "subspace" in kept:
            held = [ranks[r]["subspace"] for r in _taken_over(crew, len(ranks))]
            mine["subspace"] = subspace_of(held, ranks[0]["subspace"])
    if "memory" in kept:
        held = [ranks[r]["memory"] for r in _taken_over(crew, len(ranks))]
        mine["memory"] = _memory(crew, held, ranks)
    return {**state, **mine}


def _memory(
    crew: Crew, held: Sequence[Mapping[str, Any]], ranks: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any]:
    """What is this rank's of a memory; as it is where as many ranks wrote it in the same way."""
    like = ranks[0]["memory"]
    in_parts = like["block"] is not None and "parts" in like["block"]
    if len(ranks) == crew.size and (in_parts == crew.is_ranked or like["block"] is None):
        found: Mapping[str, Any] = ranks[crew.rank]["memory"]
        return found
    return memory_of(held, like, alone=not crew.is_ranked)


def _moved(place: Mapping[str, Any], before: int, now: int) -> dict[str, Any]:
    """A place in a pass of which each rank reads another share: as many samples in, rounded down."""
    return {**place, "given": place["given"] * before // now}


def _taken_over(crew: Crew, before: int) -> list[int]:
    """Which of the ranks of before this one stands for."""
    return [
        rank for rank in range(before) if rank * crew.size // max(before, crew.size) == crew.rank
    ]
