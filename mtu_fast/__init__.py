"""mtu_fast: from unreduced losses to an interference-free `.grad`, without building the per-sample Jacobian."""

from mtu_fast.engine import Engine
from mtu_fast.methods import FORGET, RETAIN, SUBSPACE, GradDiff, Mean, Method, OrthoGrad, PCGrad, Roles
from mtu_fast.rows import Rows, Update, cat

__version__ = "0.1.0"

__all__ = [
    "FORGET",
    "RETAIN",
    "SUBSPACE",
    "Engine",
    "GradDiff",
    "Mean",
    "Method",
    "OrthoGrad",
    "PCGrad",
    "Roles",
    "Rows",
    "Update",
    "cat",
]
