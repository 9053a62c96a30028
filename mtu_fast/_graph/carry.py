"""How the adjoint of an op carries the dimensions of its output gradient to its inputs, by shape alone.

A row of the losses sits at known positions of an output gradient. Where the adjoint treats some
dimension position by position (a batch dimension of a product, every dimension of an elementwise
op), the row sits at the same positions of the input's gradient. Where it sums over a dimension or
mixes along it, that dimension is not carried.

Each entry of `CARRY` is a function of `(node, output, slot, out, in)`, the last two being shapes;
it returns `{dimension of the output: dimension of the input}` for what is carried, or None where it
does not know this slot. An op that is not in the table is silent, and asked by experiment
(`reach.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from mtu_fast._graph.table import Table

Shape = tuple[int, ...]
Carried = dict[int, int] | None
Carry = Callable[[Any, int, int, Shape, Shape], Carried]

CARRY: Table[Carry] = Table()


def stem(name: str) -> str:
    """The op of a C++ node's name, AddmmBackward0 -> Addmm; "" for a Python function, which may be called anything."""
    found = re.fullmatch(r"(?:torch::autograd::)?(\w+?)Backwards?\d+|torch::autograd::(\w+)", name)
    return "" if found is None else found[1] or found[2]


def carry_of(node: Any, op: str) -> Carry | None:
    """The entry of a node's op; None where there is none.

    A Python function of this package says it by `ctx.rows_go_along`, for its first input.
    """
    if op:
        return CARRY.get(op)
    dims = getattr(node, "rows_go_along", None)
    if dims is None:
        return None
    return lambda node, output, slot, out, into: dims if slot == 0 else None


# ---- position by position ------------------------------------------------------------------------


@CARRY.entry(
    """Abs Acos Acosh Add Addcdiv Addcmul Alias Angle Asin Asinh Atan Atan2 Atanh BinaryCrossEntropy
    BinaryCrossEntropyWithLogits Ceil Celu Clamp ClampMax ClampMin Clone Conj ConjPhysical
    CopyBackwards Cos Cosh Deg2Rad Digamma Div Elu Erf Erfc Erfinv Exp Exp2 Expand Expm1 Floor Fmod
    Frac Gelu Hardsigmoid Hardswish Hardtanh HuberLoss Hypot LeakyRelu Lerp LiftFresh Lgamma Log
    Log10 Log1P Log2 LogSigmoid Logaddexp Logaddexp2 Logit MaskedFill Maximum Minimum Mish MseLoss
    Mul NanToNum NativeDropout Neg Polar Pow PreluKernel Rad2Deg Reciprocal Relu Remainder Round
    Rsqrt Rsub Sgn Sigmoid Sign Silu Sin Sinc Sinh SmoothL1Loss SoftMarginLoss Softplus Softshrink
    Hardshrink Sqrt Sub Tan Tanh Threshold ToCopy Tril Triu Trunc Where Xlogy Zero Fill"""
)
def elementwise(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Every dimension, aligned from the right; one that the input broadcasts, or lacks, is summed over."""
    shift = len(out) - len(into)
    return {d + shift: d for d in range(len(into)) if d + shift >= 0 and out[d + shift] == into[d]}


@CARRY.entry("IndexPut ScatterReduce IndexFill IndexCopy MaskedScatter Put")
def first_elementwise(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """What is written into keeps its place; where the written values come from is data."""
    return elementwise(node, output, slot, out, into) if slot == 0 else None


# ---- along one dimension -------------------------------------------------------------------------


@CARRY.entry(
    "Cumsum Cumprod Cummax Cummin Logcumsumexp Softmax LogSoftmax SafeSoftmax Sort Topk Glu LinalgCross"
)
def along(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Every dimension but the one it works along."""
    dims = _dims(node, len(into))
    if not dims or len(out) != len(into):
        return None
    return {d: d for d in range(len(into)) if d not in dims and out[d] == into[d]}


@CARRY.entry("Gather IndexSelect Scatter ScatterAdd IndexAdd")
def along_by_index(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Every dimension but the indexed one; what a scatter writes into keeps its place in all of them."""
    if slot == 0 and stem(node.name()) in {"Scatter", "ScatterAdd", "IndexAdd"}:
        return elementwise(node, output, slot, out, into)
    return along(node, output, slot, out, into)


@CARRY.entry(
    """Amax Amin Aminmax Kthvalue LinalgVectorNorm Logsumexp Max Mean Median Min Mode Nanmedian Nansum Norm Prod Std
    StdMean Sum Var VarMean"""
)
def reduced(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Dimensions that are kept; the others hold what the output holds, everywhere."""
    dims = set(range(len(into))) if not out else _dims(node, len(into))
    if dims is None:
        return None
    left = [d for d in range(len(into)) if d not in dims]
    if len(out) == len(into):
        return {d: d for d in left}
    return dict(enumerate(left)) if len(out) == len(left) else None


def _dims(node: Any, ndim: int) -> set[int] | None:
    """The dimensions a node works along; saved unsigned, and counted from the last where negative."""
    found = getattr(node, "_saved_dim", None)
    if found is None or found == ():
        return set(range(ndim)) if hasattr(node, "_saved_dim") else None
    dims = found if isinstance(found, tuple) else (found,)
    return {signed(d) % max(ndim, 1) for d in dims}


# ---- products ------------------------------------------------------------------------------------

_PRODUCTS: dict[str, tuple[dict[int, int], ...]] = {
    "Mm": ({0: 0}, {1: 1}),
    "Addmm": ({}, {0: 0}, {1: 1}),
    "Mv": ({0: 0}, {}),
    "Dot": ({}, {}),
    "Bmm": ({0: 0, 1: 1}, {0: 0, 2: 2}),
    "Baddbmm": ({}, {0: 0, 1: 1}, {0: 0, 2: 2}),
}


@CARRY.entry(" ".join(_PRODUCTS))
def product(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Batch dimensions, and the own side of a matrix; the other side is summed over."""
    op = stem(node.name())
    if slot == 0 and op in {"Addmm", "Baddbmm"}:
        return elementwise(node, output, slot, out, into)
    return _PRODUCTS[op][slot]


@CARRY.entry("GroupedMm")
def grouped(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Positions of the input, in whatever group; a stack of weights sums over them."""
    if slot:
        return {} if len(into) == 3 and len(out) == 2 else None
    return {0: 0} if len(into) == len(out) == 2 and len(node._saved_mat2_sym_sizes) == 3 else None


@CARRY.entry("Linear")
def linear(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Positions of the input; the weight and the bias sum over them."""
    return {d: d for d in range(len(into) - 1)} if slot == 0 else {}


@CARRY.entry(
    """ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention ScaledDotProductEfficientAttention
    ScaledDotProductCudnnAttention ScaledDotProductFusedAttentionOverrideable"""
)
def attention(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Batch and heads, and for the query its positions; a bias broadcasts like any addend."""
    if slot > 2:
        return elementwise(node, output, slot, (*out[:3], into[-1]), into)
    carried = range(3 if slot == 0 else 2)
    return {d: d for d in carried if len(into) == len(out) and out[d] == into[d]}


@CARRY.entry("Convolution CudnnConvolution MkldnnConvolution ConvolutionOverrideable")
def convolution(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Images; output channels to their kernels and shifts."""
    if slot == 0:
        return {0: 0}
    if slot == 2:
        return {1: 0}
    return None if getattr(node, "_saved_transposed", False) else {1: 0}


@CARRY.entry("MkldnnRnnLayer")
def recurrent(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Sequences, the second dimension from the last of `[S, N, I]` and of states; weights sum over them."""
    return {} if slot in {1, 2, 3, 4} else {len(out) - 2: len(into) - 2}


# ---- statistics ----------------------------------------------------------------------------------


@CARRY.entry("NativeLayerNorm FusedRmsNorm")
def layer_norm(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Every dimension before the normalised ones; scale and shift sum over these."""
    if slot:
        return elementwise(node, output, slot, out, into)
    return {d: d for d in range(len(into) - len(node._saved_normalized_shape))}


@CARRY.entry("NativeGroupNorm")
def group_norm(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Images; channels to their scale and shift."""
    return {1: 0} if slot else {0: 0}


@CARRY.entry("NativeBatchNorm CudnnBatchNorm MiopenBatchNorm")
def batch_norm(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Channels; and in evaluation every position."""
    if slot:
        return {1: 0}
    return {1: 1} if getattr(node, "_saved_training", True) else {d: d for d in range(len(into))}


# ---- windows -------------------------------------------------------------------------------------


@CARRY.entry(
    """AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D MaxPool2DWithIndices
    MaxPool3DWithIndices FractionalMaxPool2D MaxUnpool2D UpsampleBicubic2D UpsampleBilinear2D
    UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleTrilinear3D
    UpsampleBicubic2DAa UpsampleBilinear2DAa UpsampleNearestExact1D UpsampleNearestExact2D
    UpsampleNearestExact3D ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D
    ReplicationPad2D ReplicationPad3D"""
)
def spatial(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Every dimension before the one, two or three of space."""
    space = int(re.findall(r"([123])D", node.name())[0])
    return {d: d for d in range(len(into) - space)}


@CARRY.entry("PixelShuffle PixelUnshuffle")
def pixels(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Every dimension before channel, row and column."""
    return {d: d for d in range(len(into) - 3)}


@CARRY.entry("Im2Col Col2Im GridSampler2D GridSampler3D")
def images(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Images; None for one without a batch dimension."""
    return {0: 0} if max(len(out), len(into)) > 3 and out[0] == into[0] else None


@CARRY.entry("LinalgInvEx LinalgCholeskyEx LinalgSolveTriangular Cholesky CholeskySolve")
def matrices(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Every dimension before those of the matrices."""
    return (
        {d: d for d in range(len(into) - 2)}
        if len(out) == len(into) and out[:-2] == into[:-2]
        else None
    )


@CARRY.entry("FftC2C FftR2C FftC2R")
def fourier(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Every dimension that is not transformed."""
    dims = _dims(node, len(into))
    return None if dims is None else {d: d for d in range(len(into)) if d not in dims}


@CARRY.entry("ViewAsComplex ViewAsReal")
def complex_views(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Every dimension but the one of the two parts."""
    return {d: d for d in range(min(len(out), len(into)))}


# ---- losses --------------------------------------------------------------------------------------


@CARRY.entry("NllLoss NllLoss2D MultiMarginLoss MultilabelMarginLoss")
def picked(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Samples and positions; classes come second."""
    return {d: d + (d > 0) for d in range(len(out))}


@CARRY.entry("CtcLoss")
def ctc(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Samples, which come second in the scores `[S, N, C]`."""
    return {0: 1} if len(out) == 1 else None


# ---- views ---------------------------------------------------------------------------------------


@CARRY.entry("T")
def matrix_transpose(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Both dimensions, exchanged."""
    return {d: len(into) - 1 - d for d in range(len(into))}


@CARRY.entry("Transpose")
def transpose(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Every dimension, two of them exchanged."""
    order = list(range(len(into)))
    one, other = (signed(d) for d in (node._saved_dim0, node._saved_dim1))
    order[one], order[other] = order[other], order[one]
    return dict(enumerate(order))


@CARRY.entry("Permute")
def permute(node: Any, output: int, slot: int, out: Shape, into: Shape) -> Carried:
    """Every dimension, in another order."""
    return {d: signed(source) % len(into) for d, source in enumerate(node._saved_dims)}


def signed(dim: int) -> int:
    """A whole number that a node saved unsigned."""
    return dim - 2**64 if dim >= 2**63 else dim
