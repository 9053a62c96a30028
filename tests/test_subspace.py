"""Rows kept across steps: what they are, how long they stay, and that a step with them is the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast import reference
from mtu_fast._ops.gram import row_gram
from mtu_fast._rows import gram as gram_module
from tests.helpers.checks import clear, grad_vector, trained, truth_of
from tests.helpers.truth import matrix, relative_error

N, FORGOTTEN = 8, 3
MASK = torch.arange(N) < FORGOTTEN
PARTIAL = {"a": MASK}


class Net(nn.Module):
    """A shared layer, a convolution's worth of smoothness, two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh())
        self.heads = nn.ModuleDict({"a": nn.Linear(24, 1), "b": nn.Linear(24, 1)})

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        shared = self.backbone(x)
        return {task: (head(shared)[:, 0] - x[:, 0]).square() for task, head in self.heads.items()}


def build(dtype: torch.dtype = torch.float64) -> tuple[Net, mtu.Engine]:
    torch.manual_seed(0)
    net = Net().to(dtype)
    return net, mtu.Engine(net, params=net.backbone.parameters())


def batch(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def move(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.01)


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


@pytest.mark.filterwarnings("ignore:backward. .grad still holds:UserWarning")  # on purpose
@pytest.mark.parametrize(
    "options", [{}, {"basis": True}, {"basis": True, "dtype": torch.bfloat16}], ids=str
)
def test_one_that_loads_the_state_goes_on_alike(options: dict[str, Any], tmp_path: Path) -> None:
    """To the bit, through a file."""
    found = []
    for reload in (False, True):
        net, engine = build()
        subspace = mtu.Subspace(size=4 * N, every=1, **options)
        for seed in range(6):
            if seed == 4:
                torch.save(subspace.state_dict(), tmp_path / "state.pt")
            if seed == 4 and reload:
                subspace = mtu.Subspace(size=4 * N, every=1, **options)
                subspace.load_state_dict(
                    torch.load(tmp_path / "state.pt", weights_only=True), engine.subspace_rows
                )
            engine.backward(
                net.losses(batch(seed)),
                mtu.InterferenceAware(0.2),
                forget=PARTIAL,
                subspace=subspace,
            )
        found.append(grad_vector(trained(net.backbone)))
    assert torch.equal(*found)


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


def named(rows: mtu.Rows) -> dict[str, Tensor]:
    held = rows.jacobian()
    return {name: held[p] for name, p in rows.parameters.items() if p in held}


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


def broken(net: Net, seed: int) -> dict[str, Tensor]:
    """Losses of which sample 2 of task a has an infinite gradient."""
    losses = net.losses(batch(seed))
    value = losses["a"].detach()
    losses["a"] = (losses["a"] - value + (torch.arange(N) != 2)).sqrt()
    return losses


class Refuses(mtu.InterferenceAware):
    def __call__(self, G: Tensor, roles: mtu.Roles) -> Tensor:
        raise ArithmeticError("not today")


@pytest.mark.filterwarnings("ignore:backward. .grad still holds:UserWarning")  # on purpose
@pytest.mark.parametrize("basis", [False, True], ids=["rows", "basis"])
@pytest.mark.parametrize("filled", [0, 2])
def test_a_step_that_fails_keeps_nothing(basis: bool, filled: int) -> None:
    net, engine = build()
    subspace, method = mtu.Subspace(size=2 * N, every=1, basis=basis), mtu.InterferenceAware(0.3)
    for seed in range(filled):
        engine.backward(net.losses(batch(seed)), method, forget=PARTIAL, subspace=subspace)
    clear(list(net.parameters()))
    held = subspace.held
    for _attempt in range(2):
        with pytest.raises(RuntimeError, match=r"\('a', 2\)\] is not finite"):
            engine.backward(broken(net, 5), method, forget=PARTIAL, subspace=subspace)
        with pytest.raises(ArithmeticError, match="not today"):
            engine.backward(net.losses(batch(5)), Refuses(0.3), forget=PARTIAL, subspace=subspace)
        with pytest.raises(
            RuntimeError, match=r"kept for the subspace \[\('a', 2\)\] is not finite"
        ):
            subspace.keep(engine.rows(broken(net, 5), forget=PARTIAL))
        assert subspace.held is held and all(p.grad is None for p in net.parameters())
    engine.backward(net.losses(batch(6)), method, forget=PARTIAL, subspace=subspace)
    assert len(subspace) == N * min(filled + 1, 2)


def test_the_size_is_that_of_the_first_step_that_succeeds() -> None:
    net, engine = build()
    subspace = mtu.Subspace()
    with pytest.raises(RuntimeError, match="not finite"):
        engine.backward(broken(net, 0), mtu.InterferenceAware(), forget=PARTIAL, subspace=subspace)
    assert subspace.size is None and len(subspace) == 0


def test_errors_tell_kept_rows_from_those_of_the_step() -> None:
    net, engine = build()
    rows = engine.rows(net.losses(batch(0)), forget=PARTIAL)
    bad = engine.rows(broken(net, 1), forget=PARTIAL)
    says = r"\(task, sample\) to forget \[\('a', 2\)\], kept for the subspace \[\('a', 2\)\] is not finite"
    with pytest.raises(RuntimeError, match=says):
        mtu.cat(rows, bad, bad.to_subspace(("a",))).gram()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"size": 0}, ValueError, "size: found 0"),
        ({"size": 1.5}, TypeError, "size: found 1.5"),
        ({"every": None}, TypeError, "every: found None"),
        ({"tasks": "seg"}, TypeError, "expected several names"),
        ({"energy": 0}, ValueError, "energy: found 0"),
        ({"energy": True, "basis": True}, TypeError, "energy: found True"),
        ({"energy": "1"}, TypeError, "energy: found '1'"),
        (
            {"basis": True, "dtype": float},
            TypeError,
            "dtype: found <class 'float'>, expected a real dtype",
        ),
        ({"basis": True, "dtype": torch.int32}, TypeError, "dtype: found torch.int32"),
        ({"rank": 3}, ValueError, "basis=True"),
        ({"dtype": torch.bfloat16}, ValueError, "basis=True"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        mtu.Subspace(**options)


def test_misuse_is_named() -> None:
    net, engine = build()
    losses = net.losses(batch(0))
    with pytest.raises(
        ValueError, match=r"InterferenceAware moves in a subspace .* mtu.Subspace\(\)"
    ):
        engine.backward(losses, mtu.InterferenceAware(), forget=PARTIAL)
    with pytest.raises(ValueError, match="OrthoGrad does not use one"):
        engine.backward(losses, mtu.OrthoGrad(), forget=PARTIAL, subspace=mtu.Subspace())
    with pytest.raises(TypeError, match=r"found int, expected an mtu\.Subspace"):
        engine.backward(losses, mtu.InterferenceAware(), forget=PARTIAL, subspace=3)
    with pytest.raises(TypeError, match="found dict, expected Rows"):
        mtu.Subspace().keep(losses)
    with pytest.raises(ValueError, match="per='task'"):
        mtu.Subspace().keep(engine.rows(losses, forget=PARTIAL, per="task"))
    with pytest.raises(ValueError, match=r"tasks names \['c'\], the rows have \['a', 'b'\]"):
        mtu.Subspace(tasks=("c",)).keep(engine.rows(net.losses(batch(0))))
    assert all(p.grad is None for p in net.parameters())
