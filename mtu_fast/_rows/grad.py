"""Writing `.grad`, in one place: all of an update, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast._checks.flags import AT_ONCE, Flags
from mtu_fast._rows.uses import Gather, Use
from mtu_fast.errors import NotFiniteError

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # whole numbers of so many bytes


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
        if self.added:
            grads, added = zip(*self.added, strict=True)
            with torch.no_grad():  # a .grad may require one itself, as after create_graph
                torch._foreach_add_(grads, added)

    def run_hooks(self) -> None:
        """What users want done with `.grad`, as after `backward()`: last, since a hook may step the optimizer."""
        hooked = [p for p in self.parameters if p._post_accumulate_grad_hooks]
        for parameter in hooked:
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
        grad = parameter.grad
        if grad is None:
            placed.append((parameter, _own(parameter, g, owned)))
        elif grad.is_sparse:
            _check_alike(grad, g)
            # in place a sparse gradient takes no dense one
            placed.append((parameter, g.detach() + grad))
        else:
            added.append((grad, g.detach()))
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


def _check_alike(grad: Tensor, g: Tensor) -> None:
    """A sparse `.grad` and a gradient have a sum.

    Raises:
        RuntimeError: they have none.
    """
    if g.is_sparse and g.sparse_dim() != grad.sparse_dim():
        raise RuntimeError(
            f"backward: found a sparse .grad with {grad.sparse_dim()} sparse dimensions, expected {g.sparse_dim()}, as "
            "the gradient of a look-up has; no .grad was changed. Set it to None, or to .to_dense() of it."
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
    """The gradients, or zeros: by one call for all of a dtype."""
    values = [g._values() if g.is_sparse else g for g in gradients.values()]
    kept: dict[int, Tensor] = {}
    for dtype in {t.dtype for t in values}:
        at = [i for i, t in enumerate(values) if t.dtype == dtype]
        kept |= zip(at, _unless(bad, [values[i] for i in at]), strict=True)
    pairs = enumerate(gradients.items())
    return {p: _with_values(g, kept[i]) if g.is_sparse else kept[i] for i, (p, g) in pairs}


def _unless(bad: Tensor, values: Sequence[Tensor]) -> Sequence[Tensor]:
    """The values, of one dtype, or zeros: also where they are not finite, of which no product with 0 is 0."""
    dtype = values[0].dtype
    bits = BITS.get(dtype.itemsize)
    if bits is None:
        return [torch.where(bad, 0, t) for t in values]
    # as whole numbers: times 1 they are what they were, bit for bit, and times 0 they are 0
    kept = torch._foreach_mul([t.view(bits) for t in values], (~bad).to(bits))
    return [t.view(dtype) for t in kept]


def _with_values(g: Tensor, values: Tensor) -> Tensor:
    """A sparse gradient with other values; the indices stay, where they are zeros."""
    return torch.sparse_coo_tensor(
        g._indices(), values, g.shape, is_coalesced=g.is_coalesced(), check_invariants=False
    )


def _own(parameter: Tensor, g: Tensor, owned: set[int]) -> Tensor:
    """The gradient in memory that is its parameter's alone: autograd may hand out one twice, or expanded."""
    if g.requires_grad:
        g = g.detach()
    if g.is_sparse:
        return g
    where = g.untyped_storage().data_ptr()
    if where in owned or g.stride() != parameter.stride():
        g = torch.empty_like(parameter).copy_(g).detach()
        where = g.untyped_storage().data_ptr()
    owned.add(where)
    return g
