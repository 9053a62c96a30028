"""Ops that work position by position."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.graph.recorded.cases import (
    REDUCTIONS,
    SHAPES,
    both,
    case,
    each,
    u,
    words,
    x,
)

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
