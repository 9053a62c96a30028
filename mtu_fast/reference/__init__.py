"""The slow, obviously right version of every method, from the papers' formulas on explicit gradient rows.

Shares no code with the engine, the methods or the ops: it is the truth of the tests and the
baseline of the benchmarks. A file of this folder that derives a class from `Reference` is found by
`backward` under its name.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from mtu_fast.reference.backward import backward
from mtu_fast.reference.base import METHODS, Reference, Sides
from mtu_fast.reference.cagrad import cagrad
from mtu_fast.reference.dualproj import dualproj
from mtu_fast.reference.fine_tune import fine_tune
from mtu_fast.reference.graddiff import graddiff
from mtu_fast.reference.gradient_ascent import gradient_ascent
from mtu_fast.reference.interference import interference_aware
from mtu_fast.reference.jacobian import flatten, jacobian, unflatten
from mtu_fast.reference.levelled import levelled_orthograd
from mtu_fast.reference.mean import mean
from mtu_fast.reference.mgda import mgda
from mtu_fast.reference.nabla_tau import nabla_tau
from mtu_fast.reference.orthograd import independent, orthograd, orthograd_blocks, project_out
from mtu_fast.reference.pcgrad import pcgrad
from mtu_fast.reference.random_labels import random_labels
from mtu_fast.reference.upgrad import upgrad

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "METHODS",
    "Reference",
    "Sides",
    "backward",
    "cagrad",
    "dualproj",
    "fine_tune",
    "flatten",
    "graddiff",
    "gradient_ascent",
    "independent",
    "interference_aware",
    "jacobian",
    "levelled_orthograd",
    "mean",
    "mgda",
    "nabla_tau",
    "orthograd",
    "orthograd_blocks",
    "pcgrad",
    "project_out",
    "random_labels",
    "unflatten",
    "upgrad",
]
