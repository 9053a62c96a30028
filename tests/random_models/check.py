"""What one engine makes of a model's calls: right, refused where that is stated, or a fault."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

import mtu_fast as mtu
from tests.helpers.checks import combine_error, random_weights
from tests.helpers.truth import combine_truth, gram_truth, jacobian, matrix, relative_error
from tests.random_models.functions import NOT_LINEAR, PARAMETER, PARAMETER_LATER, RARE_HOOKS
from tests.random_models.generate import Model, model

RIGHT, REFUSED = "right", "refused"
WRONG, UNSTATED, ACCEPTED, CRASHED, NO_TRUTH = (
    "wrong",
    "refused, not stated",
    "not refused",
    "crashed",
    "no truth",
)
FAULTS = (WRONG, UNSTATED, ACCEPTED, CRASHED, NO_TRUTH)

# Who may be refused: the feature and the first call; a parameter with a hook must be, by its name.
STATED = {PARAMETER: 0, PARAMETER_LATER: 1} | NOT_LINEAR
WORDS = re.compile(r"[Hh]ook")
# Who may be warned of: one backward a row is slow.
SLOW = {*RARE_HOOKS, *STATED, "scaling hook"}
NOTHING = 1e-13  # a norm of J that is rounding


@dataclass(frozen=True)
class Outcome:
    """What became of one call.

    Attributes:
        call: its number.
        kind: one of the words above.
        text: the error, or how large it is.
    """

    call: int
    kind: str
    text: str

    @property
    def fault(self) -> bool:
        """Whether this must not happen."""
        return self.kind in FAULTS

    def __str__(self) -> str:
        return f"call {self.call}: {self.kind}" + (f" ({self.text})" if self.text else "")


def outcomes(m: Model) -> list[Outcome]:
    """All calls of one engine."""
    params = [p for p in m.net.parameters() if p.requires_grad]
    engine, found = mtu.Engine(m.net), []
    for k in range(m.calls):
        if m.hooked is not None and m.hooked[1] == k:
            dict(m.net.named_parameters())[m.hooked[0]].register_hook(_hook)
        losses = m.step(k)
        J = jacobian(losses, params)
        found.append(_outcome(m, engine, losses, J, k))
        if m.moves:
            _move(params, J)
    return found


def _outcome(
    m: Model,
    engine: mtu.Engine,
    losses: dict[str, Tensor],
    J: dict[int, Tensor],
    k: int,
) -> Outcome:
    params = [p for p in m.net.parameters() if p.requires_grad]
    if not all(bool(torch.isfinite(rows).all()) for rows in J.values()):
        return Outcome(k, NO_TRUTH, "autograd's own gradient is not finite")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            rows = engine.rows(losses)
        G, w = rows.gram(), random_weights(len(rows), seed=k)
        gram, d = (
            relative_error(G, gram_truth(J)),
            combine_error(rows.vjp(w), combine_truth(J, w), params),
        )
    except (RuntimeError, ValueError) as error:
        return Outcome(
            k,
            REFUSED if _stated(m, k, str(error)) else UNSTATED,
            f"{type(error).__name__}: {error}",
        )
    except Exception as error:  # whatever it is belongs into the report, with the program
        return Outcome(k, CRASHED, f"{type(error).__name__}: {error}")
    if said and m.features.isdisjoint(SLOW):
        return Outcome(k, UNSTATED, str(said[0].message))
    if _must_refuse(m, params, J, k):
        return Outcome(k, ACCEPTED, f"hook on {m.hooked[0]}")
    if max(gram, d) <= (1e-4 if "float32" in m.features else 1e-9) or _rounding(J, G):
        return Outcome(k, RIGHT, "")
    return Outcome(k, WRONG, f"Gram errs {gram:.1e}, combine {d:.1e}")


def _stated(m: Model, k: int, text: str) -> bool:
    if m.hooked is not None and m.hooked[0] not in text:
        return False
    there = [feature for feature, first in STATED.items() if k >= first]
    return not m.features.isdisjoint(there) and WORDS.search(text) is not None


def _rounding(J: dict[int, Tensor], G: Tensor) -> bool:
    """Whether autograd's gradient is what rounding left of zero, and so is the engine's."""
    return float(matrix(J).norm()) <= NOTHING and float(G.trace()) <= NOTHING**2


def _must_refuse(m: Model, params: list[Tensor], J: dict[int, Tensor], k: int) -> bool:
    """Whether a parameter with a hook has a gradient in this call."""
    if m.hooked is None or k < m.hooked[1]:
        return False
    p = dict(m.net.named_parameters())[m.hooked[0]]
    return any(q is p and bool(J[j].any()) for j, q in enumerate(params))


def _hook(g: Tensor) -> Tensor:
    return 0.5 * g


def _move(params: list[Tensor], J: dict[int, Tensor]) -> None:
    """One step of gradient descent, by a tenth at most."""
    size = max(float(torch.stack([rows.mean(0).norm() for rows in J.values()]).norm()), 1.0)
    with torch.no_grad():
        for p, rows in zip(params, J.values(), strict=True):
            p.sub_(0.1 / size * rows.mean(0))


def smaller(m: Model) -> Model:
    """A program with the same fault from which no operation, task or call can be left out."""
    kinds = {o.kind for o in outcomes(m) if o.fault}
    without: set[str] = set()
    calls = m.calls

    def fails(names: Collection[str], calls: int) -> bool:
        try:
            return any(o.kind in kinds for o in outcomes(model(m.seed, names, calls)))
        except Exception:  # what is left is no program
            return False

    while calls > 1 and fails(without, calls - 1):
        calls -= 1
    for name in reversed(m.names):
        if fails(without | {name}, calls):
            without.add(name)
    return model(m.seed, without, calls)
