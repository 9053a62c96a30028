"""A small language model and its data, alike for every loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import mtu_fast as mtu
from mtu_fast.losses import causal_lm
from tests.helpers.checks import vector

hf = pytest.importorskip("transformers")

VOCAB, S, COUNT = 23, 6, 16
RATE = 0.1
# of a layer, alike for the models of all families
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
}


def build(seed: int = 0, **more: Any) -> nn.Module:
    """A Llama of two layers, without dropout."""
    torch.manual_seed(seed)
    shape = SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 1, "use_cache": False}
    config = hf.LlamaConfig(**(shape | more))
    return hf.LlamaForCausalLM(config)


def checkpointed(model: Any) -> None:
    """Its layers' activations are made again in the backward, as the Trainer's argument has it."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()


class Texts(Dataset[dict[str, Tensor]]):
    """Random tokens; every third is to be forgotten."""

    def __init__(self, count: int = COUNT, seed: int = 1, column: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(VOCAB, (count, S), generator=generator)
        self.column = column

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = {"input_ids": self.tokens[i], "labels": self.tokens[i]}
        if self.column:
            item["forget"] = torch.tensor(int(i % 3 == 0))
        return item


def batches(data: Texts, size: int) -> Iterator[dict[str, Tensor]]:
    """In order."""
    for start in range(0, len(data), size):
        items = [data[i] for i in range(start, min(start + size, len(data)))]
        yield {name: torch.stack([item[name] for item in items]) for name in items[0]}


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The losses that every loop uses."""
    return causal_lm(model(input_ids=batch["input_ids"]).logits, batch["labels"])


def weights(model: nn.Module) -> Tensor:
    """All parameters end to end, float64."""
    params = list(model.parameters())
    return vector([p.detach() for p in params], params)


def moved(model: nn.Module, start: Tensor) -> Tensor:
    """How far all parameters moved: what a step did."""
    return weights(model) - start


def plain_step(
    model: nn.Module, method: mtu.Method, data: Texts | None = None, clip: float | None = None
) -> Tensor:
    """What one SGD step by `engine.backward` on all samples does; the model stays as it is."""
    model = copy.deepcopy(model)
    start = weights(model)
    (batch,) = batches(data or Texts(), 10**6)
    mtu.Engine(model).backward(losses_of(model, batch), method, forget=batch["forget"].bool())
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    return moved(model, start)


METHODS: dict[str, Callable[[], mtu.Method]] = {
    "orthograd": lambda: mtu.OrthoGrad(0.5),
    "pcgrad": mtu.PCGrad,
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


# what a checkpoint must hold beside weights: a method and a subspace, by what is in them
STATES: dict[str, tuple[Callable[[], mtu.Method], Callable[[], mtu.Subspace | None]]] = {
    "targets and a generator": (lambda: mtu.GradVac(generator=seeded()), lambda: None),
    "a generator": (lambda: mtu.PCGrad(generator=seeded()), lambda: None),
    "rows": (lambda: mtu.InterferenceAware(0.3), lambda: mtu.Subspace(12, every=1)),
    "a basis": (lambda: mtu.InterferenceAware(0.3), lambda: mtu.Subspace(12, every=3, basis=True)),
}
