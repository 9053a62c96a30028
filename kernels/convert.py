"""To float64 and back; half precision by way of float32, since not every device converts directly."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """Any float to float64, exactly."""
    if x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    return x.to(tl.float64)


@triton.jit
def narrow(x, element: tl.constexpr):
    """Float64 to `element`."""
    if element.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    return x.to(element)
