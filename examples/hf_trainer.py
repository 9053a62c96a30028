"""Hugging Face Trainer: a mixin before it among the bases. Needs `pip install 'mtu_fast[models]'`.

`Unlearning` puts `method` on the samples' gradients where the Trainer calls `loss.backward()`.
Everything else stays the Trainer's: data, optimizer, clipping of the global norm, logging, checkpoints,
and gradient accumulation, whose micro-batches are one step with the rows of all of them.

    python examples/hf_trainer.py [--steps 30] [--tiny]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import mtu_fast as mtu
from mtu_fast.integrations.transformers import Unlearning


class Unlearner(Unlearning, Trainer):
    """A Trainer that forgets the samples whose column "forget" is 1."""


def classification(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """One loss a sample, [N]."""
    return F.cross_entropy(
        model(input_ids=batch["input_ids"]).logits, batch["labels"], reduction="none"
    )


def samples(count: int) -> list[dict[str, Any]]:
    """Random token sequences with random labels; the first eighth is to be forgotten."""
    tokens = torch.randint(2, 50, (count, 8))
    labels = torch.randint(3, (count,))
    return [
        {"input_ids": tokens[n], "labels": int(labels[n]), "forget": int(n < count // 8)}
        for n in range(count)
    ]


@torch.no_grad()
def losses_of(model: Any, data: list[dict[str, Any]]) -> Tensor:
    """The loss of each sample, [N]."""
    tokens = torch.stack([each["input_ids"] for each in data])
    labels = torch.tensor([each["labels"] for each in data])
    return F.cross_entropy(model.eval()(input_ids=tokens).logits, labels, reduction="none")


def memorise(model: Any, data: list[dict[str, Any]], epochs: int) -> None:
    """Train on all data until the labels are known."""
    tokens = torch.stack([each["input_ids"] for each in data])
    labels = torch.tensor([each["labels"] for each in data])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        optimizer.zero_grad()
        F.cross_entropy(model.eval()(input_ids=tokens).logits, labels).backward()
        optimizer.step()


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    """Memorise, unlearn with the Trainer, print mean losses; return them as {side: (before, after)}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="the size of a test")
    args = parser.parse_args(argv)
    if args.tiny:
        args.samples, args.width, args.steps = 24, 32, 20

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=args.width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * args.width, max_position_embeddings=16, num_labels=3,
        hidden_dropout_prob=0.0,  # orthogonality then holds for the net that is used
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    data = samples(args.samples)
    memorise(model, data, epochs=20)
    forget = torch.tensor([bool(each["forget"]) for each in data])
    before = losses_of(model, data)

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.samples // 4,
            gradient_accumulation_steps=4,  # a step sees all samples
            learning_rate=0.05,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=1.0,  # one clip of the global norm keeps orthogonality
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Unlearner(
            model,
            settings,
            train_dataset=data,
            method=mtu.OrthoGrad(0.3),
            losses=classification,
            params=lambda model: model.base_model.parameters(),
        )
        trainer.train()

    after = losses_of(model.cpu(), data)
    found = {}
    for side, chosen in {"forget": forget, "retain": ~forget}.items():
        found[side] = float(before[chosen].mean()), float(after[chosen].mean())
        print(f"{side:7} mean loss {found[side][0]:.3f} -> {found[side][1]:.3f}")
    return found


if __name__ == "__main__":
    main()
