"""mtu_fast: from unreduced losses to an interference-free `.grad`, without building the per-sample Jacobian."""

from mtu_fast.engine import Engine
from mtu_fast.loop import History, unlearn
from mtu_fast.methods import (
    FORGET,
    RETAIN,
    SUBSPACE,
    FineTune,
    GradDiff,
    GradientAscent,
    InterferenceAware,
    Mean,
    Method,
    NablaTau,
    OrthoGrad,
    PCGrad,
    RandomLabels,
    Roles,
    random_labels,
    shuffled_targets,
)
from mtu_fast.report import Audit, audit
from mtu_fast.rows import Rows, Update, cat
from mtu_fast.subspace import Subspace

__version__ = "0.1.0"

__all__ = [
    "FORGET",
    "RETAIN",
    "SUBSPACE",
    "Audit",
    "Engine",
    "FineTune",
    "GradDiff",
    "GradientAscent",
    "History",
    "InterferenceAware",
    "Mean",
    "Method",
    "NablaTau",
    "OrthoGrad",
    "PCGrad",
    "RandomLabels",
    "Roles",
    "Rows",
    "Subspace",
    "Update",
    "audit",
    "cat",
    "random_labels",
    "shuffled_targets",
    "unlearn",
]
