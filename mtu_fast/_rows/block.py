"""Blocks: the rows of one task of one call, and the parameter space they lie in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mtu_fast._ops._blocks import check_blocks
from mtu_fast._rows.uses import Use
from mtu_fast.methods import SUBSPACE, Roles

PER = ("total", "layer", "tensor")


@dataclass(frozen=True)
class Shared:
    """What the rows of one engine have in common: its parameters, and how exact the products of a Gram must be."""

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    precision: str = "highest"

    def __post_init__(self) -> None:
        check_blocks(self.precision)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if parameter.is_complex():
                raise TypeError(
                    f"params: {name} is {parameter.dtype}, expected real parameters: rows and their Gram are real. "
                    f"Keep it as a real one of shape {(*parameter.shape, 2)} and write torch.view_as_complex({name}) "
                    "where it is used, or leave it out of params."
                )

    def versions(self) -> tuple[int, ...]:
        """Changes whenever a parameter is written in place."""
        return tuple(p._version for p in self.parameters)

    def groups(self, per: str) -> list[list[int]]:
        """Indices of the parameters of each block: all, those of one module, or one."""
        found: dict[str, list[int]] = {}
        for j, key in enumerate(self.keys(per)):
            found.setdefault(key, []).append(j)
        return list(found.values())

    def places(self, per: str) -> dict[Tensor, int]:
        """Which of the blocks each parameter belongs to."""
        return {self.parameters[j]: g for g, group in enumerate(self.groups(per)) for j in group}

    def keys(self, per: str) -> list[str]:
        """The name of each parameter's block."""
        if per not in PER:
            raise ValueError(f"per is {per!r}, expected one of {', '.join(map(repr, PER))}.")
        if per == "total":
            return [""] * len(self.names)
        return [name if per == "tensor" else name.rpartition(".")[0] for name in self.names]


@dataclass
class Block:
    """The rows of one task of one call.

    uses: parameter index -> the rows' gradients. outside: kind -> gradients of the summed row
    losses by the parameters outside. versions: of the parameters and of all that the uses hold,
    when the rows were taken. kept: the rows outlive their step, belong to the point where they were
    taken, and are not used up. grams: group of parameters -> Gram of the block with itself, where
    it is kept.
    """

    roles: Roles
    uses: dict[int, Use]
    outside: dict[int, dict[Tensor, Tensor]]
    versions: tuple[tuple[int, ...], tuple[int, ...]]
    spent: bool = field(default=False)
    kept: bool = False
    grams: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        roles: Roles, uses: dict[int, Use], outside: dict[int, dict[Tensor, Tensor]], shared: Shared
    ) -> Block:
        """A block of rows taken now."""
        return Block(roles, uses, outside, (shared.versions(), _versions(uses)))

    def keep(self) -> Block:
        """The same rows as rows of a subspace, for later steps."""
        roles = replace(self.roles, kind=torch.full_like(self.roles.kind, SUBSPACE))
        return Block(roles, dict(self.uses), {}, self.versions, kept=True)

    def changed(self) -> bool:
        """Whether something that the uses hold was written to since."""
        return self.versions[1] != _versions(self.uses)

    def __len__(self) -> int:
        return len(self.roles)


def _versions(uses: dict[int, Use]) -> tuple[int, ...]:
    return tuple(version for use in uses.values() for version in use.versions)


def join_roles(parts: Sequence[Roles]) -> Roles:
    """Roles of rows laid end to end, tasks matched by name."""
    if len(parts) == 1:
        return parts[0]
    tasks = tuple(dict.fromkeys(task for part in parts for task in part.tasks))
    moved = [
        torch.tensor([tasks.index(t) for t in part.tasks], device=part.task.device)[part.task]
        for part in parts
    ]
    lowest = min((part.dtype for part in parts), key=lambda dtype: -torch.finfo(dtype).eps)
    return Roles(
        torch.cat(moved), torch.cat([p.sample for p in parts]), torch.cat([p.kind for p in parts]),
        torch.cat([p.loss for p in parts]), tasks, lowest,
    )  # fmt: skip
