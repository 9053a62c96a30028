"""What a user hands over, made uniform or refused by name: losses, masks, names of tasks and of files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

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
    named = _named(losses)
    if not isinstance(named, Mapping):
        raise TypeError(
            f"losses: found {type(losses).__name__}, expected a tensor [N] or {{task: tensor [N]}}."
        )
    if not named:
        raise ValueError("losses: found no task, expected at least one {task: tensor [N]}.")
    for task, loss in named.items():
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"losses[{task!r}]: found {type(loss).__name__}, expected a tensor [N]."
            )
        _check_loss(task, loss)
    lengths = {task: len(loss) for task, loss in named.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"losses have different lengths {lengths}, expected one value per sample [N] for every task. A task "
            "without a label for some samples keeps its place: give any finite loss there and present={task: mask}."
        )
    devices = {task: str(loss.device) for task, loss in named.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"losses are on different devices {devices}, expected one: move them, or take rows apart."
        )
    if "meta" in devices.values():
        raise ValueError(
            "losses: found tensors on meta, which hold no numbers; load the model first."
        )
    if not all_finite([loss.detach() for loss in named.values()]):
        for task, loss in named.items():
            _check_finite(task, loss)
    return dict(named)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether nothing in these is infinite or undefined; one wait for their device, whatever their number."""
    dense = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in dense]
    # A sum is finite if all its terms are, but for terms near the end of the range; it costs one
    # read.
    sums = [t.sum(dtype=torch.float32 if t.dtype.itemsize < 4 else None).double() for t in real]
    if not sums or all(map(isfinite, torch.stack(sums).tolist())):
        return True
    return bool(torch.stack([torch.isfinite(t).all() for t in real]).all())


def check_direction(d: Any, parameters: Mapping[str, Tensor]) -> None:
    """A direction is {parameter: real tensor of its shape}.

    Raises:
        TypeError: no mapping, or something else than real tensors in it.
        ValueError: a key that is none of the parameters, another shape, or another device.
    """
    if not isinstance(d, Mapping):
        raise TypeError(
            f"push: found {type(d).__name__}, expected {{parameter: tensor of its shape}}."
        )
    names = {id(parameter): name for name, parameter in parameters.items()}
    for parameter, t in d.items():
        if id(parameter) not in names:
            what = (
                f"a tensor of shape {tuple(parameter.shape)}"
                if isinstance(parameter, Tensor)
                else repr(parameter)
            )
            raise ValueError(
                f"push: found {what} as a key, expected parameters of the engine, as rows.combine(w) has them for "
                "keys; by name they are rows.parameters[name]."
            )
        name = names[id(parameter)]
        if not isinstance(t, Tensor) or t.is_complex():
            found = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(
                f"push: {name} is given {found}, expected a real tensor {tuple(parameter.shape)}."
            )
        if t.shape != parameter.shape:
            raise ValueError(
                f"push: {name} is given shape {tuple(t.shape)}, expected {tuple(parameter.shape)}, that of the "
                "parameter; of several directions push one at a time."
            )
        if t.device != parameter.device:
            raise ValueError(
                f"push: {name} is given on {t.device}, expected {parameter.device} as the parameter."
            )


def labelled(given: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses {task: [N]} and the masks {task: [N]} of labelled samples, from what a losses function returned.

    Args:
        given: losses [N] or {task: [N]}, or a pair of them and {task: [N] bool}.

    Raises:
        TypeError: neither losses nor such a pair.
        ValueError: losses that are not one value a sample, or masks that do not fit.
    """
    losses, present = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    named = _named(losses)
    if not isinstance(named, Mapping) or not all(
        isinstance(loss, Tensor) for loss in named.values()
    ):
        raise TypeError(
            f"losses: found {type(losses).__name__}, expected that losses(model, batch) returns a tensor [N], "
            "{task: [N]}, or a pair (losses, {task: [N] bool}) where labels are missing."
        )
    shapes = {task: tuple(loss.shape) for task, loss in named.items()}
    if (
        not named
        or len(set(shapes.values())) > 1
        or any(len(shape) != 1 for shape in shapes.values())
    ):
        raise ValueError(
            f"losses: found shapes {shapes}, expected one value per sample [N] for every task: reduction='none', then "
            "loss.flatten(1).mean(1). Samples without a label keep their place; return (losses, {task: mask})."
        )
    return dict(named), presence(present, named)


def _named(losses: Any) -> Any:
    """A task that was given no name is called "loss"."""
    return {"loss": losses} if isinstance(losses, Tensor) else losses


def _check_loss(task: str, loss: Tensor) -> None:
    if loss.is_complex():
        raise TypeError(
            f"losses[{task!r}]: found {loss.dtype}, expected real values, such as loss.abs() or loss.real."
        )
    if loss.is_nested:
        raise TypeError(
            f"losses[{task!r}]: found a nested tensor, expected a plain one [N]: average each sample's values first, "
            "torch.stack([part.mean() for part in loss.unbind()])."
        )
    if loss.dim() == 2 and loss.shape[1] == 1:
        raise ValueError(
            f"losses[{task!r}]: found shape {tuple(loss.shape)}, expected [N]; write loss.squeeze(1)."
        )
    if loss.dim() == 0:
        raise ValueError(
            f"losses[{task!r}]: found shape (), which is already reduced to one number (as the loss of a transformers "
            f"model that is given labels=; take its logits instead); {_UNREDUCED}."
        )
    if loss.dim() > 1:
        raise ValueError(
            f"losses[{task!r}]: found shape {tuple(loss.shape)}, which has more than one value a sample; {_UNREDUCED}."
        )
    if loss.numel() and loss.grad_fn is None and loss.requires_grad:
        raise ValueError(
            f"losses[{task!r}]: found a parameter itself, expected what is computed from it; clone it."
        )
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
            "finite ones. A mean over no labels is 0/0: divide by count.clamp(min=1). A label that is missing must not "
            "reach the loss as NaN: torch.nan_to_num(label), and say present={task: mask}."
        )


def targeted(targets: Iterable[str] | None, tasks: Iterable[str]) -> tuple[str, ...]:
    """The tasks to forget from, in the order of `tasks`; None stands for all.

    Raises:
        TypeError: targets are one string, which would be read as its letters.
        ValueError: none, or names that are no tasks.
    """
    every = tuple(tasks)
    if isinstance(targets, str):
        raise TypeError(
            f"targets: found the string {targets!r}, expected several names, ({targets!r},) for this one."
        )
    named = every if targets is None else tuple(targets)
    unknown = [name for name in named if name not in every]
    if unknown or not named:
        found = f"unknown tasks {unknown}" if unknown else "no task"
        raise ValueError(
            f"targets: found {found}, expected at least one of the tasks {list(every)}, or None for all."
        )
    return tuple(task for task in every if task in named)


def kinds(forget: Mask, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`{task: [N]}` int64, FORGET where the mask says so and RETAIN elsewhere.

    Args:
        forget: None or False (nothing), True (everything), a mask [N] for all tasks (full-task), or
            `{task: [N]}` for some of them (partial-task).
        losses: what `named_losses` returned.

    Raises:
        TypeError: a mask is not boolean.
        ValueError: a mask of the wrong shape or for an unknown task.
    """
    masks = _per_task("forget", forget, losses, default=False)
    return {task: torch.where(mask, FORGET, RETAIN) for task, mask in masks.items()}


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


class Who(NamedTuple):
    """The samples `[N]` of each kind that give a task rows, kinds without any left out; and whether all samples do."""

    of: dict[int, Tensor]
    all: bool


def who_gives(kind: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Who]:
    """Who gives rows for each task, from `kinds` and `presence`; one wait for the device."""
    masks = {
        task: [(kind[task] == which) & present[task] for which in (RETAIN, FORGET)] for task in kind
    }
    flags = torch.stack([
        torch.stack([*(mask.any() for mask in masks[task]), present[task].all()]) for task in kind
    ])
    found = {}
    for (task, of), (*some, every) in zip(masks.items(), flags.tolist(), strict=True):
        kept = zip((RETAIN, FORGET), of, some, strict=True)
        found[task] = Who({which: mask for which, mask, there in kept if there}, every)
    return found


def _per_task(
    name: str, mask: Mask, losses: Mapping[str, Tensor], default: bool
) -> dict[str, Tensor]:
    if isinstance(mask, Mapping):
        unknown = [task for task in mask if task not in losses]
        if unknown:
            raise ValueError(
                f"{name}: found unknown tasks {unknown}, expected some of {list(losses)}."
            )
        return {
            task: _mask(f"{name}[{task!r}]", mask.get(task, default), loss)
            for task, loss in losses.items()
        }
    return {
        task: _mask(name, default if mask is None else mask, loss) for task, loss in losses.items()
    }


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
        raise ValueError(
            f"{name}: found shape {tuple(mask.shape)}, expected [{len(loss)}], one entry per sample."
        )
    return mask.to(loss.device)


def check_folder(name: str, path: str | Path) -> None:
    """There is a folder for the file to be written.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name}: there is no folder {folder} for {Path(path).name}; make it first, "
            f"Path({str(folder)!r}).mkdir(parents=True)."
        )
