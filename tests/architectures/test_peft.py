"""Adapters of `peft` while they are trained: rows of one engine against one backward per row, at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.helpers.checks import assert_rows, clear, grad_vector, trained, truth_of, vector
from tests.helpers.truth import combine_truth, relative_error

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft

from tests.architectures.zoo import Architecture, Batch, S, Wide, by_name, doubled, per_token

STEPS = 10
FORGET = torch.tensor([True, False, False, True, False])
TASK = {"task_type": "CAUSAL_LM"}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft asks for it
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def low_rank(**more: Any) -> Any:
    """On attention and the blocks' first layers; B is zero at first, so A has no gradient then."""
    targets = ["q_proj", "v_proj", "gate_proj"]
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **TASK, **more)


def scaled(values: list[str], inner: str, **more: Any) -> Any:
    """IA3: what comes out of `values` and what goes into `inner` is scaled."""
    return peft.IA3Config(
        target_modules=[*values, inner], feedforward_modules=[inner], **TASK, **more
    )


ADAPTERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora": ("llama-sdpa", low_rank),
    "lora_embedding": (
        "llama-eager",
        lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "o_proj"], **TASK),
    ),
    "lora_gpt2": (
        "gpt2-sdpa",
        lambda: peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, **TASK),
    ),
    "dora": ("llama-sdpa", lambda: low_rank(use_dora=True)),
    "ia3": ("llama-sdpa", lambda: scaled(["k_proj", "v_proj"], "down_proj")),
    "ia3_gpt2": ("gpt2-eager", lambda: scaled(["c_attn"], "mlp.c_proj", fan_in_fan_out=True)),
    "prompt": ("llama-sdpa", lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **TASK)),
}

every = pytest.mark.parametrize("name", ADAPTERS)


def adapted(name: str) -> tuple[nn.Module, Architecture]:
    """A small language model whose adapter alone is trained."""
    base, config = ADAPTERS[name]
    case = by_name(base)
    return peft.get_peft_model(case.build(), config()).eval(), case


def losses_of(model: nn.Module, batch: Batch) -> Tensor:
    """What each token says of the next; a soft prompt stands before the first."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    return per_token(logits[:, -S:-1], batch["labels"][:, 1:])


def losses_in_double(model: nn.Module, batch: Batch) -> Tensor:
    """The same in float64 throughout."""
    with Wide():
        return losses_of(model, batch)


def over_steps(
    model: nn.Module,
    case: Architecture,
    forward: Callable[[nn.Module, Batch], Tensor],
    tolerance: float,
) -> None:
    """Gram, d of random weights and the `.grad` of OrthoGrad at every step of training."""
    params, engine = trained(model), mtu.Engine(model)
    assert len(params) < len(list(model.parameters()))
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    for step in range(STEPS):
        losses = forward(model, case.batch(step))
        J = truth_of({"loss": losses}, params)
        rows = engine.rows(losses, forget=FORGET)
        assert_rows(rows, J, params, tolerance, seed=step)
        clear(params)
        expected = combine_truth(J, rows.backward(mtu.OrthoGrad(0.5)).weights)
        assert relative_error(grad_vector(params), vector(expected.values(), params)) <= tolerance
        optimizer.step()


@every
def test_float32(name: str) -> None:
    """As it is made."""
    model, case = adapted(name)
    over_steps(model, case, losses_of, 2e-5)


@every
def test_float64(name: str) -> None:
    """In float64 throughout."""
    model, case = adapted(name)
    over_steps(doubled(model), case, losses_in_double, 1e-10)
