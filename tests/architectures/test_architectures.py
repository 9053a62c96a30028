"""Rows of models of the `transformers` package against one backward per row, on batches that are masked differently."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.helpers.checks import (
    FLOOR,
    assert_rows,
    combine_error,
    random_weights,
    trained,
    truth_of,
)
from tests.helpers.truth import combine_truth, gram_truth, matrix, relative_error

pytest.importorskip("transformers")

from tests.architectures.zoo import ARCHITECTURES, Architecture, N, Wide, doubled

SEEDS = (0, 1, 2)  # the padding is on the right, on the left, on the right

pytestmark = pytest.mark.usefixtures("one_thread")
every = pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda case: case.name)


def steps(model: nn.Module, losses: Iterator[Tensor], tolerance: float) -> None:
    """One engine over all batches; each is compared with a backward per row on its own graph."""
    engine, params = mtu.Engine(model), trained(model)
    for seed, loss in enumerate(losses):
        J = truth_of({"loss": loss}, params)
        assert_rows(engine.rows(loss), J, params, tolerance, seed)


@every
def test_float32(case: Architecture) -> None:
    """As it is made."""
    model = case.build()
    steps(model, (case.losses(model, case.batch(seed)) for seed in SEEDS), 2e-5)


@every
def test_float64(case: Architecture) -> None:
    """In float64 throughout, also where the model casts to float32."""
    model = doubled(case.build())
    with Wide():
        batches = [case.losses(model, case.batch(seed)) for seed in SEEDS]
    steps(model, iter(batches), 1e-10)


# Models that cast to float32 themselves; the others are in float64 throughout anyway. Gemma3's
# eager attention is left out: to a query that sees nothing it adds the least float64 in float32,
# which is minus infinity, and so NaN. With padding on the right every query sees something, but for
# windows.
CASTING = (
    "llama",
    "qwen3",
    "gemma3-sdpa",
    "mixtral",
    "t5",
    "vit-eager",
    "swin-eager",
    "clip-eager",
    "mamba",
)


@pytest.mark.parametrize(
    "case", [a for a in ARCHITECTURES if a.name.startswith(CASTING)], ids=lambda case: case.name
)
def test_double_with_float32_inside(case: Architecture) -> None:
    """As `.double()` leaves it, softmax and norms in float32: what plain autograd rounds there is rounding here."""
    model = doubled(case.build())
    engine, params = mtu.Engine(model), trained(model)
    for seed in SEEDS[::2]:
        losses = case.losses(model, case.batch(seed))
        J = truth_of({"loss": losses}, params)
        plain = combine_error(
            weighted(losses, params, seed), combine_truth(J, random_weights(N, seed)), params
        )
        assert_rows(engine.rows(losses), J, params, max(1e-10, 4 * plain), seed)


def weighted(losses: Tensor, params: Sequence[Tensor], seed: int) -> dict[Tensor, Tensor]:
    """The plain backward of the losses under random weights; the graph is kept."""
    w = random_weights(len(losses), seed).to(losses.dtype)
    found = torch.autograd.grad(losses, params, w, retain_graph=True, allow_unused=True)
    return {p: g for p, g in zip(params, found, strict=True) if g is not None}


# ---- bfloat16 ------------------------------------------------------------------------------------


@every
def test_bfloat16_weights(case: Architecture) -> None:
    """Weights and activations in bfloat16; the truth has the same weights."""
    model = case.build().bfloat16()
    compared(case, model, doubled(copy.deepcopy(model)))


@every
def test_bfloat16_autocast(case: Architecture) -> None:
    """Weights in float32, the forward under autocast."""
    model = case.build()
    compared(case, model, doubled(copy.deepcopy(model)), autocast=True)


def compared(
    case: Architecture, model: nn.Module, exact: nn.Module, autocast: bool = False
) -> None:
    """Gram and d of random weights are at most twice as far from float64 as those of plain autograd.

    In one batch plain autograd may be lucky with a Gram, whose error is a handful of numbers, or
    with a small
    parameter: its rows' relative error counts as its Gram's, too, and parameters are compared over
    all batches, to three times plain autograd's error there or its relative error of all
    parameters.
    """
    engine, params = mtu.Engine(model), trained(model)
    squares = torch.zeros(3, len(params), dtype=torch.float64)
    for seed in SEEDS:
        with Wide():
            truth = case.losses(exact, case.batch(seed))
        K, w = truth_of({"loss": truth}, trained(exact)), random_weights(N, seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = case.losses(model, case.batch(seed))
        J, d = truth_of({"loss": losses}, params), combine_truth(K, w)
        plain, size = (
            weighted(losses, params, seed),
            torch.stack([part.norm() for part in d.values()]),
        )
        G, rows = gram_truth(K), engine.rows(losses)
        ours, theirs = gaps(rows.vjp(w), d, params), gaps(plain, d, params)
        assert theirs.norm() <= 0.2 * size.norm(), (
            "plain autograd is far from float64: another expert was chosen?"
        )
        assert ours.norm() <= 2 * theirs.norm()
        of_rows = max(relative_error(gram_truth(J), G), relative_error(matrix(J), matrix(K)))
        assert relative_error(rows.gram(), G) <= 2 * of_rows
        squares += torch.stack([ours, theirs, size]).square()
    ours, theirs, size = squares.sqrt()
    share = theirs.norm() / size.norm() * size.clamp(min=FLOOR * float(size.norm()))
    assert bool((ours <= 3 * torch.maximum(theirs, share)).all())


def gaps(
    found: Mapping[Tensor, Tensor], truth: Mapping[int, Tensor], params: Sequence[Tensor]
) -> Tensor:
    """How far every parameter's d is from the truth."""
    return torch.stack([
        (found.get(p, torch.zeros_like(p)).double() - truth[j]).norm() for j, p in enumerate(params)
    ])


# ---- what the comparison rests on ----------------------------------------------------------------


@every
def test_samples_are_told_apart(case: Architecture) -> None:
    """Each sample has a loss of its own, the same among other samples; but not under a contrastive loss."""
    model, batch, other = doubled(case.build()), case.batch(0), case.batch(2)
    exchanged = {name: torch.cat([x[:1], other[name][1:]]) for name, x in batch.items()}
    with torch.no_grad(), Wide():
        before, after = case.losses(model, batch), case.losses(model, exchanged)
    assert not torch.isclose(before[1:], after[1:]).any()
    assert bool(torch.isclose(before[0], after[0], rtol=1e-12)) == (case.name != "clip_contrastive")


@every
def test_plain_backward_is_the_sum_of_rows(case: Architecture) -> None:
    """The truth is one: in float64 throughout, the backward of weighted losses is that of the rows."""
    model = doubled(case.build())
    params = trained(model)
    with Wide():
        losses = case.losses(model, case.batch(1))
    J = truth_of({"loss": losses}, params)
    assert (
        combine_error(weighted(losses, params, 1), combine_truth(J, random_weights(N, 1)), params)
        <= 1e-12
    )
