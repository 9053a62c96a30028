"""The mixin in the real `Trainer`: each of its settings against the plain loop."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

import mtu_fast as mtu
from mtu_fast.integrations.transformers import Unlearning
from mtu_fast.losses import causal_lm
from tests.helpers.truth import relative_error
from tests.integrations.marks import marks
from tests.integrations.small import (
    METHODS,
    RATE,
    VOCAB,
    Texts,
    build,
    hf,
    plain_step,
)
from tests.integrations.trainers import Unlearner, settings, trained

pytestmark = marks()


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_of_the_plain_loop(name: str, tmp_path: Path) -> None:
    expected = plain_step(build(), METHODS[name]())
    trainer, found = trained(tmp_path, own={"method": METHODS[name]()})
    assert relative_error(found, expected) <= 1e-6
    assert trainer.update is not None and trainer.update.gram is not None


@pytest.mark.parametrize("name", METHODS)
def test_four_times_four_are_sixteen(name: str, tmp_path: Path) -> None:
    expected = plain_step(build(), METHODS[name]())
    size = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    trainer, found = trained(tmp_path, own={"method": METHODS[name]()}, **size)
    assert relative_error(found, expected) <= 1e-6
    assert trainer.engine.accumulated_bytes == 0


def test_an_epoch_that_ends_within_a_step(tmp_path: Path) -> None:
    """16 samples by 4, a step each 3 micro-batches: 12 and 4."""
    size = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    trainer, _ = trained(tmp_path, max_steps=-1, num_train_epochs=2, **size)
    assert trainer.state.global_step == 4
    assert trainer.engine.accumulated_bytes == 0
    assert len(trainer.update.roles) == 4


def test_two_data_sets(tmp_path: Path) -> None:
    """Each batch holds as many of both; the smaller set is gone through anew."""
    retain, forget = Texts(8, seed=2, column=False), Texts(4, seed=3, column=False)
    trainer, found = trained(
        tmp_path,
        own={"train_dataset": retain, "forget_dataset": forget},
        per_device_train_batch_size=8,
    )
    both = Halves(16)
    both.tokens = torch.cat([retain.tokens, forget.tokens, forget.tokens])
    assert relative_error(found, plain_step(build(), mtu.OrthoGrad(0.5), both)) <= 1e-6
    assert int((trainer.update.roles.kind == mtu.FORGET).sum()) == 8


class Halves(Texts):
    """The second half is to be forgotten."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return super().__getitem__(i) | {"forget": torch.tensor(int(i >= len(self) // 2))}


class Endless(IterableDataset[dict[str, Tensor]]):
    """A stream to retain."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        data, i = Texts(column=False), 0
        while True:
            yield data[i % len(data)]
            i += 1


def test_an_endless_retain_set(tmp_path: Path) -> None:
    own = {"train_dataset": Endless(), "forget_dataset": Texts(3, column=False)}
    trainer, _ = trained(tmp_path, own=own, max_steps=3, per_device_train_batch_size=2)
    assert trainer.state.global_step == 3 and len(trainer.update.roles) == 4


def test_clipping(tmp_path: Path) -> None:
    expected = plain_step(build(), mtu.OrthoGrad(0.5), clip=1e-2)
    _, found = trained(tmp_path, max_grad_norm=1e-2)
    assert relative_error(found, expected) <= 1e-5
    assert float(found.norm()) == pytest.approx(1e-2 * RATE, rel=1e-3)


def test_bf16(tmp_path: Path) -> None:
    """Under autocast rows are those of the recorded graph, casts included: the plain loop's under the same."""
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_step(build(), mtu.OrthoGrad(0.5))
    _, found = trained(tmp_path, bf16=True)
    assert relative_error(found, expected) <= 1e-5
    assert relative_error(found, plain_step(build(), mtu.OrthoGrad(0.5))) > 1e-4


def test_gradient_checkpointing(tmp_path: Path) -> None:
    expected = plain_step(build(), mtu.OrthoGrad(0.5))
    trainer, found = trained(tmp_path, gradient_checkpointing=True)
    assert trainer.model.is_gradient_checkpointing
    assert relative_error(found, expected) <= 1e-6


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torch_compile(tmp_path: Path) -> None:
    """The forward of training runs eagerly, and that is said once."""
    expected = plain_step(build(), mtu.OrthoGrad(0.5))
    with pytest.warns(UserWarning, match="training forward runs eagerly") as said:
        trainer, found = trained(
            tmp_path,
            torch_compile=True,
            torch_compile_backend="eager",
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
        )
    assert len([one for one in said if "eagerly" in str(one.message)]) == 1
    assert relative_error(found, expected) <= 1e-6
    assert not any(line.slow for line in trainer.engine.explain().lines)


@pytest.mark.parametrize("part", ["wrapped", "in place", "a layer"])
def test_a_model_compiled_before(part: str, tmp_path: Path) -> None:
    """Its forward of training runs eagerly, too; in evaluation it is compiled."""
    calls: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(part)
        return graph.forward

    model, expected = build(), plain_step(build(), mtu.OrthoGrad(0.5))
    compiled = torch.compile(model, backend=backend) if part == "wrapped" else model
    if part != "wrapped":
        inner: Any = model.model.layers[0] if part == "a layer" else model
        inner.compile(backend=backend)
    with pytest.warns(UserWarning, match=r"torch\.compile: the training forward runs eagerly"):
        trainer, found = trained(tmp_path, compiled, remove_unused_columns=False)
    assert relative_error(found, expected) <= 1e-6 and not calls
    trainer.evaluate(Texts())
    assert calls


@pytest.mark.parametrize("size", [16, 4])
def test_lora(size: int, tmp_path: Path) -> None:
    """The plain loop's step, of the adapters alone."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = peft.get_peft_model(build(), config)
    expected = plain_step(model, mtu.OrthoGrad(0.5))
    begin = {name: p.detach().clone() for name, p in model.named_parameters()}
    shares = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size}
    _, found = trained(tmp_path, model, **shares)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, begin[name])}
    # B is zero at first, so that A has no gradient
    assert changed == {name for name in begin if "lora_B" in name} and len(changed) == 4
    assert relative_error(found, expected) <= 1e-6


def test_losses_of_ones_own_and_some_parameters(tmp_path: Path) -> None:
    """Two tasks with labels for some samples, on the layers alone; the head gets the weighted gradient."""

    def losses(model: Any, batch: dict[str, Any]) -> Any:
        logits = model(input_ids=batch["input_ids"]).logits
        whole = causal_lm(logits, batch["labels"])
        first = causal_lm(logits[:, :3], batch["labels"][:, :3])
        some = torch.arange(len(whole)) % 2 == 0
        return {"whole": whole, "first": first}, {"first": some}

    trainer, found = trained(
        tmp_path, own={"losses": losses, "params": lambda model: model.model.layers.parameters()}
    )
    assert len(trainer.update.roles) == 24 and float(found.norm()) > 0
    assert all("layers" in name for name in trainer.engine.parameters)


def test_bases_in_the_other_order_are_refused() -> None:
    with pytest.raises(TypeError, match=r"class Behind\(Unlearning, Trainer\)"):

        class Behind(hf.Trainer, Unlearning):
            """Whose `training_step` would be the Trainer's."""


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 'forget' too"):
        trained(tmp_path, own={"train_dataset": Texts(column=False)})
    with pytest.raises(ValueError, match="empty forget_dataset"):
        trained(tmp_path, own={"forget_dataset": Texts(0)})
    with pytest.raises(TypeError, match="instance of a method"):
        trained(tmp_path, own={"method": mtu.OrthoGrad})
    again = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(RuntimeError, match="of transformers gradient_checkpointing_kwargs="):
        trained(tmp_path, gradient_checkpointing=True, **again)
    arguments = settings(tmp_path)
    arguments._n_gpu = 2
    with pytest.raises(RuntimeError, match="found 2 processes"):
        Unlearner(build(), arguments, method=mtu.OrthoGrad(), train_dataset=Texts())


def test_a_user_needs_at_most_five_lines() -> None:
    """Those of the module's docstring."""
    from mtu_fast.integrations import transformers as ours

    text = inspect.getdoc(ours) or ""
    code = [line for line in text.splitlines() if line.startswith("    ") and line.strip()]
    assert len(code) <= 5 and VOCAB
