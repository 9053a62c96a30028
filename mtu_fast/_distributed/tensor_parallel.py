"""Models of `parallelize_module`: how each parameter is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mtu_fast._distributed.slices import Slice


def mesh_of(parameters: Sequence[Any]) -> Any:
    """The one mesh of all parameters, of one dimension.

    Raises:
        ValueError: there are several, or one of more dimensions.
    """
    mesh = parameters[0].device_mesh
    if mesh.ndim != 1 or any(p.device_mesh != mesh for p in parameters):
        raise ValueError(
            f"model: found parameters that are DTensors on a mesh of shape {tuple(mesh.shape)}, or on several meshes; "
            "expected one mesh of one dimension (tensor parallel). Data parallel beside tensor parallel is not "
            "supported: use one of them."
        )
    return mesh


def held(parameters: Sequence[Any]) -> dict[Tensor, Slice]:
    """Parameter, which is its own leaf -> how it is held.

    Raises:
        ValueError: a parameter is cut in a way that is not known.
    """
    found: dict[Tensor, Slice] = {}
    for p in parameters:
        (placement,) = p.placements
        kind = type(placement).__name__
        if kind not in ("Shard", "Replicate"):
            raise ValueError(
                f"model: found a parameter of shape {tuple(p.shape)} placed as {placement}, expected Shard or "
                "Replicate."
            )
        # a negative dim counts from the end
        dim = placement.dim % p.dim() if kind == "Shard" else None
        found[p] = Slice(p, tuple(p.shape), dim, p.device_mesh.size())
    return found
