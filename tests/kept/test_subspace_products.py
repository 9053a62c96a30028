"""Products with kept rows: made once, and shared where blocks share their rows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from mtu_fast._ops.gram import row_gram
from mtu_fast._rows import gram as gram_module
from tests.helpers.checks import grad_vector, trained
from tests.helpers.truth import relative_error
from tests.kept.scene import (
    MASK,
    PARTIAL,
    N,
    Net,
    batch,
    build,
    named,
)


def explicit_gram(*parts: mtu.Rows, per: str = "total") -> Tensor:
    """Of the four tensors, weight and bias of two layers."""
    found = [rows.jacobian() for rows in parts]
    J = [torch.cat([held[p].flatten(1) for held in found]) for p in parts[0].parameters.values()]
    G = torch.stack([rows @ rows.T for rows in J])
    return {"total": G.sum(0), "layer": G.unflatten(0, (2, 2)).sum(1), "tensor": G}[per]


def vectors(net: Net, count: int) -> dict[str, Tensor]:
    return {f"backbone.{name}": torch.randn(count, *p.shape, dtype=torch.float64)
            for name, p in net.backbone.named_parameters()}  # fmt: skip


@pytest.mark.parametrize("per", ["total", "layer", "tensor"])
def test_products_of_kept_explicit_rows_are_made_once(
    per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, engine = build()
    kept = engine.subspace_rows(vectors(net, 5), "a")
    counts: list[int] = []

    def counted(rows: Sequence[Tensor], known: int = 0) -> Tensor:
        counts.append(known)
        return row_gram(rows, known)

    counted.unchecked = counted  # type: ignore[attr-defined]
    monkeypatch.setattr(gram_module, "row_gram", counted)
    for seed in range(2):
        rows = engine.rows(net.losses(batch(seed)), forget=PARTIAL)
        expected = explicit_gram(rows, kept, per=per)
        assert relative_error(mtu.cat(rows, kept).gram(per), expected) <= 1e-12
        assert (0 in counts) == (seed == 0) and 5 in counts
        counts.clear()


@pytest.mark.parametrize(
    "order", ["rows, kept, kept", "kept, rows, kept", "rows, its own", "kept, kept", "kept, rows"]
)
def test_blocks_that_share_their_rows(order: str) -> None:
    """Whatever is repeated: what is known of the last block is known by its place, not by its tensors."""
    net, engine = build()
    rows = engine.rows(net.losses(batch(0)), forget=PARTIAL)
    dense = engine.subspace_rows(named(rows), "a")
    parts = {"rows": rows, "kept": dense, "its own": rows.to_subspace()}
    chosen = [parts[name] for name in order.split(", ")]
    assert relative_error(mtu.cat(*chosen).gram(), explicit_gram(*chosen)) <= 1e-12


def test_heads_get_the_weights_before_the_projections() -> None:
    net, engine = build()
    subspace = mtu.Subspace(size=4 * N)
    for seed in range(2, 6):
        subspace.keep(engine.rows(net.losses(batch(seed)), forget=PARTIAL))
    engine.backward(
        net.losses(batch(1)), mtu.InterferenceAware(0.3), forget=PARTIAL, subspace=subspace
    )
    losses = net.losses(batch(1))
    loss = 0.3 * (losses["a"][~MASK].mean() + losses["b"].mean()) - 0.7 * losses["a"][MASK].mean()
    heads = trained(net.heads)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, heads)])
    assert relative_error(grad_vector(heads), expected) <= 1e-12


def test_memory_counts_what_tasks_share_once() -> None:
    net, engine = build()
    subspace = mtu.Subspace(size=N)
    subspace.keep(engine.rows(net.losses(batch(0)), forget=MASK))
    one = mtu.Subspace(size=N)
    one.keep(engine.rows(net.losses(batch(0)), forget=PARTIAL))
    assert 0 < one.memory < subspace.memory < 2 * one.memory
    assert "of 8 rows" in repr(one)
