"""The parameters of a model, those a method works on and those outside, as the model has them now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from mtu_fast._checks.flags import Ledger
from mtu_fast._checks.parameters import listed
from mtu_fast._rows.inner import inner
from mtu_fast._rows.shared import Shared


class Leaves:
    """What the graph of a forward has for the parameters of a model: these themselves."""

    def leaf(self, parameter: Tensor) -> Tensor:
        """What a parameter is in the graph."""
        return parameter

    def owners(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The model's own parameters where they are others, else nothing."""
        return ()


class Space:
    """Which parameters are shared, and which are outside; followed where the model changes.

    Args:
        model: any module.
        params: the shared parameters, frozen ones among them from the moment they require grad;
            None for all.
        precision: see `Engine`.
        leaves: what stands for the model's parameters in the graph.

    Attributes:
        ledger: what the calls of the engine are still to raise.
        model: the module.
        shared: the shared parameters that require grad.
        outside: all others of the model, by identity.

    Raises:
        TypeError: `model` is not a module, or `params` are not tensors, or are complex.
        ValueError: no parameter requires grad, one of `params` is not the model's, or `precision`
            is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Tensor] | None,
        precision: str,
        leaves: Leaves | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: found {type(model).__name__}, expected a torch.nn.Module; `params` chooses among "
                "its parameters."
            )
        self.model = model
        self._leaves = leaves or Leaves()
        self._given = self._in_graph(listed(params))
        self.ledger = Ledger()
        self._precision = precision
        names = self._names()
        self._check_given(names)
        self._look(names)
        if not self.shared.parameters:
            raise ValueError(
                "params: found no parameter that requires grad, expected at least one."
            )

    def follow(self, leaves: Iterable[Tensor]) -> bool:
        """Look at the model again where a backward reaches parameters that are not known as they are now.

        Args:
            leaves: what it reaches; what is not the model's is left alone.

        Returns:
            Whether the shared parameters are others now.

        Raises:
            RuntimeError: one is new to the model, and `params` do not say whether it is shared.
        """
        unknown = self._unknown(leaves)
        if not unknown:
            return False
        names = self._names()
        # what is left is of another model: a frozen encoder, a learned loss
        unknown = [p for p in unknown if id(p) in names]
        if not unknown:
            return False
        if self._given is not None:
            self._check_new([names[id(p)] for p in unknown if self._is_new(p)])
        self._look(names)
        return True

    def _unknown(self, leaves: Iterable[Tensor]) -> list[Tensor]:
        """Those that are neither shared nor outside by choice; mostly all are shared."""
        return [p for p in leaves if id(p) not in self._inside and not self._is_known(p)]

    def _check_given(self, names: dict[int, str]) -> None:
        strange = []
        for p in self._given or ():
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"params: found {type(p).__name__}, expected parameters; pass model.backbone.parameters()."
                )
            if p.requires_grad and id(p) not in names:
                strange.append(tuple(p.shape))
        if strange:
            raise ValueError(
                f"params: found tensors of shapes {strange} that are not parameters of the model; "
                "pass e.g. model.backbone.parameters()."
            )

    @staticmethod
    def _check_new(new: Sequence[str]) -> None:
        if new:
            raise RuntimeError(
                f"losses: found {', '.join(new[:3])} in their graph, which the model did not have when the engine was "
                "made (a layer replaced, an adapter added?), and cannot know whether it is shared; .grad is untouched. "
                "Make the engine anew, with the params of now."
            )

    def _is_known(self, p: Tensor) -> bool:
        """Whether a parameter is shared, or outside by choice and not because it was frozen."""
        if id(p) in self._inside:
            return True
        return id(p) in self.outside and self._given is not None and id(p) not in self._chosen

    def _is_new(self, p: Tensor) -> bool:
        return id(p) not in self.outside and id(p) not in self._chosen

    def _names(self) -> dict[int, str]:
        leaf = self._leaves.leaf
        return {id(leaf(p)): name for name, p in inner(self.model).named_parameters()}

    def _in_graph(self, given: list[Any] | None) -> list[Any] | None:
        if given is None:
            return None
        return [self._leaves.leaf(p) if isinstance(p, Tensor) else p for p in given]

    def _look(self, names: dict[int, str]) -> None:
        own = [self._leaves.leaf(p) for p in self.model.parameters()]
        # by identity, so that tied parameters count once
        chosen = {id(p): p for p in (own if self._given is None else self._given)}
        live = [p for p in chosen.values() if p.requires_grad]
        self._chosen = set(chosen)
        self._inside = {id(p) for p in live}
        inside = tuple(names[id(p)] for p in live)
        owners = self._leaves.owners(live)
        self.shared = Shared(inside, tuple(live), self._precision, self.ledger, owners)
        self.outside = {id(p): p for p in own if id(p) not in self._inside}
