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

A loop that is interrupted within a step leaves its rows held, as it leaves `.grad` under an
ordinary backward; `engine.discard()` lets go of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from mtu_fast._arguments import held_in
from mtu_fast._checks.losses import Losses
from mtu_fast._checks.masks import Mask
from mtu_fast._rows.update import Update
from mtu_fast.engine import Engine
from mtu_fast.integrations import _resuming, _step
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


class State:
    """Where a method stands, and the rows that a subspace keeps: `accelerator.register_for_checkpointing` takes it.

        state = State(engine, method, subspace)
        accelerator.register_for_checkpointing(state)

    `save_state` and `load_state` then go on to the bit: generators, what calls have changed, kept
    rows. Over ranks the first process writes the rows of all of them.

    Args:
        engine: of the prepared model.
        method: a method.
        subspace: rows kept from earlier steps.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: a subspace that the method lacks, or would not look at.
    """

    def __init__(self, engine: Engine, method: Method, subspace: Subspace | None = None) -> None:
        _step.check_engine(engine)
        _step.check_alone(method, subspace)
        self._engine, self._method, self._subspace = engine, method, subspace

    def state_dict(self) -> dict[str, Any]:
        """Both states; of every process's rows."""
        rows = (
            None
            if self._subspace is None
            else _resuming.states_of_rows(self._engine, self._subspace)
        )
        return {"method": _resuming.state_of_method(self._method), "subspace": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Args:
            state: what it gave.

        Raises:
            TypeError: a state that is no mapping.
            ValueError: a part is missing, of rows kept with no subspace to take them, of another
                number of processes, or of another method.
        """
        held_in("State", state, "method", "subspace")
        if (state["subspace"] is None) != (self._subspace is None):
            found = "no rows" if state["subspace"] is None else "rows"
            expected = "no subspace" if self._subspace is None else "those of a subspace"
            raise ValueError(
                f"checkpoint: found {found} kept from earlier steps, expected {expected} as given to State(...) here."
            )
        _resuming.resume_method(self._method, state["method"])
        if self._subspace is not None:
            _resuming.resume_rows(self._engine, self._subspace, state["subspace"])
