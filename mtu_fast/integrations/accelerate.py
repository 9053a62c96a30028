"""`accelerate`: the line for `accelerator.backward(loss)`.

from mtu_fast.integrations.accelerate import backward

model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
engine = mtu.Engine(model)
for batch in loader:
    with accelerator.accumulate(model):
        losses = causal_lm(model(**batch.inputs).logits, batch.labels)
        backward(accelerator, engine, losses, mtu.OrthoGrad(0.5), forget=batch.forget)
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from mtu_fast._checks.losses import Losses
from mtu_fast._checks.masks import Mask
from mtu_fast._rows.update import Update
from mtu_fast.engine import Engine
from mtu_fast.integrations import _step
from mtu_fast.methods import Method
from mtu_fast.subspace import Subspace


def backward(
    accelerator: Any,
    engine: Engine,
    losses: Losses,
    method: Method,
    *,
    forget: Mask = None,
    present: Mapping[str, Tensor] | None = None,
    subspace: Subspace | None = None,
) -> Update | None:
    """`.grad += S Jᵀ w`, J the rows of all micro-batches since the last step, S the scale of the accelerator's scaler.

    Under `accelerator.accumulate` the rows are held until its sync step (see `Engine.accumulate`
    for the memory); its division by the number of micro-batches is not needed. Under
    mixed_precision="fp16" the losses are scaled, and a step whose gradients overflow is skipped by
    the scaler.

    Args:
        accelerator: an `accelerate.Accelerator`.
        engine: made from the prepared model; of several processes, which must then be one that
            `DistributedDataParallel` wraps, it joins the rows of all.
        losses: unreduced and unscaled, `[N]` or `{task: [N]}`.
        method: a method.
        forget: as for `Engine.backward`.
        present: as for `Engine.backward`.
        subspace: as for `Engine.backward`.

    Returns:
        The update; None where no step follows, or the scaler is to skip it.

    Raises:
        RuntimeError: several processes whose rows the engine does not join, or as for
            `Engine.accumulate`.
        ValueError: a method that a loss scaler spoils, or as for `Engine.accumulate`.
        TypeError: arguments of the wrong kind.
    """
    if isinstance(accelerator, type) or not hasattr(accelerator, "sync_gradients"):
        raise TypeError(
            f"accelerator: found {type(accelerator).__name__}, expected an accelerate.Accelerator()."
        )
    _step.check_engine(engine)
    _step.check_joined(engine, accelerator.num_processes, "accelerate")
    made = partial(_step.Micro.of, losses, method, forget, present, subspace)
    micro = _step.agreed(engine, made)
    sync = bool(accelerator.sync_gradients)
    return _step.take(engine, micro, sync=sync, scaler=accelerator.scaler)
