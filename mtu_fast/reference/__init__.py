"""The slow, obviously right version of every method, from the papers' formulas on explicit gradient rows.

Shares no code with the engine, the methods or the ops: it is the truth of the tests and the baseline of the benchmarks.
"""

from __future__ import annotations

from mtu_fast.reference.backward import backward
from mtu_fast.reference.graddiff import graddiff
from mtu_fast.reference.interference import interference_aware
from mtu_fast.reference.jacobian import flatten, jacobian, unflatten
from mtu_fast.reference.mean import mean
from mtu_fast.reference.orthograd import independent, orthograd, orthograd_blocks, project_out
from mtu_fast.reference.pcgrad import pcgrad

__all__ = [
    "backward",
    "flatten",
    "graddiff",
    "independent",
    "interference_aware",
    "jacobian",
    "mean",
    "orthograd",
    "orthograd_blocks",
    "pcgrad",
    "project_out",
    "unflatten",
]
