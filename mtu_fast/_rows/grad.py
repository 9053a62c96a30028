"""Writing `.grad`, in one place: all of an update, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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
        # one dense use makes autograd's sum dense
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


@dataclass(frozen=True)
class Addition:
    """`.grad += gradient` of several parameters, all of it allocated and looked at before the first is written.

    Attributes:
        parameters: whose hooks run afterwards.
        placed: (parameter, what its `.grad` becomes).
        added: (what `.grad` holds, what is added to it in place).
    """

    parameters: Sequence[Tensor]
    placed: Sequence[tuple[Tensor, Tensor]]
    added: Sequence[tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        for grad, g in self.added:
            _check_in_place(grad, g)

    def write(self) -> None:
        """Write `.grad`; nothing here can fail by what it is given."""
        for parameter, g in self.placed:
            parameter.grad = g
        with torch.no_grad():  # a .grad may require one itself, as after create_graph
            for grad, g in self.added:
                grad.add_(g)

    def run_hooks(self) -> None:
        """What users want done with `.grad`, as after `backward()`: last, since a hook may step the optimizer."""
        for parameter in self.parameters:
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                hook(parameter)


def addition(gradients: Mapping[Tensor, Tensor], bad: Tensor | None = None) -> Addition:
    """`.grad += gradient` for every parameter, not yet written.

    Args:
        gradients: {parameter: gradient}.
        bad: `[]` bool on the device, where zeros are added in their place; None where that is not
            asked.
    """
    if bad is not None:
        gradients = _all_unless(bad, gradients)
    owned: set[int] = set()
    placed, added = [], []
    for parameter, g in gradients.items():
        if parameter.grad is None:
            placed.append((parameter, _own(parameter, g.detach(), owned)))
        elif parameter.grad.is_sparse:
            # in place a sparse gradient takes no dense one
            placed.append((parameter, g.detach() + parameter.grad))
        else:
            added.append((parameter.grad, g.detach()))
    return Addition(tuple(gradients), placed, added)


def _check_in_place(grad: Tensor, g: Tensor) -> None:
    """`grad += g` is possible.

    Raises:
        RuntimeError: it is not.
    """
    found = _hindrance(grad, g)
    if found is not None:
        raise RuntimeError(
            f"backward: found a .grad {found}, expected one to which a gradient of shape {tuple(g.shape)} on "
            f"{g.device} can be added in place; no .grad was changed. Set it to None, or to a .clone() of it."
        )


def _hindrance(grad: Tensor, g: Tensor) -> str | None:
    if grad.layout != torch.strided:
        return f"of {grad.layout}"
    if (grad.shape, grad.device) != (g.shape, g.device):
        return f"of shape {tuple(grad.shape)} on {grad.device}"
    if any(n > 1 and step == 0 for n, step in zip(grad.shape, grad.stride(), strict=True)):
        return "whose elements share memory, as .expand() makes it"
    if grad.is_inference() and not torch.is_inference_mode_enabled():
        return "made in inference mode"
    return None


def _all_unless(bad: Tensor, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    # one scalar for each dtype, broadcast by `where`
    dtypes = {g.dtype for g in gradients.values()}
    zeros = {dtype: bad.new_zeros((), dtype=dtype) for dtype in dtypes}
    return {p: _unless(bad, g, zeros) for p, g in gradients.items()}


def _unless(bad: Tensor, g: Tensor, zeros: Mapping[torch.dtype, Tensor]) -> Tensor:
    """The gradient, or zeros."""
    if not g.is_sparse:
        return torch.where(bad, zeros[g.dtype], g)
    # the indices stay: a sparse zero of the same pattern
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
