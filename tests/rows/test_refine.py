"""Refinement: with a Gram of rounded products, the update is what an exact one gives, or no worse than without.

The Gram of a GPU's float32 tiles, TF32×3 or TF32 products is that of the CPU with as much noise,
relative to the rows' lengths, at every entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast import reference
from mtu_fast._rows import refine
from mtu_fast._rows import solve as solve_file
from mtu_fast._rows.own import OwnProducts
from tests.helpers import matrices
from tests.helpers.checks import clear
from tests.helpers.truth import relative_error

RETAINED, WIDTH = 32, 300
TILES, TF32X3, TF32 = 5e-9, 1e-7, 5e-4
EPS32 = torch.finfo(torch.float32).eps
# rounding d to float32 moves it by 0.2 EPS32 |d|, of which a row sees one in √P
ROUNDED = 4 * EPS32 / WIDTH**0.5
Blocks = Mapping[str, Tensor]


class Explicit(nn.Module):
    """A model whose loss r has the gradient J[name][r] by parameter `name.weight`."""

    def __init__(self, J: Blocks) -> None:
        super().__init__()
        self.J = J
        for name, rows in J.items():
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.ones(rows.shape[1], dtype=rows.dtype))
            self.add_module(name, layer)

    def forward(self) -> Tensor:
        return torch.stack([
            (rows * self.get_submodule(name).weight).sum(1) for name, rows in self.J.items()
        ]).sum(0)


class Spoiled:
    """Grams with noise and `inexact` True, on demand; counts pushes. Exact Grams are not refined."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(refine, "CONDITION_EXACT", math.inf)
        self.patch, self.pushes, self.combines = monkeypatch, 0, 0
        self.gram, push, combine = mtu.Rows.gram, OwnProducts.jvp, OwnProducts.vjp

        def counted_push(rows: OwnProducts, *args: Any) -> Tensor:
            self.pushes += 1
            return push(rows, *args)

        def counted_combine(rows: OwnProducts, *args: Any) -> dict[Tensor, Tensor]:
            self.combines += 1
            return combine(rows, *args)

        monkeypatch.setattr(OwnProducts, "jvp", counted_push)
        monkeypatch.setattr(OwnProducts, "vjp", counted_combine)

    def noise(self, relative: float, seed: int, inexact: bool = True) -> None:
        def gram(rows: mtu.Rows, per: str = "total") -> Tensor:
            G = self.gram(rows, per)
            length = G.diagonal(dim1=-2, dim2=-1).sqrt()
            noise = torch.randn(
                G.shape, generator=torch.Generator().manual_seed(seed), dtype=G.dtype
            )
            return (
                G
                + relative
                * (noise + noise.mT)
                / 2**0.5
                * length[..., :, None]
                * length[..., None, :]
            )

        self.patch.setattr(mtu.Rows, "gram", gram)
        self.patch.setattr(solve_file, "inexact", lambda *_: inexact)
        self.pushes = self.combines = 0


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Spoiled:
    return Spoiled(monkeypatch)


def scene(cond: float, seed: int, balanced: bool = True, blocks: int = 1) -> Blocks:
    """Float32 rows of the condition, and one to forget, in each block."""
    found = {}
    for b in range(blocks):
        J = matrices.conditioned(RETAINED, WIDTH, cond, seed + 10 * b)
        g = matrices.balanced_vector(J, seed) if balanced else matrices.random_vector(WIDTH, seed)
        found[f"layer{b}"] = torch.cat([J, g[None]]).float()
    return found


def step(J: Blocks, method: Any) -> tuple[dict[str, Tensor], mtu.Update]:
    """The gradients that a step leaves, by block, and what it says."""
    model = Explicit(J)
    forget = torch.arange(len(next(iter(J.values())))) >= RETAINED
    update = mtu.Engine(model).rows(model(), forget=forget).backward(method)
    found = {name: model.get_submodule(name).weight.grad.clone() for name in J}
    clear(model.parameters())
    return found, update


def truth(J: Tensor, alpha: float = 0.0) -> Tensor:
    J = J.double()
    return reference.orthograd({"a": J[:RETAINED]}, {"a": J[RETAINED:]}, alpha, 1e-9)


def error(found: Blocks, J: Blocks, alpha: float = 0.0) -> float:
    return max(relative_error(found[name], truth(J[name], alpha)) for name in found)


def leaning(d: Tensor, J: Tensor) -> float:
    """The largest |J_r d| / (|J_r| |d|)."""
    rows, d = J[:RETAINED].double(), d.double()
    return float(((rows @ d).abs() / rows.norm(dim=1)).max() / d.norm())


SEEDS = range(3)
# noise times condition² < 1
CONTRACTS = [(TILES, 1.5e2), (TILES, 1e3), (TILES, 1e4), (TF32X3, 1.5e2), (TF32X3, 1e3)]
TOO_ROUGH = [(TILES, 1e5), (TF32X3, 1e4), (TF32, 1e2), (TF32, 1e3), (TF32, 1e4)]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("noise", "cond"), CONTRACTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_update_is_what_an_exact_gram_gives(
    noise: float, cond: float, balanced: bool, seed: int, spoiled: Spoiled
) -> None:
    J, method = scene(cond, seed, balanced), mtu.OrthoGrad(0.0)
    exact = error(step(J, method)[0], J)
    spoiled.noise(noise, seed, inexact=False)
    unrefined, _ = step(J, method)
    spoiled.noise(noise, seed)
    refined, update = step(J, method)
    # The exact Gram's error is that of combining in float32; another order of roundings may double
    # it.
    assert error(refined, J) <= 2 * exact
    assert error(unrefined, J) > 2 * exact
    # at 1e4 three passes remove a half to nine tenths each
    bound = ROUNDED if cond <= 1e3 else 10 * ROUNDED
    assert (
        leaning(refined["layer0"], J["layer0"]) <= bound < leaning(unrefined["layer0"], J["layer0"])
    )
    assert float(update.residual) == pytest.approx(
        leaning(refined["layer0"], J["layer0"]), rel=1e-5
    )
    # a pass is one of each; one more for what is not refined
    assert spoiled.pushes <= 4 and spoiled.combines <= 5


@pytest.mark.parametrize(("noise", "cond"), TOO_ROUGH)
@pytest.mark.parametrize("seed", SEEDS)
def test_where_the_gram_is_too_rough_nothing_gets_worse_and_the_update_says_so(
    noise: float, cond: float, seed: int, spoiled: Spoiled
) -> None:
    J, method = scene(cond, seed), mtu.OrthoGrad(0.0)
    spoiled.noise(noise, seed, inexact=False)
    unrefined, before = step(J, method)
    spoiled.noise(noise, seed)
    refined, update = step(J, method)
    assert error(refined, J) <= error(unrefined, J) * (1 + EPS32)
    assert before.residual is None
    assert float(update.residual) > 100 * ROUNDED
    # noisy |J_r|
    assert float(update.residual) == pytest.approx(
        leaning(refined["layer0"], J["layer0"]), rel=1e-2
    )


@pytest.mark.parametrize(("noise", "cond", "seed"), [(2e-8, 3e4, 9), (TF32, 1e2, 6)])
def test_a_smaller_residual_alone_does_not_make_a_pass_count(
    noise: float, cond: float, seed: int, spoiled: Spoiled
) -> None:
    """Found among 168 draws with Grams too rough: a pass halves the residual and errs 1.1 to 1.6 times as much."""
    J, method = scene(cond, seed), mtu.OrthoGrad(0.0)
    spoiled.noise(noise, seed, inexact=False)
    unrefined, _ = step(J, method)
    spoiled.noise(noise, seed)
    refined, _ = step(J, method)
    assert error(refined, J) <= error(unrefined, J) * (1 + EPS32)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_other_part_of_the_update_is_left_alone(alpha: float, spoiled: Spoiled) -> None:
    """alpha times the mean retain gradient, which is not to be orthogonal to anything."""
    J = scene(1e3, 0)
    exact, _ = step(J, mtu.OrthoGrad(alpha))
    spoiled.noise(TILES, 0)
    refined, _ = step(J, mtu.OrthoGrad(alpha))
    assert error(refined, J, alpha) <= 2 * error(exact, J, alpha)


@pytest.mark.parametrize("cond", [1e5, 1e6])
@pytest.mark.parametrize("seed", SEEDS)
def test_of_an_exact_gram_the_rounding_of_the_update_is_refined(
    cond: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 `Jᵀ w` leans on retain rows by some eps · cond: a cosine of 1e-4 at 1e6."""
    J, method = scene(cond, seed), mtu.OrthoGrad(0.0)
    refined, update = step(J, method)
    monkeypatch.setattr(refine, "CONDITION_EXACT", math.inf)
    unrefined, before = step(J, method)
    assert before.residual is None and update.residual is not None
    left = leaning(refined["layer0"], J["layer0"])
    assert left <= 2 * ROUNDED < leaning(unrefined["layer0"], J["layer0"]) / 5
    assert float(update.residual) == pytest.approx(left, rel=1e-5)


def test_an_exact_gram_costs_nothing_more(
    spoiled: Spoiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the condition at which it matters; rows of float64 and dependent rows ask for nothing."""
    monkeypatch.setattr(refine, "CONDITION_EXACT", 1e4)
    _, update = step(scene(5e3, 0), mtu.OrthoGrad(0.0))
    assert (spoiled.pushes, spoiled.combines) == (0, 1) and update.residual is None
    J = scene(60.0, 0)["layer0"]
    twice = torch.cat([matrices.with_duplicates(J[:RETAINED]), J[RETAINED:]])
    step({"layer0": twice}, mtu.OrthoGrad(0.0))
    step({"layer0": scene(1e6, 0)["layer0"].double()}, mtu.OrthoGrad(0.0))
    assert (spoiled.pushes, spoiled.combines) == (0, 3)


def test_well_conditioned_rows_are_not_refined(spoiled: Spoiled) -> None:
    J, method = scene(60.0, 0), mtu.OrthoGrad(0.0)
    spoiled.noise(TILES, 0, inexact=False)
    unrefined, _ = step(J, method)
    spoiled.noise(TILES, 0)
    found, update = step(J, method)
    assert spoiled.pushes == 0 and update.residual is None
    assert torch.equal(found["layer0"], unrefined["layer0"])


@pytest.mark.parametrize(
    "method", [mtu.Mean(), torch.ones(RETAINED + 1).double()], ids=["mean", "weights"]
)
def test_what_constrains_nothing_is_not_refined(method: Any, spoiled: Spoiled) -> None:
    spoiled.noise(TILES, 0)
    _, update = step(scene(1e4, 0), method)
    assert spoiled.pushes == 0 and update.residual is None


def test_each_layer_is_refined_by_itself(spoiled: Spoiled) -> None:
    """One that needs nothing, one that contracts, one that is too rough."""
    J = {
        name: scene(cond, seed)["layer0"]
        for seed, (name, cond) in enumerate({"a": 5.0, "b": 1e3, "c": 1e5}.items())
    }
    method = mtu.OrthoGrad(0.0, granularity="layer")
    exact, _ = step(J, method)
    spoiled.noise(TILES, 0, inexact=False)
    unrefined, _ = step(J, method)
    spoiled.noise(TILES, 0)
    refined, update = step(J, method)
    for name in ("a", "b"):
        assert error({name: refined[name]}, J) <= 2 * error({name: exact[name]}, J)
    assert error({"b": unrefined["b"]}, J) > 2 * error({"b": exact["b"]}, J)
    assert torch.equal(refined["c"], unrefined["c"])
    assert update.residual.shape == (3,)
    assert update.residual.tolist() == pytest.approx(
        [leaning(refined[name], J[name]) for name in J], rel=1e-5
    )


def test_dependent_and_zero_retain_rows_are_ordinary_input(spoiled: Spoiled) -> None:
    """Of duplicates a noisy Gram sees a difference that is not there."""
    J = scene(1e3, 0)["layer0"]
    rows = torch.cat([
        matrices.with_zero_row(matrices.with_duplicates(J[: RETAINED // 2]), at=3),
        J[RETAINED:],
    ])
    exact, _ = step({"layer0": rows}, mtu.OrthoGrad(0.0))
    spoiled.noise(TILES, 0)
    refined, _ = step({"layer0": rows}, mtu.OrthoGrad(0.0))
    assert error(refined, {"layer0": rows}) <= 2 * error(exact, {"layer0": rows})
    assert leaning(refined["layer0"], rows[rows.any(1)][: RETAINED - 1]) <= ROUNDED


# ---- inside a subspace ---------------------------------------------------------------------------

KEPT = 60


def step_in_a_subspace(J: Tensor, kept: Tensor, **options: Any) -> tuple[Tensor, mtu.Update]:
    model = Explicit({"layer0": J})
    engine = mtu.Engine(model)
    rows = engine.rows({"a": model()}, forget=torch.arange(len(J)) >= RETAINED)
    update = mtu.cat(rows, engine.subspace_rows({"layer0.weight": kept}, "a")).backward(
        mtu.InterferenceAware(0.0, **options)
    )
    return model.get_submodule("layer0").weight.grad.clone(), update


def outside(d: Tensor, kept: Tensor) -> float:
    """The share of d outside the span of the kept rows."""
    Q = torch.linalg.qr(kept.double().T).Q
    return float((d.double() - Q @ (Q.T @ d.double())).norm() / d.double().norm())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("order", "noise"), [("joint", TF32X3), ("project-first", TILES)])
def test_interference_aware_is_refined_within_its_span(
    order: str, noise: float, seed: int, spoiled: Spoiled
) -> None:
    """The joint solve works on B and not on its Gram, so that noise grows by the condition, not by its square."""
    J, kept = scene(1e3, seed)["layer0"], matrices.conditioned(KEPT, WIDTH, 10.0, seed + 5).float()
    exact, _ = step_in_a_subspace(J, kept, order=order)
    spoiled.noise(noise, seed, inexact=False)
    unrefined, _ = step_in_a_subspace(J, kept, order=order)
    spoiled.noise(noise, seed)
    refined, update = step_in_a_subspace(J, kept, order=order)
    assert leaning(refined, J) <= ROUNDED < leaning(unrefined, J) / 10
    assert float(update.residual) == pytest.approx(leaning(refined, J), rel=1e-5)
    assert relative_error(refined, exact.double()) <= relative_error(unrefined, exact.double())
    if order == "joint":
        assert outside(refined, kept) <= 2 * max(outside(exact, kept), EPS32)


@pytest.mark.parametrize("options", [{"order": "orthogonalize-first"}, {"ridge": 0.1}], ids=str)
def test_what_keeps_a_residue_by_definition_is_not_refined(
    options: dict[str, Any], spoiled: Spoiled
) -> None:
    J, kept = scene(1e3, 0)["layer0"], matrices.conditioned(KEPT, WIDTH, 10.0, 5).float()
    spoiled.noise(TILES, 0)
    _, update = step_in_a_subspace(J, kept, **options)
    assert spoiled.pushes == 0 and update.residual is None


@pytest.mark.parametrize("cond", [1.5, 10.0, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_cheap_look_never_takes_bad_rows_for_good_ones(cond: float, seed: int) -> None:
    """Every matrix of rows, shuffled, scaled, with a row of zeros: what passes is far below the limit."""
    J = matrices.conditioned(RETAINED, WIDTH, cond, seed)
    J = J[torch.randperm(RETAINED)] * torch.logspace(-9, 9, RETAINED, dtype=J.dtype)[:, None]
    J[seed] = 0.0
    unit = J / J.norm(dim=1, keepdim=True).clamp(min=1e-300)
    values = torch.linalg.svdvals(unit)[: RETAINED - 1]
    passed = refine._is_well_conditioned(J @ J.T, torch.ones(RETAINED, dtype=torch.bool))
    assert not passed or float(values[0] / values[-1]) < refine.CONDITION_EXACT / 10
    assert passed or cond > 1.5
