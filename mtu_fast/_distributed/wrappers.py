"""What wraps a model for several processes: taken off where it is supported, else refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from enum import Enum
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from torch import nn


class Unset(Enum):
    """The default of `group=`, to be told from None."""

    UNSET = "not given"


UNSET: Literal[Unset.UNSET] = Unset.UNSET
Group: TypeAlias = "dist.ProcessGroup | Literal[Unset.UNSET] | None"

_INSTEAD = (
    "Use torch.nn.parallel.DistributedDataParallel, or one copy of the model on every rank with "
    "mtu.Engine(model, group=process_group)"
)
# class -> what to call it; found by name, so that nothing is imported for the question
_REFUSED = {
    ("torch.distributed.fsdp", "FullyShardedDataParallel"): "FSDP1 (FullyShardedDataParallel)",
    ("torch.distributed.fsdp", "FSDPModule"): "FSDP2 (fully_shard)",
    ("torch.distributed.pipelining", "_PipelineStageBase"): "a pipeline stage",
    ("deepspeed", "DeepSpeedEngine"): "DeepSpeed",
    ("deepspeed", "PipelineEngine"): "DeepSpeed's pipeline",
}


def unwrapped(model: Any, group: Group) -> tuple[Any, dist.ProcessGroup | None]:
    """The model without its wrapper, and the processes whose rows are joined; None for one alone.

    Args:
        model: what the engine was given.
        group: the process group, None for rows of this rank only, or UNSET.

    Raises:
        TypeError: `group` is no process group.
        ValueError: this process is not one of the group, or the wrapper is not supported.
    """
    _check_group(group)
    if not (dist.is_available() and dist.is_initialized()):
        return model, None
    if (name := _refused(model)) is not None:
        raise ValueError(
            f"model: found {name}, which the engine does not support: rows of all ranks would need "
            f"what only other ranks hold. {_INSTEAD}."
        )
    model, own = _without_ddp(model)
    chosen = own if group is UNSET else group
    if chosen is None:
        if group is UNSET:
            _warn()
        return model, None
    return model, chosen if dist.get_world_size(chosen) > 1 else None


def _check_group(group: Any) -> None:
    if group is None or group is UNSET:
        return
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "group: found one that this process is not part of, expected one that it is; make the "
            "engine on the group's ranks only."
        )
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        found = type(group).__name__
        raise TypeError(
            f"group: found {found}, expected a process group: torch.distributed.group.WORLD, "
            "mesh.get_group(), or None for rows of this rank only."
        )


def _refused(model: Any) -> str | None:
    """What wraps the model and is not supported, in words."""
    modules = model.modules() if isinstance(model, nn.Module) else [model]
    for module in modules:
        for base in type(module).__mro__:
            for (package, name), words in _REFUSED.items():
                if base.__name__ == name and base.__module__.startswith(package):
                    return words
    if isinstance(model, nn.Module) and any(map(_is_sharded, model.parameters())):
        return "parameters that are DTensors (tensor parallel)"
    return None


def _is_sharded(parameter: Any) -> bool:
    return any(base.__name__ == "DTensor" for base in type(parameter).__mro__)


def _without_ddp(model: Any) -> tuple[Any, dist.ProcessGroup | None]:
    """The model inside DistributedDataParallel, and its process group."""
    if not isinstance(model, nn.Module):
        return model, None
    wrapped = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if not wrapped:
        return model, None
    for module in wrapped:
        _check_ddp(module)
    outer = wrapped[0]
    return (outer.module if outer is model else model), outer.process_group


def _check_ddp(model: nn.parallel.DistributedDataParallel) -> None:
    """The engine never runs DDP's reduction; settings that change it would be ignored silently.

    Raises:
        ValueError: there are such settings.
    """
    found = []
    if model.static_graph:
        found.append("static_graph=True")
    if model.mixed_precision is not None:
        found.append("mixed_precision")
    if getattr(model, "_comm_hooks", None):
        found.append("a communication hook")
    if found:
        raise ValueError(
            f"model: found DistributedDataParallel with {' and '.join(found)}, expected none: the "
            "engine sums gradients itself, so that DDP's own reduction never runs. Leave it out; "
            "torch.autocast serves for mixed precision."
        )


def _warn() -> None:
    warnings.warn(
        f"Engine: torch.distributed runs {dist.get_world_size()} ranks, but the model is not "
        "wrapped and group= is not given, so nothing is synchronised: rows, Gram matrix, weights "
        "and .grad are those of this rank alone, and the ranks' parameters drift apart. Pass "
        "group=torch.distributed.group.WORLD, or the DistributedDataParallel model; group=None "
        "says that this is meant.",
        RuntimeWarning,
        stacklevel=4,
    )


def check_nodes(names: Iterable[str]) -> None:
    """No node of a graph waits for the other ranks: rows take as many passes as a rank needs.

    Raises:
        ValueError: one does.
    """
    if any(name.startswith("SyncBatchNorm") for name in names):
        raise ValueError(
            "model: found SyncBatchNorm in training, expected statistics of one rank: each of its "
            "backward passes waits for all ranks, which take passes of their own. Set it to eval, "
            "or use nn.BatchNorm or GroupNorm."
        )
