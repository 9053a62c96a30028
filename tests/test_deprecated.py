"""Names of before: each does what the new name does, and says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mtu_fast as mtu

N = 4


@pytest.fixture
def engine() -> mtu.Engine:
    return mtu.Engine(nn.Linear(3, 2))


def taken(engine: mtu.Engine) -> mtu.Rows:
    torch.manual_seed(0)
    losses = engine._space.model(torch.randn(N, 3)).square().sum(1)
    return engine.rows(losses, forget=torch.arange(N) < 2)


def test_products(engine: mtu.Engine) -> None:
    rows = taken(engine)
    d = rows.vjp(torch.ones(N))
    with pytest.warns(DeprecationWarning, match="combine.w. is called rows.vjp"):
        assert all(torch.equal(d[p], g) for p, g in rows.combine(torch.ones(N)).items())
    with pytest.warns(DeprecationWarning, match="push.d. is called rows.jvp"):
        assert torch.equal(rows.push(d), rows.jvp(d))
    with pytest.warns(DeprecationWarning, match="held is called rows.nbytes"):
        assert rows.held == rows.nbytes > 0


def test_rows_of_a_subspace(engine: mtu.Engine) -> None:
    rows = taken(engine)
    with pytest.warns(DeprecationWarning, match="kept.tasks. is called rows.to_subspace"):
        kept = rows.kept(["loss"])
    assert (kept.roles.kind == mtu.SUBSPACE).all() and torch.equal(kept.gram(), rows.gram())
    vectors = {"weight": torch.randn(2, 2, 3)}
    with pytest.warns(DeprecationWarning, match="engine.kept is called engine.subspace_rows"):
        assert torch.equal(
            engine.kept(vectors, "a").gram(), engine.subspace_rows(vectors, "a").gram()
        )


def test_update(engine: mtu.Engine) -> None:
    rows = taken(engine)
    with pytest.warns(DeprecationWarning, match="update.method. is called rows.backward"):
        update = rows.update(mtu.OrthoGrad(0.5))
    assert len(update.weights) == N
