"""What a user hands over, made uniform or refused by name: losses and masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mtu_fast.methods.base import FORGET, RETAIN

Losses = Tensor | Mapping[str, Tensor]
Mask = bool | Tensor | Mapping[str, Tensor] | None

_UNREDUCED = (
    "mtu_fast needs one loss per sample: build the loss with reduction='none' and average it over everything but the "
    "samples, e.g. loss.flatten(1).mean(1)"
)


def named_losses(losses: Losses) -> dict[str, Tensor]:
    """Losses as `{task: [N]}` with a graph, of one length, on one device, all finite.

    Raises:
        TypeError: losses are neither a tensor nor a mapping of tensors, or complex.
        ValueError: no task, a reduced or ragged loss, mixed devices, a non-finite value, no graph.
    """
    named = {"loss": losses} if isinstance(losses, Tensor) else losses
    if not isinstance(named, Mapping):
        raise TypeError(f"losses: found {type(losses).__name__}, expected a tensor [N] or {{task: tensor [N]}}.")
    if not named:
        raise ValueError("losses: found no task, expected at least one {task: tensor [N]}.")
    for task, loss in named.items():
        if not isinstance(loss, Tensor):
            raise TypeError(f"losses[{task!r}]: found {type(loss).__name__}, expected a tensor [N].")
        _check_loss(task, loss)
    lengths = {task: len(loss) for task, loss in named.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"losses have different lengths {lengths}, expected one value per sample [N] for every task. A task "
            "without a label for some samples keeps its place: give any finite loss there and present={task: mask}."
        )
    devices = {task: str(loss.device) for task, loss in named.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"losses are on different devices {devices}, expected one: move them, or take rows apart.")
    for task, loss in named.items():
        _check_finite(task, loss)
    return dict(named)


def _check_loss(task: str, loss: Tensor) -> None:
    if loss.is_complex():
        raise TypeError(f"losses[{task!r}]: found {loss.dtype}, expected real values, such as loss.abs() or loss.real.")
    if loss.dim() != 1:
        what = "is already reduced to one number" if loss.dim() == 0 else "has more than one value a sample"
        raise ValueError(f"losses[{task!r}]: found shape {tuple(loss.shape)}, which {what}; {_UNREDUCED}.")
    if loss.numel() and loss.grad_fn is None:
        raise ValueError(
            f"losses[{task!r}]: found no graph (grad_fn is None), expected the output of a forward pass. Was it made "
            "under torch.no_grad() or inference_mode(), detached, or is every parameter frozen?"
        )


def _check_finite(task: str, loss: Tensor) -> None:
    bad = ~torch.isfinite(loss.detach())
    if bool(bad.any()):
        raise ValueError(
            f"losses[{task!r}]: found a non-finite value for samples {bad.nonzero().flatten()[:8].tolist()}, expected "
            "finite ones. A mean over no labels is 0/0: divide by count.clamp(min=1) and say present={task: mask}."
        )


def kinds(forget: Mask, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`{task: [N]}` int64, FORGET where the mask says so and RETAIN elsewhere.

    Args:
        forget: None or False (nothing), True (everything), a mask [N] for all tasks (full-task), or `{task: [N]}`
            for some of them (partial-task).
        losses: what `named_losses` returned.

    Raises:
        TypeError: a mask is not boolean.
        ValueError: a mask of the wrong shape or for an unknown task.
    """
    masks = _per_task("forget", forget, losses, default=False)
    return {task: torch.where(mask, FORGET, RETAIN) for task, mask in masks.items()}


def presence(present: Mapping[str, Tensor] | None, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`{task: [N]}` bool: the samples that have a label for the task.

    Raises:
        TypeError: not a mapping, or a mask is not boolean.
        ValueError: a mask of the wrong shape or for an unknown task.
    """
    if present is not None and not isinstance(present, Mapping):
        raise TypeError(f"present: found {type(present).__name__}, expected {{task: bool tensor [N]}} or None.")
    return _per_task("present", present, losses, default=True)


def _per_task(name: str, mask: Mask, losses: Mapping[str, Tensor], default: bool) -> dict[str, Tensor]:
    if isinstance(mask, Mapping):
        unknown = [task for task in mask if task not in losses]
        if unknown:
            raise ValueError(f"{name}: found unknown tasks {unknown}, expected some of {list(losses)}.")
        return {task: _mask(f"{name}[{task!r}]", mask.get(task, default), loss) for task, loss in losses.items()}
    return {task: _mask(name, default if mask is None else mask, loss) for task, loss in losses.items()}


def _mask(name: str, mask: object, loss: Tensor) -> Tensor:
    if isinstance(mask, bool):
        return torch.full((len(loss),), mask, device=loss.device)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name}: found {found}, expected a boolean tensor [{len(loss)}]: mask.bool(), torch.as_tensor(list), "
            "or convert indices by a mask."
        )
    if mask.shape != loss.shape:
        raise ValueError(f"{name}: found shape {tuple(mask.shape)}, expected [{len(loss)}], one entry per sample.")
    return mask.to(loss.device)
