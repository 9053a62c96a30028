"""A case is one op on one set of inputs: what computes it, what is true, and what it costs at least.

An implementation is timed only if its result on these very inputs is as accurate as the tests ask
of a kernel (`tests/helpers/tolerance.py`). What does not compute the result but belongs beside it
(the vendor's products inside a kernel, a factorisation instead of a solve) is a *part*: timed,
never compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.floor import Cost
from mtu_fast._ops._library import implementations
from tests.helpers.tolerance import allowed_error
from tests.helpers.truth import relative_error

Run = Callable[[], Any]  # a tensor, or several: see `flat`
REFERENCE, KERNEL = "reference", "kernel"


def flat(result: Any) -> Tensor:
    """The result as one vector: a tensor's elements, or those of a list of tensors end to end."""
    return torch.cat([t.flatten() for t in ([result] if isinstance(result, Tensor) else result)])


@dataclass(frozen=True)
class Bench:
    """A case whose inputs are made.

    Attributes:
        implementations: {name: a call that computes the result}; `REFERENCE`, the base of ratios,
            among them.
        truth: the result in float64 arithmetic on the same inputs.
        plain: the result by plain torch, in the dtype of the precision that the op promises.
        cost: what every implementation has to move and compute.
        parts: {name: a call that does something else worth comparing with}.
        observe: what of a result is compared.
    """

    implementations: Mapping[str, Run]
    truth: Run
    plain: Run
    cost: Cost
    parts: Mapping[str, Run] = field(default_factory=dict)
    observe: Callable[[Any], Tensor] = flat


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        op: the op, or the composition of ops, that is timed; names the plot.
        name: sizes, as a reader wants to see them.
        ops: the registry's ops behind it: their kernels are what `KERNEL` runs, their tests must be
            green.
        make: (device) -> inputs made, ready to be checked and timed.
    """

    op: str
    name: str
    ops: tuple[str, ...]
    make: Callable[[str], Bench]

    def why_no_kernel(self, device: str) -> str:
        """Why `KERNEL` would be the reference once more on this device; "" where one of the ops has a kernel."""
        key = device.partition(":")[0].upper()
        why = {each.op: each.why for each in implementations() if each.device == key}
        return "" if any(not why[op] for op in self.ops) else why[self.ops[0]]


@dataclass(frozen=True)
class Verdict:
    """Relative error of an implementation on the inputs to be timed, and what the tests' rule allows."""

    error: float
    allowed: float

    @property
    def wrong(self) -> str:
        """Why it is not timed; "" if it may be."""
        if self.error <= self.allowed:  # not so for NaN
            return ""
        return f"wrong: errs {self.error:.2e}, allowed {self.allowed:.2e} (2 x plain torch's error and a few eps)"


def check(bench: Bench) -> dict[str, Verdict]:
    """{implementation: how far it is from the truth}, all of them run once."""
    truth = bench.observe(bench.truth()).double()
    allowed = allowed_error(bench.observe(bench.plain()), truth)
    errors = {
        name: relative_error(bench.observe(run()), truth)
        for name, run in bench.implementations.items()
    }
    return {name: Verdict(error, allowed) for name, error in errors.items()}
