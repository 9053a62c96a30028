"""Writing `.grad`, in one place: all of an update, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mtu_fast._checks.flags import AT_ONCE, Flags
from mtu_fast._rows.uses import Gather, Use
from mtu_fast.errors import NotFiniteError


def check_finite(tensors: Iterable[Tensor], flags: Flags = AT_ONCE) -> None:
    """Nothing of an update is infinite or undefined; a NotFiniteError where something is."""
    flags.check_finite(tensors, not_finite)


def not_finite() -> NotFiniteError:
    """The error of an update that is infinite or undefined."""
    return NotFiniteError(
        "backward: the update is not finite; .grad is untouched. Look for overflow in half precision, for weights "
        "that are not finite, or for a gradient that is not finite though its loss is; the last spoils whole-batch "
        "backwards even where `present` leaves the sample out (0 times infinity), so guard it in the loss."
    )


def as_autograd_gives(d: Tensor, uses: Iterable[Use]) -> Tensor:
    """Sparse where `backward` makes it so: every use is a look-up with sparse gradients; SparseAdam takes no other."""
    indices = []
    for use in uses:
        if not isinstance(use, Gather) or not use.sparse:
            return d
        indices.append(use.index.flatten())
    if not indices:
        return d
    # what is not looked up is zero of the sum
    entries = torch.cat(indices).unique()
    values = d[entries]
    return torch.sparse_coo_tensor(
        entries[None], values, d.shape, is_coalesced=True, check_invariants=False
    )


def add(a: dict[Tensor, Tensor], b: Mapping[Tensor, Tensor]) -> None:
    """`a[p] += b[p]` in memory of its own."""
    for parameter, g in b.items():
        a[parameter] = a[parameter] + g if parameter in a else g


def accumulate(gradients: Mapping[Tensor, Tensor], bad: Tensor | None = None) -> None:
    """`.grad += gradient` for every parameter, and then what hooks are to do with it, as after `backward()`.

    Args:
        gradients: {parameter: gradient}.
        bad: `[]` bool on the device, where zeros are added in their place; None where that is not
            asked.
    """
    if bad is not None:
        gradients = _all_unless(bad, gradients)
    owned: set[int] = set()
    for parameter, g in gradients.items():
        if parameter.grad is None:
            parameter.grad = _own(parameter, g.detach(), owned)
        elif parameter.grad.is_sparse:
            # in place a sparse gradient takes no dense one
            parameter.grad = g.detach() + parameter.grad
        else:
            parameter.grad.add_(g.detach())
    for parameter in gradients:
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            hook(parameter)


def _all_unless(bad: Tensor, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    zeros = {g.dtype: g.new_zeros(()) for g in gradients.values() if not g.is_sparse}
    return {p: _unless(bad, g, zeros) for p, g in gradients.items()}


def _unless(bad: Tensor, g: Tensor, zeros: Mapping[torch.dtype, Tensor]) -> Tensor:
    """The gradient, or zeros."""
    if not g.is_sparse:
        return torch.where(bad, zeros[g.dtype], g)
    values = torch.where(bad, 0, g._values())
    return torch.sparse_coo_tensor(
        g._indices(), values, g.shape, is_coalesced=g.is_coalesced(), check_invariants=False
    )


def _own(parameter: Tensor, g: Tensor, owned: set[int]) -> Tensor:
    """The gradient in memory that is its parameter's alone: autograd may hand out one twice, or expanded."""
    if g.is_sparse:
        return g
    where = g.untyped_storage().data_ptr()
    if where in owned or g.stride() != parameter.stride():
        g = torch.empty_like(parameter).copy_(g).detach()
        where = g.untyped_storage().data_ptr()
    owned.add(where)
    return g
