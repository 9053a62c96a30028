"""The parameters that the rows of one engine lie in."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter

from torch import Tensor

from mtu_fast._arguments import check_one_of
from mtu_fast._checks.flags import Ledger
from mtu_fast._ops._arguments import check_blocks

PER = ("total", "layer", "tensor")
version = attrgetter("_version")  # of a tensor: how often it was written to in place


@dataclass(frozen=True)
class Shared:
    """The shared parameters of an engine, how exact the products of a Gram must be, and what is still to be raised.

    Attributes:
        names: theirs, in the model.
        parameters: what the graph of a forward has for them.
        precision: see `Engine`.
        ledger: what the calls of the engine are still to raise.
        owners: the model's own, where it holds slices of them.
    """

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    precision: str = "highest"
    ledger: Ledger = field(default_factory=Ledger, compare=False)
    owners: tuple[Tensor, ...] = ()

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
        return tuple(map(version, self.owners or self.parameters))

    def named(self) -> dict[str, Tensor]:
        """{name: parameter}, as the model has them."""
        return dict(zip(self.names, self.owners or self.parameters, strict=True))

    def groups(self, per: str) -> list[list[int]]:
        """Indices of the parameters of each group: all, those of one module, or one."""
        if per == "total":
            return [list(range(len(self.names)))]
        found: dict[str, list[int]] = {}
        for j, key in enumerate(self.keys(per)):
            found.setdefault(key, []).append(j)
        return list(found.values())

    def places(self, per: str) -> dict[Tensor, int]:
        """Which of the groups each parameter belongs to."""
        found = {}
        for g, group in enumerate(self.groups(per)):
            for j in group:
                found[self.parameters[j]] = g
        return found

    def keys(self, per: str) -> list[str]:
        """The name of each parameter's group."""
        check_one_of("per", per, PER)
        if per == "total":
            return [""] * len(self.names)
        if per == "layer":
            return [name.rpartition(".")[0] for name in self.names]
        return list(self.names)
