"""What wraps a model for several processes: taken off where it is supported, else refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from mtu_fast._checks.warned import warn
from mtu_fast._distributed import fsdp, tensor_parallel
from mtu_fast._distributed.ranks import Ranks
from mtu_fast._distributed.same import DTensorSlicer, SameTaking
from mtu_fast._distributed.slices import Slices
from mtu_fast._distributed.taking import JoinedTaking, Own
from mtu_fast._distributed.units import Units


class Unset(Enum):
    """The default of `group=`, to be told from None."""

    UNSET = "not given"


UNSET: Literal[Unset.UNSET] = Unset.UNSET
Group: TypeAlias = "dist.ProcessGroup | Literal[Unset.UNSET] | None"

_INSTEAD = (
    "Use torch.nn.parallel.DistributedDataParallel; torch.distributed.fsdp.fully_shard (FSDP2) where a "
    "copy on every rank does not fit; or mtu.Engine(model, group=process_group) for copies without a wrapper"
)
# class -> what to call it; found by name, so that nothing is imported for the question
_REFUSED = {
    ("torch.distributed.fsdp", "FullyShardedDataParallel"): "FSDP1 (FullyShardedDataParallel)",
    ("torch.distributed.pipelining", "_PipelineStageBase"): "a pipeline stage",
    ("torch.distributed._composable", "DDP"): "replicate()",
    ("torch.distributed._composable", "ReplicateModule"): "replicate()",
    ("deepspeed", "DeepSpeedEngine"): "DeepSpeed",
    ("deepspeed", "PipelineEngine"): "DeepSpeed's pipeline",
}


class Unwrapped(NamedTuple):
    """A model without its wrapper.

    Attributes:
        model: the model.
        ranks: whose rows are joined; None for this process alone.
        units: where its parameters are gathered for a pass.
        slicer: cuts gradients, where all ranks see one batch and each has a slice of every row.
    """

    model: Any
    ranks: Ranks | None = None
    units: Units | None = None
    slicer: DTensorSlicer | None = None


def unwrapped(model: Any, group: Group) -> Unwrapped:
    """The model without its wrapper, and the processes whose rows are joined.

    Args:
        model: what the engine was given.
        group: the process group, None for rows of this rank only, or UNSET.

    Raises:
        TypeError: `group` is no process group.
        ValueError: this process is not one of the group, or the wrapper is not supported.
    """
    _check_group(group)
    if not (dist.is_available() and dist.is_initialized()):
        return Unwrapped(model)
    if (name := _refused(model)) is not None:
        raise ValueError(
            f"model: found {name}, which the engine does not support: rows of all ranks would need "
            f"what only other ranks hold. {_INSTEAD}."
        )
    if isinstance(model, nn.Module):
        _check_dimensions(model)
        # FSDP2 first: its parameters are DTensors too, and only its units can gather them
        if is_fsdp(model):
            return _of_fsdp(model, group)
        if is_tensor_parallel(model):
            return _of_tensor_parallel(model, group)
    return _of_copies(model, group)


def _of_copies(model: Any, group: Group) -> Unwrapped:
    """A model that is whole on every rank: in DistributedDataParallel, or without a wrapper."""
    model, wrapper = _without_ddp(model)
    own = None if wrapper is None else wrapper.process_group
    chosen = own if group is UNSET else group
    if chosen is None and group is UNSET:
        _warn()
    # a rank by itself has all rows: no collective, as without torch.distributed
    if chosen is None or dist.get_world_size(chosen) == 1:
        return Unwrapped(model)
    ranks = _ranks(model, chosen)
    if wrapper is not None:
        ranks.check_step = partial(_check_join, wrapper)
    return Unwrapped(model, ranks)


def _ranks(model: nn.Module, group: dist.ProcessGroup) -> Ranks:
    return Ranks(group, next(model.parameters()).device)


def _of_fsdp(model: nn.Module, group: Group) -> Unwrapped:
    """A model of FSDP2, whose mesh says who takes part."""
    groups, roots = fsdp.groups_of(model)
    # before the mesh: it names tensor parallel inside FSDP2, which has two
    held = fsdp.held(groups)
    mesh = fsdp.mesh_of(groups)
    processes = fsdp.processes_of(mesh)
    whole = fsdp.root_of(mesh)
    if group is UNSET and whole.size() != mesh.size():
        raise ValueError(
            f"model: found FSDP2 on one dimension of a mesh of shape {tuple(whole.shape)} (another kind of parallelism "
            "beside it?), which the engine does not join. Make a mesh of all ranks; or pass group=mesh.get_group() "
            "where the other ranks are no part of this training."
        )
    if group is None or (group is not UNSET and _members(group) != _members(processes)):
        raise ValueError(
            "group: found another than the ranks of the FSDP2 model's mesh, expected that: its "
            "parameters are in slices on these ranks. Leave group= out."
        )
    ranks = _ranks(model, processes)
    shards, copies = ranks, None
    if mesh.ndim == 2:
        # HSDP: copies along the first dimension, slices along the second
        copies, shards = (_ranks(model, mesh.get_group(d)) for d in (0, 1))
    ranks.slices = Slices(held, shards, copies)
    return Unwrapped(model, ranks, Units(groups, roots, ranks))


def _of_tensor_parallel(model: nn.Module, group: Group) -> Unwrapped:
    """A model of `parallelize_module`, on one mesh of one dimension."""
    cut = [p for p in model.parameters() if _is_sharded(p)]
    mesh = tensor_parallel.mesh_of(cut)
    processes: dist.ProcessGroup = mesh.get_group()
    if group is UNSET and mesh.size() != dist.get_world_size():
        raise ValueError(
            f"model: found tensor parallel on {mesh.size()} of {dist.get_world_size()} ranks (data parallel beside "
            "it?), which the engine does not join. Use one of the two on all ranks; or "
            "group=mesh.get_group() where the other ranks are no part of this training."
        )
    if group is None or (group is not UNSET and _members(group) != _members(processes)):
        raise ValueError(
            "group: found another than the ranks of the model's mesh, expected that: its parameters are in "
            "slices on these ranks. Leave group= out, or pass mesh.get_group()."
        )
    ranks = Ranks(processes, cut[0].device)
    ranks.slices = Slices(tensor_parallel.held(cut), ranks)
    return Unwrapped(model, ranks, None, DTensorSlicer())


def _check_dimensions(model: nn.Module) -> None:
    """DistributedDataParallel is of one group, over whole parameters.

    Raises:
        ValueError: it is not.
    """
    wrapped = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if not wrapped:
        return
    # DDP with device_mesh= puts plain slices in the place of DTensors, and marks them so
    if any(_is_sharded(p) or hasattr(p, "_st_info") for p in model.parameters()):
        raise ValueError(
            "model: found DistributedDataParallel over a tensor parallel or FSDP2 model, expected one of them: the "
            "engine does not join rows over two dimensions. Use one on all ranks; fully_shard on a mesh of two "
            "dimensions has copies of slices."
        )
    groups = {tuple(_members(module.process_group)) for module in wrapped}
    if len(groups) > 1:
        raise ValueError(
            f"model: found DistributedDataParallel over {len(groups)} different process groups, expected one for all "
            "modules: rows are those of the ranks of one group."
        )


def _members(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


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


def check_wire(wire: object) -> None:
    """Uses travel as they are, or in bfloat16, which has the range of float32.

    Raises:
        ValueError: another dtype.
    """
    if wire not in (None, torch.bfloat16):
        raise ValueError(f"wire: found {wire!r}, expected torch.bfloat16, or None for exact rows.")


def _refused(model: Any) -> str | None:
    """What wraps the model and is not supported, in words."""
    modules = model.modules() if isinstance(model, nn.Module) else [model]
    for module in modules:
        for base in type(module).__mro__:
            for (package, name), words in _REFUSED.items():
                if base.__name__ == name and base.__module__.startswith(package):
                    return words
    return None


def _is_sharded(parameter: Any) -> bool:
    return any(base.__name__ == "DTensor" for base in type(parameter).__mro__)


def _without_ddp(model: Any) -> tuple[Any, nn.parallel.DistributedDataParallel | None]:
    """The model inside DistributedDataParallel, and that."""
    if not isinstance(model, nn.Module):
        return model, None
    wrapped = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if not wrapped:
        return model, None
    for module in wrapped:
        _check_ddp(module)
    # modules come outermost first; one further in has the ranks of its own group
    outer = wrapped[0]
    return (outer.module if outer is model else model), outer


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


def _check_join(model: nn.parallel.DistributedDataParallel) -> None:
    """No rank that leaves the loop early will answer DDP's reduction in place of the engine.

    Raises:
        ValueError: one may.
    """
    if model._join_config.enable:
        raise ValueError(
            "model: found a DistributedDataParallel that is or was within Join (Accelerate's join_uneven_inputs), "
            "expected one that never was: a rank that has no more batches would answer DDP's reduction, which never "
            "runs, and not the engine. Give every rank as many batches; one without samples gives losses of length 0."
        )


def _warn() -> None:
    warn(
        f"Engine: torch.distributed runs {dist.get_world_size()} ranks, but the model is not "
        "wrapped and group= is not given, so nothing is synchronised: rows, Gram matrix, weights "
        "and .grad are those of this rank alone, and the ranks' parameters drift apart. Pass "
        "group=torch.distributed.group.WORLD, or the DistributedDataParallel model; group=None "
        "says that this is meant.",
        RuntimeWarning,
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


def taking_of(
    own: Own, ranks: Ranks, units: Units | None, slicer: DTensorSlicer | None
) -> JoinedTaking | SameTaking:
    """How rows are taken over ranks: each rank's batch, or one batch of all."""
    if slicer is None:
        return JoinedTaking(own, ranks, units)
    assert isinstance(ranks.slices, Slices)
    return SameTaking(own, ranks, ranks.slices)


def parallel(model: nn.Module) -> Unwrapped:
    """The ranks that a model is of, by its wrapper or its parameters; none where this process has it alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return Unwrapped(model)
    _check_dimensions(model)
    if is_fsdp(model):
        return _of_fsdp(model, UNSET)
    if is_tensor_parallel(model):
        return _of_tensor_parallel(model, UNSET)
    _, wrapper = _without_ddp(model)
    if wrapper is None or dist.get_world_size(wrapper.process_group) == 1:
        return Unwrapped(model)
    return Unwrapped(model, _ranks(model, wrapper.process_group))


def is_fsdp(model: nn.Module) -> bool:
    """Whether a model is of FSDP2."""
    return any(map(fsdp.is_fsdp, model.modules()))


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether a model is of `parallelize_module`, and not of FSDP2."""
    return not is_fsdp(model) and any(map(_is_sharded, model.parameters()))


def is_sliced(model: nn.Module) -> bool:
    """Whether ranks hold slices of a model."""
    return is_fsdp(model) or is_tensor_parallel(model)


def slices_of(model: nn.Module) -> list[Any]:
    """The slices of a model, which optimizers are to have: a forward may leave whole ones in their place."""
    for module in filter(fsdp.is_fsdp, model.modules()):
        module.reshard()  # type: ignore[operator]
    return list(model.parameters())


def bare(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or itself."""
    found: nn.Module = _without_ddp(model)[0]
    return found
