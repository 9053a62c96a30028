"""Adapters of `peft` beside those that train alone: saved modules, prefixes, and adapters switched or added later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast.losses import causal_lm
from tests.helpers.checks import assert_rows, grad_vector, truth_of
from tests.helpers.checks import trained as trained_of
from tests.helpers.truth import relative_error
from tests.integrations.small import VOCAB, S, build

pytest.importorskip("peft")

import peft

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]
TASK = {"task_type": "CAUSAL_LM"}
LIMIT = 2e-5
TARGETS = ["q_proj", "v_proj"]


def low_rank(**more: Any) -> Any:
    return peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, **TASK, **more)


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": low_rank,
    "dora": lambda: low_rank(use_dora=True),
    "modules_to_save": lambda: low_rank(modules_to_save=["lm_head"]),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[], **TASK),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
}


def losses_of(model: nn.Module, seed: int = 0) -> Tensor:
    tokens = torch.randint(VOCAB, (5, S), generator=torch.Generator().manual_seed(seed))
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return causal_lm(logits[:, -S:], tokens)


def check(model: nn.Module, engine: mtu.Engine, seed: int = 0) -> None:
    """Rows of what trains now, and of nothing else."""
    params = trained_of(model)
    losses = losses_of(model, seed)
    J = truth_of({"loss": losses}, params)
    rows = engine.rows(losses)
    assert_rows(rows, J, params, LIMIT, seed)
    assert list(map(id, engine.parameters.values())) == list(map(id, params))


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_over_what_trains(name: str) -> None:
    model = peft.get_peft_model(build(), CONFIGS[name]())
    engine = mtu.Engine(model)
    for seed in range(2):
        check(model, engine, seed)
    names = list(engine.parameters)
    assert not any("base_layer" in each or "embed_tokens" in each for each in names)
    assert any("lm_head" in each for each in names) == (name == "modules_to_save")


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "prompt"])
def test_rows_take_no_more_than_they_must(name: str) -> None:
    """The smaller of R rows of the adapter and their factors: never a number for each weight of the base."""
    model = peft.get_peft_model(build(), CONFIGS[name]())
    engine = mtu.Engine(model)
    losses = losses_of(model)
    rows = engine.rows(losses)
    adapter = sum(p.numel() * p.element_size() for p in engine.parameters.values())
    assert rows.nbytes <= 5 * adapter * 1.05


def test_adapters_switched() -> None:
    """The engine was made while the first was active."""
    model = peft.get_peft_model(build(), low_rank(), adapter_name="one")
    model.add_adapter("two", low_rank())
    model.set_adapter("one")
    engine = mtu.Engine(model)
    for seed, active in enumerate(("one", "two", "one")):
        model.set_adapter(active)
        check(model, engine, seed)
        assert all(f".{active}." in name for name in engine.parameters)


@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.5), mtu.PCGrad()])
def test_micro_batches_after_an_adapter_was_switched(method: mtu.Method) -> None:
    """The first of them finds the other adapter, and the second goes on with that."""
    model = peft.get_peft_model(build(), low_rank(), adapter_name="one")
    model.add_adapter("two", low_rank())
    model.set_adapter("one")
    engine, forget = mtu.Engine(model), torch.arange(5) < 2
    for seed, active in enumerate(("one", "two", "one")):
        model.set_adapter(active)
        params = trained_of(model)
        both = torch.cat([losses_of(model, seed), losses_of(model, seed + 1)])
        mtu.Engine(model).backward(both, method, forget=forget.repeat(2))
        expected = grad_vector(params)
        model.zero_grad()
        for more in (0, 1):
            losses = losses_of(model, seed + more)
            engine.accumulate(losses, method, forget=forget, sync=more == 1)
        assert relative_error(grad_vector(params), expected) <= LIMIT
        model.zero_grad()


def test_an_adapter_switched_between_micro_batches_is_an_error() -> None:
    model = peft.get_peft_model(build(), low_rank(), adapter_name="one")
    model.add_adapter("two", low_rank())
    for method in (mtu.OrthoGrad(0.5), mtu.PCGrad()):
        model.set_adapter("one")
        engine, forget = mtu.Engine(model), torch.arange(5) < 2
        engine.accumulate(losses_of(model), method, forget=forget, sync=False)
        held = engine.accumulated_bytes
        model.set_adapter("two")
        with pytest.raises(ValueError, match="found other trainable parameters"):
            engine.accumulate(losses_of(model, 1), method, forget=forget, sync=False)
        assert engine.accumulated_bytes == held


def test_an_adapter_added_after_the_engine_was_made() -> None:
    model = peft.get_peft_model(build(), low_rank(), adapter_name="one")
    engine = mtu.Engine(model)
    check(model, engine)
    model.add_adapter("later", low_rank())
    model.set_adapter("later")
    check(model, engine, 1)
    assert all(".later." in name for name in engine.parameters)


def test_an_adapter_put_on_a_model_that_has_an_engine() -> None:
    """All of the base trained before; the adapter alone trains now."""
    base = build()
    engine = mtu.Engine(base)
    check(base, engine)
    model = peft.get_peft_model(base, low_rank())
    check(model, engine, 1)
    assert all("lora" in name for name in engine.parameters)


def test_an_adapter_merged_and_unloaded() -> None:
    """The base trains again as a whole."""
    model = peft.get_peft_model(build(), low_rank())
    engine = mtu.Engine(model)
    check(model, engine)
    plain = model.merge_and_unload()
    plain.requires_grad_(True)
    check(plain, mtu.Engine(plain), 1)
