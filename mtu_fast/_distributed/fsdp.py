"""Models of FSDP2 (`fully_shard`): their units, and how each parameter is cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from mtu_fast._distributed.slices import Slice


def is_fsdp(module: Any) -> bool:
    """Whether a module was given to `fully_shard`; by name, so that nothing is imported for the question."""
    return any(
        base.__name__ == "FSDPModule" and base.__module__.startswith("torch.distributed.fsdp")
        for base in type(module).__mro__
    )


def groups_of(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """The parameter groups of all units, gathered once so that every parameter has its leaf, and the outermost states.

    Raises:
        ValueError: a unit of several meshes.
    """
    groups: list[Any] = []
    roots: list[Any] = []
    for module in _units(model):
        state = _state_of(module)
        if not _is_inside(module, model):
            _add_once(roots, state)
        if state._fsdp_param_group is not None:
            _add_once(groups, state._fsdp_param_group)
    for group in groups:
        _gather_once(group)
    return groups, roots


def _state_of(module: Any) -> Any:
    state = module._get_fsdp_state()
    if len(getattr(state, "_fsdp_param_groups", ())) > 1:
        raise ValueError(
            "model: found FSDP2 with parameters on several meshes (shard_placement_fn), expected "
            "one mesh for all: leave out the meshes of single parameters."
        )
    return state


def _add_once(found: list[Any], one: Any) -> None:
    # fully_shard of a list of modules gives all of them one state and one group
    if not any(one is other for other in found):
        found.append(one)


def _gather_once(group: Any) -> None:
    """FSDP2 makes the leaf of a parameter at its first gathering."""
    was = group.is_unsharded
    group.lazy_init()
    group.unshard()
    group.wait_for_unshard()
    if not was:
        group.reshard()


def held(groups: list[Any]) -> dict[Tensor, Slice]:
    """Leaf of the graph -> how the model holds the parameter.

    Raises:
        ValueError: a parameter is cut in a way that is not known.
    """
    found: dict[Tensor, Slice] = {}
    for group in groups:
        for each in group.fsdp_params:
            owner = each.sharded_param
            # in HSDP copies are along the first dimension of the mesh, slices along the last
            *others, last = owner.placements
            if len(others) > 1 or any(not p.is_replicate() for p in others) or not _is_plain(last):
                raise ValueError(
                    f"model: found FSDP2 over placements {tuple(owner.placements)}, expected a shard "
                    "along one dimension, replicated along at most one other (HSDP): tensor "
                    "parallel inside FSDP2 is not supported. Use one of them."
                )
            mesh = owner.device_mesh
            parts = mesh.size(mesh.ndim - 1)
            found[each.unsharded_param] = Slice(owner, tuple(owner.shape), last.dim, parts)
    return found


def mesh_of(groups: list[Any]) -> Any:
    """The one mesh of all parameters.

    Raises:
        ValueError: there are several.
    """
    meshes = [p.sharded_param.device_mesh for group in groups for p in group.fsdp_params]
    if any(mesh != meshes[0] for mesh in meshes):
        raise ValueError("model: found FSDP2 units on different meshes, expected one mesh for all.")
    return meshes[0]


def root_of(mesh: Any) -> Any:
    """The mesh that another is a dimension of; itself, where it is of none."""
    root = getattr(mesh, "_get_root_mesh", None)
    return mesh if root is None else root()


def processes_of(mesh: Any) -> dist.ProcessGroup:
    """The ranks of a mesh.

    Raises:
        ValueError: a mesh of two dimensions over some of the ranks.
    """
    if mesh.ndim == 1:
        found: dist.ProcessGroup = mesh.get_group()
        return found
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"model: found HSDP on {mesh.size()} of {dist.get_world_size()} ranks, expected all: "
            "make the mesh of all ranks."
        )
    world = dist.group.WORLD
    assert world is not None
    return world


def _units(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if is_fsdp(module):
            yield module


def _is_inside(module: Any, model: nn.Module) -> bool:
    """Whether another unit holds a module."""
    others = [outer for outer in _units(model) if outer is not module]
    return any(module is inner for outer in others for inner in outer.modules())


def _is_plain(placement: Any) -> bool:
    """Whether a placement is Shard itself: slices in order along one dimension."""
    return type(placement).__name__ == "Shard"
