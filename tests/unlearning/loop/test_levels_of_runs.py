"""Levels in `unlearn`: when they are on, resumed runs, wrong labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.unlearning.loop.interrupted import Interrupted, Scene
from tests.unlearning.loop.scene import held_out, losses, net, parameters, sgd, trained

pytestmark = pytest.mark.usefixtures("one_thread")


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
