"""A small multi-task net for dense tasks of any resolution, its losses and its scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.data import Dataset
from mtu_fast.unlearning import metrics

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "segmentation": metrics.segmentation_loss,
    "depth": metrics.depth_loss,
    "normal": metrics.normal_loss,
}
RANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "depth": functional.softplus,
    "normal": functional.normalize,
}
BATCH = 64  # images scored at once


class DenseNet(nn.Module):
    """Shared convolutional backbone with GroupNorm, to 1/4 resolution; a 1x1 convolution and pixel shuffle a task."""

    def __init__(self, tasks: tuple[str, ...], classes: int, width: int = 32) -> None:
        """Build for these tasks of `segmentation`, `depth`, `normal`, with `width` channels at 1/2 resolution."""
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.GroupNorm(4, width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GroupNorm(4, 2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.GroupNorm(4, 2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=2, dilation=2), nn.GroupNorm(4, 2 * width), nn.ReLU(),
        )  # fmt: skip
        channels = {"segmentation": classes, "depth": 1, "normal": 3}
        self.heads = nn.ModuleDict({
            task: nn.Conv2d(2 * width, 16 * channels[task], 1) for task in tasks
        })

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """[N, 3, H, W] -> {segmentation: logits [N, C, H, W], depth: > 0 [N, 1, H, W], normal: unit [N, 3, H, W]}."""
        shared = self.backbone(image)
        height, width = image.shape[2:]
        outputs = {}
        for task, head in self.heads.items():
            out = functional.pixel_shuffle(head(shared), 4)[:, :, :height, :width]
            outputs[task] = RANGES[task](out) if task in RANGES else out
        return outputs


def dense_losses(outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The loss of each sample and task, {task: [N]}; a sample without a valid pixel has loss 0."""
    return {task: LOSSES[task](out, labels[task]) for task, out in outputs.items()}


@torch.no_grad()
def dense_scores(model: nn.Module, data: Dataset) -> dict[str, float]:
    """{segmentation: mIoU, depth: share within a ratio of 1.25, normal: share within 30°} over all pixels, 0..1."""
    found: dict[str, list[float]] = {"depth": [], "normal": []}
    counts: dict[str, list[int]] = {"depth": [], "normal": []}
    classes, seen, known = 0, [], []
    for start in range(0, len(data), BATCH):
        batch = data[start : start + BATCH]
        outputs = cast(dict[str, Tensor], model(batch.image))
        seen.append(outputs["segmentation"].argmax(1))
        known.append(batch.labels["segmentation"])
        classes = outputs["segmentation"].shape[1]
        for task in outputs.keys() & found.keys():
            target = batch.labels[task]
            counts[task].append(int(metrics.valid_pixels(target).sum()))
            found[task].append(_share(task, outputs[task], target) if counts[task][-1] else 0.0)
    scores = {"segmentation": metrics.mean_iou(torch.cat(seen), torch.cat(known), classes)}
    for task in (task for task in found if found[task]):
        hits = sum(share * n for share, n in zip(found[task], counts[task], strict=True))
        scores[task] = hits / sum(counts[task])
    return scores


def _share(task: str, out: Tensor, target: Tensor) -> float:
    if task == "depth":
        return metrics.depth_scores(out, target)["within_1.25"]
    return metrics.normal_scores(out, target)["within_30"]
