"""What only a step's device knows: whether the step is sound.

On the CPU a condition is looked at where it is found, and its error is raised there. A GPU runs
behind the host, and a look would wait for it. There the condition stays on the device as a flag: a
step adds nothing to `.grad` where one of its flags is set, and the error is raised once the flag
has arrived at the host, in a later call of the engine or by `Update.check`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mtu_fast._checks.values import all_finite, finite_sum
from mtu_fast._later import Later, runs_behind

Failure = Callable[[], Exception]  # the error to raise; called where the condition failed


class Flags:
    """The conditions of one call.

    Args:
        ledger: where those that stay on the device are read later; None to look at each as it
            comes.
    """

    def __init__(self, ledger: Ledger | None = None) -> None:
        self._ledger = ledger
        self._conditions: list[tuple[Tensor, Failure]] = []
        self._told: Later | None = None
        self._any: Tensor | None = None

    @property
    def deferred(self) -> bool:
        """Whether conditions stay on the device."""
        return self._ledger is not None

    def refuse(self, bad: Tensor, failure: Failure) -> None:
        """Where `bad` `[]` holds, the call is unsound: `failure()` is raised, now or once it is known."""
        if self._ledger is not None:
            self._leave(self._ledger, bad, failure)
        elif bool(bad):
            raise failure()

    def check_finite(self, tensors: Iterable[Tensor], failure: Failure) -> None:
        """Refuse what is infinite or undefined."""
        if self._ledger is not None:
            # of each its sum alone: whether they are finite is asked of all conditions together
            for t in tensors:
                self._leave(self._ledger, finite_sum(t), failure)
        elif not all_finite(tensors):
            raise failure()

    def _leave(self, ledger: Ledger, condition: Tensor, failure: Failure) -> None:
        self._conditions.append((condition, failure))
        # what was sent before did not know of this one
        self._told = self._any = None
        ledger.open(self)

    @property
    def conditions(self) -> list[Tensor]:
        """What was left on the device: `[]` each, bool that must not hold, or float64 that must be finite."""
        return [condition for condition, _ in self._conditions]

    @property
    def bad(self) -> Tensor | None:
        """Whether a condition fails, `[]` bool on the device; None where none was left there."""
        if self._any is None and self._conditions:
            # one tensor for all conditions, so that one copy tells
            self._any = _some_fail(self.conditions)
        return self._any

    @property
    def is_captured(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return bool(self._conditions) and _is_captured(self._conditions[0][0])

    def send(self, bad: Tensor | None = None) -> None:
        """Let the flags come to the host; nothing waits for them.

        Args:
            bad: whether a condition of a step fails, of which these are some; by default whether one of these does.
        """
        if self._told is not None or self.is_captured:
            return
        if self._conditions:
            self._told = Later(_some_fail(self.conditions) if bad is None else bad)

    @property
    def is_there(self) -> bool:
        """Whether the host knows all flags."""
        return not self._conditions or (self._told is not None and self._told.is_there)

    @property
    def is_unsound(self) -> bool:
        """Whether one of them, or of the step they were in, is set, as far as the host knows."""
        return self._told is not None and self._told.is_there and self._told.value

    def settled(self) -> list[Exception]:
        """The errors of the conditions that failed, which then are not raised again; waits for the device."""
        if self._ledger is not None:
            self._ledger.close(self)
        return [failure() for found, failure in self._conditions if bool(_some_fail([found]))]


AT_ONCE = Flags()


class Ledger:
    """The flags of an engine's calls that were not read yet.

    Attributes:
        at_once: look at every condition as it comes, whatever the device.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once
        self._open: list[Flags] = []

    def __reduce__(self) -> tuple[type[Ledger], tuple[bool]]:
        return Ledger, (self.at_once,)  # a copy has made no calls

    def flags(self, device: torch.device) -> Flags:
        """Those of a new call."""
        return AT_ONCE if self.at_once or not runs_behind(device) else Flags(self)

    def open(self, flags: Flags) -> None:
        """These are to be read."""
        if not any(each is flags for each in self._open):
            self._open.append(flags)

    def close(self, flags: Flags) -> None:
        """These were read."""
        self._open = [each for each in self._open if each is not flags]

    def settle(self) -> None:
        """Raise the first error of earlier calls that the host knows of; nothing is waited for.

        Raises:
            Exception: of the kind that would have been raised in the call.
        """
        if self._open and self._open[0].is_captured:
            return  # what is captured must not ask either
        errors: list[Exception] = []
        # a copy: `close` takes out of the list
        for flags in list(self._open):
            flags.send()
            if flags.is_there:
                errors += flags.settled() if flags.is_unsound else []
                self.close(flags)
        if errors:
            text = f"found in an earlier call, which added nothing to .grad: {errors[0]}"
            raise type(errors[0])(text) from errors[0]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which conditions are looked at as they come."""
        before, self.at_once = self.at_once, True
        try:
            yield
        finally:
            self.at_once = before


def some_bad(flags: Iterable[Flags]) -> Tensor | None:
    """Whether a condition of some calls fails, `[]` bool on their device; None where none was left there."""
    distinct = {id(each): each for each in flags}
    found = [condition for each in distinct.values() for condition in each.conditions]
    return _some_fail(found) if found else None


def _some_fail(conditions: Sequence[Tensor]) -> Tensor:
    """Whether one of them fails, `[]` bool: one at least is given."""
    found = [each for each in conditions if not each.is_floating_point()]
    sums = [each for each in conditions if each.is_floating_point()]
    if sums:
        together = torch.stack(sums)
        # infinity less itself is not a number
        found.append((together - together != 0).any())
    return torch.stack(found).any() if len(found) > 1 else found[0]


def _is_captured(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()
