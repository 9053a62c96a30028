"""Levels: who is forgotten already, for every method, in one's own loop and in `unlearn`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.unlearning.loop.scene import held_out, losses, net, sgd, trained
from tests.unlearning.loop.test_resume import Interrupted, Scene, parameters

pytestmark = pytest.mark.usefixtures("one_thread")

N = 6
MASK = torch.tensor([True, True, True, True, False, False])
HELD_OUT = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)  # mean 3


class Given(nn.Module):
    """A model whose losses are its parameters: two tasks of N samples."""

    def __init__(self, a: list[float], b: list[float]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([a, b], dtype=torch.float64))

    def losses(self) -> dict[str, Tensor]:
        return {"a": self.p[0] * 1.0, "b": self.p[1] * 1.0}


def known(**options: Any) -> mtu.Levels:
    """Levels of two tasks: held-out losses of mean 3, held-out scores 0.5."""

    def read(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"a": batch, "b": batch}

    def score(model: nn.Module, loader: Any) -> dict[str, float]:
        return {"a": 0.5, "b": 0.5}

    halves = [HELD_OUT[2:], HELD_OUT[:2]]
    return mtu.Levels(**options).measure(nn.Linear(1, 1), halves, read, score)


def kinds(found: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {task: kind.tolist() for task, kind in found.items()}


F, R, K = mtu.FORGET, mtu.RESTING, mtu.RETAIN
LOSSES = {
    "a": torch.tensor([0.1, 2.9, 3.0, 9.0, 0.0, 9.0], dtype=torch.float64),
    "b": torch.tensor([9.0, 0.1, 0.2, 3.5, 0.0, 0.0], dtype=torch.float64),
}

# ---- who rests -----------------------------------------------------------------------------------


def test_measures_means_and_scores_of_data_never_seen() -> None:
    levels = known()
    assert levels.tau == {"a": 3.0, "b": 3.0}
    assert levels.score == {"a": 0.5, "b": 0.5}
    assert levels.kappa == {"a": 1.0, "b": 1.0} and levels.resting == ()
    assert "tau={'a': 3.0" in repr(levels)


def test_samples_past_the_mean_rest() -> None:
    found = known().left(LOSSES, MASK)
    assert kinds(found) == {"a": [F, F, R, R, K, K], "b": [R, F, F, R, K, K]}


def test_of_a_partial_request_only_targets_rest() -> None:
    found = known().left(LOSSES, {"b": MASK})
    assert kinds(found) == {"a": [K] * N, "b": [R, F, F, R, K, K]}


@pytest.mark.parametrize("shape", ["one tensor", "float32", "with a graph"])
def test_losses_of_other_shapes(shape: str) -> None:
    levels = mtu.Levels().measure(nn.Linear(1, 1), [HELD_OUT], lambda model, batch: batch)
    loss = LOSSES["a"].clone()
    if shape == "float32":
        loss = loss.float()
    if shape == "with a graph":
        loss = loss.requires_grad_() * 1.0
    assert kinds(levels.left(loss, MASK)) == {"loss": [F, F, R, R, K, K]}
    assert levels.score == {"loss": -3.0}  # minus the mean loss


def test_tasks_at_their_score_rest_until_they_leave_it() -> None:
    levels = known()
    levels.update({"a": 0.5, "b": 0.9})
    assert levels.resting == ("a",)
    assert kinds(levels.left(LOSSES, MASK)) == {"a": [R] * 4 + [K] * 2, "b": [R, F, F, R, K, K]}
    levels.update({"a": 0.6, "b": 0.2, "another": 0.0})
    assert levels.resting == ("b",)
    assert kinds(levels.left(LOSSES, MASK))["a"] == [F, F, R, R, K, K]


def test_a_level_for_each_rank() -> None:
    """Losses 0.1, 2.9, 3, 9 of ranks 0 to 3 against the quantiles 1, 2, 3, 6; another order, the same samples."""
    levels = known(quantiles=True)
    assert kinds(levels.left({"a": LOSSES["a"]}, MASK)) == {"a": [F, R, R, R, K, K]}
    order = torch.tensor([3, 5, 0, 4, 2, 1])
    turned = levels.left({"a": LOSSES["a"][order]}, MASK[order])
    assert turned["a"].tolist() == [[F, R, R, R, K, K][i] for i in order]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_quantiles_are_those_of_torch(count: int) -> None:
    """A loss rests exactly where it reaches the (j + 1/2) / n quantile, j its rank."""
    draw = torch.Generator().manual_seed(count)
    unseen = torch.rand(100, generator=draw, dtype=torch.float64)
    levels = mtu.Levels(quantiles=True).measure(nn.Linear(1, 1), [unseen], lambda model, x: x)
    loss = torch.rand(count, generator=draw, dtype=torch.float64)
    found = levels.left(loss, True)["loss"]
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    at = torch.quantile(unseen, share, interpolation="linear")
    # torch's q of the lowest is 0, of the highest 1; ours are at half a rank
    place = (share * 100 - 0.5).clamp(0, 99) / 99
    at = torch.quantile(unseen, place)
    assert ((found[loss.argsort()] == F) == (loss.sort().values < at)).all()


def test_samples_without_a_label_neither_rest_nor_count() -> None:
    levels = known(quantiles=True)
    there = {"a": torch.tensor([False, True, True, True, True, True])}
    found = levels.left({"a": LOSSES["a"]}, MASK, there)["a"]
    assert found[1:].tolist() == [R, R, R, K, K]
    assert int(levels.held.seen["a"]) == 3


# ---- runs that stall -----------------------------------------------------------------------------


def test_a_task_that_stalls_gets_a_higher_level() -> None:
    levels, past = known(growth=1.5), {"a": torch.full((N,), 4.0), "b": torch.full((N,), 1.0)}
    for _step in range(3):
        assert (levels.left(past, MASK)["a"][:4] == R).all()
    levels.update({"a": 0.9, "b": 0.9})
    assert levels.kappa == {"a": 1.5, "b": 1.0}  # 4.5 for a, whose score is above its level
    assert (levels.left(past, MASK)["a"][:4] == F).all()
    levels.update({"a": 0.9, "b": 0.9})
    assert levels.kappa == {"a": 1.5, "b": 1.0}  # it moved


def test_a_task_at_its_level_and_one_without_steps_do_not_stall() -> None:
    levels, past = known(), {"a": torch.full((N,), 4.0), "b": torch.full((N,), 4.0)}
    levels.update({"a": 0.9, "b": 0.9})
    levels.left(past, MASK)
    levels.update({"a": 0.4, "b": 0.9})
    assert levels.kappa == {"a": 1.0, "b": 1.25}


@pytest.mark.parametrize("left", [1, 2, 3])
def test_one_row_in_twenty_is_no_movement(left: int) -> None:
    """Of 40 rows since the last evaluation."""
    levels = known()
    for i in range(10):
        loss = torch.full((N,), 4.0)
        if i < left:
            loss[0] = 1.0
        levels.left({"a": loss}, MASK)
    levels.update({"a": 0.9})
    assert levels.kappa["a"] == (1.25 if left <= 2 else 1.0)


def test_a_negative_level_rises_too() -> None:
    levels = mtu.Levels(growth=2.0).measure(
        nn.Linear(1, 1),
        [torch.full((4,), -3.0)],
        lambda model, x: x,
        lambda model, x: {"loss": 0.0},
    )
    levels.left(torch.full((N,), -2.0), True)
    levels.update({"loss": 1.0})
    assert (levels.left(torch.full((N,), -1.0), True)["loss"] == F).all()  # the level is 0 now
    assert (levels.left(torch.full((N,), 0.0), True)["loss"] == R).all()


# ---- what methods make of it ---------------------------------------------------------------------


def gradients(method: mtu.Method, forget: Any) -> Tensor:
    model = Given(LOSSES["a"].tolist(), LOSSES["b"].tolist())
    mtu.Engine(model).backward(model.losses(), method, forget=forget)
    assert model.p.grad is not None
    return model.p.grad


@pytest.mark.parametrize(
    "method", [mtu.OrthoGrad(0.0), mtu.GradDiff(0.0), mtu.GradientAscent()], ids=repr
)
def test_methods_of_sample_rows_weigh_what_is_left_by_all(method: mtu.Method) -> None:
    """-1 / n_t: here every row is its own direction, so that the gradient is the weights."""
    found = gradients(method, known().left(LOSSES, MASK))
    expected = torch.tensor([[-0.25, -0.25, 0, 0, 0, 0], [0, -0.25, -0.25, 0, 0, 0]]).double()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "method",
    [mtu.MUNBa(), mtu.PCGrad(), mtu.UPGrad(), mtu.MGDA(), mtu.CAGrad(), mtu.GradVac(), mtu.GDRGMA(),
     mtu.IMTLG(), mtu.NashMTL(), mtu.FairGrad(), mtu.AlignedMTL(), mtu.DualProj()],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_methods_of_mean_rows_get_the_mean_of_what_is_left(method: mtu.Method) -> None:
    """The same as where the others have no label."""
    found = gradients(method, known().left(LOSSES, MASK))
    model = Given(LOSSES["a"].tolist(), LOSSES["b"].tolist())
    there = {task: loss < 3.0 for task, loss in LOSSES.items()}
    for loss in there.values():
        loss[~MASK] = True
    mtu.Engine(model).backward(model.losses(), method, forget=MASK, present=there)
    assert model.p.grad is not None
    torch.testing.assert_close(found, model.p.grad, rtol=1e-12, atol=1e-15)
    assert not found[0, 2:4].any() and found[0, :2].all()


class Counting(mtu.Method):
    """A method of somebody's own, which knows of no levels."""

    def __call__(self, G: Tensor, roles: mtu.Roles) -> Tensor:
        return -(roles.kind == mtu.FORGET).double()


def test_a_method_of_ones_own_gives_no_weight_to_what_rests() -> None:
    found = gradients(Counting(), known().left(LOSSES, MASK))
    assert found[0].tolist() == [-1, -1, 0, 0, 0, 0]


@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.5), mtu.GradDiff(0.5), mtu.PCGrad()], ids=repr)
def test_where_all_rests_a_step_is_one_on_the_retained_data(method: mtu.Method) -> None:
    levels = known()
    levels.update({"a": 0.0, "b": 0.0})
    found = gradients(method, levels.left(LOSSES, MASK))
    assert not found[:, :4].any() and (found[:, 4:] > 0).all()


def test_heads_follow_what_is_left() -> None:
    model = nn.ModuleDict({"body": nn.Linear(3, 4), "head": nn.Linear(4, 1)}).double()
    x = torch.randn(N, 3, dtype=torch.float64)
    loss = model["head"](model["body"](x))[:, 0].square()
    level = float(loss.detach()[:4].median()) + 1e-9
    levels = mtu.Levels().measure(nn.Linear(1, 1), [torch.full((2,), level)], lambda model, x: x)
    still = (loss < level) & MASK
    engine = mtu.Engine(model, model["body"].parameters())
    engine.backward(loss, mtu.OrthoGrad(0.5), forget=levels.left(loss, MASK))
    loss = model["head"](model["body"](x))[:, 0].square()
    total = 0.5 * loss[~MASK].mean() - 0.5 * (loss * still).sum() / 4
    for p, g in zip(
        model["head"].parameters(),
        torch.autograd.grad(total, list(model["head"].parameters())),
        strict=True,
    ):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


# ---- in `unlearn` --------------------------------------------------------------------------------


def run(method: mtu.Method, **options: Any) -> tuple[mtu.History, Tensor, Scene]:
    scene = Scene(lambda: method, None, validation=held_out(), **options)
    return scene.run(), parameters(scene.model), scene


def test_levels_are_on_where_there_is_validation_data() -> None:
    own = mtu.Levels()
    _, by_default, _ = run(mtu.OrthoGrad(0.5))
    _, given, _ = run(mtu.OrthoGrad(0.5), levels=own)
    _, off, _ = run(mtu.OrthoGrad(0.5), levels=False)
    _, on, _ = run(mtu.OrthoGrad(0.5), levels=True)
    assert torch.equal(by_default, given) and torch.equal(by_default, on)
    assert not torch.equal(by_default, off)
    assert own.measured and set(own.tau) == set(own.score)


def test_a_schedule_of_its_own_is_left_alone() -> None:
    _, by_default, _ = run(mtu.NablaTau())
    _, off, _ = run(mtu.NablaTau(), levels=False)
    assert torch.equal(by_default, off)


def test_levels_that_are_known_are_not_measured_again() -> None:
    own = mtu.Levels()
    run(mtu.OrthoGrad(0.5), levels=own, max_steps=2)
    tau = own.tau
    _, _, scene = run(mtu.OrthoGrad(0.5), levels=own, max_steps=6)
    assert own.tau == tau and scene.arguments["levels"] is own


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (lambda: mtu.OrthoGrad(0.5), {}),
        (lambda: mtu.OrthoGrad(0.5), {"levels": "quantiles"}),
        (lambda: mtu.LevelledOrthoGrad(0.5), {}),
        (lambda: mtu.InterferenceAware(0.5), {"memory": True, "targets": ("b",)}),
        (lambda: mtu.PCGrad(), {}),
    ],
    ids=["levels", "quantiles", "with memory", "subspace and memory", "mean rows"],
)
@pytest.mark.parametrize("give_up", [6, 11])
def test_a_run_goes_on_to_the_same_bits(
    method: Any, options: dict[str, Any], give_up: int, tmp_path: Path
) -> None:
    """Beside a run that writes checkpoints too."""

    def scene(name: str) -> Scene:
        more = dict(options)
        if more.get("memory"):
            more["memory"], more["subspace"] = mtu.Memory(6), mtu.Subspace(40, every=2)
        if more.get("levels") == "quantiles":
            more["levels"] = mtu.Levels(quantiles=True)
        return Scene(method, tmp_path / name, validation=held_out(), **more)

    whole = scene("whole")
    history = whole.run()
    broken = scene("broken")
    with pytest.raises(Interrupted):
        broken.run(give_up)
    resumed = scene("broken")
    assert resumed.run().records[-1].forget == history.records[-1].forget
    assert torch.equal(parameters(resumed.model), parameters(whole.model))


def test_an_interrupted_run_leaves_levels_and_memory_as_they_were(tmp_path: Path) -> None:
    levels, memory = mtu.Levels(), mtu.Memory(every=1)
    scene = Scene(
        lambda: mtu.LevelledOrthoGrad(0.5),
        None,
        validation=held_out(),
        levels=levels,
        memory=memory,
    )
    with pytest.raises(Interrupted):
        scene.run(7)  # in step 7; the last evaluation was after step 4
    assert len(memory) == 30  # of four steps, each with 8 rows less those without a label
    assert not levels.held.seen  # counts begin anew at an evaluation


def test_of_wrong_labels_the_true_losses_decide() -> None:
    """Random labels start with losses above every level; the samples are pushed all the same."""
    seen: list[int] = []

    class Spy(mtu.RandomLabels):
        def __call__(self, G: Any, roles: mtu.Roles) -> Tensor:
            seen.append(int((roles.kind == mtu.FORGET).sum()))
            return super().__call__(G, roles)

    def wrong(model: nn.Module, batch: Any) -> Any:
        given, there = losses(model, batch)
        return {task: loss + 1e3 for task, loss in given.items()}, there

    model = trained(net())
    scene = Scene(mtu.OrthoGrad, None)
    arguments = scene.arguments | {
        "losses": losses,
        "method": Spy(0.5),
        "scheduler": None,
        "max_steps": 3,
    }
    mtu.unlearn(model, sgd(model), **arguments, forget_losses=wrong, validation=held_out())
    assert seen and max(seen) > 0


def test_the_method_of_both_wants_levels() -> None:
    scene = Scene(mtu.LevelledOrthoGrad, None)
    with pytest.raises(ValueError, match="levels: LevelledOrthoGrad goes by the losses"):
        scene.run()
    with pytest.raises(ValueError, match=r"levels: found Levels\(.*without validation"):
        Scene(mtu.OrthoGrad, None, levels=True).run()
    with pytest.raises(TypeError, match="levels: found str"):
        Scene(mtu.OrthoGrad, None, levels="on", validation=held_out()).run()


def test_a_checkpoint_of_other_levels_is_refused(tmp_path: Path) -> None:
    options = {"max_steps": 4, "validation": held_out()}
    Scene(mtu.OrthoGrad, tmp_path / "run.pt", **options).run()
    with pytest.raises(ValueError, match="other settings: levels was"):
        Scene(mtu.OrthoGrad, tmp_path / "run.pt", **options, levels=False).run()


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"quantiles": 3}, TypeError, "quantiles: found 3"),
        ({"growth": "x"}, TypeError, "growth: found 'x'"),
        ({"growth": 0.9}, ValueError, r"growth: found 0\.9, expected a number of at least 1"),
        ({"growth": math.inf}, ValueError, "growth: found inf"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        mtu.Levels(**options)


def test_misuse_is_named() -> None:
    with pytest.raises(RuntimeError, match="nothing is known of data never seen"):
        mtu.Levels().left(LOSSES, MASK)
    levels = known()
    with pytest.raises(ValueError, match="no held-out loss for task 'c'"):
        levels.left({"c": LOSSES["a"]}, MASK)
    assert levels.left({"c": LOSSES["a"]}, False)["c"].tolist() == [K] * N
    with pytest.raises(TypeError, match="score: found float, expected"):
        levels.update(0.5)
    with pytest.raises(ValueError, match="score of task 'a' is not a number"):
        levels.update({"a": math.nan})
    with pytest.raises(ValueError, match="held-out loss of task 'loss' is not finite"):
        mtu.Levels().measure(
            nn.Linear(1, 1), [HELD_OUT / 0.0], lambda model, x: x, lambda model, x: {"loss": 0.0}
        )


@pytest.mark.parametrize("bad", [2, 4, 7, -1])
def test_numbers_that_are_no_kinds_are_refused(bad: int) -> None:
    model = Given([1.0] * N, [1.0] * N)
    kind = torch.zeros(N, dtype=torch.int8)
    kind[2] = bad
    with pytest.raises(ValueError, match=r"forget\['a'\]: found the numbers"):
        mtu.Engine(model).backward(model.losses(), mtu.OrthoGrad(), forget={"a": kind})
    assert model.p.grad is None
