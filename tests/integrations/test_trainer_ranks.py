"""Two processes of a `Trainer` are one with the joined batch; or an error on both of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.helpers.truth import relative_error
from tests.integrations import small
from tests.integrations.marks import marks
from tests.integrations.ranks import on_two
from tests.integrations.shares import REFUSED, same
from tests.integrations.trainers import Unlearner, settings

pytestmark = marks("ignore:torch.compile:UserWarning")


def trained(
    folder: Path,
    size: int,
    own: dict[str, Any],
    resume: str | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> dict[str, Any]:
    """Weights before and after, logs, evaluation and the last update's number of rows."""
    given = {"per_device_train_batch_size": size, "max_steps": 3, "logging_steps": 1}
    arguments = settings(folder, **(given | more))
    model = small.build(attention_dropout=dropout)
    start = small.weights(model)
    made = {name: make() for name, make in own.items()}
    trainer = Unlearner(model, arguments, **({"train_dataset": small.Texts()} | made))
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    shown = [{name: line[name] for name in line if name.endswith("loss")} for line in history]
    evaluated = None if trainer.eval_dataset is None else trainer.evaluate()["eval_loss"]
    return {
        "start": start,
        "end": small.weights(model),
        "logs": shown[:-1],
        "evaluated": evaluated,
        "rows": len(trainer.update.roles),
        "steps": trainer.state.global_step,
    }


PARTS = {"size": 2, "gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 2}


ADAM = {
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1e-2,
}


RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "micro-batches, the last step incomplete": (lambda: mtu.OrthoGrad(0.5), PARTS),
    "of mean rows": (mtu.PCGrad, PARTS),
    "Adam, schedule, clipping": (mtu.MUNBa, ADAM),
    "gradient checkpointing": (mtu.PCGrad, {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize("name", RUNS)
def test_trainer(name: str, tmp_path: Path) -> None:
    """Weights, what is logged, and evaluation."""
    method, own_settings = RUNS[name]
    more = {"size": 4} | own_settings
    size = more.pop("size")
    own = {"method": method, "eval_dataset": lambda: small.Texts(8, seed=5)}
    ranks = on_two(partial(trained, tmp_path, size, own, **more))
    one = trained(tmp_path, 2 * size, own, **more)
    same([rank["end"] for rank in ranks], one["start"], one["end"], 2e-6)
    for rank in ranks:
        assert (rank["rows"], rank["steps"]) == (one["rows"], one["steps"])
        assert rank["logs"] == [pytest.approx(line, rel=1e-5) for line in one["logs"]]
        assert rank["evaluated"] == pytest.approx(one["evaluated"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_trainer_with_two_data_sets_a_schedule_and_compiled(tmp_path: Path) -> None:
    """∇τ: passes over what is to be forgotten, and validation losses, are those of both processes."""
    own = {
        "method": mtu.NablaTau,
        "train_dataset": lambda: small.Texts(12, seed=2, column=False),
        "forget_dataset": lambda: small.Texts(4, seed=3, column=False),
        "eval_dataset": lambda: small.Texts(5, seed=4, column=False),
    }
    more: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 500}
    more |= {"torch_compile": True, "torch_compile_backend": "eager"}
    ranks = on_two(partial(trained, tmp_path, 1, own, **more))
    one = trained(tmp_path, 2, own, **more)
    same([rank["end"] for rank in ranks], one["start"], one["end"], 2e-6)
    assert ranks[0]["steps"] == one["steps"] == 9


SAVED = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "gradient_accumulation_steps": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
}


KEPT = {"method": lambda: mtu.InterferenceAware(0.3), "subspace": lambda: mtu.Subspace(12, every=1)}


DRAWN = {"method": lambda: mtu.PCGrad(generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("own", [KEPT, DRAWN], ids=["rows kept", "random numbers drawn"])
def test_trainer_resumes_to_the_bit(own: dict[str, Any], tmp_path: Path) -> None:
    """With dropout; on another number of processes where they kept no rows of their own."""
    half = str(tmp_path / "checkpoint-2")
    run = partial(trained, tmp_path, 2, own, dropout=0.3, **SAVED)
    whole, resumed = on_two(run), on_two(partial(run, resume=half))
    for rank, again in zip(whole, resumed, strict=True):
        assert torch.equal(rank["end"], again["end"])
    assert torch.equal(whole[0]["end"], whole[1]["end"]) and whole[0]["steps"] == 4
    if own is DRAWN:
        assert run(resume=half)["steps"] == 4
        return
    with pytest.raises(ValueError, match="found rows kept by 2 processes, expected 1"):
        run(resume=half)


def test_trainer_refuses_on_both(tmp_path: Path) -> None:
    own = {"method": mtu.OrthoGrad}

    def refused() -> None:
        with pytest.raises(ValueError, match=REFUSED):
            trained(tmp_path, 8, own, ddp_static_graph=True, ddp_find_unused_parameters=False)

    on_two(refused)


class Marked(small.Texts):
    """One of the first rank's samples is marked by another number than 0 and 1."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = super().__getitem__(i)
        is_bad = torch.equal(item["input_ids"], self.tokens[3])
        return item | {"forget": torch.tensor(2)} if is_bad else item


def reduced_on_one(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    losses = small.losses_of(model, batch)
    return losses.mean() if torch.distributed.get_rank() == 1 else losses


def unreadable_on_one(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    losses = small.losses_of(model, batch)
    if torch.distributed.get_rank() == 1:
        raise KeyError("an answer")
    return losses


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a column": ({"train_dataset": Marked}, ValueError, r"rank \d: forget: found \[0, 1, 2\]"),
    "a reduced loss": ({"losses": lambda: reduced_on_one}, ValueError, "rank 1: losses: found sh"),
    "a user's own": ({"losses": lambda: unreadable_on_one}, RuntimeError, "rank 1: KeyError: 'an"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_one_rank_finds_wrong_all_raise(name: str, tmp_path: Path) -> None:
    own, kind, words = WRONG[name]

    def wrong_on_one_rank() -> None:
        with pytest.raises(kind, match=words):
            trained(tmp_path, 8, {"method": lambda: mtu.OrthoGrad(0.5)} | own)

    on_two(wrong_on_one_rank)


def begun_before(folder: Path, first: str) -> list[Tensor]:
    """An engine or an evaluation before the first step; what the step then does."""
    model = small.build()
    start = small.weights(model)
    arguments = settings(folder, per_device_train_batch_size=8)
    own = {"train_dataset": small.Texts(), "eval_dataset": small.Texts(4)}
    trainer = Unlearner(model, arguments, method=mtu.OrthoGrad(0.5), **own)
    if first == "evaluation":
        trainer.evaluate()
        with pytest.raises(
            RuntimeError, match=r"a model without Distr.* expected train\(\) before"
        ):
            trainer.train()
        return [start, start]
    assert not trainer.engine.is_joined
    trainer.train()
    assert len(trainer.update.roles) == small.COUNT
    return [start, small.weights(model)]


@pytest.mark.filterwarnings("ignore:Engine:RuntimeWarning")
@pytest.mark.parametrize("first", ["engine", "evaluation"])
def test_what_comes_before_the_first_step(first: str, tmp_path: Path) -> None:
    """Transformers wraps a model no more that it evaluated: its own Trainer then trains each rank alone."""
    (start, end), (_, other) = on_two(begun_before, tmp_path, first)
    assert torch.equal(end, other)
    if first == "engine":
        expected = small.plain_step(small.build(), mtu.OrthoGrad(0.5))
        assert relative_error(end - start, expected) <= 1e-6
