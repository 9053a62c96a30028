"""Losses: one value per sample, one tensor per task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtu_fast._checks.flags import AT_ONCE, Flags
from mtu_fast._checks.masks import presence

Losses = Tensor | Mapping[str, Tensor]

_UNREDUCED = (
    "mtu_fast needs one loss per sample: build the loss with reduction='none' and average it over everything but the "
    "samples, e.g. loss.flatten(1).mean(1)"
)


def by_task(losses: Losses) -> dict[str, Tensor]:
    """Losses as `{task: [N]}`, with or without a graph.

    Raises:
        TypeError: losses are neither a tensor nor a mapping of tensors, or complex.
        ValueError: no task, or a loss that is not one value per sample.
    """
    named = _named(losses)
    if not isinstance(named, Mapping):
        found = type(losses).__name__
        raise TypeError(f"losses: found {found}, expected a tensor [N] or {{task: tensor [N]}}.")
    if not named:
        raise ValueError("losses: found no task, expected at least one {task: tensor [N]}.")
    for task, loss in named.items():
        if not isinstance(loss, Tensor):
            found = type(loss).__name__
            raise TypeError(f"losses[{task!r}]: found {found}, expected a tensor [N].")
        _check_kind(task, loss)
        _check_shape(task, loss)
    return dict(named)


def named_losses(losses: Losses, flags: Flags = AT_ONCE) -> dict[str, Tensor]:
    """Losses as `{task: [N]}` with a graph, of one length, on one device, all finite.

    Args:
        losses: what the user handed over.
        flags: of the call.

    Raises:
        TypeError: losses are neither a tensor nor a mapping of tensors, or complex.
        ValueError: no task, a reduced or ragged loss, mixed devices, a non-finite value, no graph.
    """
    named = by_task(losses)
    for task, loss in named.items():
        _check_graph(task, loss)
    _check_lengths(named)
    _check_devices(named)
    # the error must not hold the graph, which may be the most of the memory
    values = {task: loss.detach() for task, loss in named.items()}
    flags.check_finite(values.values(), lambda: _not_finite(values))
    return named


def labelled(given: Any, called: str = "losses") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses {task: [N]} and the masks {task: [N]} of labelled samples, from what a losses function returned.

    Args:
        given: losses [N] or {task: [N]}, or a pair of them and {task: [N] bool}.
        called: the argument that the function is.

    Raises:
        TypeError: neither losses nor such a pair.
        ValueError: losses that are not one value per sample, or masks that do not fit.
    """
    # losses themselves are a tensor or a mapping, never a tuple
    is_pair = isinstance(given, tuple) and len(given) == 2
    losses, present = given if is_pair else (given, None)
    named = _named(losses)
    if not _is_mapping_of_tensors(named):
        raise TypeError(
            f"{called}: found {type(losses).__name__}, expected that {called}(model, batch) returns a tensor [N], "
            "{task: [N]}, or a pair (losses, {task: [N] bool}) where labels are missing."
        )
    shapes = {task: tuple(loss.shape) for task, loss in named.items()}
    distinct = set(shapes.values())
    if len(distinct) != 1 or len(distinct.pop()) != 1:
        raise ValueError(
            f"{called}: found shapes {shapes}, expected one value per sample [N] for every task: reduction='none', "
            "then loss.flatten(1).mean(1). Samples without a label keep their place; return (losses, {task: mask})."
        )
    return dict(named), presence(present, named)


def _named(losses: Any) -> Any:
    """A task that was given no name is called "loss"."""
    return {"loss": losses} if isinstance(losses, Tensor) else losses


def _is_mapping_of_tensors(named: Any) -> bool:
    if not isinstance(named, Mapping):
        return False
    return all(isinstance(loss, Tensor) for loss in named.values())


def _check_lengths(named: Mapping[str, Tensor]) -> None:
    lengths = {task: len(loss) for task, loss in named.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"losses have different lengths {lengths}, expected one value per sample [N] for every task. A task "
            "without a label for some samples keeps its place: give any finite loss there and present={task: mask}."
        )


def _check_devices(named: Mapping[str, Tensor]) -> None:
    devices = {task: str(loss.device) for task, loss in named.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"losses are on different devices {devices}, expected one: move them, or take rows apart."
        )
    if "meta" in devices.values():
        raise ValueError(
            "losses: found tensors on meta, which hold no numbers; load the model first."
        )


def _check_kind(task: str, loss: Tensor) -> None:
    if loss.is_complex():
        raise TypeError(
            f"losses[{task!r}]: found {loss.dtype}, expected real values, such as loss.abs() or loss.real."
        )
    if loss.is_nested:
        raise TypeError(
            f"losses[{task!r}]: found a nested tensor, expected a plain one [N]: average each sample's values first, "
            "torch.stack([part.mean() for part in loss.unbind()])."
        )


def _check_shape(task: str, loss: Tensor) -> None:
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
            f"losses[{task!r}]: found shape {tuple(loss.shape)}, which has more than one value per sample; "
            f"{_UNREDUCED}."
        )


def _check_graph(task: str, loss: Tensor) -> None:
    if not loss.numel() or loss.grad_fn is not None:
        return
    if loss.requires_grad:
        raise ValueError(
            f"losses[{task!r}]: found a parameter itself, expected what is computed from it; clone it."
        )
    raise ValueError(
        f"losses[{task!r}]: found no graph (grad_fn is None), expected the output of a forward pass. Was it made "
        "under torch.no_grad() or inference_mode(), detached, or is every parameter frozen?"
    )


def _not_finite(losses: Mapping[str, Tensor]) -> ValueError:
    """The error of the first task with a non-finite loss."""
    at = {
        task: (~loss.isfinite()).nonzero().flatten()[:8].tolist() for task, loss in losses.items()
    }
    task = next((task for task, bad in at.items() if bad), next(iter(losses)))
    return ValueError(
        f"losses[{task!r}]: found a non-finite value for samples {at[task]}, expected "
        "finite ones. A mean over no labels is 0/0: divide by count.clamp(min=1). A label that is missing must not "
        "reach the loss as NaN: torch.nan_to_num(label), and say present={task: mask}."
    )
