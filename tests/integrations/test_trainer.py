"""The mixin in the real `Trainer`: each of its settings against the plain loop, or against itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import mtu_fast as mtu
from mtu_fast.losses import causal_lm
from tests.helpers.truth import relative_error
from tests.integrations.small import (
    COUNT,
    METHODS,
    RATE,
    VOCAB,
    Texts,
    build,
    hf,
    losses_of,
    moved,
    plain_step,
    weights,
)

pytest.importorskip("accelerate")

from mtu_fast.integrations._states import STATE
from mtu_fast.integrations.transformers import Unlearning, language_model_losses

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Unlearner(Unlearning, hf.Trainer):
    """What a user writes."""


def settings(folder: Path, **more: Any) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": COUNT,
        "max_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return hf.TrainingArguments(**(given | more))


def trained(
    folder: Path, model: nn.Module | None = None, own: dict[str, Any] | None = None, **more: Any
) -> tuple[Any, Tensor]:
    """A trainer that ran, and how far its model moved."""
    model = model or build()
    start = weights(model)
    arguments: dict[str, Any] = {"method": mtu.OrthoGrad(0.5), "train_dataset": Texts()}
    trainer = Unlearner(model, settings(folder, **more), **(arguments | (own or {})))
    trainer.train()
    return trainer, moved(model, start)


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


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_an_interrupted_run_are_none_of_the_next(name: str, tmp_path: Path) -> None:
    """A run ends in its second micro-batch, and the user calls train again."""
    calls: list[int] = []

    def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(len(calls))
        if calls[-1] == 1:
            raise InterruptedError("stop")
        return losses_of(model, batch)

    size = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    own = {"method": METHODS[name](), "train_dataset": Texts(), "losses": losses}
    model = build()
    trainer, start = Unlearner(model, settings(tmp_path, **size), **own), weights(model)
    with pytest.raises(InterruptedError):
        trainer.train()
    assert trainer.engine.accumulated_bytes > 0
    trainer.train()
    assert relative_error(moved(model, start), plain_step(build(), METHODS[name]())) <= 1e-6


def test_losses_are_logged_as_they_were_before_a_scaler(tmp_path: Path) -> None:
    logs = []
    for scale in (1.0, 2.0**10):
        given = settings(tmp_path, logging_steps=1)
        own = {"method": mtu.OrthoGrad(0.5), "train_dataset": Texts()}
        trainer = Unlearner(build(), given, **own)
        # as of fp16, which the Trainer has on a GPU only
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("loss", "forget_loss", "retain_loss"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-6)


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


def test_logging_and_evaluation(tmp_path: Path) -> None:
    own = {"eval_dataset": Texts(seed=5)}
    model = build()
    with torch.no_grad():
        items = Texts()
        logged = float(causal_lm(model(input_ids=items.tokens).logits, items.tokens).mean())
    trainer, _ = trained(
        tmp_path,
        model,
        own,
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        eval_strategy="steps",
        eval_steps=1,
    )
    history = trainer.state.log_history
    losses = [line["loss"] for line in history if "loss" in line]
    assert losses[0] == pytest.approx(logged, rel=1e-3)
    assert len([line for line in history if "eval_loss" in line]) == 2
    evaluated = trainer.evaluate()
    with torch.no_grad():
        tokens = own["eval_dataset"].tokens
        expected = model.eval()(input_ids=tokens, labels=tokens).loss
    assert evaluated["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


class Caught(hf.TrainerCallback):
    """What TensorBoard's and W&B's callbacks are given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Keep it."""
        self.logs.append(dict(logs))


def test_callbacks_are_given_both_sides(tmp_path: Path) -> None:
    model, data, caught = build(), Texts(), Caught()
    with torch.no_grad():
        losses = causal_lm(model(input_ids=data.tokens).logits, data.tokens)
    trained(tmp_path, model, {"callbacks": [caught]}, logging_steps=1)
    forget = torch.tensor([bool(data[i]["forget"]) for i in range(COUNT)])
    first = caught.logs[0]
    assert first["forget_loss"] == pytest.approx(float(losses[forget].mean()), rel=1e-5)
    assert first["retain_loss"] == pytest.approx(float(losses[~forget].mean()), rel=1e-5)
    assert "forget_loss" not in caught.logs[-1]  # that is the summary of the run


def test_tensorboard_is_given_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real callback writes a file, and its curves are the losses of both sides."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    trainer, _ = trained(tmp_path, report_to=["tensorboard"], logging_steps=1, max_steps=3)
    written = EventAccumulator(str(tmp_path / "curves"))
    written.Reload()
    logged = [line for line in trainer.state.log_history if "forget_loss" in line]
    for side in ("forget_loss", "retain_loss"):
        curve = [event.value for event in written.Scalars(f"train/{side}")]
        assert curve == pytest.approx([line[side] for line in logged], rel=1e-6)
        assert len(curve) == 3


@pytest.mark.filterwarnings("ignore")
def test_wandb_is_given_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real callback, without a network."""
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    try:
        trainer, _ = trained(tmp_path, report_to=["wandb"], logging_steps=1, max_steps=2)
        found = dict(wandb.run.summary)
    finally:
        wandb.finish()
    last = [line for line in trainer.state.log_history if "forget_loss" in line][-1]
    assert found["train/forget_loss"] == pytest.approx(last["forget_loss"], rel=1e-6)
    assert found["train/retain_loss"] == pytest.approx(last["retain_loss"], rel=1e-6)


TAU = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 500}


def tau_trainer(folder: Path, **more: Any) -> Any:
    """12 items to retain, 3 batches a pass; 4 to forget, one; so E = int(6 · 3 / 2) = 9 epochs of one step."""
    return Unlearner(
        build(),
        settings(folder, **(TAU | more)),
        method=mtu.NablaTau(),
        train_dataset=Texts(12, seed=2, column=False),
        forget_dataset=Texts(4, seed=3, column=False),
        eval_dataset=Texts(5, seed=4, column=False),
    )


def test_the_schedule_of_nabla_tau(tmp_path: Path) -> None:
    trainer = tau_trainer(tmp_path)
    with torch.no_grad():
        tokens = trainer.eval_dataset.tokens
        tau = float(causal_lm(trainer.model(input_ids=tokens).logits, tokens).mean())
    seen = []
    method = trainer.method
    begin = type(method).start_epoch

    def start_epoch(self: Any, epoch: int, validation: Any) -> None:
        begin(self, epoch, validation)
        seen.append((epoch, self.alpha, dict(self.tau)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(method), "start_epoch", start_epoch)
        trainer.train()
    assert trainer.state.global_step == 9 and [epoch for epoch, _, _ in seen] == list(range(9))
    alphas = [alpha for _, alpha, _ in seen]
    assert alphas == pytest.approx([5 / 3 * 4 / 16 * (1 - epoch / 9) for epoch in range(9)])
    assert seen[0][2]["loss"] == pytest.approx(tau, rel=1e-6)
    assert seen[4][2] == seen[0][2] != seen[5][2]  # looked at again after five epochs


def test_the_schedule_is_resumed_to_the_bit(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 4}
    whole = tau_trainer(tmp_path, **saved)
    whole.train()
    resumed = tau_trainer(tmp_path, **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 9
    assert torch.equal(weights(resumed.model), weights(whole.model))


def epochs_of(trainer: Any, train: Callable[[], object]) -> list[int]:
    """The epochs that begin while it trains."""
    seen: list[int] = []
    begin = mtu.NablaTau.start_epoch

    def start_epoch(self: Any, epoch: int, validation: Any) -> None:
        begin(self, epoch, validation)
        seen.append(epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mtu.NablaTau, "start_epoch", start_epoch)
        train()
    return seen


def test_a_run_that_follows_an_interrupted_one_begins_the_schedule_anew(tmp_path: Path) -> None:
    """Whatever step that one ended in: the first, or the one that a checkpoint goes on from."""
    saved = {"save_strategy": "steps", "save_steps": 4}
    whole = tau_trainer(tmp_path, **saved)
    whole.train()
    for at, more in ((0, {}), (4, {"resume_from_checkpoint": str(tmp_path / "checkpoint-4")})):
        trainer = tau_trainer(tmp_path, **saved)
        losses = trainer.losses

        def failing(model: Any, batch: Any, trainer: Any = trainer, at: int = at) -> Any:
            if model.training and trainer.state.global_step == at:
                raise InterruptedError
            return language_model_losses(model, batch)

        trainer.losses = failing
        with pytest.raises(InterruptedError):
            trainer.train()
        trainer.losses = losses
        assert epochs_of(trainer, partial(trainer.train, **more)) == list(range(at, 9))
        if more:
            assert torch.equal(weights(trainer.model), weights(whole.model))


def test_the_schedule_is_that_of_the_batch_size_that_fits(tmp_path: Path) -> None:
    trainer = tau_trainer(
        tmp_path, per_device_train_batch_size=4, auto_find_batch_size=True, max_steps=60
    )
    losses, seen = trainer.losses, []

    def hungry(model: Any, batch: Any) -> Any:
        size = len(batch["input_ids"])
        if model.training and size > 4:  # two items to retain and two to forget fit
            raise RuntimeError("CUDA out of memory.")
        seen.append(size)
        return losses(model, batch)

    trainer.losses = hungry
    epochs = epochs_of(trainer, trainer.train)
    # 4 + 4 did not fit, nor did 3 + 3; of 2 + 2 a step holds two, so that a pass is one step
    assert epochs == [0, 0, *range(9)] and trainer.state.global_step == 9


def test_a_schedule_without_its_data_is_refused(tmp_path: Path) -> None:
    for own in ({}, {"forget_dataset": Texts(4, column=False)}):
        with pytest.raises(ValueError, match="NablaTau takes its schedule from"):
            trained(tmp_path, own={"method": mtu.NablaTau(), **own})


@dataclass(frozen=True)
class Kept(mtu.InterferenceAware):
    """A method with a state and random numbers of its own: how often it was asked."""

    asked: list[int] = field(default_factory=lambda: [0], compare=False)
    noise: torch.Generator = field(default_factory=torch.Generator, compare=False)

    def __call__(self, G: Any, roles: Any) -> Tensor:
        self.asked[0] += 1
        factor = self.asked[0] + float(torch.rand((), generator=self.noise))
        return super().__call__(G, roles) * factor

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"asked": self.asked[0]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.asked[0] = state["asked"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resume_to_the_bit(dropout: float, tmp_path: Path) -> None:
    """Four steps at once, and two and two: model, optimizer, random numbers, subspace and method."""
    more = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }
    found = []
    for resume in (False, True):
        model = build(attention_dropout=dropout)
        method = Kept(0.3)
        trainer = Unlearner(
            model,
            settings(tmp_path, **more),
            method=method,
            subspace=mtu.Subspace(12, every=1),
            train_dataset=Texts(),
        )
        if resume:
            assert (tmp_path / "checkpoint-2" / STATE).is_file()
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        else:
            trainer.train()
        assert trainer.subspace is not None and trainer.subspace.full
        assert method.asked == [4]
        found.append(weights(model))
    assert torch.equal(*found)


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


def tagger(**more: Any) -> nn.Module:
    """A token classifier of as many classes as there are tokens."""
    config = hf.BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=VOCAB,
        **more,
    )
    return hf.BertForTokenClassification(config)


class Own(Unlearning, hf.Trainer):
    """A loss of its own, that no step asks for."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Never."""
        raise AssertionError("a scalar was asked for")


def test_a_loss_that_would_not_be_worked_on_is_refused(tmp_path: Path) -> None:
    """Each by its name; with `losses=` of one's own, what remains is for evaluation."""

    def losses(model: Any, batch: Any) -> Tensor:
        return causal_lm(model(input_ids=batch["input_ids"]).logits, batch["labels"])

    with pytest.raises(ValueError, match=r"label_smoothing_factor: found 0\.3, expected 0"):
        trained(tmp_path, label_smoothing_factor=0.3)
    with pytest.raises(
        ValueError, match=r"compute_loss_func: found a function .* expected losses="
    ):
        trained(tmp_path, own={"compute_loss_func": losses})
    with pytest.raises(ValueError, match=r"compute_loss: found that of Own .* expected losses="):
        Own(build(), settings(tmp_path), method=mtu.OrthoGrad(), train_dataset=Texts())
    expected = plain_step(build(), mtu.OrthoGrad(0.5))
    _, found = trained(tmp_path, own={"compute_loss_func": losses, "losses": losses})
    assert relative_error(found, expected) <= 1e-6


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_of_another_kind_needs_losses(wrapped: bool, tmp_path: Path) -> None:
    """By default labels are those of the next tokens, which no tagger's are."""
    model = tagger(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if wrapped:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="BertForTokenClassification, whose loss is ForTokenClass"):
        trained(tmp_path, model)

    def losses(model: Any, batch: Any) -> Tensor:
        found = model(input_ids=batch["input_ids"]).logits
        return mtu.losses.token_classification(found, batch["labels"])

    _, found = trained(tmp_path, model, own={"losses": losses})
    assert float(found.norm()) > 0


def test_a_loss_of_routers_is_not_left_out_in_silence(tmp_path: Path) -> None:
    model = build()
    model.config.output_router_logits = True  # as a mixture of experts has it
    with pytest.raises(ValueError, match="output_router_logits=True beside no losses="):
        trained(tmp_path, model)
    _, found = trained(tmp_path, model, own={"losses": language_model_losses})
    assert float(found.norm()) > 0


def test_an_encoder_with_a_decoder_needs_losses(tmp_path: Path) -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCAB, **sizes))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration, an encoder with a decoder"):
        trained(tmp_path, model)


class Alone(nn.Module):
    """A causal language model that is no class of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        """Its logits."""
        return self.inner(input_ids=input_ids)


@pytest.mark.parametrize("kind", ["Alone", "GPT2LMHeadModel", "MyLlama"])
def test_causal_models_are_taken_without_losses(kind: str, tmp_path: Path) -> None:
    gpt2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": VOCAB, "n_positions": 8}
    models: dict[str, Any] = {
        "Alone": Alone,
        "GPT2LMHeadModel": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
        # a class of one's own says nothing of its loss
        "MyLlama": lambda: type("MyLlama", (hf.LlamaForCausalLM,), {})(build().config),
    }
    _, found = trained(tmp_path, models[kind]())
    assert float(found.norm()) > 0


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 'forget' too"):
        trained(tmp_path, own={"train_dataset": Texts(column=False)})
    with pytest.raises(ValueError, match="empty forget_dataset"):
        trained(tmp_path, own={"forget_dataset": Texts(0)})
    with pytest.raises(TypeError, match="instance of a method"):
        trained(tmp_path, own={"method": mtu.OrthoGrad})
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
