"""Who takes part in a run: one process, or ranks that agree on every number before they decide anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from mtu_fast._distributed.ranks import Ranks
from mtu_fast._distributed.slices import Slices

T = TypeVar("T")


class Crew:
    """One process.

    Attributes:
        rank: its number.
        size: how many there are.
        is_ranked: whether the engine joins the rows of ranks, if only of one.
    """

    rank = 0
    size = 1
    is_ranked = False

    def objects(self, what: str, mine: T) -> list[T]:
        """The values of all ranks, plain ones or tensors, in their order."""
        return [mine]

    def agreed(self, what: str, function: Callable[[], T]) -> T:
        """What a function gives on this rank, if it raises on none."""
        return function()

    def first(self, what: str, function: Callable[[], T]) -> T:
        """What a function gives on the first rank, which alone calls it."""
        return function()

    def whole(self, state: Any) -> Any:
        """A state with whole tensors in the place of slices."""
        return state

    def cut(self, model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state with slices in the place of whole tensors, as model and optimizer hold them."""
        return state


class RankedCrew(Crew):
    """Ranks.

    Args:
        ranks: who takes part.
    """

    is_ranked = True

    def __init__(self, ranks: Ranks) -> None:
        self.rank = ranks.rank
        self.size = ranks.size
        self._ranks = ranks
        self._slices = ranks.slices if isinstance(ranks.slices, Slices) else None

    def objects(self, what: str, mine: T) -> list[T]:
        """The values of all ranks, plain ones or tensors, in their order."""
        return self._ranks.objects(what, mine)

    def agreed(self, what: str, function: Callable[[], T]) -> T:
        """What a function gives on this rank, if it raises on none.

        Raises:
            Exception: of the kind that it raised on a rank, which is named.
        """
        return self._ranks.agreed(what, function)

    def first(self, what: str, function: Callable[[], T]) -> T:
        """What a function gives on the first rank, which alone calls it.

        Raises:
            Exception: of the kind that it raised there.
        """
        # an error of the first rank reaches all before they wait for its value
        found = self._ranks.agreed(what, lambda: function() if self.rank == 0 else None)
        first: T = self._ranks.objects(what, found)[0]
        return first

    def whole(self, state: Any) -> Any:
        """A state with whole tensors in the place of slices, on the first rank; others have None there.

        All ranks call it with states alike.
        """
        if isinstance(state, Mapping):
            return type(state)({key: self.whole(part) for key, part in state.items()})  # type: ignore[call-arg]
        if isinstance(state, list | tuple):
            return type(state)(map(self.whole, state))
        # a collective: every rank meets the slices in the order of the state
        if not hasattr(state, "full_tensor"):
            return state
        found = state.full_tensor()
        # one tensor at a time is whole elsewhere
        return found.cpu() if self.rank == 0 else None

    def cut(self, model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state with slices in the place of whole tensors, as model and optimizer hold them."""
        slices = self._slices
        if slices is None:
            return state
        named = dict(model.named_parameters())
        found = {}
        # buffers are no parameters: each rank has them whole
        for name, t in state["model"].items():
            found[name] = slices.as_held(named[name], t) if name in named else t
        held = [p for group in optimizer.param_groups for p in group["params"]]
        of_parameters = {}
        for i, parts in state["optimizer"]["state"].items():
            p = held[i]
            # moments are cut as their parameter is; a count of steps is one number
            of_parameters[i] = {
                key: slices.as_held(p, t) if isinstance(t, Tensor) and t.shape == p.shape else t
                for key, t in parts.items()
            }
        return {
            **state,
            "model": found,
            "optimizer": {**state["optimizer"], "state": of_parameters},
        }


def crew_of(ranks: Ranks | None, batches_differ: bool) -> Crew | None:
    """The crew of an engine; None where its ranks share one batch, which a run's loop does not know."""
    if ranks is None:
        return Crew()
    return RankedCrew(ranks) if batches_differ else None
