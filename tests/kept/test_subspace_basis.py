"""A basis in the place of kept rows: orthonormal, as good as the rows, and what is projected by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mtu_fast as mtu
from tests.helpers.checks import grad_vector, trained
from tests.helpers.truth import relative_error
from tests.kept.scene import (
    PARTIAL,
    N,
    batch,
    build,
)


@pytest.mark.parametrize(
    "options", [{}, {"rank": 12}, {"energy": 0.95}, {"dtype": torch.bfloat16}], ids=str
)
def test_a_basis_is_orthonormal_and_spans_the_rows(options: dict[str, Any]) -> None:
    net, engine = build(torch.float32)
    subspace = mtu.Subspace(size=2 * N, basis=True, **options)
    for seed in range(2):
        subspace.keep(engine.rows(net.losses(batch(seed, torch.float32)), forget=PARTIAL))
    assert subspace.held.basis is not None
    Q = torch.cat([q.flatten(1) for q in subspace.held.basis.jacobian().values()], 1).double()
    S = torch.cat([
        torch.cat([g.flatten(1) for g in rows.jacobian().values()], 1)
        for rows in subspace.held.batches
    ])
    limit = 2e-2 if options.get("dtype") is torch.bfloat16 else 1e-6
    assert (Q @ Q.t() - torch.eye(len(Q), dtype=Q.dtype)).norm() <= limit
    values, vectors = torch.linalg.svd(S.double(), full_matrices=False)[1:]
    if not options:
        kept = vectors[: len(Q)]
        # directions at the edge are rounded ones
        assert relative_error(Q.t() @ Q, kept.t() @ kept) <= 1e-3
    if "rank" in options:
        assert len(Q) == 12 and relative_error(Q.t() @ Q, vectors[:12].t() @ vectors[:12]) <= 1e-4
    if "energy" in options:
        power = values.square().cumsum(0) / values.square().sum()
        assert len(Q) == int((power < 0.95).sum()) + 1


def test_a_step_with_a_basis_is_a_step_with_the_rows() -> None:
    found = []
    for basis in (False, True):
        net, engine = build()
        subspace = mtu.Subspace(size=5 * N, basis=basis)
        for seed in range(5):
            subspace.keep(engine.rows(net.losses(batch(seed)), forget=PARTIAL))
        engine.backward(
            net.losses(batch(9)), mtu.InterferenceAware(0.2), forget=PARTIAL, subspace=subspace
        )
        found.append(grad_vector(trained(net.backbone)))
    assert relative_error(found[1], found[0]) <= 1e-8


def test_vectors_from_elsewhere_are_kept_rows() -> None:
    net, engine = build()
    v = {"backbone.0.weight": torch.randn(3, 24, 5, dtype=torch.float64)}
    rows = engine.subspace_rows(v, "a")
    assert torch.allclose(
        rows.gram(), v["backbone.0.weight"].flatten(1) @ v["backbone.0.weight"].flatten(1).T
    )
    assert (rows.roles.kind == mtu.SUBSPACE).all()
    with pytest.raises(
        ValueError,
        match=r"vectors\['heads.a.bias'\] has shape \(3, 1\), expected a shared parameter",
    ):
        engine.subspace_rows({"heads.a.bias": torch.zeros(3, 1)}, "a")
    with pytest.raises(ValueError, match=r"expected \[K, \*\(24,\)\]"):
        engine.subspace_rows({"backbone.0.bias": torch.zeros(24)}, "a")


def test_projects_gradients_of_another_loop() -> None:
    net, engine = build()
    subspace = mtu.Subspace(size=N, basis=True)
    with pytest.raises(RuntimeError, match="needs a basis"):
        subspace.project({})
    rows = engine.rows(net.losses(batch(0)), forget=PARTIAL)
    subspace.keep(rows)
    g = {p: torch.randn_like(p) for p in net.backbone.parameters()}
    inside, outside = subspace.project(g), subspace.project(g, into=False)
    flat = torch.cat([t.flatten() for t in inside.values()])
    S = torch.cat([t.flatten(1) for t in rows.to_subspace(("a",)).jacobian().values()], 1)
    assert (S @ torch.cat([t.flatten() for t in outside.values()])).norm() <= 1e-10 * S.norm()
    for p, whole in g.items():
        assert relative_error(inside[p] + outside[p], whole) <= 1e-12
    Q = torch.linalg.qr(S.t()).Q
    assert relative_error(Q @ (Q.t() @ flat), flat) <= 1e-10
