"""Two overlapping handwritten digits on one canvas, with three tasks, and the small net that reads them.

The images are the 1,797 real 8x8 digits that scikit-learn ships. A scene puts one digit on the left
and one on the right of a 12x16 canvas, their boxes overlapping by 1 to 5 columns, and asks for

    left, right   the class of each digit, 10 classes
    mask          per pixel: background (0), left (1) or right (2)

A pixel shows the stronger ink of the two digits and belongs to the digit whose ink it shows; the
left digit takes a tie; where neither has a quarter of full ink the pixel is background. Every digit
image is used in at most one scene, so no image is in two splits, and none of a forgotten scene is
left in the retained ones.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.data import Samples
from mtu_fast.unlearning.metrics import mean_iou, top1

TASKS = ("left", "right", "mask")
HEIGHT, WIDTH, BOX = 12, 16, 8
INK = 0.25  # share of full ink below which a pixel is background


# image [N, 1, 12, 16], labels {task: [N] or [N, 12, 16]}, source [N, 2] digit indices
Scenes = Samples


def compose(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """image = max(left, right); mask = 0 where image < 1/4, else 1 where left >= right, else 2.

    Args:
        left: [..., H, W] ink of the left digit alone, 0..1.
        right: [..., H, W] ink of the right digit alone, 0..1.

    Returns:
        image [..., H, W] and mask [..., H, W] int64.
    """
    image = torch.maximum(left, right)
    owner = torch.where(left >= right, 1, 2)
    return image, torch.where(image < INK, 0, owner)


def _place(digits: Tensor, top: Tensor, start: Tensor) -> Tensor:
    """Put [N, 8, 8] digits on empty [N, 12, 16] canvases with their upper left corners at (top, start)."""
    canvas = torch.zeros(len(digits), HEIGHT, WIDTH)
    sample = torch.arange(len(digits))[:, None, None]
    rows = top[:, None, None] + torch.arange(BOX)[:, None]
    columns = start[:, None, None] + torch.arange(BOX)
    canvas[sample, rows, columns] = digits
    return canvas


def make_scenes(sizes: dict[str, int], seed: int = 0) -> dict[str, Scenes]:
    """Scenes for each named split, deterministic from `seed`; each digit image serves in one scene at most.

    Args:
        sizes: {split: number of scenes}, two digit images each, 898 scenes at most in all.
        seed: of the shuffle and of the positions.

    Returns:
        {split: Scenes}.

    Raises:
        ValueError: more scenes are asked for than the digit images allow.
    """
    data = load_digits()
    ink, digit = torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target)
    total = sum(sizes.values())
    if 2 * total > len(ink):
        raise ValueError(
            f"sizes {sizes} ask for {total} scenes of two images each; {len(ink)} images allow at most {len(ink) // 2}"
        )
    rng = np.random.default_rng(seed)
    source = torch.from_numpy(rng.permutation(len(ink))[: 2 * total].reshape(total, 2))
    top = torch.from_numpy(rng.integers(0, HEIGHT - BOX + 1, (total, 2)))
    start = torch.from_numpy(rng.integers((1, 6), (4, 9), (total, 2)))  # left 1..3, right 6..8
    layers = [_place(ink[source[:, i]], top[:, i], start[:, i]) for i in (0, 1)]
    image, mask = compose(layers[0], layers[1])
    labels = {"left": digit[source[:, 0]], "right": digit[source[:, 1]], "mask": mask}
    everything = Scenes(image[:, None], labels, source)
    ends = np.cumsum(list(sizes.values())).tolist()
    return {
        name: everything[end - n : end] for (name, n), end in zip(sizes.items(), ends, strict=True)
    }


class Net(nn.Module):
    """Shared convolutional backbone with GroupNorm at half resolution; one linear or 1x1-convolution head a task."""

    def __init__(self, width: int = 24) -> None:
        """Build for `width` channels at full resolution, twice that below."""
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GroupNorm(4, 2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.GroupNorm(4, 2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=2, dilation=2), nn.GroupNorm(4, 2 * width), nn.ReLU(),
        )  # fmt: skip
        features = 2 * width * (HEIGHT // 4) * (WIDTH // 4)
        self.left, self.right = nn.Linear(features, 10), nn.Linear(features, 10)
        # three classes for each of the 2x2 pixels below a feature
        self.mask = nn.Conv2d(2 * width, 4 * 3, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """[N, 1, 12, 16] -> logits {left: [N, 10], right: [N, 10], mask: [N, 3, 12, 16]}."""
        shared = self.backbone(image)
        flat = functional.max_pool2d(shared, 2).flatten(1)
        return {
            "left": self.left(flat), "right": self.right(flat), "mask": functional.pixel_shuffle(self.mask(shared), 2)
        }  # fmt: skip


def scene_losses(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cross-entropy of each sample and task, {task: [N]}; `mask` is the mean over a sample's pixels."""
    losses = {
        task: functional.cross_entropy(logits[task], labels[task], reduction="none")
        for task in TASKS
    }
    return {
        task: loss.flatten(1).mean(1) if loss.dim() > 1 else loss for task, loss in losses.items()
    }


@torch.no_grad()
def scene_scores(model: nn.Module, scenes: Scenes) -> dict[str, float]:
    """{left: accuracy, right: accuracy, mask: mean IoU over the three classes}, each in 0..1."""
    logits = cast(dict[str, Tensor], model(scenes.image))
    scores = {task: top1(logits[task], scenes.labels[task]) for task in ("left", "right")}
    return scores | {"mask": mean_iou(logits["mask"].argmax(1), scenes.labels["mask"], classes=3)}
