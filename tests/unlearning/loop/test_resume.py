"""A run that was interrupted goes on to the parameters of one that was not, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, Subset

import mtu_fast as mtu
from mtu_fast.unlearning.loop import checkpoint
from tests.unlearning.loop.interrupted import Interrupted, Scene
from tests.unlearning.loop.scene import data, held_out, losses, net, parameters, sgd, sides, trained

pytestmark = pytest.mark.usefixtures("one_thread")


def noisy(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch with noise from all three global generators."""
    x, y = (torch.stack(part) for part in zip(*batch, strict=True))
    draw = (
        torch.randn(())
        + random.random()
        + float(np.random.default_rng(np.random.randint(9)).random())
    )
    return x + 0.01 * (draw + np.random.randn()), y


def timeless(history: mtu.History) -> mtu.History:
    return replace(history, records=[replace(record, seconds=0.0) for record in history.records])


def shared_generator() -> dict[str, Any]:
    whole, draw = data(), torch.Generator().manual_seed(3)
    forget, retain = Subset(whole, range(6)), Subset(whole, range(6, 24))
    return {
        "forget": DataLoader(forget, 3, shuffle=True, generator=draw),
        "retain": DataLoader(retain, 4, shuffle=True, generator=draw, collate_fn=noisy),
    }


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "global order": dict,
    "own order": lambda: sides(shuffle=True, seed=5),
    "shared order, noise": shared_generator,
    "partial": lambda: {"targets": ("b",)},
}


@cache
def uninterrupted(options: str) -> tuple[mtu.History, Tensor]:
    scene = Scene(lambda: mtu.OrthoGrad(0.5), None, **OPTIONS[options]())
    return scene.run(), parameters(scene.model)


@pytest.mark.parametrize("give_up", [3, 11])
@pytest.mark.parametrize("options", list(OPTIONS))
def test_resumed_is_uninterrupted(options: str, give_up: int, tmp_path: Path) -> None:
    """With dropout, an adaptive optimizer, a scheduler and shuffling; killed before, between and at evaluations."""
    expected, whole = uninterrupted(options)
    path = tmp_path / "run.pt"
    first = Scene(lambda: mtu.OrthoGrad(0.5), path, **OPTIONS[options]())
    with pytest.raises(Interrupted):
        first.run(give_up)
    second = Scene(lambda: mtu.OrthoGrad(0.5), path, **OPTIONS[options]())
    torch.manual_seed(99), random.seed(98), np.random.seed(97)
    found = second.run()
    assert torch.equal(parameters(second.model), whole)
    assert timeless(found) == timeless(expected)


@pytest.mark.parametrize(
    "method",
    [mtu.NablaTau, lambda: mtu.PCGrad(torch.Generator().manual_seed(1)), mtu.GradDiff],
    ids=["∇τ", "PCGrad", "GradDiff"],
)
def test_methods_with_a_state_are_resumed(method: Callable[[], Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"validation": held_out(), "every": 3, "max_steps": 12}
    whole, path = Scene(method, None, **options), tmp_path / "run.pt"
    whole.run()
    with pytest.raises(Interrupted):
        Scene(method, path, **options).run(8)
    second = Scene(method, path, **options)
    second.run()
    assert torch.equal(parameters(second.model), parameters(whole.model))


@pytest.mark.parametrize("begun", [True, False], ids=["compiled first", "compiled later"])
def test_a_compiled_model_goes_on_as_it_is_in_no_wrapper(begun: bool, tmp_path: Path) -> None:
    """torch.compile puts a prefix before the names of parameters."""

    def scene(path: Path | None, compiled: bool) -> Scene:
        kept = {"memory": mtu.Memory(8), "subspace": mtu.Subspace(4)}
        made = Scene(mtu.InterferenceAware, path, **kept)
        if compiled:
            made.model = torch.compile(made.model, backend="eager")  # type: ignore[assignment]
        return made

    whole, path = scene(None, False), tmp_path / "run.pt"
    whole.run()
    with pytest.raises(Interrupted):
        scene(path, begun).run(6)
    second = scene(path, not begun)
    second.run()
    # compiled code adds up in another order
    assert_close(parameters(second.model), parameters(whole.model), rtol=1e-12, atol=1e-12)


def test_generators_of_the_users_functions_are_resumed(tmp_path: Path) -> None:
    """Evaluations leave them alone, too."""

    def scene(path: Path | None) -> Scene:
        labels, noise = (torch.Generator().manual_seed(seed) for seed in (5, 6))
        made = Scene(lambda: mtu.RandomLabels(0.5), path, generators=[labels, noise])
        made.arguments["forget_losses"] = lambda model, batch: losses(
            model,
            (
                batch[0] + 0.1 * torch.randn((), generator=noise),
                mtu.random_labels(batch[1], 3, labels),
            ),
        )
        return made

    whole, path = scene(None), tmp_path / "run.pt"
    whole.run(every=2)
    with pytest.raises(Interrupted):
        scene(path).run(5, every=2)  # in step 10: steps draw the losses of forget batches elsewhere
    second = scene(path)
    second.run(every=2)
    assert torch.equal(parameters(second.model), parameters(whole.model))
    with pytest.raises(ValueError, match="generators was 2, is 0"):
        scene(path).run(generators=(), every=2)


def test_resumed_in_the_same_process(tmp_path: Path) -> None:
    """The very objects of the interrupted run, half a step further on, are put back first."""
    whole = Scene(mtu.OrthoGrad, None)
    whole.run()
    again = Scene(mtu.OrthoGrad, tmp_path / "run.pt")
    with pytest.raises(Interrupted):
        again.run(11)
    again.run()
    assert torch.equal(parameters(again.model), parameters(whole.model))


def test_interrupted_twice_and_then_given_more_steps(tmp_path: Path) -> None:
    whole, path = Scene(mtu.OrthoGrad, None), tmp_path / "run.pt"
    whole.run(max_steps=18)
    for give_up, steps in ((7, 14), (9, 14), (None, 14), (None, 18)):
        scene = Scene(mtu.OrthoGrad, path)
        if give_up is None:
            assert scene.run(max_steps=steps).step == steps
        else:
            with pytest.raises(Interrupted):
                scene.run(give_up, max_steps=steps)
    assert torch.equal(parameters(scene.model), parameters(whole.model))


def test_a_run_that_is_over_gives_its_result_again(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    model = trained(net())
    arguments: dict[str, Any] = {
        **sides(), "method": mtu.GradientAscent(), "max_drift": 0.2, "max_steps": 400, "checkpoint": path,
        "progress": False,
    }  # fmt: skip
    history = mtu.unlearn(model, sgd(model), **arguments)
    assert history.reason == "drift"
    other = net(seed=5)
    assert mtu.unlearn(other, sgd(other), **arguments) == history
    assert torch.equal(parameters(other), parameters(model))


def test_an_interrupt_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = tmp_path / "run.pt", Scene(mtu.OrthoGrad, None)
    whole.run()
    real, calls = torch.save, [0]

    def half(state: Any, file: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            file.write(b"PK half of it")
            raise KeyboardInterrupt
        real(state, file)

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        Scene(mtu.OrthoGrad, path).run()
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    assert torch.load(path, weights_only=True)["step"] == 4
    second = Scene(mtu.OrthoGrad, path)
    second.run()
    assert torch.equal(parameters(second.model), parameters(whole.model))


# ---- checkpoints of something else ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"method": mtu.OrthoGrad(0.7)},
            r"method was .*OrthoGrad.*0\.5.*is .*OrthoGrad.*0\.7",
        ),
        ({"targets": ("a",)}, r"targets was None, is \['a'\]"),
        ({"clip": None}, r"clip was 1.0, is None"),
        ({"every": 6}, r"every was 4, is 6"),
        ({"max_drift": {"a": 1.0}}, r"max_drift was None, is \{'a': 1.0\}"),
        ({"scheduler": None}, r"scheduler was OneCycleLR, is None"),
        (
            {"retain": [next(iter(held_out()))]},
            r"batches was \{'forget': 2, 'retain': 5\}, is .*'retain': 1",
        ),
    ],
)
def test_other_settings_are_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"
    Scene(mtu.OrthoGrad, path).run(max_steps=1)
    with pytest.raises(
        ValueError, match=r"checkpoint: .*run.pt is of a run with other settings: " + message
    ):
        Scene(mtu.OrthoGrad, path).run(**change)


def test_another_model_and_another_optimizer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    Scene(mtu.OrthoGrad, path).run(max_steps=1)
    wide, scene = Scene(mtu.OrthoGrad, path), Scene(mtu.OrthoGrad, path)
    wide.model.backbone[0] = nn.Linear(5, 9).double()
    wide.optimizer = torch.optim.AdamW(wide.model.parameters(), lr=0.01)
    with pytest.raises(
        ValueError, match=r"model was \['backbone.0.weight \(8, 5\) torch.float64'.*\(9, 5\)"
    ):
        wide.run()
    scene.optimizer = sgd(scene.model)
    with pytest.raises(ValueError, match=r"optimizer was \['AdamW', .*SGD"):
        scene.run()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_what_is_no_checkpoint_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    if content is None:
        torch.save({"weights": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run.pt is no checkpoint"):
        Scene(mtu.OrthoGrad, path).run()
    assert content is None or path.read_bytes() == content


def test_no_code_is_stored() -> None:
    with pytest.raises(
        TypeError, match=r"state\['a'\]\[1\] is function, expected tensors, numbers"
    ):
        checkpoint.copied({"a": [1, print_nothing]}, "state")


def print_nothing() -> None:
    pass


def test_fewer_batches_than_before_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    batches = Shrinking(sides()["retain"])
    Scene(mtu.OrthoGrad, path, retain=batches, max_steps=4).run()
    batches.given = 1
    with pytest.raises(
        RuntimeError,
        match="retain: the loader ended after 1 batches, but 4 of this pass were taken",
    ):
        Scene(mtu.OrthoGrad, path, retain=batches).run()


class Shrinking(list[Any]):
    """Batches of which only the first `given` come."""

    given = 5

    def __iter__(self) -> Iterator[Any]:
        return iter(self[: self.given])


class Noise(Dataset[Any]):
    """Samples that are drawn when they are asked for."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.randn(5, dtype=torch.float64), torch.tensor([index % 3, index % 2])


def test_samples_drawn_on_the_way(tmp_path: Path) -> None:
    def scene(path: Path | None) -> Scene:
        return Scene(mtu.GradDiff, path, retain=DataLoader(Noise(), 5, shuffle=True))

    whole, path = scene(None), tmp_path / "run.pt"
    whole.run()
    with pytest.raises(Interrupted):
        scene(path).run(11)
    second = scene(path)
    second.run()
    assert torch.equal(parameters(second.model), parameters(whole.model))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 6]),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.ConstantLR(o),
                torch.optim.lr_scheduler.CosineAnnealingLR(o, 9),
            ],
            [3],
        ),
    ],
    ids=["multi-step", "lambda", "sequential"],
)
def test_schedulers_are_resumed(make: Callable[[Any], Any], tmp_path: Path) -> None:
    found = []
    for give_up in (None, 7):
        path = None if give_up is None else tmp_path / "run.pt"
        for again in (give_up, None) if give_up else (None,):
            scene = Scene(mtu.GradDiff, path)
            scene.optimizer = sgd(scene.model, momentum=0.9)
            scene.arguments |= {"scheduler": make(scene.optimizer), "max_steps": 9}
            if again:
                with pytest.raises(Interrupted):
                    scene.run(again)
            else:
                scene.run()
        found.append(parameters(scene.model))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    "subspace", [{"size": 60}, {"size": 40, "basis": True}], ids=["rows", "basis"]
)
def test_a_subspace_is_resumed(subspace: dict[str, Any], tmp_path: Path) -> None:
    """Beside a run that writes checkpoints too: from the first on, the rows are held explicitly."""
    found = []
    for name, give_up in (("whole", None), ("broken", 9)):
        options = {
            "targets": ("b",),
            "checkpoint": tmp_path / name,
            "subspace": mtu.Subspace(every=2, **subspace),
        }
        scene = Scene(lambda: mtu.InterferenceAware(0.5), None, **options)
        if give_up is not None:
            with pytest.raises(Interrupted):
                scene.run(give_up)
            scene = Scene(lambda: mtu.InterferenceAware(0.5), None, **options)
            scene.arguments["subspace"] = mtu.Subspace(every=2, **subspace)
        scene.run()
        assert scene.arguments["subspace"].full
        found.append(parameters(scene.model))
    assert torch.equal(*found)


def test_a_subspace_of_another_size_is_refused(tmp_path: Path) -> None:
    options = {"checkpoint": tmp_path / "run.pt", "max_steps": 4}
    Scene(mtu.InterferenceAware, None, **options, subspace=mtu.Subspace(60)).run()
    with pytest.raises(ValueError, match="subspace"):
        Scene(mtu.InterferenceAware, None, **options, subspace=mtu.Subspace(50)).run()
