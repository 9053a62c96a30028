"""Steps with a memory."""

from __future__ import annotations

from typing import Any

import mtu_fast as mtu
from tests.helpers.checks import clear
from tests.kept.scene import MASK, PARTIAL, N, Net, batch

RETAINED = 2 * N - int(MASK.sum())  # rows of a partial step


ALPHA = 0.3


def backward(
    net: Net,
    engine: mtu.Engine,
    memory: mtu.Memory | None,
    seed: int,
    method: mtu.Method | None = None,
    forget: Any = None,
) -> mtu.Update:
    """One step's `.grad`, alone."""
    clear(list(net.parameters()))
    chosen = mtu.OrthoGrad(ALPHA) if method is None else method
    mask = PARTIAL if forget is None else forget
    dtype = next(net.parameters()).dtype
    return engine.backward(net.losses(batch(seed, dtype)), chosen, forget=mask, memory=memory)
