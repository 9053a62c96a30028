"""Whether `.grad` still holds what an earlier projection wrote: adding another is seldom what is meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from mtu_fast._checks.warned import warn
from mtu_fast._later import runs_behind
from mtu_fast.methods import Method


class _Mark(NamedTuple):
    grad: TensorWeakRef
    version: int


class Written:
    """Remembers one `.grad` as a projection left it, and warns once where the next one finds it unchanged.

    One that was cleared, or that something else wrote to since (another engine, an ordinary
    backward, clipping), is not warned of: what was meant cannot be known there.
    """

    def __init__(self) -> None:
        self._mark: _Mark | None = None
        self._said = False

    def __reduce__(self) -> tuple[type[Written], tuple[()]]:
        return Written, ()  # a copy has written nothing

    def check(self, method: Method | Tensor, parameters: Sequence[Tensor]) -> None:
        """Warn once where `.grad` is as the projection before left it."""
        if self._mark is None or self._said or not _projects(method):
            return
        # mostly it was let go of
        if self._mark.grad() is None or not any(
            _is_as_marked(p.grad, self._mark) for p in parameters
        ):
            return
        self._said = True
        warn(
            "backward: .grad still holds what this engine's last backward added: it was not cleared since. Projections "
            "of micro-batches one by one do not add up to the projection of all of them. For micro-batches call "
            "engine.accumulate(losses, method, sync=is_last); between steps call optimizer.zero_grad(). This is said "
            "once an engine.",
        )

    def note(self, method: Method | Tensor, parameters: Sequence[Tensor]) -> None:
        """Remember `.grad` as it is now."""
        self._mark = None
        if not _projects(method):
            return
        for p in parameters:  # one is enough: they are cleared together
            if p.grad is not None:
                self._mark = _Mark(TensorWeakRef(p.grad), p.grad._version)
                return


def _projects(method: Method | Tensor) -> bool:
    """Whether updates do not add up: weights that are given, or that no Gram is needed for, are sums of gradients."""
    return not isinstance(method, Tensor) and method.needs_gram


def _is_as_marked(grad: Tensor | None, mark: _Mark) -> bool:
    if grad is None or mark.grad() is not grad or grad._version != mark.version:
        return False
    values = grad._values() if grad.is_sparse else grad
    if runs_behind(values.device):
        return True  # a look would wait for it
    return bool(values.any())  # .data.zero_() leaves the version as it is
