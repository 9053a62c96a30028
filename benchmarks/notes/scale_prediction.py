"""A step over an ordinary one on 8 to 4,096 GPUs, by the formulas of docs/scale.md: a prediction, nothing is measured.

    python -m benchmarks.notes.scale_prediction

With R_p rows on each of W ranks, R = W R_p, P parameters and b bytes held of a sample, a rank

* sends R_p b of uses, 16 R² of the Gram matrix (its sum, float64), and as ever 8 P of the gradient;
* forms the rows of the layers it multiplies, which is a plain step's product of weight gradients
  once more, takes 2 R² P / W operations of products, and solves with R³ / 3.
"""

from __future__ import annotations

from typing import NamedTuple

MIB, GIB = 2**20, 2**30
ROWS = 16  # a rank
RATE = 1e14  # operations a second that a GPU keeps up, of all kinds: an assumption
LINKS = {"100 Gb/s": 12.5e9, "NVLink, 450 GB/s": 450e9}  # bytes a second
RANKS = (8, 64, 512, 4096)


class Model(NamedTuple):
    """What a prediction needs of a model.

    Attributes:
        parameters: that have rows.
        held: bytes of a sample as they travel.
        forward: operations of the forward of a sample.
        frozen: whether weights beside the parameters are frozen (LoRA).
    """

    parameters: float
    held: float
    forward: float
    frozen: bool = False

    @property
    def plain(self) -> float:
        """Operations of a plain step of a sample: forward, and backward by inputs and by weights."""
        return self.forward * (2 if self.frozen else 3)

    @property
    def forming(self) -> float:
        """Operations of forming a sample's rows: those of the backward by weights."""
        # of LoRA the share of its parameters, which is small
        return 0.0 if self.frozen else self.forward


def language(parameters: float, tokens: int = 2048) -> float:
    """Operations of the forward of one text."""
    return 2.0 * parameters * tokens


MODELS = {
    "ResNet-50, 224²": Model(25.6e6, 27 * MIB, 8.2e9),
    "ViT-L, 197 tokens": Model(304e6, 296 * MIB, 123e9),
    "1 B, 2,048 tokens": Model(1.24e9, 4.5 * GIB, language(1.24e9)),
    "1 B, LoRA": Model(12.5e6, 48 * MIB, language(1.24e9), frozen=True),
    "7 B, 2,048 tokens": Model(6.7e9, 16 * GIB, language(6.7e9)),
    "7 B, LoRA": Model(33e6, 128 * MIB, language(6.7e9), frozen=True),
}


def shares(model: Model, ranks: int, bandwidth: float) -> dict[str, float]:
    """Seconds of each part of a step: "plain", and what comes on top."""
    rows = ROWS * ranks
    moved = (ranks - 1) / ranks
    return {
        "plain": ROWS * model.plain / RATE + 8 * model.parameters * moved / bandwidth,
        "uses": ROWS * model.held * moved / bandwidth,
        "Gram": 16 * rows**2 * moved / bandwidth,
        "rows": ROWS * model.forming / RATE,
        "products": 2 * rows * ROWS * model.parameters / RATE,
        "solving": rows**3 / 3 / RATE,
    }


def cell(model: Model, ranks: int, bandwidth: float) -> str:
    """Step over plain step, and what binds."""
    parts = shares(model, ranks, bandwidth)
    extra = {name: seconds for name, seconds in parts.items() if name != "plain"}
    ratio = sum(parts.values()) / parts["plain"]
    shown = f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"
    return f"{shown} {max(extra, key=lambda name: extra[name])}"


def main() -> None:
    """Print the tables."""
    for link, bandwidth in LINKS.items():
        print(f"\n| {link} |" + "".join(f" {ranks:,} ranks |" for ranks in RANKS))
        print("|---|" + "---:|" * len(RANKS))
        for name, model in MODELS.items():
            cells = [cell(model, ranks, bandwidth) for ranks in RANKS]
            print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
