"""A language model with LoRA adapters forgets some sequences. Needs `pip install 'mtu_fast[models]'`.

A small GPT-2 with random weights stands for yours. Only the adapters require gradients, so they are what
the engine works on, and a row is as long as the adapters are. Per-sequence losses are the mean over a
sequence's tokens.

    python examples/lora.py [--steps 20] [--tiny]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import mtu_fast as mtu

VOCABULARY = 64


def sequence_losses(model: Any, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy of each sequence: tokens [N, S] -> [N]."""
    logits = model(input_ids=tokens).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses.mean(1)


def build(width: int, layers: int) -> Any:
    """GPT-2 without dropout, and LoRA adapters on its attention."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=width, n_layer=layers, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    adapters = LoraConfig(
        r=8, lora_alpha=32, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    )
    return get_peft_model(GPT2LMHeadModel(config), adapters)


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    """Memorise, unlearn, print the mean losses; return them as {side: (before, after)}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="the size of a test")
    args = parser.parse_args(argv)
    if args.tiny:
        args.width, args.layers, args.sequences, args.steps = 32, 1, 8, 10

    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (args.sequences, 12))
    forget = torch.arange(args.sequences) < args.sequences // 4
    model = build(args.width, args.layers)
    adapters = [p for p in model.parameters() if p.requires_grad]

    trainer = torch.optim.Adam(adapters, lr=3e-2)
    for _ in range(60):
        trainer.zero_grad()
        sequence_losses(model, tokens).mean().backward()
        trainer.step()
    before = sequence_losses(model, tokens).detach()

    engine = mtu.Engine(model)  # every parameter that requires grad: the adapters
    optimizer = torch.optim.SGD(adapters, lr=0.3)
    for _ in range(args.steps):
        optimizer.zero_grad()
        engine.backward(sequence_losses(model, tokens), mtu.OrthoGrad(alpha=0.3), forget=forget)
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
    after = sequence_losses(model, tokens).detach()

    found = {}
    for side, chosen in {"forget": forget, "retain": ~forget}.items():
        found[side] = float(before[chosen].mean()), float(after[chosen].mean())
        print(f"{side:7} mean loss per token {found[side][0]:.3f} -> {found[side][1]:.3f}")
    return found


if __name__ == "__main__":
    main()
