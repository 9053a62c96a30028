"""Scores of one task: how good predictions are, higher better."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast._arguments import check_tensors, check_whole


def top1(logits: Tensor, target: Tensor) -> float:
    """Share of the N samples whose largest logit is at `target`, in 0..1.

    Args:
        logits: [N, C].
        target: [N] int64, 0..C-1.

    Returns:
        The accuracy.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: the shapes do not match, or N = 0.
    """
    check_tensors(logits=logits, target=target)
    if target.is_floating_point():
        raise TypeError(f"top1: target: found {target.dtype}, expected whole numbers.")
    if logits.dim() != 2 or target.shape != logits.shape[:1] or len(target) == 0:
        raise ValueError(
            f"top1 needs logits [N, C] and target [N], N > 0; got {_shape(logits)} and {_shape(target)}"
        )
    return (logits.argmax(1) == target).double().mean().item()


def mean_iou(predicted: Tensor, target: Tensor, classes: int, ignore: int = -1) -> float:
    """Mean over classes c of |predicted = c and target = c| / |predicted = c or target = c|, over all pixels at once.

    A class that occurs neither in `predicted` nor in `target` is left out of the mean. The
    confusion matrix is that of all pixels given, not averaged per image.

    Args:
        predicted: [...] int64 class of each pixel, 0..classes-1.
        target: [...] int64, same shape.
        classes: number of classes C.
        ignore: pixels with this target are not counted.

    Returns:
        The mean intersection over union, in 0..1.

    Raises:
        TypeError: an argument is no tensor of whole numbers, or no whole number.
        ValueError: the shapes differ, a class is out of range, or no pixel counts.
    """
    check_tensors(predicted=predicted, target=target)
    check_whole("mean_iou: classes", classes, 1, 2**15)
    check_whole("mean_iou: ignore", ignore, -(2**63), 2**63 - 1)
    for name, value in (("predicted", predicted), ("target", target)):
        if value.is_floating_point():
            raise TypeError(f"mean_iou: {name}: found {value.dtype}, expected whole numbers.")
    if predicted.shape != target.shape:
        raise ValueError(
            f"predicted and target need one shape; got {_shape(predicted)} and {_shape(target)}"
        )
    valid = target != ignore
    p, t = predicted[valid], target[valid]
    if p.numel() == 0:
        raise ValueError(f"no pixel counts: all {target.numel()} targets are ignore={ignore}")
    low, high = int(torch.minimum(p, t).min()), int(torch.maximum(p, t).max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"classes={classes} allows 0..{classes - 1}; found {low}..{high} (logits need argmax first)"
        )
    # the pair (t, p) as one number, so that a single count gives the table
    confusion = (
        torch.bincount(t * classes + p, minlength=classes**2).reshape(classes, classes).double()
    )
    both = confusion.diagonal()
    either = confusion.sum(0) + confusion.sum(1) - both
    # a class that is in neither is left out
    return (both[either > 0] / either[either > 0]).mean().item()


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
