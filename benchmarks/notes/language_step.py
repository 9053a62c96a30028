"""An OrthoGrad step on a small language model over `causal_lm(...).mean().backward()`: all parameters, and LoRA.

    python -m benchmarks.notes.language_step [--quick]

A Llama of 4 layers, d = 256, 2000 tokens, 8 + 8 samples of 64, one thread. Processor time, which a
busy machine disturbs least, of steps that are not checked (10 to 16); medians of rounds in turn. Then
the first twenty steps of a new engine, of which 1, 2, 3, 5, 9 and 17 are checked: their mean, and what a
checked one takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import mtu_fast as mtu
from benchmarks.measure import SETTLED
from benchmarks.pool import one_thread
from mtu_fast.losses import causal_lm

ROUNDS = 7  # after SETTLED steps: the ninth is the last one checked before the seventeenth
FIRST = 20
KINDS = ("full", "lora")


class Cost(NamedTuple):
    """Of the plain step's processor time: an ordinary step, the mean of the first twenty, a checked one."""

    ordinary: float
    first: float
    checked: float


def steps(kind: str, quick: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """The plain step and ours."""
    import transformers

    torch.manual_seed(0)
    width, layers, vocabulary, length = (16, 1, 50, 6) if quick else (256, 4, 2000, 64)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=43 * width // 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    if kind == "lora":
        import peft

        adapters = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, adapters)
    tokens, forget = torch.randint(vocabulary, (16, length)), torch.arange(16) < 8
    engine = mtu.Engine(model)

    def losses() -> torch.Tensor:
        model.zero_grad()
        return causal_lm(model(input_ids=tokens).logits, tokens)

    def plain() -> None:
        losses().mean().backward()

    def ours() -> mtu.Update:
        return engine.backward(losses(), mtu.OrthoGrad(0.5), forget=forget)

    return plain, ours


def ratio(kind: str, quick: bool) -> float:
    """The median over rounds of our step's processor time over the plain one's."""
    plain, ours = steps(kind, quick)
    for _ in range(SETTLED):
        plain()
        ours()
    found = []
    for _ in range(ROUNDS):
        base = seconds(plain)
        found.append(seconds(ours) / base)
    return statistics.median(found)


def first_steps(kind: str, quick: bool) -> tuple[float, float]:
    """The mean of the first steps over the plain one, and that of those which are checked."""
    plain, ours = steps(kind, quick)
    for _ in range(3):  # the allocator and the caches are warm
        plain()
    found = []
    for _ in range(FIRST):
        base = min(seconds(plain) for _ in range(2))
        found.append(seconds(ours) / base)
    checked = [found[number - 1] for number in (1, 2, 3, 5, 9, 17)]
    return statistics.mean(found), statistics.mean(checked)


def seconds(step: Callable[[], object]) -> float:
    """Of the processor."""
    start = time.process_time()
    step()
    return time.process_time() - start


def main(argv: Sequence[str] | None = None) -> dict[str, Cost]:
    """Print a line for each kind; return {kind: costs}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    quick = parser.parse_args(argv).quick
    with one_thread():
        found = {kind: Cost(ratio(kind, quick), *first_steps(kind, quick)) for kind in KINDS}
    for kind, cost in found.items():
        print(
            f"{kind}: {cost.ordinary:.2f} of the plain step; the first {FIRST}: {cost.first:.2f} in the mean, "
            f"{cost.checked:.2f} those that are checked"
        )
    return found


if __name__ == "__main__":
    main()
