"""Retain rows kept across steps: what they are, who stays, and that a step with them is the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast import reference
from mtu_fast._rows import own
from tests.helpers import matrices
from tests.helpers.checks import clear, grad_vector, trained, truth_of
from tests.helpers.truth import matrix, relative_error
from tests.test_subspace import MASK, PARTIAL, N, Net, Refuses, batch, broken, build, move

RETAINED = 2 * N - int(MASK.sum())  # rows of a partial step
ALPHA = 0.3


def backward(
    net: Net,
    engine: mtu.Engine,
    memory: mtu.Memory | None,
    seed: int,
    method: mtu.Method | None = None,
    forget: Any = None,
) -> mtu.Update:
    """One step's `.grad`, alone."""
    clear(list(net.parameters()))
    chosen = mtu.OrthoGrad(ALPHA) if method is None else method
    mask = PARTIAL if forget is None else forget
    dtype = next(net.parameters()).dtype
    return engine.backward(net.losses(batch(seed, dtype)), chosen, forget=mask, memory=memory)


@pytest.mark.parametrize("forget", [MASK, PARTIAL], ids=["full", "partial"])
@pytest.mark.parametrize("per", ["global", "layer"])
def test_steps_are_the_references(forget: Any, per: Any) -> None:
    """Seven steps, parameters moving: the rows of every second one are kept, and the oldest go."""
    net, engine = build()
    params, heads = trained(net.backbone), trained(net.heads)
    memory = mtu.Memory(size=20)
    M: Tensor | None = None
    for seed in range(7):
        clear(list(net.parameters()))
        losses = net.losses(batch(seed))
        J = matrix(truth_of(losses, params))
        blocks = [[0, 1], [2, 3]] if per == "layer" else None
        reference.backward(
            params, losses, "levelled_orthograd", forget=forget, outside=heads, blocks=blocks,
            subspace=M, alpha=ALPHA,
        )  # fmt: skip
        expected, of_heads = grad_vector(params), grad_vector(heads)
        update = backward(
            net, engine, memory, seed, mtu.LevelledOrthoGrad(ALPHA, granularity=per), forget
        )
        assert relative_error(grad_vector(params), expected) <= 1e-9
        assert relative_error(grad_vector(heads), of_heads) <= 1e-12
        masks = forget if isinstance(forget, dict) else {"a": MASK, "b": MASK}
        retained = [~masks.get(task, ~torch.ones_like(MASK)) for task in ("a", "b")]
        assert int((update.roles.kind == mtu.MEMORY).sum()) == (0 if M is None else len(M))
        if seed % 2 == 0:
            new = J[torch.cat(retained)]
            M = (new if M is None else torch.cat([M, new]))[-20:]
        move(net)
    assert len(memory) == 20


def test_the_first_step_is_that_without_a_memory() -> None:
    found = []
    for memory in (None, mtu.Memory()):
        net, engine = build()
        backward(net, engine, memory, 0)
        found.append(grad_vector(list(net.parameters())))
    assert relative_error(found[1], found[0]) <= 1e-12


def test_size_is_by_default_four_times_the_retain_rows() -> None:
    net, engine = build()
    memory = mtu.Memory()
    for seed in range(12):
        backward(net, engine, memory, seed)
    assert memory.size == len(memory) == 4 * RETAINED
    P = sum(p.numel() for p in net.backbone.parameters())
    assert memory.memory >= 8 * P * len(memory)
    assert f"of {4 * RETAINED} rows" in repr(memory)


def test_products_of_kept_rows_are_those_of_their_steps() -> None:
    """None is made again, and they are those of the rows."""
    net, engine = build()
    memory = mtu.Memory(size=2 * RETAINED)
    for seed in range(7):
        backward(net, engine, memory, seed)
        rows, block = memory.held.rows, memory.held.block
        assert rows is not None and block is not None
        grams = block.grams
        assert len(grams) == 1
        J = torch.cat([part.flatten(1) for part in rows.jacobian().values()], 1)
        (gram,) = grams.values()
        assert relative_error(gram, J @ J.t()) <= 1e-12
        move(net)


def test_a_task_of_which_all_rests_gives_no_row() -> None:
    net, engine = build()
    kinds = {"a": mtu.RESTING * MASK.to(torch.int8), "b": torch.zeros(N, dtype=torch.int8)}
    update = backward(net, engine, mtu.Memory(), 0, forget=kinds)
    assert not (update.roles.kind == mtu.FORGET).any()
    found = grad_vector(trained(net.backbone))
    losses = net.losses(batch(0))
    loss = ALPHA * (losses["a"][~MASK].mean() + losses["b"].mean())
    expected = torch.autograd.grad(loss, trained(net.backbone))
    assert relative_error(found, torch.cat([g.flatten() for g in expected])) <= 1e-12


def test_the_interference_aware_method_is_orthogonal_to_kept_rows() -> None:
    net, engine = build()
    memory, subspace = mtu.Memory(size=RETAINED), mtu.Subspace(size=6 * N)
    method = mtu.InterferenceAware(0.0)
    for seed in range(9):
        clear(list(net.parameters()))
        engine.backward(
            net.losses(batch(seed)), method, forget=PARTIAL, subspace=subspace, memory=memory
        )
        move(net)
    kept = memory.held.rows
    assert kept is not None and subspace.full
    clear(list(net.parameters()))
    engine.backward(net.losses(batch(20)), method, forget=PARTIAL, subspace=subspace, memory=memory)
    d = {p: p.grad for p in trained(net.backbone)}
    size = grad_vector(trained(net.backbone)).norm()
    lengths = kept.gram().diagonal().sqrt()
    assert size > 0 and (kept.jvp(d).abs() <= 1e-6 * lengths * size).all()


# ---- who stays -----------------------------------------------------------------------------------


def test_a_budget_is_kept() -> None:
    net, engine = build()
    P = sum(p.numel() for p in net.backbone.parameters())
    memory = mtu.Memory(budget=8 * P * (RETAINED + 4))
    for seed in range(6):
        backward(net, engine, memory, seed)
        assert len(memory) <= RETAINED + 4
    assert len(memory) == memory.size == RETAINED + 4
    for size in (None, 4):
        with pytest.raises(ValueError, match="budget is 5 bytes, expected at least"):
            backward(net, engine, mtu.Memory(size, budget=5), 0)
        assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("per_task", [True, False])
def test_a_budget_bounds_the_size_that_is_asked_for(size: int, per_task: bool) -> None:
    net, engine = build()
    P = sum(p.numel() for p in net.backbone.parameters())
    for rows in (1, 4):
        memory = mtu.Memory(size, budget=8 * P * rows + 7, every=1, per_task=per_task)
        for seed in range(3):
            backward(net, engine, memory, seed)
            assert memory.size == min(size, rows)
            assert memory.size - per_task <= len(memory) <= memory.size


def test_as_many_of_each_task() -> None:
    net, engine = build()
    memory = mtu.Memory(size=10, per_task=True)
    for seed in range(4):
        backward(net, engine, memory, seed)
    block = memory.held.block
    assert block is not None
    assert block.roles.task.bincount().tolist() == [5, 5]


def test_only_some_tasks() -> None:
    net, engine = build()
    memory = mtu.Memory(tasks=("b",))
    backward(net, engine, memory, 0)
    assert len(memory) == N and memory.size == 4 * N
    with pytest.raises(ValueError, match=r"tasks names \['c'\], the rows have \['a', 'b'\]"):
        backward(net, engine, mtu.Memory(tasks=("c",)), 1)


def test_rows_that_forgetting_harms_most_stay() -> None:
    net, engine = build()
    memory = mtu.Memory(size=6, keep="conflicting", every=1)
    for seed in range(3):
        held = memory.held.rows
        losses = net.losses(batch(seed))
        J = matrix(truth_of(losses, trained(net.backbone)))
        backward(net, engine, memory, seed)
        new = torch.cat([J[3:N], J[N:]])
        every = new if held is None else torch.cat([explicit(held), new])
        harm = (every @ J[:3].mean(0)) / every.norm(dim=1)
        best = harm.topk(6).indices.sort().values
        kept = memory.held.rows
        assert kept is not None and relative_error(explicit(kept), every[best]) <= 1e-12


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"basis": True}, {"basis": True, "energy": 0.9}], ids=str
)
def test_other_forms(options: dict[str, Any]) -> None:
    """The step's rows are exact constraints whatever stands for those before; what is held is a constraint too."""
    net, engine = build(torch.float32)
    memory = mtu.Memory(size=RETAINED, **options)
    for seed in range(4):
        backward(net, engine, memory, seed, mtu.OrthoGrad(0.0))
    kept, params = memory.held.rows, trained(net.backbone)
    assert kept is not None and 0 < len(kept) <= RETAINED
    update = backward(net, engine, memory, 9, mtu.OrthoGrad(0.0))
    assert int((update.roles.kind == mtu.MEMORY).sum()) == len(kept)
    J = matrix(truth_of(net.losses(batch(9, torch.float32)), params))
    d = grad_vector(params)
    for rows, limit in ((torch.cat([J[3:N], J[N:]]), 1e-5), (explicit(kept), 1e-3)):
        assert ((rows @ d).abs() <= limit * rows.norm(dim=1) * d.norm()).all()


def explicit(rows: mtu.Rows) -> Tensor:
    return torch.cat([part.flatten(1) for part in rows.jacobian().values()], 1).double()


@pytest.mark.parametrize("seed", range(3))
def test_float32_rows_are_protected_as_without_a_memory(seed: int) -> None:
    net, engine = build(torch.float32)
    memory, params = mtu.Memory(), trained(net.backbone)
    for before in range(6):
        backward(net, engine, memory, 10 * seed + before, mtu.OrthoGrad(0.0))
        move(net)
    J = matrix(truth_of(net.losses(batch(seed, torch.float32)), params))
    backward(net, engine, memory, seed, mtu.OrthoGrad(0.0))
    rows, d = torch.cat([J[3:N], J[N:]]), grad_vector(params)
    assert ((rows @ d).abs() <= 1e-5 * rows.norm(dim=1) * d.norm()).all()


# ---- steps that fail, and steps that go on --------------------------------------------------------


class Scaled(nn.Module):
    """A layer and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = (torch.tanh(self.layer(x)) * self.scale).square().sum(1)
        return loss


@pytest.mark.parametrize("silent", [False, True])
def test_a_basis_of_numbers_and_of_rows_of_zeros(silent: bool) -> None:
    """A parameter of no dimensions is a part of the basis; rows of zeros span nothing."""
    torch.manual_seed(0)
    net = Scaled().double()
    engine, memory, params = mtu.Engine(net), mtu.Memory(every=1, basis=True), trained(net)
    mask, kept = torch.arange(N) < 3, torch.zeros(0, 25, dtype=torch.float64)
    for seed in range(4):
        loss = net(batch(seed))
        if silent:
            loss = torch.where(mask, loss, 0 * loss)
        J = matrix(truth_of({"loss": loss}, params))
        clear(params)
        engine.backward(loss, mtu.OrthoGrad(0.0), forget=mask, memory=memory)
        assert memory.held.rows is not None
        basis = matrix(dict(enumerate(memory.held.rows.jacobian().values())))
        fixed = torch.cat([J[~mask], kept])
        Q = torch.linalg.svd(fixed, full_matrices=False)
        Q = Q.Vh[Q.S > 1e-9]
        f = J[mask].mean(0)
        assert relative_error(grad_vector(params), f @ Q.T @ Q - f) <= 1e-9
        kept = basis
        with torch.no_grad():
            for p in params:
                p.mul_(1.001)


def test_a_step_that_fails_keeps_nothing() -> None:
    net, engine = build()
    memory = mtu.Memory(every=1)
    backward(net, engine, memory, 0)
    held = memory.held
    clear(list(net.parameters()))
    with pytest.raises(RuntimeError, match=r"to forget \[\('a', 2\)\] is not finite"):
        engine.backward(broken(net, 5), mtu.OrthoGrad(0.3), forget=PARTIAL, memory=memory)
    refuses = Refuses(0.3)
    subspace = mtu.Subspace()
    with pytest.raises(ArithmeticError, match="not today"):
        engine.backward(
            net.losses(batch(5)), refuses, forget=PARTIAL, subspace=subspace, memory=memory
        )
    assert memory.held is held and subspace.size is None
    assert all(p.grad is None for p in net.parameters())
    backward(net, engine, memory, 6)
    assert len(memory) == 2 * RETAINED


@pytest.mark.parametrize(
    "options",
    [{}, {"keep": "conflicting"}, {"basis": True}, {"dtype": torch.bfloat16}, {"budget": 60_000}],
    ids=str,
)
def test_one_that_loads_the_state_goes_on_alike(options: dict[str, Any], tmp_path: Path) -> None:
    """To the bit, through a file."""
    found = []
    for reload in (False, True):
        net, engine = build()
        memory = mtu.Memory(**options)
        for seed in range(9):
            if seed == 5:
                torch.save(memory.state_dict(), tmp_path / "state.pt")
            if seed == 5 and reload:
                memory = mtu.Memory(**options)
                state = torch.load(tmp_path / "state.pt", weights_only=True)
                memory.load_state_dict(state, engine.subspace_rows)
            backward(net, engine, memory, seed)
            move(net)
        found.append(grad_vector(list(net.parameters())))
    assert torch.equal(*found)


def test_micro_batches_are_one_step() -> None:
    found = []
    for parts in (1, 2):
        net, engine = build()
        memory = mtu.Memory()
        for seed in range(3):
            clear(list(net.parameters()))
            for i, x in enumerate(batch(seed).chunk(parts)):
                kinds = {"a": MASK.chunk(parts)[i]}
                engine.accumulate(
                    net.losses(x), mtu.OrthoGrad(ALPHA), forget=kinds, sync=i + 1 == parts,
                    memory=memory,
                )  # fmt: skip
            move(net)
        found.append(grad_vector(list(net.parameters())))
    assert relative_error(found[1], found[0]) <= 1e-9


def test_rows_of_two_loaders() -> None:
    found = []
    for twice in (False, True):
        net, engine = build()
        memory = mtu.Memory()
        for seed in range(3):
            clear(list(net.parameters()))
            x, gone = batch(seed), {"a": MASK}
            if twice:
                first = engine.rows(net.losses(x[:2]), forget={"a": MASK[:2]})
                rows = mtu.cat(first, engine.rows(net.losses(x[2:]), forget={"a": MASK[2:]}))
            else:
                rows = engine.rows(net.losses(x), forget=gone)
            memory.step(rows, mtu.OrthoGrad(ALPHA))
            with pytest.raises(RuntimeError, match="used these rows up"):
                rows.gram()
        found.append(grad_vector(list(net.parameters())))
    assert relative_error(found[1], found[0]) <= 1e-9


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"size": 0}, ValueError, "Memory: size: found 0"),
        ({"every": 1.5}, TypeError, "Memory: every: found 1.5"),
        ({"tasks": "seg"}, TypeError, "expected several names"),
        ({"keep": "oldest"}, ValueError, "keep: found 'oldest', expected one of"),
        ({"per_task": 1}, TypeError, "per_task: found 1, expected True or False"),
        ({"budget": 0}, ValueError, "budget: found 0"),
        ({"energy": 0.5}, ValueError, "basis=True"),
        ({"dtype": torch.int32}, TypeError, "dtype: found torch.int32"),
        ({"basis": True, "keep": "conflicting"}, ValueError, "keep='conflicting' with basis=True"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        mtu.Memory(**options)


def test_misuse_is_named() -> None:
    net, engine = build()
    losses = net.losses(batch(0))
    with pytest.raises(ValueError, match=r"LevelledOrthoGrad moves across .* mtu.Memory\(\)"):
        engine.backward(losses, mtu.LevelledOrthoGrad(), forget=PARTIAL)
    with pytest.raises(ValueError, match="GradDiff does not use one"):
        engine.backward(losses, mtu.GradDiff(), forget=PARTIAL, memory=mtu.Memory())
    with pytest.raises(TypeError, match=r"memory: found int, expected an mtu\.Memory"):
        engine.backward(losses, mtu.OrthoGrad(), forget=PARTIAL, memory=3)
    assert all(p.grad is None for p in net.parameters())


# ---- how the products with kept rows are made -----------------------------------------------------


class Deep(nn.Module):
    """A convolution, a norm and a head that only some steps reach."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.GroupNorm(3, 3)
        self.heads = nn.ModuleDict({task: nn.Linear(12, 4) for task in ("a", "b")})

    def losses(self, x: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
        h = torch.tanh(self.norm(self.conv(x))).flatten(1)
        return {task: self.heads[task](h).square().sum(1) for task in tasks}


GRANULARITY = ["global", "layer", "tensor"]


def steps(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, beside: bool, per: Any, factor: float
) -> list[tuple[Tensor, Tensor]]:
    """`.grad` and Gram of twelve steps that are all taken in; `beside` says how products are made."""
    taken = own.kept_of if beside else lambda parts, shared: 0
    monkeypatch.setattr(own, "kept_of", taken)
    torch.manual_seed(0)
    net = Deep().to(dtype)
    engine, memory, found = mtu.Engine(net), mtu.Memory(60, every=1), []
    for seed in range(12):
        clear(list(net.parameters()))
        x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
        losses = net.losses(x, (("a", "b"), ("b",), ("b", "a"))[seed % 3])
        scaled = {task: factor * loss for task, loss in losses.items()}
        update = engine.backward(
            scaled, mtu.OrthoGrad(0.3, granularity=per),
            forget={"b": torch.arange(5) < 2}, memory=memory,
        )  # fmt: skip
        assert update.gram is not None and (update.into is not None) == (beside and seed > 0)
        into = torch.arange(len(update.roles)) if update.into is None else update.into
        stays = (update.roles.kind != mtu.FORGET).nonzero().flatten()
        gram = update.gram[..., into[stays][:, None], into[stays]]
        found.append((grad_vector(list(net.parameters())).double(), gram))
        move(net)
    return found


@pytest.mark.parametrize("per", GRANULARITY)
def test_beside_kept_rows_products_are_those_of_all_rows(
    monkeypatch: pytest.MonkeyPatch, per: Any
) -> None:
    """More batches than stay in matrices of their own, tasks that are missing and in another order."""
    found = steps(monkeypatch, torch.float64, True, per, 1.0)
    expected = steps(monkeypatch, torch.float64, False, per, 1.0)
    for (_, gram), (_, truth) in zip(found, expected, strict=True):
        assert relative_error(gram, truth) <= 1e-12
    if per == "global":  # of one tensor rows depend on one another
        for (grad, _), (truth, _) in zip(found, expected, strict=True):
            assert relative_error(grad, truth) <= 1e-9


@pytest.mark.parametrize("factor", [1.0, 1e-20, 1e18])
def test_products_beside_kept_rows_in_float32(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Also of rows whose squares float32 does not hold."""
    found = steps(monkeypatch, torch.float32, True, "global", factor)[:2]
    expected = steps(monkeypatch, torch.float32, False, "global", factor)[:2]
    for (_, gram), (_, truth) in zip(found, expected, strict=True):
        lengths = truth.diagonal().sqrt()
        assert ((gram - truth).abs() <= 1e-6 * lengths[:, None] * lengths).all()


class Explicit(nn.Module):
    """A model whose gradients are the rows it is given."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))


Rows = tuple[Tensor, Tensor]  # to retain, to forget


def directions(batches: list[Rows], method: mtu.Method, dtype: torch.dtype) -> list[Tensor]:
    """`.grad` of the steps that these rows, held in float32, make."""
    model = Explicit(batches[0][0].shape[1], dtype)
    engine, found = mtu.Engine(model), []
    memory = mtu.Memory(64, every=1)
    for retain, forget in batches:
        clear([model.weight])
        # that of a first step: the whole space
        subspace = mtu.Subspace() if method.needs_subspace else None
        J = torch.cat([retain, forget]).float().to(dtype)
        engine.backward(
            (J * model.weight).sum(1), method, forget=torch.arange(len(J)) >= len(retain),
            memory=memory, subspace=subspace,
        )  # fmt: skip
        found.append(grad_vector([model.weight]).double())
    return found


def conditioned(cond: float) -> list[Rows]:
    """Steps whose own rows are of this condition."""
    found = []
    for seed in range(3):
        J = matrices.conditioned(16, 200, cond, seed)
        g = [matrices.balanced_vector(J, seed + i) for i in range(3)]
        found.append((J, torch.stack(g)))
    return found


def resembling(near: float) -> list[Rows]:
    """Steps of random rows; those of the last are nearly sums of kept ones."""
    draw = torch.Generator().manual_seed(0)
    a, b, new = torch.randn(3, 16, 2000, generator=draw).unbind()
    g = torch.randn(3, 2000, generator=draw)
    return [(a, g), (b, g + a[:3]), (a + b + near * new, g + a[:3] + b[3:6])]


@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.0), mtu.InterferenceAware(0.0)], ids=repr)
@pytest.mark.parametrize(
    ("made", "how"),
    [
        *((conditioned, cond) for cond in (10.0, 1e3, 1e5, 1e6)),
        *((resembling, near) for near in (1e-1, 1e-2, 1e-3, 1e-4)),
    ],
)
def test_float32_rows_beside_kept_ones_err_as_all_rows_do(
    made: Any, how: float, method: mtu.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However badly conditioned: the products with kept rows, and those kept of them, are not rounded to float32."""
    batches = made(how)
    truth = directions(batches, method, torch.float64)
    beside = directions(batches, method, torch.float32)
    monkeypatch.setattr(own, "kept_of", lambda parts, shared: 0)
    apart = directions(batches, method, torch.float32)
    for found, usual, exact in zip(beside, apart, truth, strict=True):
        assert relative_error(found, exact) <= 2 * relative_error(usual, exact) + 1e-6
