"""Ops that work along one dimension, or reduce some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tests.graph.recorded.cases import (
    case,
    u,
    x,
)

_shape: tuple[int, ...]  # of every loop below


for _dim in (0, 1, 2, -1, -2):
    for _shape in ((3, 4, 4), (2, 2, 2), (1, 3, 2)):
        for _op, _along in {
            "Cumsum": torch.cumsum, "Cumprod": torch.cumprod, "Logcumsumexp": torch.logcumsumexp,
            "Softmax": torch.softmax, "LogSoftmax": torch.log_softmax,
            "SafeSoftmax": torch.ops.aten._safe_softmax,
        }.items():  # fmt: skip
            case(_op, lambda f=_along, d=_dim, s=_shape: f(u(*s), d))
        for _op, _along in {
            "Cummax": torch.cummax,
            "Cummin": torch.cummin,
            "Sort": torch.sort,
        }.items():
            case(_op, lambda f=_along, d=_dim, s=_shape: f(u(*s), d)[0])
        case(
            "Topk",
            lambda d=_dim, s=_shape: u(*s).topk(1, d)[0],
            lambda d=_dim, s=_shape: u(*s).topk(s[d], d)[0],
        )
    case("Glu", lambda d=_dim: F.glu(x(4, 2, 6), d), lambda d=_dim: F.glu(x(2, 2, 2), d))
    case("LinalgCross", lambda d=_dim: torch.linalg.cross(x(3, 3, 3), x(3, 3, 3), dim=d))
case(
    "LinalgCross",
    lambda: torch.linalg.cross(x(1, 3), x(4, 3)),
    lambda: torch.linalg.cross(x(4, 1, 3), x(1, 2, 3)),
)
case("Softmax", lambda: torch.softmax(x(3), 0), lambda: torch.softmax(x(), 0))
case("Cumsum", lambda: torch.cumsum(x(), 0))


def reducing(
    op: str,
    function: Callable[..., Any],
    several: bool,
    whole: bool = True,
    picked: bool = False,
    one: bool = True,
) -> None:
    """An op over one dimension or several, kept or not; one: also of one element, where it is no number for some."""
    for keepdim in (False, True):
        for shape in ((2, 3, 4), (3, 3, 3), *([(1, 3, 1)] if one else [])):
            for d in (0, 1, 2, -1, -2):
                case(
                    op,
                    lambda d=d, s=shape, k=keepdim: _first(
                        function(u(*s), dim=d, keepdim=k), picked
                    ),
                )
            for dims in ((0, 2), (-1, 0), (1, 2), (0, 1, 2)) if several else ():
                case(
                    op,
                    lambda d=dims, s=shape, k=keepdim: _first(
                        function(u(*s), dim=d, keepdim=k), picked
                    ),
                )
    if whole:
        case(
            op,
            lambda: _first(function(u(2, 3, 4)), picked),
            *([lambda: _first(function(u()), picked)] if one else []),
        )


def _first(found: Any, picked: bool) -> Any:
    return found[0] if picked else found


reducing("Amax", torch.amax, several=True)
reducing("Amin", torch.amin, several=True)
reducing("Aminmax", lambda a, **k: tuple(torch.aminmax(a, **k)), several=False)
reducing(
    "Kthvalue",
    lambda a, dim, keepdim: a.kthvalue(1, dim, keepdim),
    several=False,
    whole=False,
    picked=True,
)
reducing("LinalgVectorNorm", lambda a, **k: torch.linalg.vector_norm(a, 3, **k), several=True)
reducing("Logsumexp", torch.logsumexp, several=True, whole=False)
reducing("Mean", torch.mean, several=True)
for _op, _pick in {
    "Max": torch.max,
    "Min": torch.min,
    "Median": torch.median,
    "Nanmedian": torch.nanmedian,
}.items():
    reducing(_op, _pick, several=False, whole=False, picked=True)
    case(_op, lambda f=_pick: f(x(2, 3, 4)), lambda f=_pick: f(x()))
reducing("Mode", torch.mode, several=False, whole=False, picked=True)
reducing("Nansum", torch.nansum, several=True)
reducing(
    "Norm",
    lambda a, **k: torch.ops.aten.norm.ScalarOpt_dim(a, 2, [k.pop("dim")], **k),
    False,
    whole=False,
)
case("Norm", lambda: torch.ops.aten.norm.Scalar(x(2, 3), 2))
reducing("Prod", torch.prod, several=False)
reducing("Std", torch.std, several=True, one=False)
reducing("StdMean", torch.std_mean, several=True, one=False)
reducing("Sum", torch.sum, several=True)
reducing("Var", torch.var, several=True, one=False)
reducing("VarMean", torch.var_mean, several=True, one=False)
case(
    "Var",
    lambda: torch.var(x(2, 3), dim=1, correction=0),
    lambda: torch.var(x(2, 3), dim=None, keepdim=True),
)
case("Sum", lambda: x(2, 3).sum(dim=()), lambda: x(2, 3).sum(dim=(), keepdim=True))
case("LinalgVectorNorm", lambda: torch.linalg.vector_norm(x(2, 3), dim=None, keepdim=True))
case("Amax", lambda: torch.amax(x(2, 3), dim=()), lambda: torch.amax(x(2, 3), dim=(), keepdim=True))
