"""How the adjoint of an op carries the dimensions of its output gradient to its inputs, by shape alone.

A row of the losses sits at known positions of an output gradient. Where the adjoint treats some
dimension position by position (a batch dimension of a product, every dimension of an elementwise
op), the row sits at the same positions of the input's gradient. Where it sums over a dimension or
mixes along it, that dimension is not carried.

Each entry of `CARRY` is a function of a `Passage`. It returns `{dimension of the output: dimension
of the input}` for what is carried, or None where it does not know this input. An op that is not in
the table is silent, and asked by experiment (`reach.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from mtu_fast._graph.table import Table

Shape = tuple[int, ...]
Carried = dict[int, int] | None


class Passage(NamedTuple):
    """From the gradient of one output of a node to that of one of its inputs.

    Attributes:
        node: the autograd node, read through its `_saved_*` attributes only.
        output: which of its outputs.
        slot: which of its inputs, an index into `node.next_functions`.
        out: the output's shape.
        into: the input's shape.
    """

    node: Any
    output: int
    slot: int
    out: Shape
    into: Shape


Carry = Callable[[Passage], Carried]

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
    return lambda at: dims if at.slot == 0 else None


def _straight(dims: Iterable[int]) -> dict[int, int]:
    """These dimensions, each where it was."""
    return {d: d for d in dims}


def _of_one_size(at: Passage, dims: Iterable[int]) -> dict[int, int]:
    """Those of the dimensions that are as long in the input as in the output, each where it was."""
    return _straight(d for d in dims if at.out[d] == at.into[d])


def _without(count: int, dims: Collection[int]) -> list[int]:
    """All of so many dimensions but these."""
    return [d for d in range(count) if d not in dims]


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
def elementwise(at: Passage) -> Carried:
    """Every dimension, aligned from the right; one that the input broadcasts, or lacks, is summed over."""
    shift = len(at.out) - len(at.into)
    found: dict[int, int] = {}
    for d, size in enumerate(at.into):
        if d + shift >= 0 and at.out[d + shift] == size:
            found[d + shift] = d
    return found


@CARRY.entry("IndexPut ScatterReduce IndexFill IndexCopy MaskedScatter Put")
def first_elementwise(at: Passage) -> Carried:
    """What is written into keeps its place; where the written values come from is data."""
    return elementwise(at) if at.slot == 0 else None


# ---- along one dimension -------------------------------------------------------------------------


@CARRY.entry(
    "Cumsum Cumprod Cummax Cummin Logcumsumexp Softmax LogSoftmax SafeSoftmax Sort Topk Glu LinalgCross"
)
def along(at: Passage) -> Carried:
    """Every dimension but the one it works along."""
    dims = _dims(at.node, len(at.into))
    if not dims or len(at.out) != len(at.into):
        return None
    return _of_one_size(at, _without(len(at.into), dims))


@CARRY.entry("Gather IndexSelect Scatter ScatterAdd IndexAdd")
def along_by_index(at: Passage) -> Carried:
    """Every dimension but the indexed one; what a scatter writes into keeps its place in all of them."""
    if at.slot == 0 and stem(at.node.name()) in {"Scatter", "ScatterAdd", "IndexAdd"}:
        return elementwise(at)
    return along(at)


@CARRY.entry(
    """Amax Amin Aminmax Kthvalue LinalgVectorNorm Logsumexp Max Mean Median Min Mode Nanmedian Nansum Norm Prod Std
    StdMean Sum Var VarMean"""
)
def reduced(at: Passage) -> Carried:
    """Dimensions that are kept; the others hold what the output holds, everywhere."""
    count = len(at.into)
    # to a single number: whatever the node saved as its dimensions
    dims = _dims(at.node, count) if at.out else set(range(count))
    if dims is None:
        return None
    left = _without(count, dims)
    if len(at.out) == count:  # keepdim
        return _straight(left)
    return dict(enumerate(left)) if len(at.out) == len(left) else None


def _dims(node: Any, ndim: int) -> set[int] | None:
    """The dimensions a node works along; saved unsigned, and counted from the last where negative."""
    if not hasattr(node, "_saved_dim"):
        return None
    found = node._saved_dim
    if found is None or found == ():
        return set(range(ndim))  # torch reads "no dimension" as all of them
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
def product(at: Passage) -> Carried:
    """Batch dimensions, and the own side of a matrix; the other side is summed over."""
    op = stem(at.node.name())
    if at.slot == 0 and op in {"Addmm", "Baddbmm"}:
        return elementwise(at)
    return _PRODUCTS[op][at.slot]


@CARRY.entry("GroupedMm")
def grouped(at: Passage) -> Carried:
    """Positions of the input, in whatever group; a stack of weights sums over them."""
    if at.slot:
        stacked = len(at.into) == 3 and len(at.out) == 2
        return {} if stacked else None
    flat = len(at.into) == len(at.out) == 2
    return {0: 0} if flat and len(at.node._saved_mat2_sym_sizes) == 3 else None


@CARRY.entry("Linear")
def linear(at: Passage) -> Carried:
    """Positions of the input; the weight and the bias sum over them."""
    return {} if at.slot else _straight(range(len(at.into) - 1))


@CARRY.entry(
    """ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention ScaledDotProductEfficientAttention
    ScaledDotProductCudnnAttention ScaledDotProductFusedAttentionOverrideable"""
)
def attention(at: Passage) -> Carried:
    """Batch and heads, and for the query its positions; a bias broadcasts like any addend."""
    if at.slot > 2:
        # the bias is added to the scores [batch, heads, queries, keys]: its last dimension is keys
        scores = (*at.out[:3], at.into[-1])
        return elementwise(at._replace(out=scores))
    if len(at.into) != len(at.out):
        return None
    # every query adds to the gradients of all keys and values of its head
    return _of_one_size(at, range(3 if at.slot == 0 else 2))


@CARRY.entry("Convolution CudnnConvolution MkldnnConvolution ConvolutionOverrideable")
def convolution(at: Passage) -> Carried:
    """Images; output channels to their kernels and shifts."""
    if at.slot == 0:
        return {0: 0}
    if at.slot == 2:
        return {1: 0}
    # a transposed kernel has the input's channels first
    return None if getattr(at.node, "_saved_transposed", False) else {1: 0}


@CARRY.entry("MkldnnRnnLayer")
def recurrent(at: Passage) -> Carried:
    """Sequences, the second dimension from the last of `[S, N, I]` and of states; weights sum over them."""
    if at.slot in {1, 2, 3, 4}:
        return {}
    return {len(at.out) - 2: len(at.into) - 2}


# ---- statistics ----------------------------------------------------------------------------------


@CARRY.entry("NativeLayerNorm FusedRmsNorm")
def layer_norm(at: Passage) -> Carried:
    """Every dimension before the normalised ones; scale and shift sum over these."""
    if at.slot:
        return elementwise(at)
    return _straight(range(len(at.into) - len(at.node._saved_normalized_shape)))


@CARRY.entry("NativeGroupNorm")
def group_norm(at: Passage) -> Carried:
    """Images; channels to their scale and shift."""
    return {1: 0} if at.slot else {0: 0}


@CARRY.entry("NativeBatchNorm CudnnBatchNorm MiopenBatchNorm")
def batch_norm(at: Passage) -> Carried:
    """Channels; and in evaluation every position."""
    if at.slot:
        return {1: 0}
    if getattr(at.node, "_saved_training", True):
        return {1: 1}  # statistics of the batch: every image reaches every other
    return _straight(range(len(at.into)))


# ---- windows -------------------------------------------------------------------------------------


@CARRY.entry(
    """AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D MaxPool2DWithIndices
    MaxPool3DWithIndices FractionalMaxPool2D MaxUnpool2D UpsampleBicubic2D UpsampleBilinear2D
    UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleTrilinear3D
    UpsampleBicubic2DAa UpsampleBilinear2DAa UpsampleNearestExact1D UpsampleNearestExact2D
    UpsampleNearestExact3D ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D
    ReplicationPad2D ReplicationPad3D"""
)
def spatial(at: Passage) -> Carried:
    """Every dimension before the one, two or three of space."""
    space = int(re.findall(r"([123])D", at.node.name())[0])
    return _straight(range(len(at.into) - space))


@CARRY.entry("PixelShuffle PixelUnshuffle")
def pixels(at: Passage) -> Carried:
    """Every dimension before channel, row and column."""
    return _straight(range(len(at.into) - 3))


@CARRY.entry("Im2Col Col2Im GridSampler2D GridSampler3D")
def images(at: Passage) -> Carried:
    """Images; None for one without a batch dimension."""
    batched = max(len(at.out), len(at.into)) > 3
    return {0: 0} if batched and at.out[0] == at.into[0] else None


@CARRY.entry("LinalgInvEx LinalgCholeskyEx LinalgSolveTriangular Cholesky CholeskySolve")
def matrices(at: Passage) -> Carried:
    """Every dimension before those of the matrices."""
    if len(at.out) != len(at.into) or at.out[:-2] != at.into[:-2]:
        return None
    return _straight(range(len(at.into) - 2))


@CARRY.entry("FftC2C FftR2C FftC2R")
def fourier(at: Passage) -> Carried:
    """Every dimension that is not transformed."""
    dims = _dims(at.node, len(at.into))
    return None if dims is None else _straight(_without(len(at.into), dims))


@CARRY.entry("ViewAsComplex ViewAsReal")
def complex_views(at: Passage) -> Carried:
    """Every dimension but the one of the two parts."""
    # the dimension of the two parts comes last, on one side only
    return _straight(range(min(len(at.out), len(at.into))))


# ---- losses --------------------------------------------------------------------------------------


@CARRY.entry("NllLoss NllLoss2D MultiMarginLoss MultilabelMarginLoss")
def picked(at: Passage) -> Carried:
    """Samples and positions; classes come second."""
    # output [N, *], scores [N, C, *]
    return {d: d + 1 if d else 0 for d in range(len(at.out))}


@CARRY.entry("CtcLoss")
def ctc(at: Passage) -> Carried:
    """Samples, which come second in the scores `[S, N, C]`."""
    return {0: 1} if len(at.out) == 1 else None


# ---- views ---------------------------------------------------------------------------------------


@CARRY.entry("T")
def matrix_transpose(at: Passage) -> Carried:
    """Both dimensions, exchanged."""
    last = len(at.into) - 1
    return {d: last - d for d in range(len(at.into))}


@CARRY.entry("Transpose")
def transpose(at: Passage) -> Carried:
    """Every dimension, two of them exchanged."""
    order = list(range(len(at.into)))
    one, other = signed(at.node._saved_dim0), signed(at.node._saved_dim1)
    order[one], order[other] = order[other], order[one]
    return dict(enumerate(order))


@CARRY.entry("Permute")
def permute(at: Passage) -> Carried:
    """Every dimension, in another order."""
    return {d: signed(source) % len(at.into) for d, source in enumerate(at.node._saved_dims)}


def signed(dim: int) -> int:
    """A whole number that a node saved unsigned."""
    return dim - 2**64 if dim >= 2**63 else dim
