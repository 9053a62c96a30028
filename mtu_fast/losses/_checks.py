"""What losses are given, checked."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast._arguments import check_dense, check_one_of, check_tensors, check_whole

REDUCTIONS = ("mean", "sum")


def check_logits(name: str, logits: Tensor) -> None:
    """Logits are `[N, S, V]`.

    Raises:
        TypeError: no floating tensor.
        ValueError: another shape.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(
            f"{name}: logits: found {found}, expected a floating tensor [N, S, V]; of a transformers model, take "
            "model(...).logits."
        )
    check_dense(f"{name}: logits", logits)
    if logits.dim() != 3:
        raise ValueError(
            f"{name}: logits: found shape {tuple(logits.shape)}, expected [N, S, V]: samples, positions, classes."
        )


def check_labels(name: str, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Whether each label counts, `[N, S]` bool.

    Raises:
        TypeError: labels that are not int64, or an ignore_index that is no whole number.
        ValueError: labels of another shape, or beyond the classes.
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"{name}: labels: found {found}, expected int64 [N, S]; convert by .long()."
        )
    check_dense(f"{name}: labels", labels)
    check_shape(name, "labels", labels, logits)
    check_whole(f"{name}: ignore_index", ignore_index, -(2**63), 2**63 - 1)
    counts = labels != ignore_index
    classes = logits.shape[2]
    # a label outside would be read from foreign memory by the kernel, or raise late
    beyond = counts & ((labels < 0) | (labels >= classes))
    if bool(beyond.any()):
        raise ValueError(
            f"{name}: labels: found {labels[beyond][:4].tolist()}, expected 0 to {classes - 1}, or ignore_index = "
            f"{ignore_index} where a position does not count."
        )
    return counts


def check_shape(name: str, what: str, given: Tensor, logits: Tensor) -> None:
    """One value a position.

    Raises:
        ValueError: it is not.
    """
    if given.shape != logits.shape[:2]:
        raise ValueError(
            f"{name}: {what}: found shape {tuple(given.shape)}, expected {tuple(logits.shape[:2])} as the logits' "
            "samples and positions; where a soft prompt stands before the text, take logits[:, -S:]."
        )


def check_reduction(name: str, reduction: str) -> None:
    """The reduction is known.

    Raises:
        ValueError: it is not.
    """
    check_one_of(f"{name}: reduction", reduction, REDUCTIONS, " over the positions of a sample")


def counted(name: str, mask: Tensor | None, logits: Tensor) -> Tensor:
    """The positions that a mask (of ones, or True) lets count, `[N, S]` bool; all where there is none.

    Raises:
        TypeError: something else than a dense tensor.
        ValueError: a mask of another shape.
    """
    if mask is None:
        return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    check_tensors(attention_mask=mask)
    check_shape(name, "attention_mask", mask, logits)
    return mask.to(torch.bool)
