"""Methods: maps (G, roles) -> w from the Gram matrix of the rows to the weights of the update direction."""

from __future__ import annotations

from mtu_fast.methods.alignedmtl import AlignedMTL
from mtu_fast.methods.base import Constraint, Method, Scheduled, dependence_tolerance
from mtu_fast.methods.cagrad import CAGrad
from mtu_fast.methods.dualproj import DualProj
from mtu_fast.methods.fairgrad import FairGrad
from mtu_fast.methods.fine_tune import FineTune
from mtu_fast.methods.gdrgma import GDRGMA
from mtu_fast.methods.graddiff import GradDiff
from mtu_fast.methods.gradient_ascent import GradientAscent
from mtu_fast.methods.gradvac import GradVac
from mtu_fast.methods.imtlg import IMTLG
from mtu_fast.methods.interference import InterferenceAware
from mtu_fast.methods.levelled import LevelledOrthoGrad
from mtu_fast.methods.mean import Mean
from mtu_fast.methods.mgda import MGDA
from mtu_fast.methods.munba import MUNBa
from mtu_fast.methods.nabla_tau import NablaTau
from mtu_fast.methods.nashmtl import NashMTL
from mtu_fast.methods.orthograd import OrthoGrad
from mtu_fast.methods.pcgrad import PCGrad
from mtu_fast.methods.random_labels import RandomLabels, random_labels, shuffled_targets
from mtu_fast.methods.roles import (
    FORGET,
    MEMORY,
    RESTING,
    RETAIN,
    SUBSPACE,
    Roles,
    mean_weights,
)
from mtu_fast.methods.sum import Sum
from mtu_fast.methods.upgrad import UPGrad

__all__ = [
    "FORGET",
    "GDRGMA",
    "IMTLG",
    "MEMORY",
    "MGDA",
    "RESTING",
    "RETAIN",
    "SUBSPACE",
    "AlignedMTL",
    "CAGrad",
    "Constraint",
    "DualProj",
    "FairGrad",
    "FineTune",
    "GradDiff",
    "GradVac",
    "GradientAscent",
    "InterferenceAware",
    "LevelledOrthoGrad",
    "MUNBa",
    "Mean",
    "Method",
    "NablaTau",
    "NashMTL",
    "OrthoGrad",
    "PCGrad",
    "RandomLabels",
    "Roles",
    "Scheduled",
    "Sum",
    "UPGrad",
    "dependence_tolerance",
    "mean_weights",
    "random_labels",
    "shuffled_targets",
]
