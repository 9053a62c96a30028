"""One micro-batch of somebody else's loop: their loss scaler, their accumulation, their processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mtu_fast._arguments import shown
from mtu_fast._checks.losses import Losses, by_task
from mtu_fast._checks.masks import Mask
from mtu_fast._distributed.wrappers import is_sliced, slices_of
from mtu_fast._rows.update import Update, check_method
from mtu_fast.engine import Engine
from mtu_fast.errors import NotFiniteError
from mtu_fast.methods import Method, Roles
from mtu_fast.subspace import Subspace, check_subspace

T = TypeVar("T")


class Micro(NamedTuple):
    """What a user hands over for one micro-batch, as for `Engine.backward`."""

    losses: Losses
    method: Method
    forget: Mask = None
    present: Mapping[str, Tensor] | None = None
    subspace: Subspace | None = None

    @classmethod
    def of(
        cls,
        losses: Losses,
        method: Method,
        forget: Mask,
        present: Mapping[str, Tensor] | None,
        subspace: Subspace | None,
    ) -> Micro:
        """One whose losses, method and subspace are of the right kinds; masks are looked at with the rows.

        Raises:
            TypeError: one of the wrong kind.
            ValueError: losses that are not one value a sample, or a subspace that the method lacks.
        """
        by_task(losses)
        check_alone(method, subspace)
        return cls(losses, method, forget, present, subspace)

    @property
    def mean(self) -> Tensor:
        """The sum of the tasks' mean losses, `[]`, without a graph: what loops log."""
        if isinstance(self.losses, Tensor):
            return self.losses.detach().mean()
        return torch.stack([loss.detach().mean() for loss in self.losses.values()]).sum()


def take(engine: Engine, micro: Micro, *, sync: bool, scaler: Any = None) -> Update | None:
    """`engine.accumulate`, on scaled losses where there is a scaler.

    Args:
        engine: of the model.
        micro: the micro-batch.
        sync: whether a step follows.
        scaler: a `torch.amp.GradScaler`, or None.

    Returns:
        The update, with the losses as they were given; None where no step follows, or the scaler is
        to skip it.

    Raises:
        NotFiniteError: the update is not finite, and no scaler is there to lower its scale.
    """
    if not _scales(scaler):
        return _accumulate(engine, micro, micro.losses, sync)
    check_scalable(micro.method)
    losses = _scaled(micro.losses, scaler)
    return _under(scaler, engine, lambda: _accumulate(engine, micro, losses, sync))


def finish(
    engine: Engine, method: Method, subspace: Subspace | None, *, scaler: Any = None
) -> Update | None:
    """The step of the micro-batches that are held, where the one it was to follow gave no losses; None without any.

    Args:
        engine: of the model.
        method: theirs.
        subspace: likewise.
        scaler: as for `take`.

    Raises:
        NotFiniteError: as for `take`.
    """
    if not _scales(scaler):
        return engine._finish(method, subspace)
    return _under(scaler, engine, lambda: engine._finish(method, subspace))


def _scales(scaler: Any) -> bool:
    return scaler is not None and scaler.is_enabled()


def _under(scaler: Any, engine: Engine, step: Callable[[], Update | None]) -> Update | None:
    """What a step on scaled losses gives; None where the scaler is to skip it."""
    try:
        # a scaler must know at once whether the step was sound
        with engine.waiting():
            update = step()
    except NotFiniteError:
        # a scaler expects overflows: it leaves the step out and goes on with a lower scale
        _tell(engine)
        return None
    # the scale stays as it is until the step is behind, so all micro-batches had this one
    return None if update is None else _unscaled(update, scaler.get_scale())


def _accumulate(engine: Engine, micro: Micro, losses: Losses, sync: bool) -> Update | None:
    return engine.accumulate(
        losses,
        micro.method,
        sync=sync,
        forget=micro.forget,
        present=micro.present,
        subspace=micro.subspace,
    )


def agreed(engine: Engine, function: Callable[[], T]) -> T:
    """What a function without collectives gives in this process, if it raises in none of those whose rows are joined.

    Raises:
        Exception: of the kind that it raised in a process, in all of them.
    """
    ranks = engine._taking.ranks
    if ranks is None:
        return function()
    # before the exchange: a rank that has left would not answer it
    ranks.check_step()
    return ranks.agreed("losses", function)


def check_alone(method: object, subspace: object) -> None:
    """A method, and with it the subspace that it works in.

    Raises:
        TypeError: weights, which are of the rows of one step, or something else than a method.
        ValueError: no subspace where one is needed, or one that would not be looked at.
    """
    if isinstance(method, Method | type):
        check_method(method)  # of a class it says what to do
    if not isinstance(method, Method):
        raise TypeError(
            f"method: found {shown(method)}, expected an mtu.Method such as mtu.OrthoGrad(alpha=0.5)."
        )
    check_subspace(method, subspace)


def check_engine(engine: object) -> None:
    """An engine.

    Raises:
        TypeError: something else.
    """
    if not isinstance(engine, Engine):
        raise TypeError(
            f"engine: found {type(engine).__name__}, expected mtu.Engine(model) of the prepared model."
        )


def check_scalable(method: Method) -> None:
    """A loss scaler does the method no harm.

    Raises:
        ValueError: its update is not S times as long for losses times S.
    """
    check_method(method)
    if method.scale_equivariant:
        return
    raise ValueError(
        f"{type(method).__name__}: found a loss scaler, expected unscaled losses: its update for losses times S "
        "is not S times as long, and dividing .grad by S spoils it. Use bfloat16, which needs no scaler, or float32."
    )


def replicated(model: Any) -> Any:
    """The `DistributedDataParallel` around or within a model; None where there is none."""
    if not isinstance(model, nn.Module):
        return None
    kind = nn.parallel.DistributedDataParallel
    return next((module for module in model.modules() if isinstance(module, kind)), None)


def check_joined(engine: Engine, processes: int, what: str) -> None:
    """The engine joins the rows of all processes.

    Raises:
        RuntimeError: it does not, and there are several.
    """
    if not engine.is_joined:
        check_single(processes, what)


def check_single(processes: int, what: str) -> None:
    """One process holds all rows.

    Raises:
        RuntimeError: there are several.
    """
    if processes > 1:
        raise RuntimeError(
            f"{what}: found {processes} processes or devices, expected 1, or an engine that joins their rows (that of "
            "a DistributedDataParallel): rows of other processes would be missing in the Gram matrix, and .grad would "
            "differ between them."
        )


def _scaled(losses: Losses, scaler: Any) -> Losses:
    # in float32: float16 ends at 65504, which is less than a usual scale
    if isinstance(losses, Tensor):
        return scaler.scale(_widened(losses))
    return {task: scaler.scale(_widened(loss)) for task, loss in losses.items()}


def _widened(loss: Tensor) -> Tensor:
    return loss.float() if loss.dtype == torch.float16 else loss


def _unscaled(update: Update, scale: float) -> Update:
    """The same update, whose roles tell the losses as they were before the scaler: what is logged."""

    def true(roles: Roles) -> Roles:
        return replace(roles, loss=roles.loss / scale)

    seen = None if update.seen is None else true(update.seen)
    return replace(update, roles=true(update.roles), seen=seen)


def _tell(engine: Engine) -> None:
    """An infinite `.grad`, by which the scaler skips the step and lowers its scale, as after an ordinary backward."""
    # those outside as well: they may have an optimizer of their own, whose step is left out, too
    for p in _trained(engine.model):
        # what GradScaler looks for; the update itself was refused before .grad was written
        p.grad = torch.full_like(p, float("inf"))


def _trained(model: nn.Module) -> Iterable[Tensor]:
    """What optimizers may have: the parameters that an update may write to."""
    held = slices_of(model) if is_sliced(model) else model.parameters()
    return [p for p in held if p.requires_grad]
