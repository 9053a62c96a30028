"""Properties over drawn row sets (any number of rows, repeated, zero, dependent, of any length), and under scaling."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from inspect import isabstract

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtu_fast import methods, reference
from mtu_fast.methods import (
    FORGET,
    IMTLG,
    RETAIN,
    AlignedMTL,
    FairGrad,
    GradVac,
    Method,
    NashMTL,
    OrthoGrad,
    PCGrad,
    Roles,
)
from mtu_fast.reference.alignedmtl import alignedmtl
from mtu_fast.reference.gradvac import gradvac
from mtu_fast.reference.imtlg import imtlg
from tests.helpers import matrices
from tests.helpers.matrices import roles

Drawn = tuple[Tensor, Roles]


@st.composite
def row_sets(draw: st.DrawFn) -> Drawn:
    """Up to 10 rows: multiples (zero among them) of up to 6 random directions in up to 12 dimensions."""
    P, rank = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    entry = st.tuples(st.integers(0, rank - 1), st.sampled_from([0.0, 1.0, -1.0, 1e-3, 250.0]))
    picks = draw(st.lists(entry, min_size=1, max_size=10))
    kinds = draw(
        st.lists(st.sampled_from([RETAIN, FORGET]), min_size=len(picks), max_size=len(picks))
    )
    tasks = draw(st.lists(st.integers(0, 2), min_size=len(picks), max_size=len(picks)))
    base = matrices.low_rank(rank, P, rank, seed=draw(st.integers(0, 50)))
    return torch.stack([factor * base[i] for i, factor in picks]), roles(kinds, tasks)


def _rows(J: Tensor, who: Roles, kind: int) -> dict[str, Tensor]:
    return {str(t): J[(who.task == t) & (who.kind == kind)] for t in range(3)}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(row_sets(), st.sampled_from([0.0, 0.4, 1.0]))
def test_orthograd_is_qr(drawn: Drawn, alpha: float) -> None:
    J, who = drawn
    d = J.t() @ OrthoGrad(alpha)(J @ J.t(), who)
    truth = reference.orthograd(_rows(J, who, RETAIN), _rows(J, who, FORGET), alpha)
    assert (d - truth).norm() <= 1e-8 * J.norm()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(row_sets())
def test_pure_orthogonal_ascent_never_helps_the_forget_mean_and_spares_retain(drawn: Drawn) -> None:
    """<f, d> = -‖d‖² for the mean forget gradient f, and <g, d> = 0 for retain rows g."""
    J, who = drawn
    d = J.t() @ OrthoGrad(0.0)(J @ J.t(), who)
    f = J.t() @ -OrthoGrad(0.0).outside(who)
    scale = J.norm() ** 2
    assert (f @ d + d @ d).abs() <= 1e-8 * scale
    assert ((J @ d)[who.kind == RETAIN]).norm() <= 1e-8 * scale


@settings(max_examples=150, deadline=None, derandomize=True)
@given(row_sets())
def test_pcgrad_is_the_papers_loop(drawn: Drawn) -> None:
    J, who = drawn
    signed = J * PCGrad().outside(who)[:, None]
    d = J.t() @ PCGrad()(J @ J.t(), who)
    assert (d - reference.pcgrad(signed)).norm() <= 1e-8 * J.norm()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(row_sets(), st.sampled_from([NashMTL(), FairGrad(2.0)]))
def test_a_bargain_helps_every_row_or_moves_nothing(
    drawn: Drawn, method: NashMTL | FairGrad
) -> None:
    J, who = drawn
    signed = (J * method.outside(who)[:, None])[J.norm(dim=1) > 0]
    w = method(J @ J.t(), who)
    gains = signed @ (J.t() @ w) / signed.norm(dim=1)
    assert w.isfinite().all() and ((gains > 0).all() or not w.any())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(row_sets())
def test_aligned_mtl_is_the_singular_value_decomposition(drawn: Drawn) -> None:
    J, who = drawn
    d = J.t() @ AlignedMTL()(J @ J.t(), who)
    assert (
        d - alignedmtl(J * AlignedMTL().outside(who)[:, None] * len(who))
    ).norm() <= 1e-8 * J.norm()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(row_sets())
def test_imtlg_is_the_pseudo_inverse_of_the_unit_rows(drawn: Drawn) -> None:
    J, who = drawn
    truth = imtlg(J * IMTLG().outside(who)[:, None])
    assert (J.t() @ IMTLG()(J @ J.t(), who) - truth).norm() <= 1e-6 * (J.norm() + truth.norm())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(row_sets(), st.sampled_from([0.0, 0.2]))
def test_gradvac_is_the_papers_loop(drawn: Drawn, beta: float) -> None:
    J, who = drawn
    signed, method = J * PCGrad().outside(who)[:, None], GradVac(beta)
    names = list(range(len(J)))
    alone = Roles(
        torch.tensor(names), who.sample, who.kind, who.loss, tuple(map(str, names)), who.dtype
    )
    targets: dict[tuple[int, int], float] = {}
    for _call in range(2):
        d = J.t() @ method(J @ J.t(), alone)
        assert (d - gradvac(signed, targets, beta)).norm() <= 1e-6 * J.norm()


# ---- the scale of the losses ---------------------------------------------------------------------

S = 65536.0  # what a loss scaler begins with
LINEAR: list[Method] = [
    methods.Mean(), methods.Sum(), methods.FineTune(), methods.GradientAscent(), methods.RandomLabels(0.3),
    methods.GradDiff(0.3), methods.OrthoGrad(0.3), methods.LevelledOrthoGrad(0.3), methods.InterferenceAware(0.3),
    methods.PCGrad(), methods.GradVac(), methods.MGDA(), methods.CAGrad(), methods.IMTLG(), methods.AlignedMTL(),
    methods.DualProj(), methods.UPGrad(),
]  # fmt: skip
DEGREES: list[tuple[Method, float]] = [
    *((method, 1.0) for method in LINEAR), (methods.MUNBa(), 0.0), (methods.NashMTL(), 0.0),
    *((methods.FairGrad(a), (1 - a) / (1 + a)) for a in (0.5, 1.0, 2.0, 4.0)),
]  # fmt: skip
KINDS = [RETAIN, RETAIN, FORGET, RETAIN, FORGET, FORGET] + [methods.SUBSPACE] * 5
ROWS = matrices.conditioned(11, 20, 10.0)


def _direction(method: Method, factor: float) -> Tensor:
    """d [P] of two tasks' rows and losses, both `factor` times as large."""
    J, who = factor * ROWS, roles(KINDS, [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1])
    loss = factor * torch.linspace(0.01, 0.03, len(who), dtype=torch.float64)
    return J.t() @ deepcopy(method)(J @ J.t(), replace(who, loss=loss))  # GradVac remembers


@pytest.mark.parametrize(("method", "degree"), DEGREES, ids=lambda value: repr(value))
def test_losses_times_s_multiply_d_by_a_power_of_s(method: Method, degree: float) -> None:
    """Where d is S times as long, a loss scaler that divides it by S is harmless; to the others it is not."""
    d = _direction(method, 1.0)
    assert d.norm() > 0
    torch.testing.assert_close(
        _direction(method, S), S**degree * d, rtol=1e-9, atol=1e-9 * S**degree * float(d.norm())
    )


def test_gdr_gma_has_a_degree_where_its_constants_scale_too() -> None:
    """λ reads the value of the loss: at 0.02 it is one half, at 65536 · 0.02 nothing."""
    d = _direction(methods.GDRGMA(), 1.0)
    torch.testing.assert_close(
        _direction(methods.GDRGMA(slope=100.0 / S, threshold=0.02 * S), S), S * d
    )
    assert (_direction(methods.GDRGMA(), S) / S - d).norm() > 0.1 * d.norm()


@pytest.mark.parametrize("follows", [True, False], ids=["τ scales too", "τ stays"])
def test_nabla_tau_has_a_degree_a_side(follows: bool) -> None:
    """Retain rows S; forget rows S² with the τ of scaled losses, and nothing with that of unscaled ones."""
    sides = []
    for factor, tau in ((1.0, 0.05), (S, 0.05 * S if follows else 0.05)):
        method = methods.NablaTau()
        method.prepare(forget=10, retain=90, forget_batches=1, retain_batches=9)
        method.start_epoch(0, lambda tau=tau: dict.fromkeys("ab", tau))  # type: ignore[misc]
        with_both, alpha = _direction(method, factor), method.alpha
        who = roles(KINDS, [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1])
        retain = (1 - alpha) * factor * ROWS.t() @ methods.mean_weights(who, RETAIN)
        sides.append((retain, with_both - retain))
    (retain, forget), (retain_s, forget_s) = sides
    assert forget.norm() > 0
    torch.testing.assert_close(retain_s, S * retain)
    torch.testing.assert_close(
        forget_s, S**2 * forget if follows else 0 * forget, rtol=1e-6, atol=1e-9 * S
    )


def test_no_method_is_without_a_degree() -> None:
    stated = {type(method) for method, _ in DEGREES} | {methods.GDRGMA, methods.NablaTau}
    found = {
        value
        for value in vars(methods).values()
        if isinstance(value, type) and issubclass(value, Method) and not isabstract(value)
    }
    assert stated == found
