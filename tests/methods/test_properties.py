"""Properties over drawn row sets: any number of rows, repeated, zero, dependent, of any length."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtu_fast import reference
from mtu_fast.methods import FORGET, IMTLG, RETAIN, AlignedMTL, FairGrad, GradVac, NashMTL, OrthoGrad, PCGrad, Roles
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
    kinds = draw(st.lists(st.sampled_from([RETAIN, FORGET]), min_size=len(picks), max_size=len(picks)))
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
def test_a_bargain_helps_every_row_or_moves_nothing(drawn: Drawn, method: NashMTL | FairGrad) -> None:
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
    assert (d - alignedmtl(J * AlignedMTL().outside(who)[:, None] * len(who))).norm() <= 1e-8 * J.norm()


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
    alone = Roles(torch.tensor(names), who.sample, who.kind, who.loss, tuple(map(str, names)), who.dtype)
    targets: dict[tuple[int, int], float] = {}
    for _call in range(2):
        d = J.t() @ method(J @ J.t(), alone)
        assert (d - gradvac(signed, targets, beta)).norm() <= 1e-6 * J.norm()
