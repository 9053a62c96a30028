"""Dense tasks (segmentation, depth, surface normals): scores over all valid pixels, losses per sample.

Shapes: logits [N, C, H, W] with classes [N, H, W], depth [N, 1, H, W], normals [N, 3, H, W]. A
pixel counts when its class is not `ignore`, or when its depth or normal does not sum to zero over
channels (the convention of NYUv2's files, where what was not measured is zero; a normal with
components that cancel exactly is lost to it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mtu_fast._arguments import check_mapping, check_tensors, check_whole

# ---- which pixels count --------------------------------------------------------------------------


def valid_pixels(target: Tensor) -> Tensor:
    """valid = (Σ_c target_c ≠ 0), [N, H, W] bool.

    Args:
        target: [N, C, H, W] depth or normals.

    Returns:
        The pixels that count.

    Raises:
        TypeError: `target` is no tensor.
        ValueError: `target` has not four dimensions.
    """
    check_tensors(target=target)
    if target.dim() != 4:
        raise ValueError(f"valid_pixels needs target [N, C, H, W]; got {tuple(target.shape)}")
    return target.sum(1) != 0


def present(labels: Mapping[str, Tensor], ignore: int = -1) -> dict[str, Tensor]:
    """`present[task][n]`: sample n has a pixel that counts for the task, as `Engine.backward` takes it.

    Args:
        labels: {task: target}; whole numbers ([N], [N, H, W]) are classes, [N, C, H, W] of floats
            depth or normals.
        ignore: the class of pixels that do not count.

    Returns:
        {task: [N] bool}.

    Raises:
        TypeError: no mapping of tensors, or `ignore` is no whole number.
    """
    _check_ignore(ignore)
    found = {}
    for task, target in check_mapping("labels", labels).items():
        check_tensors(labels=target)
        counts = valid_pixels(target) if target.is_floating_point() else target != ignore
        found[task] = counts.reshape(len(counts), -1).any(1)
    return found


# ---- losses, unreduced ---------------------------------------------------------------------------


def segmentation_loss(logits: Tensor, target: Tensor, ignore: int = -1) -> Tensor:
    """ℓ_n = mean over pixels that count of −log softmax(logits)[target]; 0 for a sample without such a pixel.

    Args:
        logits: [N, C, H, W].
        target: [N, H, W] int64, 0..C-1 or `ignore`.
        ignore: the class of pixels that do not count.

    Returns:
        Losses [N].

    Raises:
        TypeError: an argument is no tensor.
        ValueError: the shapes do not match.
    """
    check_tensors(logits=logits, target=target)
    if logits.dim() != 4 or target.shape != (len(logits), *logits.shape[2:]):
        raise ValueError(
            "segmentation_loss needs logits [N, C, H, W] and target [N, H, W]; "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    _check_ignore(ignore)
    losses = functional.cross_entropy(logits, target, ignore_index=ignore, reduction="none")
    return _mean(losses, target != ignore)


def depth_loss(depth: Tensor, target: Tensor) -> Tensor:
    """ℓ_n = mean over valid pixels of |d − d*|; 0 for a sample without a valid pixel.

    Args:
        depth: [N, 1, H, W] predicted.
        target: [N, 1, H, W], zero where not measured.

    Returns:
        Losses [N].
    """
    _check("depth_loss", "depth", depth, target, channels=1)
    return _mean((depth - target).abs().squeeze(1), valid_pixels(target))


def normal_loss(normal: Tensor, target: Tensor) -> Tensor:
    """ℓ_n = mean over valid pixels of 1 − ⟨n, n*⟩; 0 for a sample without a valid pixel.

    Args:
        normal: [N, 3, H, W] predicted, of unit length (the network normalises).
        target: [N, 3, H, W] of unit length, zero where not measured.

    Returns:
        Losses [N].
    """
    _check("normal_loss", "normal", normal, target, channels=3)
    return _mean(1.0 - (normal * target).sum(1), valid_pixels(target))


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of values [N, H, W] over the pixels that count, [N]."""
    # chosen, not multiplied: NaN * 0 would be NaN
    kept = torch.where(counts, values, 0.0)
    return kept.flatten(1).sum(1) / counts.flatten(1).sum(1).clamp(min=1)


# ---- scores --------------------------------------------------------------------------------------


def pixel_accuracy(predicted: Tensor, target: Tensor, ignore: int = -1) -> float:
    """Share of the pixels that count whose predicted class is the target, in 0..1.

    Args:
        predicted: [...] int64 class of each pixel.
        target: [...] int64, same shape.
        ignore: pixels with this target are not counted.

    Returns:
        The accuracy over all pixels at once.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: the shapes differ, or no pixel counts.
    """
    check_tensors(predicted=predicted, target=target)
    _check_ignore(ignore)
    if predicted.shape != target.shape:
        raise ValueError(
            f"pixel_accuracy: predicted and target need one shape; got {tuple(predicted.shape)} and "
            f"{tuple(target.shape)} (logits need argmax first)"
        )
    counts = target != ignore
    _check_any("pixel_accuracy", counts)
    return (predicted == target)[counts].double().mean().item()


def depth_scores(depth: Tensor, target: Tensor) -> dict[str, float]:
    """{abs: mean |d − d*|, rel: mean |d − d*| / d*, within_1.25: share with max(d/d*, d*/d) < 1.25} of valid pixels.

    A predicted depth that is not positive lies within no ratio.

    Args:
        depth: [N, 1, H, W] predicted.
        target: [N, 1, H, W], zero where not measured.

    Returns:
        The errors (lower better) and the share (higher better), over all valid pixels at once.
    """
    _check("depth_scores", "depth", depth, target, channels=1)
    counts = valid_pixels(target)
    _check_any("depth_scores", counts)
    d = depth.squeeze(1)[counts].double()
    t = target.squeeze(1)[counts].double()
    error = (d - t).abs()
    # two negative numbers would have a fine ratio
    within = (d > 0) & (torch.maximum(d / t, t / d) < 1.25)
    return {
        "abs": error.mean().item(),
        "rel": (error / t.abs()).mean().item(),
        "within_1.25": within.double().mean().item(),
    }


def normal_scores(normal: Tensor, target: Tensor) -> dict[str, float]:
    """{mean, median: of the angle ∠(n, n*) in degrees; within_11.25, within_22.5, within_30: shares} of valid pixels.

    Lengths do not matter; a predicted normal of length zero counts as 90° off.

    Args:
        normal: [N, 3, H, W] predicted.
        target: [N, 3, H, W], zero where not measured.

    Returns:
        The angles (lower better) and the shares (higher better), over all valid pixels at once.
    """
    _check("normal_scores", "normal", normal, target, channels=3)
    counts = valid_pixels(target)
    _check_any("normal_scores", counts)
    n = normal.movedim(1, -1)[counts].double()
    t = target.movedim(1, -1)[counts].double()
    # exact for small angles too, where the cosine is flat
    radians = torch.atan2(torch.linalg.cross(n, t).norm(dim=-1), (n * t).sum(-1))
    angle = torch.where((n != 0).any(-1), radians * (180.0 / math.pi), 90.0)
    median = float(np.median(angle.cpu().numpy()))
    found = {"mean": angle.mean().item(), "median": median}
    for limit in (11.25, 22.5, 30.0):
        found[f"within_{limit:g}"] = (angle < limit).double().mean().item()
    return found


def _check_ignore(ignore: int) -> None:
    check_whole("ignore", ignore, -(2**63), 2**63 - 1)


def _check(name: str, called: str, predicted: Tensor, target: Tensor, channels: int) -> None:
    check_tensors(**{called: predicted, "target": target})
    if target.dim() != 4 or target.shape[1] != channels or predicted.shape != target.shape:
        raise ValueError(
            f"{name} needs {called} and target [N, {channels}, H, W]; "
            f"got {tuple(predicted.shape)} and {tuple(target.shape)}"
        )


def _check_any(name: str, counts: Tensor) -> None:
    if not bool(counts.any()):
        raise ValueError(
            f"{name}: none of the {counts.numel()} pixels counts, all are ignored or not measured"
        )
