"""Masks of samples, `{task: [N]}`, and names of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mtu_fast._arguments import names
from mtu_fast._checks.flags import AT_ONCE, Flags
from mtu_fast.methods.base import FORGET, RESTING, RETAIN

Mask = bool | Tensor | Mapping[str, Tensor] | None
KIND = torch.int8  # of kinds in the place of a mask: no indices, and no mask of numbers by mistake


def kinds(forget: Mask, losses: Mapping[str, Tensor], flags: Flags = AT_ONCE) -> dict[str, Tensor]:
    """`{task: [N]}` int64, FORGET where the mask says so and RETAIN elsewhere.

    Args:
        forget: None or False (nothing), True (everything), a mask [N] for all tasks (full-task), or
            `{task: [N]}` for some of them (partial-task); masks are boolean, or kinds as
            `Levels.left` gives them.
        losses: what `named_losses` returned.
        flags: of the call.

    Raises:
        TypeError: a mask is neither boolean nor of kinds.
        ValueError: a mask of the wrong shape or for an unknown task.
    """
    masks = _per_task("forget", forget, losses, default=False, dtypes=(torch.bool, KIND))
    found: dict[int, Tensor] = {}
    for task, mask in masks.items():
        # mostly one mask for all tasks
        if id(mask) not in found:
            found[id(mask)] = _kinds(f"forget[{task!r}]", mask, flags)
    return {task: found[id(mask)] for task, mask in masks.items()}


def _kinds(name: str, mask: Tensor, flags: Flags) -> Tensor:
    if mask.dtype == torch.bool:
        return mask.long()  # RETAIN is 0, FORGET 1
    known = (mask == RETAIN) | (mask == FORGET) | (mask == RESTING)
    flags.refuse(~known.all(), lambda: _unknown_kinds(name, mask))
    return mask.long()


def _unknown_kinds(name: str, mask: Tensor) -> ValueError:
    return ValueError(
        f"{name}: found the numbers {sorted(set(mask.tolist()))}, expected a boolean mask, or the kinds RETAIN "
        f"({RETAIN}), FORGET ({FORGET}) and RESTING ({RESTING}) as Levels.left gives them."
    )


def presence(
    present: Mapping[str, Tensor] | None, losses: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`{task: [N]}` bool: the samples that have a label for the task.

    Raises:
        TypeError: not a mapping, or a mask is not boolean.
        ValueError: a mask of the wrong shape or for an unknown task.
    """
    if present is not None and not isinstance(present, Mapping):
        raise TypeError(
            f"present: found {type(present).__name__}, expected {{task: bool tensor [N]}} or None."
        )
    return _per_task("present", present, losses, default=True)


def _per_task(
    name: str,
    mask: Mask,
    losses: Mapping[str, Tensor],
    default: bool,
    dtypes: tuple[torch.dtype, ...] = (torch.bool,),
) -> dict[str, Tensor]:
    if not isinstance(mask, Mapping):
        mask = default if mask is None else mask
        whole: dict[object, Tensor] = {}
        for loss in losses.values():
            if (loss.shape, loss.device) not in whole:
                whole[loss.shape, loss.device] = _mask(name, mask, loss, dtypes)
        return {task: whole[loss.shape, loss.device] for task, loss in losses.items()}
    unknown = [task for task in mask if task not in losses]
    if unknown:
        raise ValueError(f"{name}: found unknown tasks {unknown}, expected some of {list(losses)}.")
    found = {}
    for task, loss in losses.items():
        found[task] = _mask(f"{name}[{task!r}]", mask.get(task, default), loss, dtypes)
    return found


def _mask(name: str, mask: object, loss: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if isinstance(mask, bool):
        return torch.full((len(loss),), mask, device=loss.device)
    if not isinstance(mask, Tensor) or mask.dtype not in dtypes:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name}: found {found}, expected a boolean tensor [{len(loss)}]: mask.bool(), torch.as_tensor(list); "
            f"for indices, mask = torch.zeros({len(loss)}, dtype=torch.bool) and mask[indices] = True."
        )
    if mask.layout != torch.strided or mask.is_meta:
        found = "one on meta, which holds no values" if mask.is_meta else f"layout {mask.layout}"
        raise ValueError(f"{name}: found {found}, expected a dense boolean tensor [{len(loss)}].")
    if mask.shape != loss.shape:
        raise ValueError(
            f"{name}: found shape {tuple(mask.shape)}, expected [{len(loss)}] as the losses have, one entry per "
            "sample; losses of tokens are first averaged over each sample's."
        )
    # the step does not wait for the copy, which its device runs before what reads it
    return mask.to(loss.device, non_blocking=True)


def on_host(mask: Mask, task: str, loss: Tensor, default: bool) -> bool | Tensor | None:
    """What the host knows of a task's mask, one that was found right: a value for all, a mask `[N]`, or None."""
    of_task = mask.get(task, default) if isinstance(mask, Mapping) else mask
    if of_task is None:
        return default
    if isinstance(of_task, Tensor):
        # only a mask that came from the host can be read without a wait
        here = of_task.device.type == "cpu" and loss.device.type != "cpu"
        return of_task if here and of_task.dtype == torch.bool else None
    return of_task


def targeted(targets: Iterable[str] | None, tasks: Iterable[str]) -> tuple[str, ...]:
    """The tasks to forget from, in the order of `tasks`; None stands for all.

    Raises:
        TypeError: targets are one string, which would be read as its letters.
        ValueError: none, or names that are no tasks.
    """
    every = tuple(tasks)
    named = every if targets is None else names("targets", targets)
    unknown = [name for name in named if name not in every]
    if unknown:
        raise ValueError(
            f"targets: found unknown tasks {unknown}, expected some of the tasks {list(every)}, or None for all."
        )
    return tuple(task for task in every if task in named)
