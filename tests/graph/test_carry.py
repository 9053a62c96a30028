"""What structure says of every op (`carry.py`, `moves.py`): rows along each dimension in turn, and one vjp per row.

The truth of a node is its own adjoint, run on one row at a time. Where structure hands a map to an
input, each element that a row reaches must be that row's; it may be silent, but not of everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtu_fast._graph import nodes as node_ops
from mtu_fast._graph.carry import CARRY, stem
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.moves import MOVES, SETTLED
from mtu_fast._graph.rowmap import MEET, NO_ROW, Ids, RowMap
from mtu_fast._graph.walk import Walk

Case = Callable[..., Any]  # without arguments; it returns a tensor or several

CASES: dict[str, list[Case]] = {}

_shape: tuple[int, ...]  # of every loop below

pytestmark = pytest.mark.usefixtures("one_thread")


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Ops of other devices and builds; those below them in their family are tested on the CPU by the
# same entry.
ELSEWHERE = words(
    """
    ConvolutionOverrideable CudnnBatchNorm CudnnConvolution FusedRmsNorm Linear MiopenBatchNorm
    MkldnnConvolution ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention
    ScaledDotProductFlashAttention ScaledDotProductFusedAttentionOverrideable
    """
)


def case(op: str, *makers: Case) -> None:
    """Ways to record an op."""
    CASES.setdefault(op, []).extend(makers)


def x(*shape: int) -> Tensor:
    """Any numbers, of either sign."""
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def u(*shape: int) -> Tensor:
    """Numbers between 0.1 and 0.9."""
    return (torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()


@pytest.fixture(autouse=True)
def any_kernel() -> Iterator[None]:
    """Some ops have no deterministic kernel, which is of no importance here."""
    wanted = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(wanted)


# ---- position by position ------------------------------------------------------------------------

SHAPES = ((3,), (3, 4), (2, 3, 4), (1, 3, 1), ())
PAIRS = (
    ((3, 4), (3, 4)), ((3, 4), (4,)), ((4,), (3, 4)), ((3, 1), (3, 4)), ((2, 1, 4), (3, 1)), ((1, 4), (3, 1)),
    ((), (3, 4)), ((2, 3, 4), ()), ((1,), (3, 1)),
    ((3, 3), (3,)), ((3,), (3, 3, 3)), ((3, 1, 3), (3, 3)),
)  # fmt: skip


def each(op: str, function: Callable[[Tensor], Any], make: Callable[..., Tensor] = u) -> None:
    """An op of one tensor."""
    case(op, *(lambda s=s: function(make(*s)) for s in SHAPES))
    case(op, lambda: function(make(2, 3, 4, 5).to(memory_format=torch.channels_last)))
    case(op, lambda: function(make(3, 4).t()))


def both(
    op: str, function: Callable[[Tensor, Tensor], Any], make: Callable[..., Tensor] = u
) -> None:
    """An op of two tensors that broadcast."""
    case(op, *(lambda s=s, t=t: function(make(*s), make(*t)) for s, t in PAIRS))


UNARY = sorted(
    words(
        """
    Abs Acos Angle Asin Asinh Atan Atanh Ceil Celu Clone Cos Cosh Deg2Rad Digamma Elu Erf Erfc
    Erfinv Exp Exp2 Expm1 Floor Frac Gelu Hardshrink Hardsigmoid Hardswish Hardtanh LeakyRelu Lgamma
    Log Log10 Log1P Log2 LogSigmoid Logit Mish NanToNum Neg Rad2Deg Reciprocal Relu Round Rsqrt Sgn
    Sigmoid Sign Silu Sin Sinc Sinh Softplus Softshrink Sqrt Tan Tanh Tril Triu Trunc
    """
    )
)
SPELT = {"LogSigmoid": "logsigmoid", "NanToNum": "nan_to_num", "LeakyRelu": "leaky_relu"}


def unary(op: str) -> None:
    name = SPELT.get(op, op.lower())
    function = getattr(torch, name, None) or getattr(F, name)
    if op in {"Tril", "Triu"}:
        case(
            op,
            *(lambda s=s, k=k: function(x(*s), k) for s in ((3, 4), (2, 4, 3)) for k in (-1, 0, 2)),
        )
    else:
        each(op, function)


for _op in UNARY:
    unary(_op)
each("Acosh", lambda a: torch.acosh(a + 2))
each("Alias", torch.ops.aten.alias)
each("Clamp", lambda a: a.clamp(0.3, 0.6))
each("ClampMin", lambda a: a.clamp_min(0.5))
each("ClampMax", lambda a: a.clamp_max(0.5))
each("Conj", lambda a: torch.complex(a, a).conj().resolve_conj())
each("ConjPhysical", lambda a: torch.conj_physical(torch.complex(a, a)))
each("Fill", lambda a: (a * 1).fill_(2.0))
each("Zero", lambda a: (a * 1).zero_())
case("Fill", lambda: (x(3, 4) * 1).fill_(x()))
each("LiftFresh", torch.ops.aten.lift_fresh)
each("MaskedFill", lambda a: a.masked_fill(a > 0.5, 0.0))
case(
    "MaskedFill",
    *(lambda s=s: x(3, 4).masked_fill(torch.rand(s) > 0.5, x()) for s in ((3, 4), (4,), (3, 1))),
)
case("MaskedFill", lambda: x(4).masked_fill(torch.rand(3, 4) > 0.5, x()))
each("NativeDropout", lambda a: torch.ops.aten.native_dropout(a, 0.5, True)[0])
each("Pow", lambda a: a**3)
both("Pow", torch.pow)
each("Threshold", lambda a: F.threshold(a, 0.5, 0.0))
each("ToCopy", lambda a: a.to(torch.float32))
each("CopyBackwards", lambda a: torch.empty_like(a, dtype=torch.float32).copy_(a))
case("CopyBackwards", lambda: torch.zeros(2, 3, 4, dtype=torch.float64).copy_(x(3, 1)))
case("CopyBackwards", lambda: (x(3, 4) * 1).copy_(x(4)))
for _op, _both in {
    "Add": torch.add, "Sub": torch.sub, "Rsub": torch.rsub, "Mul": torch.mul, "Div": torch.div, "Atan2": torch.atan2,
    "Fmod": torch.fmod, "Remainder": torch.remainder, "Hypot": torch.hypot, "Logaddexp": torch.logaddexp,
    "Logaddexp2": torch.logaddexp2, "Maximum": torch.maximum, "Minimum": torch.minimum, "Polar": torch.polar,
    "Xlogy": torch.xlogy, "Lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "Where": lambda a, b: torch.where(torch.rand(torch.broadcast_shapes(a.shape, b.shape)) > 0.5, a, b),
}.items():  # fmt: skip
    both(_op, _both)
both("Add", lambda a, b: torch.add(a, b, alpha=2))
each("Div", lambda a: a / 3)
each("Fmod", lambda a: a.fmod(0.3))
each("Remainder", lambda a: a.remainder(0.3))
each("Add", lambda a: a + 1)
case(
    "Lerp",
    lambda: torch.lerp(x(3, 4), x(4), x(3, 1)),
    lambda: torch.lerp(x(1), x(3, 4), x(2, 1, 1)),
)
case("Clamp", lambda: torch.clamp(x(3, 4), x(4), x(3, 1)))
case(
    "Addcmul",
    lambda: torch.addcmul(x(4), x(3, 1), x(2, 3, 4), value=2.0),
    lambda: torch.addcmul(x(3), x(3), x(3)),
)
case(
    "Addcdiv",
    lambda: torch.addcdiv(x(4), x(3, 1), u(2, 3, 4), value=2.0),
    lambda: torch.addcdiv(x(3), x(3), u(3)),
)
case(
    "Expand",
    *(
        lambda s=s: x(*s).expand(2, 3, 4)
        for s in ((4,), (3, 1), (1, 3, 4), (1,), (2, 1, 1), (2, 3, 4), ())
    ),
)
case(
    "PreluKernel",
    lambda: F.prelu(x(2, 3, 4), u(3)),
    lambda: F.prelu(x(3), u(1)),
    lambda: F.prelu(x(2, 3), u(3)),
)
case("PreluKernel", lambda: F.prelu(x(2, 3, 4, 5), u(1)), lambda: F.prelu(x(1, 3, 1), u(3)))

REDUCTIONS = ("none", "mean", "sum")
for _op, _loss in {
    "MseLoss": F.mse_loss, "HuberLoss": F.huber_loss, "SmoothL1Loss": F.smooth_l1_loss,
    "SoftMarginLoss": F.soft_margin_loss, "BinaryCrossEntropy": F.binary_cross_entropy,
    "BinaryCrossEntropyWithLogits": F.binary_cross_entropy_with_logits,
}.items():  # fmt: skip
    for _reduction in REDUCTIONS:
        case(
            _op,
            *(
                lambda loss=_loss, r=_reduction, s=s: loss(
                    u(*s), torch.rand(s, dtype=torch.float64), reduction=r
                )
                for s in SHAPES
            ),
        )
case("HuberLoss", lambda: F.huber_loss(x(2, 3), x(2, 3), reduction="none"))
case("SmoothL1Loss", lambda: F.smooth_l1_loss(x(2, 3), x(2, 3), reduction="none", beta=0.3))
case(
    "BinaryCrossEntropyWithLogits",
    lambda: F.binary_cross_entropy_with_logits(
        x(2, 3, 4),
        torch.rand(2, 3, 4).double(),
        torch.rand(4).double(),
        reduction="none",
        pos_weight=torch.rand(3, 1),
    ),
)


# ---- indexed -------------------------------------------------------------------------------------


def index(size: int, *shape: int) -> Tensor:
    return torch.randint(0, size, shape)


def _without(dim: int, size: int) -> tuple[int, ...]:
    """[4, 4, 4] with another size of one dimension."""
    return tuple(size if k == dim % 3 else 4 for k in range(3))


for _dim in (0, 1, -1):
    case("Gather", lambda d=_dim: x(3, 4, 5).gather(d, index(3, 3, 4, 5)))
    case("Gather", lambda d=_dim: x(3, 4, 5).gather(d, index(3, 2, 3, 4)))
    case("Gather", lambda d=_dim: x(3, 1, 5).gather(d, index(1, 3, 1, 5)))
    case("IndexSelect", lambda d=_dim: x(3, 4, 5).index_select(d, index(3, 4)))
    case("IndexSelect", lambda d=_dim: x(3, 3, 3).index_select(d, index(3, 3)))
    case(
        "Scatter",
        lambda d=_dim: x(4, 4, 4).scatter(
            d, torch.randperm(4)[:, None, None].expand(4, 4, 4), x(4, 4, 4)
        ),
    )
    case("Scatter", lambda d=_dim: x(4, 4, 4).scatter(d, index(2, 2, 2, 2), x(2, 2, 2)))
    case("Scatter", lambda d=_dim: x(4, 4, 4).scatter(d, index(2, 2, 2, 2), 1.0))
    case("ScatterAdd", lambda d=_dim: x(4, 4, 4).scatter_add(d, index(4, 4, 4, 4), x(4, 4, 4)))
    case("ScatterAdd", lambda d=_dim: x(4, 4, 4).scatter_add(d, index(2, 2, 3, 4), x(2, 3, 4)))
    case("IndexAdd", lambda d=_dim: x(4, 4, 4).index_add(d, index(4, 4), x(4, 4, 4), alpha=2))
    case("IndexCopy", lambda d=_dim: x(4, 4, 4).index_copy(d, torch.randperm(4), x(4, 4, 4)))
    case(
        "IndexCopy",
        lambda d=_dim: x(4, 4, 4).index_copy(d, torch.randperm(4)[:2], x(*_without(d, 2))),
    )
    case("IndexFill", lambda d=_dim: x(4, 4, 4).index_fill(d, index(4, 2), x()))
    case("IndexFill", lambda d=_dim: x(4, 4, 4).index_fill(d, index(4, 2), 1.0))
    for _reduce in ("sum", "prod", "mean", "amax"):
        case(
            "ScatterReduce",
            lambda d=_dim, r=_reduce: u(4, 4, 4).scatter_reduce(
                d, index(4, 4, 4, 4), u(4, 4, 4), reduce=r
            ),
        )
case("Gather", lambda: x(4).gather(0, index(4, 3)))
case("IndexPut", lambda: x(4, 5).index_put((index(4, 3),), x(3, 5)))
case("IndexPut", lambda: x(5, 4).index_put((torch.tensor([3, 0, 4, 2, 1]),), x(5, 4)))
case("IndexPut", lambda: x(4, 5).index_put((index(4, 3), index(5, 3)), x(3), accumulate=True))
case("IndexPut", lambda: x(4, 5).index_put((torch.tensor([True, False, True, True]),), x(1, 5)))
case("MaskedScatter", lambda: x(3, 4).masked_scatter(torch.rand(3, 4) > 0.5, x(3, 4)))
case(
    "Put",
    lambda: x(3, 4).put(torch.randperm(12)[:5], x(5)),
    lambda: x(3, 4).put(index(12, 5), x(5), True),
)


# ---- along one dimension, reduced ----------------------------------------------------------------

for _dim in (0, 1, 2, -1, -2):
    for _shape in ((3, 4, 4), (2, 2, 2), (1, 3, 2)):
        for _op, _along in {
            "Cumsum": torch.cumsum, "Cumprod": torch.cumprod, "Logcumsumexp": torch.logcumsumexp,
            "Softmax": torch.softmax, "LogSoftmax": torch.log_softmax,
            "SafeSoftmax": torch.ops.aten._safe_softmax,
        }.items():  # fmt: skip
            case(_op, lambda f=_along, d=_dim, s=_shape: f(u(*s), d))
        for _op, _along in {
            "Cummax": torch.cummax,
            "Cummin": torch.cummin,
            "Sort": torch.sort,
        }.items():
            case(_op, lambda f=_along, d=_dim, s=_shape: f(u(*s), d)[0])
        case(
            "Topk",
            lambda d=_dim, s=_shape: u(*s).topk(1, d)[0],
            lambda d=_dim, s=_shape: u(*s).topk(s[d], d)[0],
        )
    case("Glu", lambda d=_dim: F.glu(x(4, 2, 6), d), lambda d=_dim: F.glu(x(2, 2, 2), d))
    case("LinalgCross", lambda d=_dim: torch.linalg.cross(x(3, 3, 3), x(3, 3, 3), dim=d))
case(
    "LinalgCross",
    lambda: torch.linalg.cross(x(1, 3), x(4, 3)),
    lambda: torch.linalg.cross(x(4, 1, 3), x(1, 2, 3)),
)
case("Softmax", lambda: torch.softmax(x(3), 0), lambda: torch.softmax(x(), 0))
case("Cumsum", lambda: torch.cumsum(x(), 0))


def reducing(
    op: str,
    function: Callable[..., Any],
    several: bool,
    whole: bool = True,
    picked: bool = False,
    one: bool = True,
) -> None:
    """An op over one dimension or several, kept or not; one: also of one element, where it is no number for some."""
    for keepdim in (False, True):
        for shape in ((2, 3, 4), (3, 3, 3), *([(1, 3, 1)] if one else [])):
            for d in (0, 1, 2, -1, -2):
                case(
                    op,
                    lambda d=d, s=shape, k=keepdim: _first(
                        function(u(*s), dim=d, keepdim=k), picked
                    ),
                )
            for dims in ((0, 2), (-1, 0), (1, 2), (0, 1, 2)) if several else ():
                case(
                    op,
                    lambda d=dims, s=shape, k=keepdim: _first(
                        function(u(*s), dim=d, keepdim=k), picked
                    ),
                )
    if whole:
        case(
            op,
            lambda: _first(function(u(2, 3, 4)), picked),
            *([lambda: _first(function(u()), picked)] if one else []),
        )


def _first(found: Any, picked: bool) -> Any:
    return found[0] if picked else found


reducing("Amax", torch.amax, several=True)
reducing("Amin", torch.amin, several=True)
reducing("Aminmax", lambda a, **k: tuple(torch.aminmax(a, **k)), several=False)
reducing(
    "Kthvalue",
    lambda a, dim, keepdim: a.kthvalue(1, dim, keepdim),
    several=False,
    whole=False,
    picked=True,
)
reducing("LinalgVectorNorm", lambda a, **k: torch.linalg.vector_norm(a, 3, **k), several=True)
reducing("Logsumexp", torch.logsumexp, several=True, whole=False)
reducing("Mean", torch.mean, several=True)
for _op, _pick in {
    "Max": torch.max,
    "Min": torch.min,
    "Median": torch.median,
    "Nanmedian": torch.nanmedian,
}.items():
    reducing(_op, _pick, several=False, whole=False, picked=True)
    case(_op, lambda f=_pick: f(x(2, 3, 4)), lambda f=_pick: f(x()))
reducing("Mode", torch.mode, several=False, whole=False, picked=True)
reducing("Nansum", torch.nansum, several=True)
reducing(
    "Norm",
    lambda a, **k: torch.ops.aten.norm.ScalarOpt_dim(a, 2, [k.pop("dim")], **k),
    False,
    whole=False,
)
case("Norm", lambda: torch.ops.aten.norm.Scalar(x(2, 3), 2))
reducing("Prod", torch.prod, several=False)
reducing("Std", torch.std, several=True, one=False)
reducing("StdMean", torch.std_mean, several=True, one=False)
reducing("Sum", torch.sum, several=True)
reducing("Var", torch.var, several=True, one=False)
reducing("VarMean", torch.var_mean, several=True, one=False)
case(
    "Var",
    lambda: torch.var(x(2, 3), dim=1, correction=0),
    lambda: torch.var(x(2, 3), dim=None, keepdim=True),
)
case("Sum", lambda: x(2, 3).sum(dim=()), lambda: x(2, 3).sum(dim=(), keepdim=True))
case("LinalgVectorNorm", lambda: torch.linalg.vector_norm(x(2, 3), dim=None, keepdim=True))
case("Amax", lambda: torch.amax(x(2, 3), dim=()), lambda: torch.amax(x(2, 3), dim=(), keepdim=True))


# ---- products ------------------------------------------------------------------------------------

case(
    "Mm",
    lambda: x(3, 4) @ x(4, 5),
    lambda: x(3, 3) @ x(3, 3),
    lambda: x(1, 3) @ x(3, 1),
    lambda: x(4, 3).t() @ x(4, 3),
)
case(
    "Addmm",
    *(
        lambda s=s: torch.addmm(x(*s), x(3, 4), x(4, 5), beta=2)
        for s in ((5,), (3, 5), (3, 1), (1, 5), ())
    ),
)
case(
    "Addmm",
    lambda: torch.addmm(x(3), x(3, 3), x(3, 3)),
    lambda: torch.addmm(x(3, 1), x(3, 3), x(3, 3)),
)
case(
    "Baddbmm",
    lambda: torch.baddbmm(x(3), x(3, 3, 3), x(3, 3, 3)),
    lambda: torch.baddbmm(x(3, 3), x(3, 3, 3), x(3, 3, 3)),
)
case("Addmm", lambda: F.linear(x(2, 3, 4), x(5, 4), x(5)))
case("Mv", lambda: x(3, 4) @ x(4), lambda: x(3, 3) @ x(3))
case("Dot", lambda: x(3) @ x(3))
case("Bmm", lambda: torch.bmm(x(2, 3, 4), x(2, 4, 5)), lambda: torch.bmm(x(3, 3, 3), x(3, 3, 3)))
case(
    "Bmm",
    lambda: x(2, 3, 4) @ x(4, 5).expand(2, 4, 5),
    lambda: torch.einsum("bik,bjk->bij", x(2, 3, 4), x(2, 5, 4)),
)
case(
    "Cat",
    lambda: torch.cat([x(2, 3), x(4, 3)], 0),
    lambda: torch.cat([x(2, 3), x(2, 1), x(2, 2)], -1),
)
case(
    "Cat",
    lambda: torch.cat([x(2, 3).detach(), x(4, 3)], 0),
    lambda: torch.cat([x(1, 3), x(2, 3).detach()], 0),
)
case("GroupedMm", lambda: torch._grouped_mm(
    torch.rand(6, 16, requires_grad=True), torch.rand(2, 16, 8, requires_grad=True), offs=torch.tensor([2, 6]).int()
))  # fmt: skip
for _shape in ((2, 3, 5), (5,), (3, 1), (1, 3, 5), (2, 1, 1)):
    case("Baddbmm", lambda s=_shape: torch.baddbmm(x(*s), x(2, 3, 4), x(2, 4, 5), beta=0.5))


def attended(
    heads: int, groups: int, mask: tuple[int, ...] | None, causal: bool = False, size: int = 4
) -> Case:
    """Attention [2, heads, 3, size] to 5 positions, maybe with a bias."""

    def make() -> Tensor:
        q, k, v = x(2, heads, 3, size), x(2, groups, 5, size), x(2, groups, 5, size)
        bias = None if mask is None else x(*mask)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(
                q, k, v, bias, is_causal=causal, enable_gqa=heads != groups
            )

    return make


def fused(mask: tuple[int, ...] | None, size: int, groups: int = 3) -> Case:
    """The CPU's own op."""

    def make() -> Tensor:
        q, k, v = x(2, 3, 4, size), x(2, groups, 5, size), x(2, groups, 5, size)
        bias = None if mask is None else torch.randn(mask).double()
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=bias
        )[0]
        return found

    return make


case(
    "ScaledDotProductFlashAttentionForCpu",
    fused(None, 6),
    fused((4, 5), 6),
    fused((2, 1, 4, 5), 5),
    fused(None, 4),
)
case(
    "ScaledDotProductFlashAttentionForCpu",
    attended(2, 2, None, causal=True),
    attended(2, 2, None, size=5),
)
case(
    "ScaledDotProductFlashAttentionForCpu", attended(4, 2, None), attended(3, 1, None, causal=True)
)


# ---- convolution, recurrence ---------------------------------------------------------------------


def convolved(
    channels: int, out: int, groups: int, transposed: bool, space: int, batch: int | None = 2
) -> Case:
    """A convolution with a bias, over one to three dimensions of space."""

    def make() -> Tensor:
        name = f"conv{'_transpose' if transposed else ''}{space}d"
        images = x(*([] if batch is None else [batch]), channels, *range(4, 4 + space))
        kernel = (channels, out // groups) if transposed else (out, channels // groups)
        found: Tensor = getattr(F, name)(
            images, x(*kernel, *[2] * space), x(out), groups=groups, stride=1
        )
        return found

    return make


for _transposed in (False, True):
    for _space in (1, 2, 3):
        case(
            "Convolution",
            convolved(4, 6, 2, _transposed, _space),
            convolved(3, 3, 3, _transposed, _space),
        )
        case(
            "Convolution",
            convolved(2, 2, 1, _transposed, _space),
            convolved(3, 2, 1, _transposed, _space, None),
        )
case(
    "Convolution",
    lambda: F.conv2d(x(2, 3, 4, 4).to(memory_format=torch.channels_last), x(3, 1, 2, 2), groups=3),
)


def recurrent(first: bool, both_ways: bool = False, layers: int = 1) -> Case:
    """An LSTM as the CPU runs it."""

    def make() -> tuple[Tensor, ...]:
        net = nn.LSTM(2, 2, layers, batch_first=first, bidirectional=both_ways)
        states = [
            torch.randn(layers * (1 + both_ways), 3 if first else 2, 2).requires_grad_()
            for _ in range(2)
        ]
        sequences, (hidden, cell) = net(torch.randn(3, 2, 2).requires_grad_(), tuple(states))
        return sequences, hidden, cell

    return make


case(
    "MkldnnRnnLayer",
    recurrent(False),
    recurrent(True),
    recurrent(False, both_ways=True),
    recurrent(False, layers=2),
)


# ---- statistics ----------------------------------------------------------------------------------

for _shape, _normed in (
    ((2, 3, 4), (4,)),
    ((2, 3, 4), (3, 4)),
    ((3, 3), (3,)),
    ((2, 3), (2, 3)),
    ((4,), (4,)),
):
    case("NativeLayerNorm", lambda s=_shape, n=_normed: F.layer_norm(x(*s), n, x(*n), x(*n)))
    case("NativeLayerNorm", lambda s=_shape, n=_normed: F.layer_norm(x(*s), n))
for _shape in ((2, 4), (2, 4, 3), (4, 4, 2, 3)):
    case("NativeGroupNorm", lambda s=_shape: F.group_norm(x(*s), 2, x(4), x(4)))
    case("NativeGroupNorm", lambda s=_shape: F.group_norm(x(*s), 4, x(4), x(4)))
    for _training in (False, True):
        case(
            "NativeBatchNorm",
            lambda s=_shape, t=_training: F.batch_norm(
                x(*s), torch.zeros(4).double(), torch.ones(4).double(), x(4), x(4), training=t
            ),
        )
case("NativeBatchNorm", lambda: F.instance_norm(x(2, 4, 3), weight=x(4), bias=x(4)))


# ---- windows -------------------------------------------------------------------------------------

SPACE = {1: (6,), 2: (6, 4), 3: (4, 6, 4)}


def spatial(op: str, space: int, function: Callable[..., Any], plain: bool = True) -> None:
    """An op of images, of unbatched ones too, in either memory format."""
    case(op, lambda: function(x(2, 3, *SPACE[space])), lambda: function(x(6, 6, *SPACE[space])))
    if plain:
        case(op, lambda: function(x(3, *SPACE[space])))
    if space == 2:
        case(op, lambda: function(x(2, 3, *SPACE[space]).to(memory_format=torch.channels_last)))


spatial("AvgPool2D", 2, lambda a: F.avg_pool2d(a, 2))
spatial("AvgPool2D", 2, lambda a: F.avg_pool2d(a, 3, 1, 1))
spatial("AvgPool3D", 3, lambda a: F.avg_pool3d(a, 3, 1, 1))
spatial("AvgPool3D", 3, lambda a: F.avg_pool3d(a, 2))
spatial("AdaptiveAvgPool2D", 2, lambda a: F.adaptive_avg_pool2d(a, (3, 3)))
spatial("AdaptiveAvgPool3D", 3, lambda a: F.adaptive_avg_pool3d(a, 2))
spatial("AdaptiveMaxPool2D", 2, lambda a: F.adaptive_max_pool2d(a, 2))
spatial("AdaptiveMaxPool3D", 3, lambda a: F.adaptive_max_pool3d(a, 2))
spatial("MaxPool2DWithIndices", 2, lambda a: F.max_pool2d(a, 2))
spatial("MaxPool2DWithIndices", 2, lambda a: F.max_pool2d(a, 3, 1, 1))
spatial("MaxPool3DWithIndices", 3, lambda a: F.max_pool3d(a, 3, 1, 1))
spatial("MaxPool2DWithIndices", 1, lambda a: F.max_pool1d(a, 2))
spatial("MaxPool3DWithIndices", 3, lambda a: F.max_pool3d(a, 2))
spatial("FractionalMaxPool2D", 2, lambda a: F.fractional_max_pool2d(a, 2, output_size=2))
spatial("MaxUnpool2D", 2, lambda a: F.max_unpool2d(*F.max_pool2d(a, 2, return_indices=True), 2))
for _op, _space, _mode, _more in (
    ("UpsampleNearest1D", 1, "nearest", {}), ("UpsampleLinear1D", 1, "linear", {}),
    ("UpsampleNearest2D", 2, "nearest", {}), ("UpsampleBilinear2D", 2, "bilinear", {}),
    ("UpsampleBicubic2D", 2, "bicubic", {}), ("UpsampleBilinear2DAa", 2, "bilinear", {"antialias": True}),
    ("UpsampleBicubic2DAa", 2, "bicubic", {"antialias": True}), ("UpsampleNearest3D", 3, "nearest", {}),
    ("UpsampleTrilinear3D", 3, "trilinear", {}), ("UpsampleNearestExact1D", 1, "nearest-exact", {}),
    ("UpsampleNearestExact2D", 2, "nearest-exact", {}), ("UpsampleNearestExact3D", 3, "nearest-exact", {}),
):  # fmt: skip
    for _scale in (1.5, 0.5, 1.0):
        spatial(
            _op,
            _space,
            lambda a, m=_mode, k=_more, r=_scale: F.interpolate(a, scale_factor=r, mode=m, **k),
            plain=False,
        )
for _space in (1, 2, 3):
    _pads = (1, 2) * _space
    spatial(f"ReflectionPad{_space}D", _space, lambda a, p=_pads: F.pad(a, p, "reflect"))
    spatial(f"ReplicationPad{_space}D", _space, lambda a, p=_pads: F.pad(a, p, "replicate"))
case(
    "PixelShuffle",
    lambda: F.pixel_shuffle(x(2, 8, 3, 3), 2),
    lambda: F.pixel_shuffle(x(2, 3, 4, 2, 2), 2),
)
case(
    "PixelShuffle",
    lambda: F.pixel_shuffle(x(4, 2, 2), 2),
    lambda: F.pixel_shuffle(x(2, 4, 3, 3), 1),
)
case(
    "PixelUnshuffle",
    lambda: F.pixel_unshuffle(x(2, 2, 4, 4), 2),
    lambda: F.pixel_unshuffle(x(2, 3, 2, 4, 2), 2),
)
case("PixelUnshuffle", lambda: F.pixel_unshuffle(x(3, 4, 2), 2))
case(
    "Im2Col",
    lambda: F.unfold(x(2, 3, 4, 4), 2),
    lambda: F.unfold(x(3, 4, 4), 2, padding=1),
    lambda: F.unfold(x(2, 2, 2, 2), 1),
)
case(
    "Col2Im",
    lambda: F.fold(x(2, 12, 9), (4, 4), 2),
    lambda: F.fold(x(12, 9), (4, 4), 2),
    lambda: F.fold(x(4, 4, 4), (2, 2), 1),
)
case("GridSampler2D", lambda: F.grid_sample(x(2, 3, 4, 4), u(2, 2, 3, 2), align_corners=False))
case(
    "GridSampler2D",
    lambda: F.grid_sample(x(2, 2, 2, 2), u(2, 2, 2, 2), align_corners=True, mode="bicubic"),
)
case("Im2Col", lambda: F.unfold(x(4, 4, 4, 4), (1, 4)))
case("Col2Im", lambda: F.fold(x(4, 4, 4), (4, 4), (1, 4)))
case("GridSampler3D", lambda: F.grid_sample(x(2, 3, 3, 3, 3), u(2, 3, 3, 3, 3), align_corners=True))
case(
    "GridSampler3D", lambda: F.grid_sample(x(2, 3, 4, 4, 3), u(2, 2, 3, 2, 3), align_corners=False)
)


# ---- matrices, transforms ------------------------------------------------------------------------


def posed(*shape: int) -> Tensor:
    """Positive definite matrices."""
    a = x(*shape, 3, 3)
    return a @ a.mT + 3 * torch.eye(3).double()


for _shape in ((), (2,), (2, 3), (1, 3)):
    case("LinalgInvEx", lambda s=_shape: torch.linalg.inv(posed(*s)))
    case("LinalgCholeskyEx", lambda s=_shape: torch.linalg.cholesky(posed(*s)))
    case(
        "LinalgSolveTriangular",
        lambda s=_shape: torch.linalg.solve_triangular(posed(*s), x(*s, 3, 2), upper=True),
    )
    case("Cholesky", lambda s=_shape: torch.ops.aten.cholesky(posed(*s)))
    case(
        "CholeskySolve",
        lambda s=_shape: torch.cholesky_solve(x(*s, 3, 2), torch.linalg.cholesky(posed(*s))),
    )
case(
    "LinalgSolveTriangular",
    lambda: torch.linalg.solve_triangular(posed(2, 1), x(3, 3, 3), upper=False),
)
case(
    "LinalgSolveTriangular",
    lambda: torch.linalg.solve_triangular(posed(2), x(2, 4, 3), upper=True, left=False),
)
case("CholeskySolve", lambda: torch.cholesky_solve(x(2, 3, 3, 2), torch.linalg.cholesky(posed(3))))
for _dim in (0, 1, 2, -1):
    for _shape in ((4, 4, 4), (3, 4, 6)):
        case("FftC2C", lambda d=_dim, s=_shape: torch.fft.fft(torch.complex(x(*s), x(*s)), dim=d))
        case("FftR2C", lambda d=_dim, s=_shape: torch.fft.rfft(x(*s), dim=d))
        case("FftR2C", lambda d=_dim, s=_shape: torch.fft.fft(x(*s), dim=d))
        case("FftC2R", lambda d=_dim, s=_shape: torch.fft.irfft(torch.complex(x(*s), x(*s)), dim=d))
case("FftC2C", lambda: torch.fft.fft2(torch.complex(x(3, 4, 4), x(3, 4, 4))))
case("FftR2C", lambda: torch.fft.rfftn(x(3, 4, 4), dim=(0, -1)))
case("FftC2R", lambda: torch.fft.irfftn(torch.complex(x(3, 4, 4), x(3, 4, 4)), dim=(-1, 0)))
case(
    "ViewAsComplex", lambda: torch.view_as_complex(x(2, 3, 2)), lambda: torch.view_as_complex(x(2))
)
case("ViewAsReal", lambda: torch.view_as_real(torch.complex(x(2, 3), x(2, 3))))
case(
    "ViewAsReal",
    lambda: torch.view_as_real(torch.complex(x(2), x(2))),
    lambda: torch.view_as_real(torch.complex(x(), x())),
)


# ---- losses of picked classes --------------------------------------------------------------------

for _reduction in REDUCTIONS:
    case("NllLoss", lambda r=_reduction: F.nll_loss(x(4, 3), index(3, 4), reduction=r))
    case(
        "NllLoss",
        lambda r=_reduction: F.nll_loss(x(3, 3), index(3, 3), torch.rand(3).double(), reduction=r),
    )
    case("NllLoss", lambda r=_reduction: F.nll_loss(x(3), index(3), reduction=r))
    case(
        "NllLoss",
        lambda r=_reduction: F.nll_loss(x(4, 3), torch.tensor([0, -100, 2, 1]), reduction=r),
    )
    case(
        "NllLoss2D", lambda r=_reduction: F.nll_loss(x(2, 3, 4, 5), index(3, 2, 4, 5), reduction=r)
    )
    case(
        "NllLoss2D", lambda r=_reduction: F.nll_loss(x(3, 3, 3, 3), index(3, 3, 3, 3), reduction=r)
    )
    case(
        "NllLoss2D",
        lambda r=_reduction: F.nll_loss(x(2, 3, 4, 2, 2), index(3, 2, 4, 2, 2), reduction=r),
    )
    case(
        "MultiMarginLoss",
        lambda r=_reduction: F.multi_margin_loss(x(4, 3), index(3, 4), reduction=r),
    )
    case("MultiMarginLoss", lambda r=_reduction: F.multi_margin_loss(x(3), index(3), reduction=r))
    case(
        "MultilabelMarginLoss",
        lambda r=_reduction: F.multilabel_margin_loss(x(4, 3), index(3, 4, 3), reduction=r),
    )
    case(
        "MultilabelMarginLoss",
        lambda r=_reduction: F.multilabel_margin_loss(x(3), index(3, 3), reduction=r),
    )
    case(
        "CtcLoss",
        lambda r=_reduction: F.ctc_loss(
            x(6, 3, 4).log_softmax(-1),
            index(3, 3, 2) + 1,
            torch.tensor([6, 5, 4]),
            torch.tensor([2, 1, 2]),
            reduction=r,
        ),
        lambda r=_reduction: F.ctc_loss(
            x(6, 4).log_softmax(-1), index(3, 2) + 1, torch.tensor(6), torch.tensor(2), reduction=r
        ),
    )


# ---- views ---------------------------------------------------------------------------------------

case(
    "T",
    lambda: torch.t(x(3, 3)),
    lambda: torch.t(x(3, 4)),
    lambda: torch.t(x(4)),
    lambda: torch.t(x(1, 3)),
    lambda: torch.t(x()),
)
for _one, _other in ((0, 1), (0, -1), (-2, -1), (1, 1), (2, 0)):
    case(
        "Transpose",
        lambda a=_one, b=_other: x(2, 3, 4).transpose(a, b),
        lambda a=_one, b=_other: x(3, 3, 3).transpose(a, b),
    )
case("Transpose", lambda: x(3, 4).mT, lambda: x(1, 3, 1).mT)
for _order in itertools.permutations(range(3)):
    case(
        "Permute",
        lambda o=_order: x(2, 3, 4).permute(o),
        lambda o=_order: x(3, 3, 3).permute([d - 3 for d in o]),
    )
case("Permute", lambda: x(2, 3, 1, 4).permute(0, -1, 1, 2))
for _from, _to in (
    ((2, 3, 4), (6, 4)), ((6, 4), (2, 3, 4)), ((4, 6), (6, 4)), ((2, 3, 4), (4, 3, 2)), ((2, 3, 4), (24,)),
    ((12,), (3, 1, 4)), ((1, 3), (3,)), ((), (1, 1)), ((4, 4), (4, 4)), ((2, 1, 6), (4, 3)), ((4, 9), (6, 6)),
    ((2, 3, 1, 4), (2, 12)), ((8,), (2, 2, 2)), ((3, 0), (0, 2)),
):  # fmt: skip
    case("View", lambda a=_from, b=_to: x(*a).view(b))
    case("UnsafeView", lambda a=_from, b=_to: torch.ops.aten._unsafe_view(x(*a), b))
    case(
        "ReshapeAlias",
        lambda a=_from, b=_to: torch.ops.aten._reshape_alias(x(*a), b, torch.empty(b).stride()),
    )
case("UnsafeView", lambda: x(2, 3, 4) @ x(4, 5), lambda: x(2, 3, 4).transpose(0, 1).reshape(6, 4))
for _dim in (0, 1, 2, -1, -3):
    case("Unsqueeze", lambda d=_dim: x(3, 4).unsqueeze(d))
case(
    "Squeeze",
    lambda: x(1, 3, 1).squeeze(),
    lambda: x(1, 3, 1).squeeze(-1),
    lambda: x(2, 3).squeeze(0),
)
case(
    "Squeeze",
    lambda: x(1, 3, 1, 2).squeeze((0, -2)),
    lambda: x(3, 1, 3).squeeze(1),
    lambda: x(1, 1).squeeze(),
)
for _dim in (0, 1, -1):
    for _at in (0, 1, -1, -2):
        case(
            "Select",
            lambda d=_dim, i=_at: x(2, 3, 4).select(d, i),
            lambda d=_dim, i=_at: x(3, 3).select(d, i),
        )
    for _cut in (
        slice(1),
        slice(1, None),
        slice(-1, None),
        slice(0, None, 2),
        slice(1, 3, 2),
        slice(5, 9),
    ):
        case(
            "Slice",
            lambda d=_dim, c=_cut: x(3, 4, 3).movedim(0, d)[(slice(None),) * (d % 3) + (c,)],
        )
        case(
            "Slice",
            lambda d=_dim, c=_cut: torch.ops.aten.slice(
                x(3, 3, 3), d, c.start, c.stop, c.step or 1
            ),
        )
    case("Unbind", lambda d=_dim: x(2, 3, 2).unbind(d), lambda d=_dim: x(1, 3, 1).unbind(d))
    case(
        "Stack",
        lambda d=_dim: torch.stack([x(2, 3), x(2, 3)], d),
        lambda d=_dim: torch.stack([x(2, 2), x(2, 2)], d),
    )
    case(
        "Stack", lambda d=_dim: torch.stack([torch.ones(2, 3), x(2, 3).float(), x(2, 3).float()], d)
    )
    case("Stack", lambda d=_dim: torch.stack([x(3)], min(d, 1)))
    case("Split", lambda d=_dim: x(4, 5, 3).split(2, d), lambda d=_dim: x(3, 3, 3).split(3, d))
    case("UnsafeSplit", lambda d=_dim: x(4, 5, 3).unsafe_split(2, d))
    case(
        "SplitWithSizes",
        lambda d=_dim: x(4, 4, 4).split([1, 3], d),
        lambda d=_dim: x(4, 4, 4).split([2, 0, 2], d),
    )
    case(
        "UnsafeSplitWithSizes",
        lambda d=_dim: torch.ops.aten.unsafe_split_with_sizes(x(4, 4, 4), [3, 1], d),
    )
    case("Flip", lambda d=_dim: x(2, 3, 4).flip(d), lambda d=_dim: x(3, 3).flip(d))
    for _shift in (1, -1, 2, 7):
        case(
            "Roll",
            lambda d=_dim, k=_shift: x(2, 3, 4).roll(k, d),
            lambda d=_dim, k=_shift: x(3, 3).roll(k, d),
        )
case("Flip", lambda: x(2, 3, 4).flip((0, -1)))
case(
    "Roll",
    lambda: x(2, 3, 4).roll((1, -1), (0, -1)),
    lambda: x(3, 4).roll(2),
    lambda: x(3, 3).roll((1, 1), (0, 0)),
)


# ---- the comparison ------------------------------------------------------------------------------


def recorded(op: str, made: Tensor | Sequence[Tensor]) -> tuple[Graph, int] | None:
    """The graph of what a case made, and its first node of that op; None where the op is not there."""
    ends = [t for t in ([made] if isinstance(made, Tensor) else made) if t.requires_grad]
    total = sum((torch.view_as_real(t) if t.is_complex() else t).double().sum() for t in ends)
    assert isinstance(total, Tensor)
    graph = Graph([total[None]], [])
    found = [i for i, name in enumerate(graph.names) if stem(name) == op]
    # Of several of one kind, the last recorded one but for what makes the losses, which no case is
    # about.
    inner = [i for i in found if graph.nodes[i] in _below(ends)]
    return (graph, inner[0]) if inner else None


def _below(ends: Iterable[Tensor]) -> set[Any]:
    return set(node_ops.below([t.grad_fn for t in ends]))


def maps(shape: tuple[int, ...]) -> Iterator[Ids]:
    """Rows along each dimension, along two at once, and with a gap."""
    yield np.zeros([1] * len(shape), np.int64)
    for d, size in enumerate(shape):
        if size > 1:
            ids = np.arange(size).reshape([size if k == d else 1 for k in range(len(shape))])
            yield ids
            yield np.where(ids == 0, NO_ROW, size - ids)
    for pair in itertools.combinations([d for d, size in enumerate(shape) if size > 1], 2):
        sizes = [size if d in pair else 1 for d, size in enumerate(shape)]
        if np.prod(sizes) <= 16:
            yield np.arange(np.prod(sizes)).reshape(sizes)


def truth(graph: Graph, i: int, output: int, ids: Ids) -> dict[int, dict[int, Tensor]]:
    """Row -> slot -> the elements of that input that the row reaches, by the node's own adjoint."""
    shape, meta = graph.shape((i, output)), graph.outputs[i][output]
    noise = (
        torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(
            meta.dtype
        )
        + 0.5
    )
    where, found = torch.from_numpy(np.broadcast_to(ids, shape).copy()), {}
    for row in np.unique(ids[ids >= 0]):
        grads = [
            torch.where(where == row, noise, 0) if k == output else None
            for k in range(len(graph.outputs[i]))
        ]
        reached = node_ops.vjp(graph.nodes[i], grads)
        found[int(row)] = {
            slot: node_ops.conformed(g, graph.nodes[edge[0]], edge[1]) != 0
            for slot, (edge, g) in enumerate(zip(graph.next[i], reached, strict=True))
            if edge is not None and g is not None
        }
    return found


def compare(graph: Graph, i: int, output: int, ids: Ids) -> int:
    """Whether each input's map is the truth; returns how many maps with several rows were said."""
    arrived = tuple(ids if k == output else None for k in range(len(graph.outputs[i])))
    rows, said = truth(graph, i, output, ids), 0
    if not any(rows.values()):
        return 0  # an output whose gradient the adjoint does not read: the statistics of a norm
    for slot, edge in enumerate(graph.next[i]):
        if edge is None or 0 in graph.shape(edge):
            continue
        found = Walk(graph).structure(i, arrived, slot, edge)
        if found is None:
            continue
        reached = [
            (row, of_row[slot])
            for row, of_row in rows.items()
            if slot in of_row and bool(of_row[slot].any())
        ]
        if found is MEET:
            continue
        mine = found
        into = graph.shape(edge)
        assert mine.ndim == len(into), f"slot {slot}: a map {mine.shape} of an input {into}"
        assert all(n in (1, size) for n, size in zip(mine.shape, into, strict=True)), (
            slot,
            mine.shape,
            into,
        )
        RowMap(mine, into, int(ids.max()) + 1)
        full = torch.from_numpy(np.broadcast_to(mine, into).copy())
        for row, there in reached:
            wrong = there & (full != row)
            assert not wrong.any(), (
                f"slot {slot}: row {row} reaches {int(wrong.sum())} elements said to be another's"
            )
        said += mine.size > 1
    return said


def _differentiable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


@pytest.mark.parametrize("op", sorted({*CARRY, *MOVES} - ELSEWHERE))
def test_structure_says_what_the_adjoint_does(op: str) -> None:
    """Every case of the op, every output, rows along every dimension; and not silent in all of them."""
    assert op in CASES, f"{op} is in a table, but no case records it"
    torch.manual_seed(0)
    said, seen = 0, 0
    for number, make in enumerate(CASES[op]):
        found = recorded(op, make())
        if found is None:
            continue
        graph, i = found
        seen += 1
        for output in range(len(graph.outputs[i])):
            shape = graph.shape((i, output))
            if 0 in shape or not _differentiable(graph.outputs[i][output].dtype):
                continue
            for ids in maps(shape):
                try:
                    said += compare(graph, i, output, ids)
                except AssertionError as error:
                    place = f"case {number}, output {output} {shape}, rows {ids.ravel()} along {ids.shape}"
                    raise AssertionError(f"{place}: {error}") from error
    assert seen, f"no case of {op} records it"
    assert said or op == "Dot", f"structure says nothing of {op}"


def test_every_case_is_of_an_op_in_the_tables() -> None:
    assert set(CASES) <= {*CARRY, *MOVES}
    assert not set(CASES) & ELSEWHERE
    assert not ELSEWHERE - {*CARRY, *MOVES}
    assert not SETTLED & {*CARRY}
