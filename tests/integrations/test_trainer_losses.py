"""Losses that a step would not follow, or that are not the model's own, are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast.integrations._own_loss import COARSE, FINE, _compared, check_own_loss
from mtu_fast.integrations.transformers import Unlearning, language_model_losses
from mtu_fast.losses import causal_lm
from tests.helpers.truth import relative_error
from tests.integrations.marks import marks
from tests.integrations.small import (
    SIZES,
    VOCAB,
    Texts,
    build,
    hf,
    plain_step,
    weights,
)
from tests.integrations.trainers import settings, trained

pytestmark = marks()


def tagger(**more: Any) -> nn.Module:
    """A token classifier of as many classes as there are tokens."""
    config = hf.BertConfig(**SIZES, num_hidden_layers=1, num_labels=VOCAB, **more)
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
    with pytest.raises(ValueError, match="optim: found 'adalomo', expected one that steps after"):
        trained(tmp_path, optim="adalomo")
    with pytest.raises(
        ValueError, match=r"compute_loss_func: found a function .* expected losses="
    ):
        trained(tmp_path, own={"compute_loss_func": losses})
    with pytest.raises(ValueError, match=r"compute_loss: found that of Own .* expected losses="):
        Own(build(), settings(tmp_path), method=mtu.OrthoGrad(), train_dataset=Texts())
    expected = plain_step(build(), mtu.OrthoGrad(0.5))
    _, found = trained(tmp_path, own={"compute_loss_func": losses, "losses": losses})
    assert relative_error(found, expected) <= 1e-6


def test_a_model_that_changes_its_weights_in_evaluation(tmp_path: Path) -> None:
    """RWKV divides some in place, and multiplies them again in the next forward of training."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "rescale_every": 1}
    config = hf.RwkvConfig(vocab_size=VOCAB, context_length=8, **sizes)
    torch.manual_seed(0)
    model = hf.RwkvForCausalLM(config)
    copied = copy.deepcopy(model)
    _, found = trained(tmp_path, model)
    _, expected = trained(tmp_path, copied, own={"losses": language_model_losses})
    assert relative_error(found, expected) <= 1e-6 and float(found.norm()) > 0


def test_a_step_of_ones_own_behind_the_mixin_is_told(tmp_path: Path) -> None:
    """It is not called; in front of the mixin it is."""
    calls: list[str] = []

    def step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(type(self).__name__)
        return super(kinds[type(self).__name__], self).training_step(*args, **kwargs)

    theirs: Any = type("Theirs", (hf.Trainer,), {"training_step": step})
    behind: Any = type("Behind", (Unlearning, theirs), {})
    front: Any = type("Front", (Unlearning, hf.Trainer), {"training_step": step})
    kinds = {"Front": front}
    given = {"method": mtu.OrthoGrad(0.5), "train_dataset": Texts()}
    with pytest.warns(
        UserWarning, match="training_step: found that of Theirs, which is not called"
    ):
        behind(build(), settings(tmp_path), **given).train()
    assert not calls
    front(build(), settings(tmp_path), **given).train()
    assert calls == ["Front"]


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


WIDE = {"d_model": 16, "dropout": 0.0}
BART = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
OF_ANOTHER_LOSS: dict[str, Callable[[], Any]] = {
    # the label of a position is what is predicted there: not shifted
    "XLNet": lambda: hf.XLNetLMHeadModel(
        hf.XLNetConfig(vocab_size=VOCAB, n_layer=1, n_head=2, d_inner=24, **WIDE)
    ),
    "XLM": lambda: hf.XLMWithLMHeadModel(
        hf.XLMConfig(vocab_size=VOCAB, emb_dim=16, n_layers=1, n_heads=2)
    ),
    # which calls its loss ForCausalLM
    "Bart": lambda: hf.BartForCausalLM(hf.BartConfig(vocab_size=VOCAB, **WIDE, **BART)),
    "a term of its own": lambda: penalised(),
    "flat, in bfloat16": lambda: hf.BartForCausalLM(
        hf.BartConfig(vocab_size=VOCAB, init_std=1e-4, **WIDE, **BART)
    ).bfloat16(),
}


def penalised() -> Any:
    """A language model that adds something to its loss, which no logits show."""

    class Penalised(hf.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            if found.loss is not None:
                found.loss = found.loss + 1e-2 * self.model.norm.weight.mean()
            return found

    return Penalised(build().config)


@pytest.mark.parametrize("name", OF_ANOTHER_LOSS)
def test_a_model_with_another_loss_needs_losses(name: str, tmp_path: Path) -> None:
    """It is compared in the first step, before anything is written."""
    torch.manual_seed(0)
    model = OF_ANOTHER_LOSS[name]()
    start = weights(model)
    with pytest.raises(
        ValueError, match=r"computes itself is no mean of causal_lm .* expected los"
    ):
        trained(tmp_path, model, remove_unused_columns=False)
    assert torch.equal(weights(model), start) and all(p.grad is None for p in model.parameters())
    own = {"losses": language_model_losses}
    _, found = trained(tmp_path, model, own=own, remove_unused_columns=False)
    assert float(found.norm()) > 0


@pytest.mark.parametrize("seed", range(3))
def test_gradients_rounded_to_half_precision_are_no_other_loss(seed: int) -> None:
    """Under autocast logits are handed out in float32, as accelerate has it: the loss is as exact, its gradient not."""
    fp32 = pytest.importorskip("accelerate.utils").convert_outputs_to_fp32
    batch = {"input_ids": Texts(seed=seed).tokens, "labels": Texts(seed=seed).tokens}
    for model, is_own in ((build(seed), True), (penalised(), False)):
        model.forward = fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
        found = _compared(model, batch)
        assert found is not None
        assert [bound for _, bound in found.distances] == [FINE, COARSE]
        if is_own:
            assert check_own_loss(model, batch)
        else:
            with pytest.raises(ValueError, match="computes itself is no mean of causal_lm"):
                check_own_loss(model, batch)


def test_an_adapter_with_a_term_of_its_own_needs_losses(tmp_path: Path) -> None:
    """AdaLoRA adds how far its factors are from orthogonal ones."""
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    with pytest.raises(ValueError, match="computes itself is no mean of causal_lm"):
        trained(tmp_path, peft.get_peft_model(build(), config))


def test_a_model_without_logits_needs_losses(tmp_path: Path) -> None:
    model = hf.BertForPreTraining(hf.BertConfig(**SIZES, num_hidden_layers=1))
    with pytest.raises(
        ValueError, match="BertForPreTrainingOutput without logits, expected those o"
    ):
        trained(tmp_path, model)


def test_a_soft_prompt_predicts_the_first_token(tmp_path: Path) -> None:
    """As the model itself has it; its own loss is the mean over tokens."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model, tokens = peft.get_peft_model(build(), config), Texts().tokens
    losses = language_model_losses(model, {"input_ids": tokens, "labels": tokens})
    own = model(input_ids=tokens, labels=tokens).loss
    assert relative_error(losses.detach().mean(), own.detach()) <= 1e-6
    _, found = trained(tmp_path, model)
    assert float(found.norm()) > 0


def test_a_comparison_leaves_the_model_as_it_was_and_waits_for_tokens() -> None:
    model = build(attention_dropout=0.5).train()
    model.model.norm.eval()
    tokens = Texts(4).tokens
    state = torch.random.get_rng_state()
    assert not check_own_loss(model, {"input_ids": tokens, "labels": torch.full_like(tokens, -100)})
    labels = tokens.clone()
    labels[1:] = -100
    assert check_own_loss(model, {"input_ids": tokens, "labels": labels})
    assert model.training and not model.model.norm.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
