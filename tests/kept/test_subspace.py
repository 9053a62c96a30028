"""Rows kept across steps: what a subspace takes in, and that a step with it is the reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from mtu_fast import reference
from tests.helpers.checks import clear, grad_vector, trained, truth_of
from tests.helpers.truth import matrix, relative_error
from tests.kept.scene import (
    FORGOTTEN,
    MASK,
    PARTIAL,
    N,
    batch,
    build,
    move,
)


def test_rows_outlive_their_step() -> None:
    net, engine = build()
    rows = engine.rows(net.losses(batch(0)), forget=PARTIAL)
    kept, G = rows.to_subspace(("a",)), rows.gram()[:N, :N]
    rows.backward(mtu.Mean())
    move(net)
    assert torch.equal(kept.gram(), G)
    assert (kept.roles.kind == mtu.SUBSPACE).all() and len(kept) == N
    with pytest.raises(RuntimeError, match="used these rows up"):
        rows.gram()


def test_a_buffer_that_is_filled_again_is_noticed() -> None:
    net, engine = build()
    x = batch(0)
    kept = engine.rows(net.losses(x), forget=PARTIAL).to_subspace()
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        kept.gram()


def test_jacobian_is_that_of_autograd() -> None:
    net, engine = build()
    params = trained(net.backbone)
    losses = net.losses(batch(0))
    J = matrix(truth_of(losses, params))
    rows = engine.rows(losses)
    found = rows.jacobian()
    assert relative_error(torch.cat([found[p].flatten(1) for p in params], 1), J) <= 1e-12


def test_fills_then_takes_in_a_batch_now_and_then() -> None:
    net, engine = build()
    subspace, held = mtu.Subspace(size=2 * N, every=3), []
    for seed in range(9):
        full = subspace.keep(engine.rows(net.losses(batch(seed)), forget=PARTIAL))
        assert full == subspace.full
        held.append([float(rows.roles.loss[0]) for rows in subspace.held.batches])
    first = [net.losses(batch(seed))["a"][0].item() for seed in range(9)]
    taken = [[0], [0, 1], [0, 1], [0, 1], [1, 4], [1, 4], [1, 4], [4, 7], [4, 7]]
    assert held == [[first[i] for i in which] for which in taken]


def test_size_is_by_default_twice_the_retain_rows() -> None:
    net, engine = build()
    subspace = mtu.Subspace()
    subspace.keep(engine.rows(net.losses(batch(0)), forget=PARTIAL))
    assert subspace.size == 2 * (2 * N - FORGOTTEN)


def test_keeps_the_target_tasks_or_those_named() -> None:
    net, engine = build()
    for tasks, forget, expected in (
        (None, PARTIAL, ["a"]),
        (None, MASK, ["a", "b"]),
        (("b",), PARTIAL, ["b"]),
    ):
        subspace = mtu.Subspace(size=4, tasks=tasks)
        subspace.keep(engine.rows(net.losses(batch(0)), forget=forget))
        (held,) = subspace.held.batches
        assert sorted(held.roles.tasks) == expected


def test_a_step_without_forget_rows_adds_nothing() -> None:
    net, engine = build()
    subspace = mtu.Subspace(size=4)
    assert not subspace.keep(engine.rows(net.losses(batch(0))))
    assert len(subspace) == 0


@pytest.mark.parametrize("forget", [MASK, PARTIAL], ids=["full", "partial"])
@pytest.mark.parametrize("order", ["joint", "project-first", "orthogonalize-first"])
def test_steps_are_the_references(forget: Any, order: str) -> None:
    """Six steps, parameters moving: rows kept from the points where they were taken."""
    net, engine = build()
    params, targets = trained(net.backbone), ("a", "b") if forget is MASK else ("a",)
    subspace, method = mtu.Subspace(size=5 * N, every=2), mtu.InterferenceAware(0.3, order=order)
    kept: list[Tensor] = []  # per batch
    since = 0
    for seed in range(8):
        losses = net.losses(batch(seed))
        J = matrix(truth_of(losses, params))
        sides = {task: J[i * N : (i + 1) * N] for i, task in enumerate(("a", "b"))}
        retain = {task: g[~MASK] if task in targets else g for task, g in sides.items()}
        gone = {task: sides[task][MASK] for task in targets}
        full = sum(map(len, kept)) >= 5 * N
        basis = torch.cat(kept) if full else J[:0]
        expected = reference.interference_aware(retain, gone, basis, 0.3, order)
        since += 1
        if not full or since >= 2:
            kept.append(torch.cat([sides[task] for task in targets]))
            since = 0
        while sum(map(len, kept[1:])) >= 5 * N:
            kept.pop(0)
        clear(params)
        update = engine.backward(losses, method, forget=forget, subspace=subspace)
        assert len(update.roles) == len(J) + len(basis)
        assert relative_error(grad_vector(params), expected) <= 1e-8
        move(net)
