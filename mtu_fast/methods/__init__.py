"""Methods: maps (G, roles) -> w from the Gram matrix of the rows to the weights of the update direction."""

from __future__ import annotations

from mtu_fast.methods.base import FORGET, RETAIN, SUBSPACE, Method, Roles, dependence_tolerance, mean_weights
from mtu_fast.methods.graddiff import GradDiff
from mtu_fast.methods.interference import InterferenceAware
from mtu_fast.methods.mean import Mean
from mtu_fast.methods.orthograd import OrthoGrad
from mtu_fast.methods.pcgrad import PCGrad

__all__ = [
    "FORGET",
    "RETAIN",
    "SUBSPACE",
    "GradDiff",
    "InterferenceAware",
    "Mean",
    "Method",
    "OrthoGrad",
    "PCGrad",
    "Roles",
    "dependence_tolerance",
    "mean_weights",
]
