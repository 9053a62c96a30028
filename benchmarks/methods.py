"""The methods that the unlearning benchmark tries: one line each.

A line names the method, makes it from alpha, names its reference, and says whose settings it is searched over. What a
method needs besides (labels replaced, a schedule, kept rows) is a hook of `benchmarks.protocol.Entry`.
"""

from __future__ import annotations

import mtu_fast as mtu
from benchmarks.protocol import Entry

ENTRIES: tuple[Entry, ...] = (
    Entry("Fine-tune", mtu.GradDiff, "graddiff", family="descent"),
    Entry("Ascent", mtu.GradDiff, "ascent", family="ascent"),
    Entry("GradDiff", mtu.GradDiff, "graddiff", family="protective"),
    Entry("OrthoGrad", mtu.OrthoGrad, "orthograd", family="orthogonal"),
    Entry("PCGrad", lambda alpha: mtu.PCGrad(), "pcgrad", family="surgery"),
)
METHODS = {entry.name: entry for entry in ENTRIES}
