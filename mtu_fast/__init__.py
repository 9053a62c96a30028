"""mtu_fast: from unreduced losses to an interference-free `.grad`, without building the per-sample Jacobian."""

from mtu_fast.engine import Engine
from mtu_fast.loop import History, unlearn
from mtu_fast.methods import (
    FORGET,
    GDRGMA,
    IMTLG,
    RETAIN,
    SUBSPACE,
    AlignedMTL,
    FairGrad,
    FineTune,
    GradDiff,
    GradientAscent,
    GradVac,
    InterferenceAware,
    Mean,
    Method,
    MUNBa,
    NablaTau,
    NashMTL,
    OrthoGrad,
    PCGrad,
    RandomLabels,
    Roles,
    Sum,
    random_labels,
    shuffled_targets,
)
from mtu_fast.report import Audit, audit
from mtu_fast.rows import Rows, Update, cat
from mtu_fast.subspace import Subspace

__version__ = "0.1.0"

__all__ = [
    "FORGET",
    "GDRGMA",
    "IMTLG",
    "RETAIN",
    "SUBSPACE",
    "AlignedMTL",
    "Audit",
    "Engine",
    "FairGrad",
    "FineTune",
    "GradDiff",
    "GradVac",
    "GradientAscent",
    "History",
    "InterferenceAware",
    "MUNBa",
    "Mean",
    "Method",
    "NablaTau",
    "NashMTL",
    "OrthoGrad",
    "PCGrad",
    "RandomLabels",
    "Roles",
    "Rows",
    "Subspace",
    "Sum",
    "Update",
    "audit",
    "cat",
    "random_labels",
    "shuffled_targets",
    "unlearn",
]
