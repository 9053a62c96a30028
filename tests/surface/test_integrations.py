"""Other people's loops given what they do not take: an error of ours that names it, and `.grad` untouched."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast.integrations import lightning as of_lightning
from tests.integrations.small import Texts, build, hf
from tests.surface.wrong import WRONG, parameters_of, refused

accelerate: Any = pytest.importorskip("accelerate")
peft: Any = pytest.importorskip("peft")
of_accelerate: Any = importlib.import_module("mtu_fast.integrations.accelerate")
open_unlearning: Any = importlib.import_module("mtu_fast.integrations.open_unlearning")
ours: Any = importlib.import_module("mtu_fast.integrations.transformers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
N = 4
MASK = torch.arange(N) < 2
OFTEN = [5, "x", object()]
NO_MASK = [5, "x", [True] * N, MASK.float(), MASK[:2], MASK.to_sparse(), {"c": MASK}]
NO_LOSSES: list[Any] = [*OFTEN, None, [1.0], {}, {"a": 5}, {"a": [1.0]}, torch.tensor(1.0)]
NO_METHOD = [*OFTEN, None, mtu.OrthoGrad, torch.ones(N)]
NO_FUNCTION = [v for v in WRONG["function"] if not isinstance(v, Tensor)]


class Unlearner(ours.Unlearning, hf.Trainer):
    """What a user writes."""


class Surgery(open_unlearning.Surgery, hf.Trainer):
    """What a user writes."""


class Module(of_lightning.Unlearning, nn.Module):
    """What a user writes, in a loop that calls it as Lightning does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.automatic_optimization = False
        self.trainer = SimpleNamespace(world_size=1, precision_plugin=None)

    def step(self, *given: Any, **more: Any) -> None:
        self.backward(self.unlearn(*given, **more))


class Scene:
    """A network in every loop, its gradients all ones."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.net: Any = nn.Linear(3, 1)
        self.engine = mtu.Engine(self.net)
        self.accelerator = accelerate.Accelerator(cpu=True)
        self.module = Module(self.net)
        self.lora = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"]))
        self.watched = [*self.net.parameters(), *self.lora.parameters()]
        for p in self.watched:
            p.grad = torch.ones_like(p)

    def losses(self) -> Tensor:
        return self.net(torch.randn(N, 3))[:, 0].square()

    def accelerated(self, **changes: Any) -> Any:
        given = {
            "accelerator": self.accelerator,
            "engine": self.engine,
            "losses": self.losses(),
            "method": mtu.OrthoGrad(0.5),
            "forget": MASK,
        } | changes
        return of_accelerate.backward(**given)

    def lightened(self, **changes: Any) -> Any:
        given = {"losses": self.losses(), "method": mtu.OrthoGrad(0.5), "forget": MASK} | changes
        return self.module.step(given.pop("losses"), given.pop("method"), **given)

    def trainer(self, kind: Any = Unlearner, **changes: Any) -> Any:
        arguments = hf.TrainingArguments(
            output_dir=str(self.folder), report_to=[], use_cpu=True, disable_tqdm=True
        )
        given = {"method": mtu.OrthoGrad(0.5), "train_dataset": Texts()} | changes
        return kind(self.lora, arguments, **given)

    def trained(self, inputs: Any, **changes: Any) -> Any:
        trainer = self.trainer(**changes)
        trainer.current_gradient_accumulation_steps = 1
        return trainer.training_step(self.lora, inputs)

    def batch(self, **changes: Any) -> Any:
        found = torch.utils.data.default_collate([Texts()[i] for i in range(N)])
        return {k: v for k, v in (found | changes).items() if v is not MISSING}

    def sides(self, **changes: Any) -> Any:
        side = {name: torch.ones(2, 3).long() for name in ("input_ids", "attention_mask", "labels")}
        return {"forget": side | changes, "retain": side}


MISSING = object()


def step_arguments(name: str, call: str) -> dict[str, Any]:
    """What every integration hands to the engine's step, given to one of the scene's calls."""
    wrong = {
        "losses": ("losses", NO_LOSSES),
        "method": ("method|backward", NO_METHOD),
        "forget": ("forget", NO_MASK),
        "present": ("present", NO_MASK[2:]),
        "subspace": ("subspace", [*OFTEN, mtu.Memory()]),
    }
    found = {}
    for argument, (message, values) in wrong.items():
        others = {"method": mtu.InterferenceAware()} if argument == "subspace" else {}

        def run(s: Any, v: Any, argument: str = argument, others: Any = others) -> Any:
            return getattr(s, call)(**{argument: v}, **others)

        found[f"{name}({argument})"] = (run, message, values)
    return found


# What is called, the words of the argument in the error, and the wrong values.
SURFACE: dict[str, tuple[Callable[[Scene, Any], object], str, list[Any]]] = {
    "accelerate(accelerator)": (
        lambda s, v: s.accelerated(accelerator=v),
        "accelerator",
        [*OFTEN, None, accelerate.Accelerator],
    ),
    "accelerate(engine)": (
        lambda s, v: s.accelerated(engine=v),
        "engine",
        [*OFTEN, None, mtu.Engine, nn.Linear(1, 1)],
    ),
    **step_arguments("accelerate", "accelerated"),
    **step_arguments("lightning", "lightened"),
    "lightning(sync)": (
        lambda s, v: s.lightened(sync=v),
        "sync",
        [v for v in WRONG["flag"] if v is not None],
    ),
    "Trainer(method)": (lambda s, v: s.trainer(method=v), "method|backward", NO_METHOD),
    "Trainer(losses)": (lambda s, v: s.trainer(losses=v), "losses", NO_FUNCTION),
    "Trainer(forget_column)": (
        lambda s, v: s.trainer(forget_column=v),
        "forget_column",
        [v for v in WRONG["text"] if not isinstance(v, Tensor)],
    ),
    "Trainer(forget_dataset)": (
        lambda s, v: s.trainer(forget_dataset=v),
        "forget_dataset",
        [5, object(), [], iter([1])],
    ),
    "Trainer(train_dataset beside one to forget)": (
        lambda s, v: s.trainer(train_dataset=v, forget_dataset=Texts()),
        "train_dataset",
        [None, 5, object(), []],
    ),
    "Trainer(params)": (lambda s, v: s.trainer(params=v), "params", NO_FUNCTION),
    "Trainer(what params gives)": (
        lambda s, v: s.trainer(params=lambda model: v).engine,
        "params",
        [5, "x", [], [5], object()],
    ),
    "Trainer(subspace)": (
        lambda s, v: s.trainer(subspace=v, method=mtu.InterferenceAware()),
        "subspace",
        [*OFTEN, mtu.Memory()],
    ),
    "Trainer(forget of a batch)": (
        lambda s, v: s.trained(s.batch(forget=v)),
        "forget",
        [
            MISSING,
            5,
            "x",
            [1, 0, 0, 1],
            torch.ones(2),
            torch.ones(N, 2),
            torch.tensor([0, 1, 2, 3]),
        ],
    ),
    "Trainer(what losses gives)": (
        lambda s, v: s.trained(s.batch(), losses=lambda *_: v),
        "losses",
        NO_LOSSES,
    ),
    "language_model_losses(batch)": (
        lambda s, v: ours.language_model_losses(s.lora, v),
        "batch|labels",
        [*OFTEN, None, {}, {"input_ids": torch.ones(2, 3).long()}, {"labels": 5}],
    ),
    "Surgery(method)": (lambda s, v: s.trainer(Surgery, method=v), "method|backward", NO_METHOD),
    "Surgery(options)": (
        lambda s, v: s.trainer(Surgery, method="OrthoGrad", options=v),
        "options|alpha",
        [5, "x", [1], {"unknown": 1}, {5: 1}, {"alpha": "x"}, {"alpha": 7}],
    ),
    "Surgery(forget_loss)": (
        lambda s, v: s.trainer(Surgery, forget_loss=v),
        "forget_loss",
        [v for v in WRONG["word"] if not isinstance(v, Tensor)],
    ),
    "Surgery(beta)": (
        lambda s, v: s.trainer(Surgery, forget_loss="npo", beta=v),
        "beta",
        WRONG["positive"],
    ),
    "Surgery(a batch)": (
        lambda s, v: open_unlearning.joined(v, "forget"),
        "Surgery",
        [*OFTEN, None, {}, {"forget": {}}, {"forget": 5, "retain": 5}],
    ),
    "Surgery(a tensor of a batch)": (
        lambda s, v: open_unlearning.joined(s.sides(labels=v), "forget"),
        "Surgery",
        [5, "x", None, [1], torch.ones(2), torch.ones(2, 3).to_sparse()],
    ),
}


@pytest.mark.parametrize("name", SURFACE)
def test_a_wrong_argument_is_named_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    call, words, wrong = SURFACE[name]
    scene = Scene(tmp_path)
    before = [p.detach().clone() for p in scene.watched]
    for value in wrong:
        refused(lambda v=value: call(scene, v), words)  # type: ignore[misc]
        assert all(p.grad is not None and (p.grad == 1.0).all() for p in scene.watched)
    assert all(torch.equal(p, q) for p, q in zip(scene.watched, before, strict=True))


def test_what_is_right_is_taken(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.accelerated()
    scene.lightened()
    scene.trained(scene.batch())
    assert ours.language_model_losses(
        scene.lora, {k: v for k, v in scene.batch().items() if k != "forget"}
    ).shape == (N,)
    open_unlearning.joined(scene.sides(), "forget")
    assert any((p.grad != 1.0).any() for p in scene.watched if p.grad is not None)


def test_every_argument_is_walked() -> None:
    for called, function in (
        ("accelerate", of_accelerate.backward),
        ("lightning", of_lightning.Unlearning.unlearn),
        ("Trainer", ours.Unlearning.__init__),
        ("Surgery", open_unlearning.Surgery.__init__),
    ):
        for argument in parameters_of(function, ["args", "kwargs"]):
            assert f"{called}({argument})" in SURFACE
