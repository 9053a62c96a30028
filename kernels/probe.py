"""The smallest kernel: whether Triton can compile for, and run on, this machine's device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _double(x, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(x + at, 2.0 * tl.load(x + at))


def probe(device: str = "cuda") -> None:
    """Run it.

    Raises:
        RuntimeError: it ran and the result is wrong; whatever Triton raises where it cannot run.
    """
    x = torch.ones(16, device=device)
    _double[(1,)](x, x.numel())
    if not torch.equal(x, torch.full_like(x, 2.0)):
        raise RuntimeError(f"a kernel that doubles ones gave {x.tolist()}")
