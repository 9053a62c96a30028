"""Updates: what `backward` did, and what it asks of methods and numbers before it touches `.grad`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast._checks import all_finite
from mtu_fast._ops.gram_schmidt import effective_rank
from mtu_fast.methods import RETAIN, SUBSPACE, Method, Roles
from mtu_fast.methods.base import dependence_tolerance


class NotFiniteError(RuntimeError):
    """A row or an update is infinite or undefined; nothing was written."""


@dataclass(frozen=True, repr=False)
class Update:
    """What a `backward` did: w, and from what.

    Attributes:
        weights: w `[R]`, or `[L, R]` for a method that works per layer or tensor.
        roles: what each row is.
        gram: G `[R, R]` or `[L, R, R]`, float64; None where no Gram was needed.
        residual: the largest `|J_r d| / (|J_r| |d|)` left of what the method constrains, `[]` or
            `[L]`; None where it was not measured: where the Gram is exact, the rows are well
            conditioned, or nothing is constrained.
    """

    weights: Tensor
    roles: Roles
    gram: Tensor | None
    residual: Tensor | None = None

    def __repr__(self) -> str:
        rank = "none needed" if self.rank is None else self.rank.tolist()
        return f"Update({len(self.roles)} rows, rank of the retain rows: {rank})"

    @property
    def rank(self) -> Tensor | None:
        """Effective rank of the retain rows: how many directions were protected; None without a Gram."""
        if self.gram is None:
            return None
        retain = (self.roles.kind == RETAIN).to(self.gram.dtype)
        return effective_rank(
            self.gram * retain * retain[:, None], dependence_tolerance(self.roles.dtype)
        )


def check_method(method: object) -> None:
    """A method, or weights.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(method, type):
        raise TypeError(
            f"backward: found the class {method.__name__}, expected an instance of a method, such as "
            "mtu.OrthoGrad(alpha=0.5): call the class with its settings."
        )
    lacking = [
        name for name in ("per", "needs_gram", "outside", "__call__") if not hasattr(method, name)
    ]
    if lacking and not isinstance(method, Tensor):
        raise TypeError(
            f"backward: found {type(method).__name__} without {lacking}, expected a method such as "
            "mtu.OrthoGrad(alpha=0.5) with per, needs_gram, outside(roles) and __call__(G, roles), or weights [R]. A "
            "map from G alone is used as rows.backward(weighting(rows.gram()))."
        )


def check_meant(method: Method, roles: Roles) -> None:
    """The rows are such as the method is meant for.

    Raises:
        ValueError: sample rows for a method of mean rows, or no subspace for one that needs it.
    """
    name, own = type(method).__name__, roles.kind != SUBSPACE
    if method.per == "task" and bool((own & (roles.sample >= 0)).any()):
        raise ValueError(
            f"backward: {name} works on mean rows, one a task and role, found rows per sample; take them by "
            "engine.rows(..., per='task'), or call engine.backward(losses, method). rows.update(method) does not ask."
        )
    if getattr(method, "needs_subspace", False) and bool(own.all()):
        raise ValueError(
            f"backward: {name} moves in a subspace of rows kept from earlier steps, found none among these; call "
            "subspace.step(rows, method) with a mtu.Subspace() made before the loop."
        )


def check_finite(tensors: Iterable[Tensor]) -> None:
    """Nothing of an update is infinite or undefined.

    Raises:
        NotFiniteError: something is.
    """
    if not all_finite(tensors):
        raise NotFiniteError(
            "backward: the update is not finite; .grad is untouched. Look for overflow in half precision, for weights "
            "that are not finite, or for a gradient that is not finite though its loss is; the last spoils whole-batch "
            "backwards even where `present` leaves the sample out (0 times infinity), so guard it in the loss."
        )


def accumulate(gradients: dict[Tensor, Tensor]) -> None:
    """`.grad += gradient` for every parameter, and then what hooks are to do with it, as after `backward()`."""
    owned: set[int] = set()
    for parameter, g in gradients.items():
        if parameter.grad is None and g.is_sparse:
            parameter.grad = g.detach()
        elif parameter.grad is None:
            # Autograd may hand out one memory twice, or expanded: a gradient is its parameter's
            # alone.
            alone = g.stride() == parameter.stride() and g.untyped_storage().data_ptr() not in owned
            parameter.grad = g.detach() if alone else torch.empty_like(parameter).copy_(g).detach()
            owned.add(parameter.grad.untyped_storage().data_ptr())
        elif parameter.grad.is_sparse:
            parameter.grad = g.detach() + parameter.grad
        else:
            parameter.grad.add_(g.detach())
    for parameter in gradients:
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            hook(parameter)
