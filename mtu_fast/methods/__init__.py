"""Methods: maps (G, roles) -> w from the Gram matrix of the rows to the weights of the update direction."""

from __future__ import annotations

from mtu_fast.methods.base import FORGET, RETAIN, SUBSPACE, Method, Roles, dependence_tolerance, mean_weights
from mtu_fast.methods.fine_tune import FineTune
from mtu_fast.methods.graddiff import GradDiff
from mtu_fast.methods.gradient_ascent import GradientAscent
from mtu_fast.methods.interference import InterferenceAware
from mtu_fast.methods.mean import Mean
from mtu_fast.methods.nabla_tau import NablaTau
from mtu_fast.methods.orthograd import OrthoGrad
from mtu_fast.methods.pcgrad import PCGrad
from mtu_fast.methods.random_labels import RandomLabels, random_labels, shuffled_targets

__all__ = [
    "FORGET",
    "RETAIN",
    "SUBSPACE",
    "FineTune",
    "GradDiff",
    "GradientAscent",
    "InterferenceAware",
    "Mean",
    "Method",
    "NablaTau",
    "OrthoGrad",
    "PCGrad",
    "RandomLabels",
    "Roles",
    "dependence_tolerance",
    "mean_weights",
    "random_labels",
    "shuffled_targets",
]
