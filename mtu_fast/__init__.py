"""mtu_fast: from unreduced losses to an interference-free `.grad`, without building the per-sample Jacobian."""

from mtu_fast.engine import Engine
from mtu_fast.methods import (
    FORGET,
    RETAIN,
    SUBSPACE,
    GradDiff,
    InterferenceAware,
    Mean,
    Method,
    OrthoGrad,
    PCGrad,
    Roles,
)
from mtu_fast.rows import Rows, Update, cat
from mtu_fast.subspace import Subspace

__version__ = "0.1.0"

__all__ = [
    "FORGET",
    "RETAIN",
    "SUBSPACE",
    "Engine",
    "GradDiff",
    "InterferenceAware",
    "Mean",
    "Method",
    "OrthoGrad",
    "PCGrad",
    "Roles",
    "Rows",
    "Subspace",
    "Update",
    "cat",
]
