"""Rows kept as factors: of which parameters, in how many bytes, and that steps beside them are those of the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast import reference
from mtu_fast._rows import own
from tests.helpers.checks import clear, grad_vector, trained, truth_of
from tests.helpers.truth import matrix, relative_error
from tests.kept.factors import (
    FACTORS,
    MASK,
    OPTIONS,
    TASKS,
    Deep,
    Heads,
    Positions,
    Small,
    Words,
    batch,
    build,
    explicit,
    fill,
    kept_as_factors,
)
from tests.kept.scene import move


@pytest.mark.parametrize("per", ["global", "layer"])
@pytest.mark.parametrize("kind", FACTORS, ids=lambda kind: kind.__name__)
def test_steps_are_the_references(kind: type[Heads], per: Any) -> None:
    """Parameters moving, tasks missing and in another order; what is kept is the rows, bytes and all."""
    net, engine = build(kind)
    params, memory = trained(net), mtu.Memory(14, every=1)
    M: Tensor | None = None
    for seed in range(5):
        clear(params)
        tasks, x = (TASKS, ("b",), TASKS[::-1])[seed % 3], batch(seed)
        losses = net.losses(x, tasks)
        J = matrix(truth_of(losses, params))
        blocks = None if per == "global" else _blocks(net)
        reference.backward(
            params, losses, "levelled_orthograd", forget={"b": MASK}, blocks=blocks, subspace=M,
            alpha=0.3,
        )  # fmt: skip
        expected = grad_vector(params)
        clear(params)
        update = engine.backward(
            net.losses(x, tasks), mtu.LevelledOrthoGrad(0.3, granularity=per), forget={"b": MASK},
            memory=memory,
        )  # fmt: skip
        assert update.gram is not None
        assert relative_error(grad_vector(params), expected) <= 1e-9
        retained = torch.cat([~MASK if task == "b" else torch.ones_like(MASK) for task in tasks])
        M = (J[retained] if M is None else torch.cat([M, J[retained]]))[-14:]
        rows = memory.held.rows
        assert rows is not None and relative_error(explicit(rows), M) <= 1e-12
        G = rows.gram()
        assert relative_error(G, M @ M.T) <= 1e-12
        assert kept_as_factors(memory) == FACTORS[kind]
        move(net)


def _blocks(net: nn.Module) -> list[list[int]]:
    layers: dict[str, list[int]] = {}
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    for j, name in enumerate(names):
        layers.setdefault(name.rpartition(".")[0], []).append(j)
    return list(layers.values())


@pytest.mark.parametrize("budget", [None, 1_500_000], ids=["fast", "small"])
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("kind", FACTORS, ids=lambda kind: kind.__name__)
def test_products_are_those_of_the_rows(
    kind: type[Heads], beside: bool, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gram, `Jᵀ w` and `J d` of a step's rows with kept ones, however these are held and multiplied."""
    if not beside:
        monkeypatch.setattr(own, "kept_of", lambda parts, shared: 0)
    net, engine = build(kind)
    params, memory = trained(net), mtu.Memory(30, every=1, budget=budget)
    fill(net, engine, memory)
    held = memory.held.rows
    assert held is not None
    J = torch.cat([matrix(truth_of(net.losses(batch(9)), params)), explicit(held)])
    rows = memory.join(engine.rows(net.losses(batch(9)), forget=MASK))
    assert relative_error(rows.gram(), J @ J.T) <= 1e-12
    drawn = torch.Generator().manual_seed(1)
    w = torch.randn(len(J), generator=drawn, dtype=torch.float64)
    d = rows.vjp(w)
    assert relative_error(torch.cat([d[p].flatten() for p in params]), w @ J) <= 1e-12
    assert relative_error(rows.jvp(d), J @ (w @ J)) <= 1e-12
    for G, of_module in zip(rows.gram("tensor"), params, strict=True):
        start = sum(p.numel() for p in params[: [id(p) for p in params].index(id(of_module))])
        part = J[:, start : start + of_module.numel()]
        assert relative_error(G, part @ part.T) <= 1e-12


def test_what_is_kept_is_nobody_elses() -> None:
    """No activation of the step stays alive, nor more than the rows that are kept."""
    net, engine = build(Positions)
    memory = mtu.Memory(7, every=1)
    fill(net, engine, memory)
    block: Any = memory.held.block
    for piece in block.pieces:
        for use in piece.factors.values():
            for t in use.tensors:
                assert t.untyped_storage().nbytes() == t.numel() * t.itemsize
                assert not t.requires_grad and len(t) == len(piece)


def test_bytes_are_those_of_factors() -> None:
    net, engine = build(Deep)
    memory = mtu.Memory(8, every=1)
    fill(net, engine, memory)
    explicit_numbers = sum(p.numel() for p in net.parameters() if p.dim() == 1)
    factors = sum(sum(p.shape) for p in net.parameters() if p.dim() == 2)
    block, rows = memory.held.block, memory.held.rows
    assert block is not None and rows is not None
    assert block.row_nbytes == 8 * (explicit_numbers + factors)
    assert block.nbytes == 8 * block.row_nbytes
    assert memory.memory == block.nbytes + 8 * 8 * 8  # and their Gram
    budget = 5 * block.row_nbytes + 3
    bounded = mtu.Memory(budget=budget, every=1)
    fill(net, engine, bounded)
    assert bounded.size == len(bounded) == 5
    assert bounded.held.block is not None and bounded.held.block.nbytes <= budget
    with pytest.raises(ValueError, match=f"expected at least {block.row_nbytes}, those of one row"):
        memory = mtu.Memory(budget=9)
        clear(list(net.parameters()))
        engine.backward(net.losses(batch(0)), mtu.OrthoGrad(0.3), forget=MASK, memory=memory)


def test_rows_of_more_positions() -> None:
    """Batches of few positions, and one of so many that rows are smaller: all go on explicitly, within the budget."""
    net, engine = build(Positions)
    params, budget = trained(net), 500_000
    memory = mtu.Memory(60, budget=budget, every=1)
    M: Tensor | None = None
    for seed, positions in enumerate((2, 3, 40, 2)):
        clear(params)
        x = batch(seed, positions=positions)
        J = matrix(truth_of(net.losses(x), params))
        engine.backward(net.losses(x), mtu.OrthoGrad(0.3), forget={"b": MASK}, memory=memory)
        few = kept_as_factors(memory) == FACTORS[Positions]
        assert few == (seed < 2)
        new = J[torch.cat([torch.ones_like(MASK), ~MASK])]
        M = new if M is None else torch.cat([M, new])
        block, rows = memory.held.block, memory.held.rows
        assert block is not None and rows is not None and block.nbytes <= budget
        assert relative_error(explicit(rows), M[-len(rows) :]) <= 1e-12
        move(net)


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_other_forms_hold_the_same_rows(options: dict[str, Any]) -> None:
    """As a memory whose rows are all explicit."""
    found = []
    for few in (1 << 12, 1 << 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mtu_fast._rows.keeping.FEW", few)
            net, engine = build(Deep)
            memory = mtu.Memory(**({"size": 20} | options))
            for seed in range(5):
                clear(list(net.parameters()))
                losses = net.losses(batch(seed))
                engine.backward(losses, mtu.OrthoGrad(0.3), forget={"b": MASK}, memory=memory)
                move(net)
            block, rows = memory.held.block, memory.held.rows
            assert block is not None and rows is not None
            assert bool(kept_as_factors(memory)) == (few < 1 << 30)
            # a budget has room for more of the smaller rows
            found.append((rows.gram()[-2:, -2:], block.roles.sample[-2:]))
    exact = options.get("dtype") != torch.bfloat16
    assert relative_error(found[1][0], found[0][0]) <= (1e-9 if exact else 1e-2)
    assert torch.equal(found[1][1], found[0][1])


def test_half_precision_factors_are_exact_rows() -> None:
    """Of a model in bfloat16: rows are products of what the step had, not rounded once more."""
    net, engine = build(Deep, torch.bfloat16)
    memory = mtu.Memory(every=1)
    x = batch(0, torch.bfloat16)
    J = explicit(engine.rows(net.losses(x), forget=MASK))
    engine.backward(net.losses(x), mtu.OrthoGrad(0.3), forget=MASK, memory=memory)
    rows = memory.held.rows
    assert rows is not None and kept_as_factors(memory) == FACTORS[Deep]
    stay = torch.cat([~MASK, ~MASK])
    assert relative_error(explicit(rows), J[stay]) <= 1e-7
    for seed in range(1, 4):
        clear(list(net.parameters()))
        losses = net.losses(batch(seed, torch.bfloat16))
        update = engine.backward(losses, mtu.OrthoGrad(0.3), forget=MASK, memory=memory)
        assert update.gram is not None
    kept, fresh = memory.held.rows, engine.rows(net.losses(x), forget=MASK)
    assert kept is not None
    J = torch.cat([explicit(fresh), explicit(kept)])
    assert relative_error(memory.join(fresh).gram(), J @ J.T) <= 1e-6


def test_kept_rows_of_less_precision_are_summed_with_those_of_a_step() -> None:
    """Factors of bfloat16 make rows in float32, which meet a step's own in float64."""
    net, engine = build(Small)
    params, memory = trained(net), mtu.Memory(12, every=1, dtype=torch.bfloat16, budget=1_000_000)
    for seed in range(4):
        M = None if memory.held.rows is None else explicit(memory.held.rows).double()
        clear(params)
        reference.backward(
            params, net.losses(batch(seed)), "levelled_orthograd", forget={"b": MASK}, subspace=M,
            alpha=0.3,
        )  # fmt: skip
        expected = grad_vector(params)
        clear(params)
        losses = net.losses(batch(seed))
        engine.backward(losses, mtu.LevelledOrthoGrad(0.3), forget={"b": MASK}, memory=memory)
        assert relative_error(grad_vector(params), expected) <= 1e-5
        clear(params)
        engine.backward(net.losses(batch(seed)), mtu.OrthoGrad(0.3), forget=MASK, memory=memory)
        move(net)


def test_where_a_budget_is_small_bytes_decide(tmp_path: Path) -> None:
    """At positions of which explicit rows would be the faster: steps are those of the rows, before and after a file."""
    found = []
    for budget in (None, 2_800_000):
        net, engine = build(Positions)
        memory = mtu.Memory(20, budget=budget, every=1)
        for seed in range(5):
            clear(list(net.parameters()))
            losses = net.losses(batch(seed, positions=40))
            engine.backward(losses, mtu.OrthoGrad(0.3), forget={"b": MASK}, memory=memory)
            found.append(grad_vector(list(net.parameters())))
            in_factors = kept_as_factors(memory)
            of_body = {"body.0.weight", "body.2.weight"}
            assert (in_factors & of_body) == (of_body if budget else set())
            move(net)
            torch.save(memory.state_dict(), tmp_path / "state.pt")
            memory = mtu.Memory(20, budget=budget, every=1)
            memory.load_state_dict(torch.load(tmp_path / "state.pt"), engine.subspace_rows)
        block = memory.held.block
        assert block is not None and len(memory) == 20
        assert budget is None or block.nbytes <= budget
    for explicitly, by_factors in zip(found[:5], found[5:], strict=True):
        assert relative_error(by_factors, explicitly) <= 1e-9


def test_sparse_gradients_of_a_table_stay_sparse() -> None:
    """Those of entries that kept rows look up are among them."""
    found = []
    for sparse in (False, True):
        net, engine = build(Words)
        assert isinstance(net, Words)
        net.table.sparse = sparse
        memory = mtu.Memory(every=1)
        for seed in range(3):
            clear(list(net.parameters()))
            engine.backward(net.losses(batch(seed)), mtu.OrthoGrad(0.3), forget=MASK, memory=memory)
            assert "table.weight" in kept_as_factors(memory)
        grad = net.table.weight.grad
        assert grad is not None and grad.is_sparse == sparse
        found.append(grad.to_dense())
    assert relative_error(found[1], found[0]) <= 1e-12


def test_under_autocast() -> None:
    """Casts of a weight are no views of it: activations are kept in the dtype that the step had them in."""
    net, engine = build(Deep, torch.float32)
    memory = mtu.Memory(12, every=1)

    def losses(seed: int) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return net.losses(batch(seed, torch.float32))

    for seed in range(4):
        clear(list(net.parameters()))
        engine.backward(losses(seed), mtu.OrthoGrad(0.3), forget=MASK, memory=memory)
        assert kept_as_factors(memory) == FACTORS[Deep]
        move(net)
    block, kept = memory.held.block, memory.held.rows
    assert block is not None and kept is not None
    (piece,) = block.pieces
    dtypes = {t.dtype for use in piece.factors.values() for t in use.tensors}
    assert torch.bfloat16 in dtypes
    fresh = engine.rows(losses(9), forget=MASK)
    J = torch.cat([explicit(fresh), explicit(kept)])
    assert relative_error(memory.join(fresh).gram(), J @ J.T) <= 1e-6


def test_rows_of_two_loaders_and_micro_batches() -> None:
    found = []
    for parts in (1, 2, 3):
        net, engine = build(Positions)
        memory = mtu.Memory(every=1)
        for seed in range(3):
            clear(list(net.parameters()))
            pieces = zip(batch(seed).chunk(parts), MASK.chunk(parts), strict=True)
            if parts == 2:
                for i, (x, mask) in enumerate(pieces):
                    engine.accumulate(
                        net.losses(x), mtu.OrthoGrad(0.3), forget={"a": mask}, sync=i == 1,
                        memory=memory,
                    )  # fmt: skip
            else:
                rows = [engine.rows(net.losses(x), forget={"a": mask}) for x, mask in pieces]
                memory.step(mtu.cat(*rows), mtu.OrthoGrad(0.3))
            move(net)
        assert kept_as_factors(memory) == FACTORS[Positions]
        found.append(grad_vector(list(net.parameters())))
    assert relative_error(found[1], found[0]) <= 1e-9
    assert relative_error(found[2], found[0]) <= 1e-9
