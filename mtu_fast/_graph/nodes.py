"""Autograd nodes, one at a time: the only file that touches what is semi-private in them.

`_input_metadata`, `_raw_saved_*` and calling a node are semi-private in torch; whatever depends on
them is here. Rules read the public `_saved_*` of the node they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtu_fast._graph.fetch import Mode, fetch, hooks_do

Grads = tuple[Tensor | None, ...]
Following = tuple[tuple[Any, int], ...]  # a node's `next_functions`

ACCUMULATE = "torch::autograd::AccumulateGrad"
UNPACKING = attrgetter("unpack_hook")  # of a saved tensor
# types of arguments that say how elements move
WHOLE, WHOLE_IN_TUPLES = {int, bool, str}, {int, bool}
# parts of the names of those that say along which dimensions, and how
NAMES_OF_DIMENSIONS = ("dim", "mode", "training")

# Views and casts: adjoints that keep inner products, so a Gram may be taken before them.
ISOMETRIES = frozenset(
    f"{name}Backward{i}"
    for name in (
        "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Alias", "ToCopy",
        "Clone", "Slice", "Select", "Split", "SplitWithSizes", "UnsafeSplit", "Unbind", "Flip", "Roll",
    )
    for i in (0, 1, 2, 3)
)  # fmt: skip


def is_isometry(node: Any, name: str, out: Sequence[int], into: Sequence[int]) -> bool:
    """Whether the adjoint of a node with one input keeps inner products; shapes of its output and its input."""
    if name in ISOMETRIES:
        return True
    if name != "AddBackward0" or tuple(out) != tuple(into):
        return False
    # alpha = 1 and no broadcasting: the adjoint hands the gradient on unchanged
    return type(node._saved_alpha) is int and node._saved_alpha == 1  # a constant added: `1 + w`


def below(roots: Sequence[Any]) -> dict[Any, Following]:
    """All nodes below the roots and what they feed gradients to, in topological order: each before those it feeds."""
    order: list[tuple[Any, Following]] = []
    seen = set()
    # depth first without recursion, which deep graphs would exhaust; reversed post-order at the end
    for root in reversed(roots):
        if root in seen:
            continue
        seen.add(root)
        edges = root.next_functions
        stack = [(root, edges, iter(edges))]
        while stack:
            node, following, rest = stack[-1]
            for child, _ in rest:
                if child is not None and child not in seen:
                    seen.add(child)
                    edges = child.next_functions
                    stack.append((child, edges, iter(edges)))
                    break
            else:
                order.append((node, following))
                stack.pop()
    return dict(reversed(order))


# shape, dtype and device of each output of the forward op
outputs: Callable[[Any], Sequence[Any]] = attrgetter("_input_metadata")


def arguments(node: Any) -> tuple[str, ...]:
    """Names of the arguments that a node saved, tensors aside."""
    kind: Any = type(node)
    return _attributes(kind)[1]


def integers(node: Any) -> tuple[object, ...]:
    """Integer arguments (dimensions, starts, sizes), None for others: a loss weight, a step size may change freely."""
    kind: Any = type(node)
    return tuple(_whole(getattr(node, name)) for name in _attributes(kind)[1])


def dimensions(node: Any) -> tuple[object, ...]:
    """Those of the integer arguments that say along which dimensions the op works, and in which mode."""
    kind: Any = type(node)
    return tuple(_whole(getattr(node, name)) for name in _attributes(kind)[2])


def _whole(value: object) -> object:
    """The value if it is made of whole numbers, else None."""
    if isinstance(value, tuple):
        return value if WHOLE_IN_TUPLES.issuperset(map(type, value)) else None
    # by the exact type: a tensor or a float may change from step to step
    return value if type(value) in WHOLE else None


def is_foreign(node: Any, stem: str) -> bool:
    """Whether a node's backward is somebody's own, and thus need not be linear; `stem` is the op's name or ""."""
    return not stem or _is_python(node)


def recomputes(node: Any) -> bool:
    """Whether reading a saved tensor runs a part of the forward again (checkpointing)."""
    return some_recompute([node])


def some_recompute(nodes: Iterable[Any]) -> bool:
    """Whether one of the nodes does."""
    held: list[Any] = []
    for node in nodes:
        kind: Any = type(node)
        raw = _raw(kind)
        if raw is not None:
            held += raw(node)
    if tuple in set(map(type, held)):
        held = [each for saved in held for each in _as_tuple(saved)]
    # asked of all at once: None for a tensor that is held as it is
    return list(map(UNPACKING, held)) != [None] * len(held)


@cache
def _raw(kind: Any) -> Callable[[Any], tuple[Any, ...]] | None:
    """What gives the saved tensors of a node of this type, as they are held; None where it has none of torch's own."""
    names = _attributes(kind)[0]
    if not names or issubclass(kind, torch.autograd.function.BackwardCFunction):
        return None
    # of one name, `attrgetter` gives no tuple
    return attrgetter(*names) if len(names) > 1 else lambda node: (getattr(node, names[0]),)


def recompute_once(nodes: Sequence[Any]) -> None:
    """Run every checkpointed part of the forward again, once each, as one backward does."""
    done: list[Any] = []
    for node in nodes:
        found = _unpacking(node)
        if found is not None and not any(found[1] is hook for hook in done):
            done.append(found[1])
            # reading one tensor recomputes the whole region that shares its hook
            getattr(node, found[0].replace("_raw", "", 1))


def storages(node: Any) -> set[int]:
    """Numbers of the storages of the tensors that a node saved as they are."""
    found: set[int] = set()
    for t in _saved(node):
        # sparse tensors have no storage of their own
        if isinstance(t, Tensor) and t.layout == torch.strided:
            found.add(t.untyped_storage()._cdata)
    return found


def _saved(node: Any) -> list[Any]:
    if _is_python(node):
        return list(node.saved_tensors)
    found: list[Any] = []
    kind: Any = type(node)
    for attribute in _attributes(kind)[0]:
        # what is recomputed on reading is no parameter as it lies in memory
        if all(saved.unpack_hook is None for saved in _as_tuple(getattr(node, attribute))):
            found += _as_tuple(getattr(node, attribute.replace("_raw", "", 1)))
    return found


def _unpacking(node: Any) -> tuple[str, Any] | None:
    """A saved tensor of the node that is not held as it is, by the attribute's name, and what brings it back."""
    if _is_python(node):
        return None
    kind: Any = type(node)
    for attribute in _attributes(kind)[0]:
        for saved in _as_tuple(getattr(node, attribute)):
            if saved.unpack_hook is not None:
                return attribute, saved.unpack_hook
    return None


def vjp(node: Any, grads: Sequence[Tensor | None]) -> Grads:
    """Gradients of the node's inputs, one per `next_functions`, from gradients of its outputs.

    Only outside a backward pass: within one, a node returns what that pass needs and no more.
    """
    fetch(node, storages)
    if not _is_python(node):
        return _as_tuple(node(*grads))
    # A Python node returns a gradient per argument of its forward, and wants no undefined
    # gradients.
    full = [_zeros(m) if g is None else g for g, m in zip(grads, outputs(node), strict=True)]
    returned = zip(_as_tuple(node.apply(*full)), node.needs_input_grad, strict=False)
    # `next_functions` has a place per tensor argument, `needs_input_grad` one per argument
    needed = iter([g for g, wanted in returned if wanted])
    return tuple(None if child is None else next(needed, None) for child, _ in node.next_functions)


def conformed(g: Tensor, node: Any, output: int) -> Tensor:
    """What the engine does before it hands a gradient to a node: undo broadcasting, sparsity and promotion."""
    meta = outputs(node)[output]
    # in this order: a sparse gradient cannot be summed to a size
    return densified(g).sum_to_size(meta.shape).to(meta.dtype)


def densified(g: Tensor) -> Tensor:
    """A gradient as a dense tensor; that of an embedding may be sparse."""
    return g.to_dense() if g.is_sparse else g


def release(losses: Sequence[Tensor], until: Sequence[GradientEdge]) -> None:
    """Free what the graph between losses and edges saved, as `backward()` does: a pass of undefined gradients."""
    with torch.enable_grad():
        # one root over all losses, so that one pass frees what they share
        end = _Nothing.apply(*losses)
    # of a hook that needs a gradient: the rest is freed with the losses
    with hooks_do(Mode.HOLLOW), suppress(TypeError, AttributeError):
        torch.autograd.grad(end, until, allow_unused=True)


class _Nothing(torch.autograd.Function):
    """A function of the losses whose backward hands on no gradient."""

    @staticmethod
    def forward(ctx: Any, *losses: Tensor) -> Tensor:
        ctx.count = len(losses)
        return losses[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        return (None,) * ctx.count


def _is_python(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _zeros(meta: Any) -> Tensor:
    return torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)


@cache
def _attributes(kind: Any) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of a node type's saved tensors (raw), of its other saved arguments, and of those that name dimensions."""
    names = dir(kind)
    raw = [name for name in names if name.startswith("_raw_saved_")]
    saved = [name for name in names if name.startswith("_saved_")]
    # a tensor has both forms of its name, and reading the plain one would unpack it
    plain = [name for name in saved if f"_raw{name}" not in raw]
    dims = [name for name in plain if any(word in name for word in NAMES_OF_DIMENSIONS)]
    return tuple(raw), tuple(plain), tuple(dims)
