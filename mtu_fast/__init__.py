"""mtu_fast: from unreduced losses to an interference-free `.grad`, without building the per-sample Jacobian."""

from mtu_fast._rows.update import Update
from mtu_fast.engine import Engine
from mtu_fast.errors import NotFiniteError
from mtu_fast.methods import (
    FORGET,
    GDRGMA,
    IMTLG,
    MGDA,
    RETAIN,
    SUBSPACE,
    AlignedMTL,
    CAGrad,
    DualProj,
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
    UPGrad,
    random_labels,
    shuffled_targets,
)
from mtu_fast.rows import Rows, cat
from mtu_fast.subspace import Subspace
from mtu_fast.unlearning.loop import History, unlearn
from mtu_fast.unlearning.report import Audit, audit

__version__ = "0.1.0"

__all__ = [
    "FORGET",
    "GDRGMA",
    "IMTLG",
    "MGDA",
    "RETAIN",
    "SUBSPACE",
    "AlignedMTL",
    "Audit",
    "CAGrad",
    "DualProj",
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
    "NotFiniteError",
    "OrthoGrad",
    "PCGrad",
    "RandomLabels",
    "Roles",
    "Rows",
    "Subspace",
    "Sum",
    "UPGrad",
    "Update",
    "audit",
    "cat",
    "random_labels",
    "shuffled_targets",
    "unlearn",
]
