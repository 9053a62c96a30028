"""A trainer in open-unlearning's form, on the real `Trainer`, against the plain loop on the joined batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import mtu_fast as mtu
from mtu_fast.losses import causal_lm, npo
from tests.helpers.truth import relative_error
from tests.integrations.marks import marks
from tests.integrations.ranks import on_two
from tests.integrations.small import RATE, VOCAB, build, hf, moved, weights
from tests.integrations.trainers import settings

pytest.importorskip("accelerate")

from mtu_fast.integrations.open_unlearning import Surgery, joined, method_of

pytestmark = marks()
COUNT = 6


class Base(hf.Trainer):
    """What their trainers derive from: a Trainer with arguments of its own, and scalars in `compute_loss`."""

    def __init__(self, *args: Any, evaluators: Any = None, template_args: Any = None, **kw: Any):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kw)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a scalar was asked for")


class OrthoGrad(Surgery, Base):
    """What a user writes."""


HANDLERS = {OrthoGrad.__name__: OrthoGrad}


class Sides(Dataset[dict[str, dict[str, Tensor]]]):
    """Pairs of a forget and a retain text; those to retain are longer."""

    def __init__(self, count: int = COUNT, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.texts = {
            side: torch.randint(1, VOCAB, (count, length), generator=generator)
            for side, length in (("forget", 5), ("retain", 7))
        }

    def __len__(self) -> int:
        return len(self.texts["forget"])

    def __getitem__(self, i: int) -> dict[str, dict[str, Tensor]]:
        found = {}
        for side, texts in self.texts.items():
            labels = texts[i].clone()
            labels[: 1 + i % 2] = -100  # questions of different lengths
            mask = torch.ones_like(labels)
            found[side] = {"input_ids": texts[i], "labels": labels, "attention_mask": mask}
        return found


def collate(items: list[Any]) -> Any:
    """Theirs goes into nested dictionaries."""
    if isinstance(items[0], Mapping):
        return {name: collate([item[name] for item in items]) for name in items[0]}
    return torch.stack(items)


def load(config: dict[str, Any], folder: Path, **more: Any) -> Any:
    """A trainer from a config as theirs: a handler, method_args, and the arguments of training."""
    handler = HANDLERS[config["handler"]]
    return handler(
        model=more.pop("model", None) or build(),
        args=settings(folder, remove_unused_columns=False, **more),
        train_dataset=Sides(),
        data_collator=collate,
        evaluators=None,
        template_args={},
        **config["method_args"],
    )


def test_both_sides_of_an_item_are_no_unused_columns(tmp_path: Path) -> None:
    """As the Trainer has it by default, it drops what the model's forward does not name."""
    given: dict[str, Any] = {"train_dataset": Sides(), "data_collator": collate}
    moves = []
    for removes in (True, False):
        model = build()
        start = weights(model)
        arguments = settings(tmp_path, remove_unused_columns=removes)
        OrthoGrad(model=model, args=arguments, method="OrthoGrad", **given).train()
        moves.append(moved(model, start))
    assert torch.equal(*moves) and float(moves[0].norm()) > 0


CONFIG: dict[str, Any] = {
    "handler": "OrthoGrad",
    "method_args": {"method": "OrthoGrad", "options": {"alpha": 0.3}},
}


def plain_losses(model: nn.Module, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """Losses of both sides, each in a forward of its own: retain, forget."""
    data = Sides()
    whole = collate([data[i] for i in range(len(data))])
    found = []
    for side in ("retain", "forget"):
        batch = whole[side]
        logits = model(input_ids=batch["input_ids"]).logits
        found.append(causal_lm(logits, batch["labels"], reduction=reduction))
    return found[0], found[1]


def plain_step(model: nn.Module, losses: Tensor, method: mtu.Method) -> Tensor:
    start = weights(model)
    mask = torch.arange(2 * COUNT) >= COUNT
    mtu.Engine(model).backward(losses, method, forget=mask)
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    return moved(model, start)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_step_is_that_of_the_plain_loop(accumulated: int, tmp_path: Path) -> None:
    model = build()
    expected = plain_step(model, torch.cat(plain_losses(model)), mtu.OrthoGrad(0.3))
    more = {
        "per_device_train_batch_size": COUNT // accumulated,
        "gradient_accumulation_steps": accumulated,
    }
    trainer = load(CONFIG, tmp_path, **more)
    start = weights(trainer.model)
    trainer.train()
    assert trainer.method == mtu.OrthoGrad(0.3)
    assert relative_error(moved(trainer.model, start), expected) <= 1e-6


def test_npo_beside_a_frozen_copy(tmp_path: Path) -> None:
    """Two steps, so that the model and its frozen copy differ."""
    model = build()
    frozen = copy.deepcopy(model)
    begin = weights(model)
    for _ in range(2):
        model.zero_grad()
        retain, _ = plain_losses(model)
        preferred = npo(plain_losses(model, "sum")[1], plain_losses(frozen, "sum")[1], beta=0.5)
        plain_step(model, torch.cat([retain, preferred]), mtu.GradDiff(0.4))
    expected = moved(model, begin)

    own = {"method": "GradDiff", "options": {"alpha": 0.4}, "forget_loss": "npo", "beta": 0.5}
    trainer = load({"handler": "OrthoGrad", "method_args": own}, tmp_path, max_steps=2)
    start = weights(trainer.model)
    trainer.train()
    assert relative_error(moved(trainer.model, start), expected) <= 1e-5


NPO = {"method": "GradDiff", "options": {"alpha": 0.4}, "forget_loss": "npo", "beta": 0.5}
SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def resumed(folder: Path, arguments: dict[str, Any], model: nn.Module | None = None) -> Tensor:
    """The weights after four steps, of which the last two are those of a run that was resumed."""
    config = {"handler": "OrthoGrad", "method_args": arguments}
    trainer = load(config, folder, model=model, **SAVED)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return weights(trainer.model)


@pytest.mark.parametrize("forget_loss", ["nll", "npo"])
@pytest.mark.parametrize("seed", [0, 1])
def test_resume_to_the_bit(forget_loss: str, seed: int, tmp_path: Path) -> None:
    """NPO's reference is the model as given, not that of the checkpoint."""
    arguments = NPO | {"forget_loss": forget_loss}
    config = {"handler": "OrthoGrad", "method_args": arguments}
    whole = load(config, tmp_path, model=build(seed), **SAVED)
    whole.train()
    assert torch.equal(resumed(tmp_path, arguments, build(seed)), weights(whole.model))


def test_a_reference_of_other_weights_is_refused(tmp_path: Path) -> None:
    load({"handler": "OrthoGrad", "method_args": NPO}, tmp_path, **SAVED).train()
    half_unlearned = hf.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="model: found other weights than those the run began"):
        resumed(tmp_path, NPO, half_unlearned)
    with pytest.raises(ValueError, match="or another forget_loss"):
        resumed(tmp_path, NPO | {"forget_loss": "nll"})


@pytest.mark.parametrize("forget_loss", ["nll", "npo"])
def test_a_soft_prompt_before_the_text(forget_loss: str, tmp_path: Path) -> None:
    """The logits of the prompt's positions predict no token of the text."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    torch.manual_seed(5)
    model = peft.get_peft_model(build(), config)
    own = NPO | {"forget_loss": forget_loss}
    trainer = load({"handler": "OrthoGrad", "method_args": own}, tmp_path, model=model)
    begin, expected = weights(model), copy.deepcopy(model)
    data = Sides()
    batch = joined(collate([data[i] for i in range(COUNT)]), "forget")
    forget, labels = batch.pop("forget"), batch["labels"]
    logits = expected(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    text = logits[:, 3:]
    losses = causal_lm(text, labels)
    if forget_loss == "npo":
        summed = causal_lm(text, labels, reduction="sum")
        losses = torch.where(forget, npo(summed, summed.detach(), beta=0.5), losses)
    mtu.Engine(expected).backward(losses, mtu.GradDiff(0.4), forget=forget)
    torch.optim.SGD(expected.parameters(), lr=RATE).step()
    trainer.train()
    assert float(moved(model, begin).norm()) > 0
    assert relative_error(moved(model, begin), moved(expected, begin)) <= 1e-5


def test_what_two_sides_leave_no_place_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Surgery: found NablaTau, expected a method without"):
        load({"handler": "OrthoGrad", "method_args": {"method": "NablaTau"}}, tmp_path)
    own = {"method": "OrthoGrad", "forget_dataset": Sides()}
    with pytest.raises(ValueError, match="Surgery: found forget_dataset=, expected both sides"):
        load({"handler": "OrthoGrad", "method_args": own}, tmp_path)


def test_the_shorter_side_is_padded_behind_its_end() -> None:
    data = Sides(2)
    batch = joined(collate([data[0], data[1]]), "forget")
    assert batch["input_ids"].shape == (4, 7)
    assert batch["forget"].tolist() == [False, False, True, True]
    assert (batch["labels"][2:, 5:] == -100).all() and (batch["attention_mask"][2:, 5:] == 0).all()


def test_a_method_by_its_name() -> None:
    assert method_of("GradDiff", {"alpha": 0.2}) == mtu.GradDiff(0.2)
    assert method_of(mtu.PCGrad(), {}) == mtu.PCGrad()
    with pytest.raises(ValueError, match=r"found 'Orthograd', expected one of .*OrthoGrad"):
        method_of("Orthograd", {})
    with pytest.raises(ValueError, match="options"):
        method_of(mtu.PCGrad(), {"alpha": 0.5})
    with pytest.raises(ValueError, match="Method"):
        method_of("Method", {})


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.ones(2, 3)},
        {"forget": {"input_ids": torch.ones(2, 3)}, "retain": {}},
        {"forget": {"original": {}, "alternate": {}}, "retain": {}},
    ],
)
def test_a_batch_of_another_form_is_refused(batch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected forget and retain"):
        joined(batch, "forget")


def test_an_unknown_forget_loss_is_refused(tmp_path: Path) -> None:
    own = {"method": "OrthoGrad", "forget_loss": "dpo"}
    with pytest.raises(ValueError, match="forget_loss: found 'dpo'"):
        load({"handler": "OrthoGrad", "method_args": own}, tmp_path)


@pytest.mark.parametrize("forget_loss", ["nll", "npo"])
def test_two_processes_are_one(forget_loss: str, tmp_path: Path) -> None:
    arguments = {**CONFIG["method_args"], "forget_loss": forget_loss}

    def run(size: int) -> Tensor:
        more = {"max_steps": 2, "per_device_train_batch_size": size}
        trainer = load(CONFIG | {"method_args": arguments}, tmp_path, **more)
        start = weights(trainer.model)
        trainer.train()
        assert len(trainer.update.roles) == 2 * COUNT
        return moved(trainer.model, start)

    one, other = on_two(run, COUNT // 2)
    expected = run(COUNT)
    assert torch.equal(one, other)
    assert relative_error(one, expected) <= 2e-6


def test_a_model_with_another_loss_is_refused(tmp_path: Path) -> None:
    """As in `Unlearning`: by what it says of itself, and by its own loss."""
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCAB, **sizes))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration, an encoder with a decoder"):
        load(CONFIG, tmp_path, model=t5)
    xlm = hf.XLMConfig(vocab_size=VOCAB, emb_dim=16, n_layers=1, n_heads=2)
    for forget_loss in ("nll", "npo"):
        own = {**CONFIG["method_args"], "forget_loss": forget_loss}
        trainer = load(CONFIG | {"method_args": own}, tmp_path, model=hf.XLMWithLMHeadModel(xlm))
        with pytest.raises(
            ValueError, match=r"XLMWithLMHeadModel computes itself is no mean of ca"
        ):
            trainer.train()


class Scored(Surgery, hf.Trainer):
    """Whose evaluation is that of the `Trainer`."""


def test_evaluation_is_of_one_side(tmp_path: Path) -> None:
    data = Sides()
    sides = {side: [data[i][side] for i in range(COUNT)] for side in ("forget", "retain")}
    own: dict[str, Any] = {"method": "OrthoGrad", "train_dataset": data, "data_collator": collate}
    arguments = settings(tmp_path, remove_unused_columns=False)
    trainer = Scored(model=build(), args=arguments, **own)
    with pytest.raises(ValueError, match=r"evaluation: found a batch of \['forget', 'retain'\]"):
        trainer.evaluate(data)
    found = trainer.evaluate(sides)
    with torch.no_grad():
        retain, forget = plain_losses(trainer.model)
    # answers of one side are nearly of one length
    assert found["eval_retain_loss"] == pytest.approx(float(retain.mean()), rel=1e-2)
    assert found["eval_forget_loss"] == pytest.approx(float(forget.mean()), rel=1e-2)


def other_form_on_one_rank(folder: Path) -> None:
    trainer = load(CONFIG, folder, per_device_train_batch_size=COUNT // 2)
    whole = trainer.data_collator

    def collated(items: Any) -> Any:
        batch = whole(items)
        return batch if torch.distributed.get_rank() == 0 else {"retain": batch["retain"]}

    trainer.data_collator = collated
    with pytest.raises(ValueError, match="rank 1: Surgery: forget: found a batch of"):
        trainer.train()


def test_a_batch_of_another_form_on_one_rank_is_an_error_on_both(tmp_path: Path) -> None:
    on_two(other_form_on_one_rank, tmp_path)
