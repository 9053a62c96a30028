"""What the surgery of task rows has in common: signs, zero and kept rows, batches, order, scale, and the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from mtu_fast import reference
from mtu_fast.methods import (
    FORGET,
    GDRGMA,
    IMTLG,
    RETAIN,
    SUBSPACE,
    AlignedMTL,
    FairGrad,
    GradVac,
    Method,
    MUNBa,
    NashMTL,
    Roles,
    Sum,
)
from tests.helpers import matrices
from tests.helpers.checks import clear, grad_vector
from tests.helpers.matrices import roles
from tests.helpers.truth import relative_error
from tests.helpers.zoo import by_name

Make = Callable[[], Method]
PAIRWISE: dict[str, Make] = {  # a row for each (kind, task)
    "sum": Sum,
    "gradvac": lambda: GradVac(beta=0.3),
    "imtlg": IMTLG,
    "nashmtl": NashMTL,
    "fairgrad": lambda: FairGrad(2.0),
    "alignedmtl": AlignedMTL,
}
TWO_SIDED: dict[str, Make] = {"munba": MUNBa, "gdrgma": GDRGMA}
ALL = PAIRWISE | TWO_SIDED
OPTIONS = {"gradvac": {"beta": 0.3}, "fairgrad": {"a": 2.0}}
MASK = torch.tensor([True, False, False, True, False, False])
KINDS, TASKS = [RETAIN, FORGET, RETAIN, FORGET, RETAIN], [0, 0, 1, 1, 2]
WHO = {
    "mixed": (KINDS, TASKS),
    "retain": ([RETAIN] * 3, [0, 1, 2]),
    "forget": ([FORGET] * 3, [0, 1, 2]),
}


def rows_of(R: int, seed: int, conflict: float = 0.5) -> Tensor:
    """[R, 9] float64, of lengths apart; `conflict` of their mean is taken away."""
    J = torch.stack([matrices.random_vector(9, 100 * seed + r) for r in range(R)])
    return (J - conflict * J.mean(0)) * torch.logspace(-1, 1, R, dtype=J.dtype)[:, None]


def with_losses(who: Roles) -> Roles:
    """Losses near the threshold of GDR-GMA, so that both sides count."""
    loss = torch.linspace(0.01, 0.03, len(who), dtype=torch.float64)
    return Roles(who.task, who.sample, who.kind, loss, who.tasks, who.dtype)


def sides_of(J: Tensor, who: Roles) -> reference.Sides:
    """The rows by role and task."""
    masks = [
        {task: (who.task == t) & (who.kind == kind) for t, task in enumerate(who.tasks)}
        for kind in (RETAIN, FORGET)
    ]
    rows, losses = (
        [{task: x[at] for task, at in mask.items()} for mask in masks] for x in (J, who.loss)
    )
    return reference.Sides(rows[0], rows[1], losses[0], losses[1])


def by_reference(name: str, J: Tensor, who: Roles) -> Tensor:
    return reference.METHODS[name](**OPTIONS.get(name, {})).direction(sides_of(J, who))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("case", WHO)
@pytest.mark.parametrize("conflict", [0.0, 0.8])
def test_is_the_reference_on_explicit_gradients(name: str, case: str, conflict: float) -> None:
    kinds, tasks = WHO[case]
    J, who = rows_of(len(kinds), 3, conflict), with_losses(roles(kinds, tasks))
    assert relative_error(J.t() @ ALL[name]()(J @ J.t(), who), by_reference(name, J, who)) <= 1e-9


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("forget", [MASK, {"b": MASK}, None])
def test_a_step_of_the_engine_is_that_of_the_reference(
    name: str, forget: Tensor | dict[str, Tensor] | None
) -> None:
    """Shared layers and heads, full-task and partial-task requests, nothing to forget."""
    model, forward = by_name("mlp").build(3, 6)
    params, heads = list(model.backbone.parameters()), list(model.heads.parameters())
    blocks = [[j] for j in range(len(params))] if name == "gdrgma" else None
    options = OPTIONS.get(name, {})
    reference.backward(
        params, forward(), name, forget=forget, outside=heads, blocks=blocks, **options
    )
    expected = grad_vector([*params, *heads])
    clear([*params, *heads])
    mtu.Engine(model, params=model.backbone.parameters()).backward(
        forward(), ALL[name](), forget=forget
    )
    assert relative_error(grad_vector([*params, *heads]), expected) <= 1e-9


@pytest.mark.parametrize("name", ALL)
def test_outside_gets_what_the_reference_says(name: str) -> None:
    who = with_losses(roles([RETAIN, FORGET, RETAIN, FORGET], [0, 0, 1, 1]))
    known = reference.METHODS[name](**OPTIONS.get(name, {}))
    sides = sides_of(torch.zeros(4, 0, dtype=torch.float64), who)
    pairs = [known.outside(sides, task) for task in "ab"]
    expected = [
        sign * float(x) for pair in pairs for sign, x in zip((1.0, -1.0), pair, strict=True)
    ]
    assert ALL[name]().outside(who).tolist() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_forget_row_is_a_retain_row_negated(name: str) -> None:
    """Ascent on g is descent on -g: turning rows round and calling them retained gives the weights negated."""
    J, who = rows_of(5, 1), roles(KINDS, TASKS)
    sign = torch.tensor([1.0 if kind == RETAIN else -1.0 for kind in KINDS], dtype=torch.float64)
    other = roles([RETAIN] * 5, [0, 1, 2, 3, 4])
    signed = sign[:, None] * J
    w = ALL[name]()(J @ J.t(), who)
    assert relative_error(sign * w, ALL[name]()(signed @ signed.t(), other)) <= 1e-9


@pytest.mark.parametrize("name", ALL)
def test_a_direction_descends_on_retain_and_ascends_on_forget(name: str) -> None:
    """Rows that agree once the forget rows are turned."""
    base = rows_of(4, 2, 0.0) * 0.05 + 1.0
    kinds = [RETAIN, FORGET, RETAIN, FORGET]
    J = base * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None]
    effect = J @ (J.t() @ ALL[name]()(J @ J.t(), with_losses(roles(kinds, [0, 0, 1, 1]))))
    assert effect.sign().tolist() == [1.0, -1.0, 1.0, -1.0]


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_its_matrices_one_by_one(name: str) -> None:
    G = torch.stack([J @ J.t() for J in (rows_of(5, seed, 0.8) for seed in range(6))]).view(
        2, 3, 5, 5
    )
    G[1, 1, 2], G[1, 1, :, 2] = 0.0, 0.0
    who = with_losses(roles(KINDS, TASKS))
    batched = ALL[name]()(G, who) if name != "sum" else Sum()(None, who).expand(2, 3, 5)
    one_by_one = torch.stack([ALL[name]()(g, who) for g in G.view(6, 5, 5)]).view(2, 3, 5)
    torch.testing.assert_close(batched, one_by_one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in ALL if name != "gradvac"])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_rows_makes_no_difference(name: str, seed: int) -> None:
    J, who = rows_of(5, seed, 0.8), with_losses(roles(KINDS, TASKS))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    moved = Roles(
        who.task[order], who.sample[order], who.kind[order], who.loss[order], who.tasks, who.dtype
    )
    w = ALL[name]()(J @ J.t(), who)
    assert relative_error(ALL[name]()(J[order] @ J[order].t(), moved), w[order]) <= 1e-9


@pytest.mark.parametrize(
    ("name", "degree"),
    [
        ("sum", 0), ("gradvac", 0), ("imtlg", 0), ("alignedmtl", 0), ("nashmtl", -1), ("fairgrad", -4 / 3),
        ("munba", -1), ("gdrgma", 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_weights_are_homogeneous_in_the_scale_of_the_losses(
    name: str, degree: float, factor: float
) -> None:
    """J -> c J gives w -> c^degree w."""
    J, who = rows_of(5, 2, 0.8), with_losses(roles(KINDS, TASKS))
    G = J @ J.t()
    assert (
        relative_error(ALL[name]()(factor**2 * G, who), factor**degree * ALL[name]()(G, who))
        <= 1e-9
    )


@pytest.mark.parametrize("name", ["nashmtl", "imtlg"])
def test_the_scale_of_one_loss_does_not_turn_the_direction(name: str) -> None:
    J, who = rows_of(5, 2, 0.8), roles(KINDS, TASKS)
    scaled = J * torch.tensor([1e-5, 1.0, 1e4, 3.0, 1e-2], dtype=torch.float64)[:, None]
    d, other = (K.t() @ ALL[name]()(K @ K.t(), who) for K in (J, scaled))
    assert relative_error(other / other.norm(), d / d.norm()) <= 1e-9


@pytest.mark.parametrize("name", [name for name in PAIRWISE if name != "sum"])
def test_a_zero_row_changes_nothing_for_the_others(name: str) -> None:
    J, who = rows_of(4, 5, 0.8), roles([RETAIN, FORGET, RETAIN, FORGET], [0, 0, 1, 1])
    J[2] = 0.0
    left = J[[0, 1, 3]]
    fewer = roles([RETAIN, FORGET, FORGET], [0, 0, 1])
    d = J.t() @ PAIRWISE[name]()(J @ J.t(), who)
    expected = left.t() @ PAIRWISE[name]()(left @ left.t(), fewer)
    if name == "alignedmtl":
        expected = 0.75 * expected  # a zero row has its share of p all the same
    assert relative_error(d, expected) <= 1e-9


@pytest.mark.parametrize("name", ALL)
def test_rows_that_are_all_zero_give_finite_weights(name: str) -> None:
    assert ALL[name]()(torch.zeros(5, 5, dtype=torch.float64), roles(KINDS, TASKS)).isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_subspace_rows_take_no_part(name: str) -> None:
    J, who = rows_of(6, 4, 0.8), with_losses(roles([*KINDS, SUBSPACE], [*TASKS, 0]))
    w = ALL[name]()(J @ J.t(), who)
    few = Roles(who.task[:5], who.sample[:5], who.kind[:5], who.loss[:5], who.tasks, who.dtype)
    assert w[5] == 0 and ALL[name]().outside(who)[5] == 0
    assert relative_error(w[:5], ALL[name]()(J[:5] @ J[:5].t(), few)) <= 1e-9


@pytest.mark.parametrize("name", ALL)
def test_one_row_is_its_own_direction(name: str) -> None:
    J = rows_of(1, 0, 0.0)
    for kind, sign in ((RETAIN, 1.0), (FORGET, -1.0)):
        d = J.t() @ ALL[name]()(J @ J.t(), with_losses(roles([kind])))
        assert relative_error(d / d.norm(), sign * J[0] / J.norm()) <= 1e-12


@pytest.mark.parametrize("name", ALL)
def test_no_rows_have_no_weights(name: str) -> None:
    for shape in ((0, 0), (3, 0, 0)):
        w = ALL[name]()(torch.zeros(shape, dtype=torch.float64), roles([]))
        assert w.shape[-1] == 0 and w.dtype == torch.float64


@pytest.mark.parametrize("name", ALL)
def test_duplicate_rows_are_ordinary_input(name: str) -> None:
    """Two tasks with one gradient, beside a third: finite, the same weight for the two, downhill for all."""
    J = rows_of(3, 3, 0.0)
    J = torch.stack([J[0], J[0], J[1] + 2 * J[0], J[2] + 3 * J[0]])
    w = ALL[name]()(J @ J.t(), with_losses(roles([RETAIN] * 4, [0, 1, 2, 3])))
    assert w.isfinite().all() and (w[0] - w[1]).abs() <= 1e-7 * w[0].abs()
    assert (J @ (J.t() @ w) > 0).all()


@pytest.mark.parametrize("name", ALL)
def test_leaves_the_global_random_state_alone(name: str) -> None:
    J, before = rows_of(5, 0), torch.get_rng_state()
    ALL[name]()(J @ J.t(), roles(KINDS, TASKS))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_read_on_the_host(name: str) -> None:
    """Tensors of the meta device hold no values: whoever asks for one fails."""
    who = roles(KINDS, TASKS)
    task, sample, kind, loss = (
        column.to("meta") for column in (who.task, who.sample, who.kind, who.loss)
    )
    empty = Roles(task, sample, kind, loss, who.tasks, who.dtype)
    w = ALL[name]()(torch.empty(2, 5, 5, dtype=torch.float64, device="meta"), empty)
    assert w.device.type == "meta" and w.shape[-1] == 5 and w.dtype == torch.float64
    assert ALL[name]().outside(empty).device.type == "meta"


@pytest.mark.parametrize("name", [name for name in ALL if name != "sum"])
def test_refuses_a_gram_of_other_rows(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected \[..., 5, 5\] for 5 rows"):
        ALL[name]()(torch.eye(4, dtype=torch.float64), roles(KINDS, TASKS))
