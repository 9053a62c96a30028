"""Autograd nodes, one at a time: the only file that touches what is semi-private in them.

`_input_metadata`, `_raw_saved_*` and calling a node are semi-private in torch; whatever depends on them is here.
Rules read the public `_saved_*` of the node they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

Grads = tuple[Tensor | None, ...]
Following = tuple[tuple[Any, int], ...]  # a node's `next_functions`

ACCUMULATE = "torch::autograd::AccumulateGrad"
WHOLE, WHOLE_IN_TUPLES = {int, bool, str}, {int, bool}  # types of arguments that say how elements move

# Views and casts: adjoints that keep inner products, so a Gram may be taken before them.
ISOMETRIES = frozenset(
    f"{name}Backward{i}"
    for name in (
        "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Alias", "ToCopy",
        "Clone", "Slice", "Select", "Split", "SplitWithSizes", "UnsafeSplit", "Unbind", "Flip", "Roll",
    )
    for i in (0, 1, 2, 3)
)  # fmt: skip

# Nodes whose map from rows to elements follows from shapes and integer arguments alone. A graph with any other node
# (indexing, routing, custom functions) may move rows differently next time: its row maps are made anew every time.
_PLAIN = """
Abs Acos Add Addcdiv Addcmul Addmm Alias Amax Amin Angle Asin Atan Atan2 AvgPool2D AvgPool3D Baddbmm
BinaryCrossEntropy BinaryCrossEntropyWithLogits Bmm Cat Celu Ceil Clamp ClampMax ClampMin Clone ConstantPadNd
Convolution Cos Cosh CudnnBatchNorm CudnnConvolution Cumprod Cumsum Diagonal Div Dot Elu Embedding Erf Erfc Exp
Expand Expm1 Flip Floor Fmod FusedRmsNorm Gelu Glu HardSigmoid Hardsigmoid Hardswish Hardtanh Huber HuberLoss
L1Loss LeakyRelu Lerp LinalgVectorNorm Log Log10 Log1P Log2 LogSigmoid LogSoftmax Logaddexp Logsumexp MSELoss
MaskedFill MaxPool2DWithIndices MaxPool3DWithIndices Maximum Mean Minimum Mish Mm MseLoss Mul Mv NativeBatchNorm
NativeDropout NativeGroupNorm NativeLayerNorm Neg NllLoss NllLoss2D NllLossNd Norm Permute PixelShuffle
PixelUnshuffle Pow PreluKernel Prelu Prod Reciprocal ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu Repeat
ReplicationPad1D ReplicationPad2D ReplicationPad3D ReshapeAlias Roll Rsqrt Rsub SafeSoftmax Im2Col Col2Im
ScaledDotProductEfficientAttention ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu Select
SelectBackward Sgn Sigmoid Silu Sin Sinh Slice SmoothL1Loss Softmax Softplus Split SplitWithSizes Sqrt Squeeze
Stack Std Sub Sum T Tan Tanh Threshold ToCopy Transpose Tril Triu Unbind Unfold UnsafeSplit UnsafeView Unsqueeze
UpsampleBicubic2D UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D
UpsampleTrilinear3D Var View WeightNormInterface Where AdaptiveAvgPool2D AdaptiveAvgPool3D
"""
# Nodes that move elements along one dimension as the data say: plain to the rows of another dimension.
ALONG = frozenset(
    ("Gather", "IndexSelect", "IndexAdd", "Scatter", "ScatterAdd", "Max", "Min", "Sort", "Topk", "Kthvalue", "Median")
)
PLAIN = frozenset(_PLAIN.split()) | ALONG
# Nodes that look at several positions of every dimension but the first.
SPATIAL = ("Convolution", "CudnnConvolution", "MaxPool", "AvgPool", "AdaptiveAvgPool", "Upsample", "Im2Col", "Col2Im")
# Nodes with a dimension that only cut, join or reorder.
VIEWS = frozenset(
    ("Cat", "Stack", "Select", "Slice", "Split", "SplitWithSizes", "UnsafeSplit", "Unbind", "Unsqueeze", "Squeeze",
     "Sum", "Mean")
)  # fmt: skip


def stem(name: str) -> str:
    """The op of a node's name: `AddmmBackward0` -> `Addmm`."""
    return name.partition("Backward")[0]


def below(roots: Sequence[Any]) -> dict[Any, Following]:
    """All nodes below the roots and what they feed gradients to, in topological order: each before those it feeds."""
    order: list[tuple[Any, Following]] = []
    seen = set()
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


def outputs(node: Any) -> Sequence[Any]:
    """Shape, dtype and device of each output of the forward op."""
    metadata: Sequence[Any] = node._input_metadata
    return metadata


def integers(node: Any) -> tuple[object, ...]:
    """Integer arguments (dimensions, starts, sizes), None for others: a loss weight, a step size may change freely."""
    found: list[object] = []
    kind: Any = type(node)
    for attribute in _attributes(kind)[1]:
        value = getattr(node, attribute)
        whole = type(value) in WHOLE or (type(value) is tuple and WHOLE_IN_TUPLES.issuperset(map(type, value)))
        found.append(value if whole else None)
    return tuple(found)


def dimension(node: Any) -> int | None:
    """The dimension that the node works along, if it has one; negative counts from the last."""
    dim = getattr(node, "_saved_dim", None)
    if not isinstance(dim, int):
        return None
    return dim - 2**64 if dim >= 2**63 else dim  # saved unsigned


def recomputes(node: Any) -> bool:
    """Whether reading a saved tensor runs a part of the forward again (checkpointing)."""
    if _is_python(node):
        return False
    kind: Any = type(node)
    for attribute in _attributes(kind)[0]:
        if any(saved.unpack_hook is not None for saved in _as_tuple(getattr(node, attribute))):
            return True
    return False


def vjp(node: Any, grads: Sequence[Tensor | None]) -> Grads:
    """Gradients of the node's inputs, one per `next_functions`, from gradients of its outputs.

    Only outside a backward pass: within one, a node returns what that pass needs and no more.
    """
    if not _is_python(node):
        return _as_tuple(node(*grads))
    # A Python node returns a gradient per argument of its forward, and wants no undefined gradients.
    full = [_zeros(m) if g is None else g for g, m in zip(grads, outputs(node), strict=True)]
    returned = zip(_as_tuple(node.apply(*full)), node.needs_input_grad, strict=False)
    needed = iter([g for g, wanted in returned if wanted])
    return tuple(None if child is None else next(needed, None) for child, _ in node.next_functions)


def conformed(g: Tensor, node: Any, output: int) -> Tensor:
    """What the engine does before it hands a gradient to a node: undo broadcasting, sparsity and promotion."""
    meta = outputs(node)[output]
    return densified(g).sum_to_size(meta.shape).to(meta.dtype)


def densified(g: Tensor) -> Tensor:
    """A gradient as a dense tensor; that of an embedding may be sparse."""
    return g.to_dense() if g.is_sparse else g


def release(losses: Sequence[Tensor], until: Sequence[GradientEdge]) -> None:
    """Free what the graph between losses and edges saved, as `backward()` does: a pass of undefined gradients."""
    with torch.enable_grad():
        end = _Nothing.apply(*losses)
    with suppress(TypeError, AttributeError):  # of a hook that needs a gradient: the rest is freed with the losses
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
def _attributes(kind: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a node type's saved tensors (raw), and of its other saved arguments."""
    names = dir(kind)
    raw = tuple(n for n in names if n.startswith("_raw_saved_"))
    plain = tuple(n for n in names if n.startswith("_saved_") and f"_raw{n}" not in raw)
    return raw, plain
