"""The loop for those who have none: loaders in, an unlearned model and its history out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast._arguments import check_flag
from mtu_fast._checks.parameters import listed
from mtu_fast._distributed.crew import Crew
from mtu_fast.engine import Engine
from mtu_fast.memory import Memory
from mtu_fast.methods import Method
from mtu_fast.subspace import Subspace
from mtu_fast.unlearning.arguments import several
from mtu_fast.unlearning.loop.history import History, Record
from mtu_fast.unlearning.loop.interrupts import or_undone
from mtu_fast.unlearning.loop.levels import Levels
from mtu_fast.unlearning.loop.lock import locked
from mtu_fast.unlearning.loop.progress import Progress
from mtu_fast.unlearning.loop.run import DivergedError, Run
from mtu_fast.unlearning.loop.schedule import Scheduled
from mtu_fast.unlearning.loop.sealed import remove_leftovers
from mtu_fast.unlearning.loop.settings import Bound, Settings, check_given
from mtu_fast.unlearning.loop.state import clear_gradients
from mtu_fast.unlearning.reading import LossFunction, ScoreFunction

__all__ = ["DivergedError", "History", "Levels", "Record", "Scheduled", "unlearn"]


def unlearn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    forget: Iterable[Any],
    retain: Iterable[Any],
    losses: LossFunction,
    method: Method,
    targets: Sequence[str] | None = None,
    params: Iterable[Tensor] | None = None,
    validation: Iterable[Any] | None = None,
    score: ScoreFunction | None = None,
    forget_losses: LossFunction | None = None,
    monitor: Iterable[Any] | None = None,
    max_steps: int | None = None,
    epochs: int | None = None,
    every: int = 10,
    settle: int | None = None,
    max_drift: Bound = None,
    scheduler: Any = None,
    clip: float | None = None,
    checkpoint: str | Path | None = None,
    subspace: Subspace | None = None,
    memory: Memory | None = None,
    levels: bool | Levels | None = None,
    generators: Iterable[torch.Generator] = (),
    progress: bool = True,
) -> History:
    """θ ← θ - lr · Jᵀ w, w = method(J Jᵀ) on a retain and a forget batch, until forget scores are those of unseen data.

    A run stops at the first evaluation at which

    * every target task's score on `forget` is at most what the original scores on `validation`:
      reason "level" (our reading; a method with a number of epochs of its own, as ∇τ, is not
      stopped by this), or `settle` steps after that evaluation;
    * the mean loss of what is retained has risen by more than `max_drift` in some task: reason
      "drift", and the model is put back to the last evaluation within the bound;
    * `max_steps` steps or `epochs` passes have been made.

    Steps are taken in the mode that the model is in: call `model.eval()` first to freeze BatchNorm
    and turn dropout off, which suits the methods. Evaluations are made in evaluation mode; they
    leave random generators and all modes as they were. The shorter loader starts again, with a
    fresh iterator. An interrupted run that has a `checkpoint` goes on from its last evaluation when
    `unlearn` is called again with the same arguments, to the same parameters bit for bit (where the
    device is deterministic); longer limits continue a run that they ended. Whatever is raised on the
    way, by a user's function or by Ctrl-C, leaves model, optimizer, scheduler, method, subspace
    and generators as they were at the last evaluation within all bounds, and no gradients.

    On several ranks, the model a DistributedDataParallel or FSDP2 one, a run is that of one process
    with the ranks' batches together: each rank passes loaders of its share, as many batches on each
    (`DistributedSampler`; the loop calls its `set_epoch`). Losses, scores and levels are those of all
    samples, a `score` of one's own the mean over ranks by samples. Ranks of a tensor parallel model
    read the same batches. The first rank shows progress and writes the checkpoint, and each rank of
    a model in slices (FSDP2, tensor parallel) a file of its own beside it; that or another number
    of ranks goes on from it.

    Args:
        model: unlearned in place.
        optimizer: of its parameters. Momentum, weight decay and adaptive steps act after the
            direction.
        forget: batches of anything, the data to forget; a DataLoader or a list, not an iterator.
        retain: the data to keep; no sample of `forget` may be in it, which is an error where it can
            be told: of DataLoaders over one dataset, and of lists of batches of the same memory.
        losses: `losses(model, batch)` gives unreduced losses, [N] or {task: [N]}, or the pair
            (losses, {task: [N] bool}) where some samples have no label for a task. It moves
            the batch to its device.
        method: a method, for example `mtu.OrthoGrad(0.7)`.
        targets: the tasks to forget from; None for all (full-task). With fewer (partial-task) the
            other tasks of the forget samples are retained.
        params: the shared parameters the method works on; all by default.
        validation: data never seen, for the level at which to stop, and for ∇τ; no sample of
            `forget` or `retain` may be in it.
        score: `score(model, loader)` gives {task: score}, higher better; by default minus the mean
            loss.
        forget_losses: the losses that steps take of forget batches, where they differ: those of
            `mtu.RandomLabels`.
        monitor: the retained data that evaluations look at; all of `retain` by default, which may
            take long.
        max_steps: optimizer steps at most.
        epochs: passes at most, over `retain` (or over what the method counts by).
        every: steps between evaluations.
        settle: steps that a run with levels goes on for once it is at the level, at rates that fall
            to zero: what the steps before have done to the rest is mended meanwhile. Of the
            evaluations at the level the model is then of the one that is nearest to the original on
            `validation` and in what is retained, and to the level on `forget`. That one alone is
            kept: errors, interruptions and drift lead back to it, and `checkpoint` holds it. Rates are
            zero at `max_steps` at the latest; `epochs` end the run whatever they are. None: a run
            ends at its first evaluation at the level.
        max_drift: by how much the mean loss of a task on what is retained may rise, or {task: how
            much}.
        scheduler: a learning rate scheduler, stepped after every step.
        clip: the global norm to which the direction is clipped, which keeps orthogonality.
        checkpoint: a file, written at every evaluation that is kept and found again by the next
            call; one run uses it at a time. Of a model in slices its folder is one that all ranks see.
        subspace: rows kept across steps, for a method that moves in their span
            (`mtu.InterferenceAware`), which gets an `mtu.Subspace()` by default. It holds explicit
            rows, K gradients, from the first checkpoint on.
        memory: retain rows kept across steps, as further constraints of a method that takes them
            (`mtu.OrthoGrad`, `mtu.InterferenceAware`, and `mtu.LevelledOrthoGrad`, which gets a
            `mtu.Memory()` by default).
        levels: forget samples whose loss is that of data never seen, and tasks whose score is, have
            no weight in a step: an `mtu.Levels`, or True for the default one. None stands for True
            where `validation` is given, except with a schedule of the method's own (∇τ). They are
            measured at the start, unless they are known already. With `forget_losses` a step takes
            one more forward of its forget batch.
        generators: those that `losses`, `forget_losses`, `score` or the data draw from, beside the
            default ones and those of loaders and method: `mtu.random_labels` takes one. They are
            stored and put back with the rest; a resumed run differs from an uninterrupted one where
            one is missing here.
        progress: a progress bar in a terminal or notebook, if tqdm is installed; elsewhere a line on
            stderr every half minute, and one at the end.

    Returns:
        What happened, evaluation by evaluation, and why it stopped.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument that makes no sense: unknown tasks, overlapping data, empty loaders,
            reduced losses, no end, a checkpoint of another run, or one that is damaged; model and
            optimizer are as they were.
        FileNotFoundError: the folder of `checkpoint` does not exist.
        OSError: the checkpoint cannot be written: the old file stays, and the model is that of the
            last evaluation.
        RuntimeError: another run uses the checkpoint.
        DivergedError: a RuntimeError; a loss or gradient was not finite.
    """
    check_given(method)
    check_flag("progress", progress)
    shared = listed(params)
    if subspace is None and method.needs_subspace:
        subspace = Subspace()
    if memory is None and method.needs_memory:
        memory = Memory()
    settings = Settings(
        model=model,
        optimizer=optimizer,
        forget=forget,
        retain=retain,
        losses=losses,
        method=method,
        targets=targets,
        params=shared,
        validation=validation,
        score=score,
        forget_losses=forget_losses,
        monitor=monitor,
        max_steps=max_steps,
        epochs=epochs,
        every=every,
        settle=settle,
        max_drift=max_drift,
        scheduler=scheduler,
        clip=clip,
        checkpoint=checkpoint,
        subspace=subspace,
        memory=memory,
        levels=_levels(levels, method, validation is not None),
        generators=several(generators),
    )
    engine = Engine(settings.model, settings.params)
    crew = engine._crew
    if checkpoint is None:
        return _run(settings, engine, crew, progress)
    if crew.is_ranked:
        with _alone_on(checkpoint, crew):
            return _run(settings, engine, crew, progress)
    with locked(checkpoint):
        remove_leftovers(checkpoint)
        return _run(settings, engine, crew, progress)


@contextmanager
def _alone_on(checkpoint: str | Path, crew: Crew) -> Iterator[None]:
    """The ranks of this run alone use the checkpoint, which the first one writes."""
    with ExitStack() as stack:

        def take() -> None:
            stack.enter_context(locked(checkpoint))
            remove_leftovers(checkpoint)

        crew.first("unlearn: checkpoint", take)
        yield


def _run(settings: Settings, engine: Engine, crew: Crew, progress: bool) -> History:
    run = Run(settings, engine, crew)

    def to_the_end() -> None:
        with Progress(run, progress and crew.is_first) as bar:
            while not run.history.reason:
                run.advance()
                bar.update()
            clear_gradients(settings)

    or_undone(to_the_end, run.undo)
    return run.history


def _levels(given: object, method: Method, is_known: bool) -> Levels | None:
    """The levels of a run: those given, the default ones, or none."""
    if given is None:
        given = is_known and not isinstance(method, Scheduled)
    if isinstance(given, bool):
        return Levels() if given else None
    if not isinstance(given, Levels):
        raise TypeError(
            f"levels: found {type(given).__name__}, expected an mtu.Levels, True, False or None."
        )
    return given
