"""Batches of a loader, pass after pass, from a place that can be stored and found again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from mtu_fast.unlearning.loaders import begun, generators_of, length_of, sampler_of
from mtu_fast.unlearning.randomness import capture, restore

END: Final = object()


class Stream:
    """One side of the data, a batch at a time; every pass is a fresh iterator of the loader.

    A pass is found again by its beginning: the states of all generators are put back to what they
    were, the iterator is made anew, and the batches that were given are drawn and dropped.

    Args:
        name: what errors call it.
        loader: an iterable of batches.

    Attributes:
        passes: finished passes.
    """

    def __init__(self, name: str, loader: Iterable[Any]) -> None:
        self.name = name
        self.loader = loader
        self.passes = 0
        self._iterator: Iterator[Any] | None = None
        self._begun: Mapping[str, Any] = {}
        self._given = 0

    @property
    def open(self) -> bool:
        """Whether a pass has begun and its end was not seen."""
        return self._iterator is not None

    def advance(self) -> Any:
        """The next batch of this pass, the first one of a new pass, or END once where a pass ends.

        Raises:
            ValueError: a pass has no batch at all.
        """
        if self._iterator is None:
            # before the iterator is made: a DataLoader draws a seed for it
            self._begun, self._given = capture(generators_of(self.loader)), 0
            self._iterator = self._pass()
        batch = next(self._iterator, END)
        if batch is not END:
            self._given += 1
            return batch
        self._iterator = None
        # a generator or file that was read to its end looks like an empty loader
        if self._given == 0:
            once = ""
            if self.passes:
                once = "; it can be iterated once only, pass a DataLoader or a list"
            raise ValueError(
                f"{self.name}: pass {self.passes + 1} of the loader gave no batch{once}."
            )
        self.passes += 1
        return END

    def _pass(self) -> Iterator[Any]:
        """A fresh iterator; a sampler that counts passes (DistributedSampler) is told which."""
        set_epoch = getattr(sampler_of(self.loader), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.passes)
        # after set_epoch: an iterator takes its order when it begins
        return begun(self.name, self.loader)

    def again(self) -> Any:
        """The next batch, of a new pass where one ends."""
        batch = self.advance()
        if batch is END:
            return self.advance()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place: finished passes, batches given since, of how many, and what the pass began with."""
        return {
            "passes": self.passes,
            "open": self.open,
            "given": self._given,
            "length": length_of(self.loader),
            "begun": dict(self._begun),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put generators where a pass begins, as its state says."""
        if state["open"]:
            restore(state["begun"], generators_of(self.loader))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a place; the generators are then where the pass has left them.

        Raises:
            RuntimeError: the loader has fewer batches than it had.
        """
        self.passes, self._given, self._begun = state["passes"], state["given"], state["begun"]
        self._iterator = None
        if state["open"]:
            self.restore(state)
            self._iterator = self._pass()
            for at in range(self._given):
                if next(self._iterator, END) is END:
                    raise RuntimeError(
                        f"{self.name}: the loader ended after {at} batches, but {self._given} of this pass were taken "
                        "when the checkpoint was written; resume with the same data."
                    )
