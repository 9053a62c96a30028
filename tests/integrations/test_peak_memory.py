"""What a step on a small language model allocates at most, over the plain step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import mtu_fast as mtu
from mtu_fast.losses import causal_lm

hf = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def peak(step: Callable[[], object]) -> int:
    """The most bytes that lived at a time, of those that a step allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [x for x in found.profiler.kineto_results.events() if x.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def test_a_step_takes_at_most_half_as_much_again() -> None:
    """The first three are checked against an ordinary backward; the fourth is an ordinary step."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    model = hf.LlamaForCausalLM(config)
    tokens, forget = torch.randint(2000, (16, 64)), torch.arange(16) < 8
    engine = mtu.Engine(model)

    def losses() -> torch.Tensor:
        return causal_lm(model(input_ids=tokens).logits, tokens)

    def plain() -> None:
        losses().mean().backward()

    def ours() -> None:
        engine.backward(losses(), mtu.OrthoGrad(0.5), forget=forget)

    plain()  # .grad is there before anything is counted
    model.zero_grad(set_to_none=False)
    expected = peak(plain)
    assert expected > 50 * 2**20  # of activations
    found = []
    for _ in range(4):
        model.zero_grad(set_to_none=False)
        found.append(peak(ours) / expected)
    assert max(found[:3]) <= 1.4
    assert found[3] <= 1.1
