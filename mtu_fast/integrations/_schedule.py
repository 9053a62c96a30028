"""The hooks of a scheduled method (∇τ), called from the steps of a `Trainer`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mtu_fast._checks.losses import labelled
from mtu_fast.methods import Method, Scheduled


class Schedule:
    """An epoch of the method is a pass over its leading side, counted in steps of the `Trainer`.

    Args:
        method: the scheduled method.
        sizes: {"forget", "retain": items of each side}.
        batch: items of each side in a step.
    """

    def __init__(self, method: Scheduled, sizes: Mapping[str, int], batch: int) -> None:
        self.method = method
        self._sizes = dict(sizes)
        self.begin(batch)

    def begin(self, batch: int) -> None:
        """A run begins, with as many items of each side in a step: its first step has hooks of its own."""
        # the last batch of a pass may be smaller
        self._batches = {side: math.ceil(count / batch) for side, count in self._sizes.items()}
        self._steps = self._batches[self.method.epoch_of]
        self._begun: int | None = None

    def before(self, step: int, validation: Callable[[], Mapping[str, float]]) -> None:
        """The hooks that are due before this step, counted from 0; asked again within it, none."""
        # with accumulation every micro-batch of a step asks
        if step == self._begun:
            return
        self._begun = step
        # a run that is resumed has what `prepare` found from its checkpoint
        if step == 0:
            self.method.prepare(
                **self._sizes,
                forget_batches=self._batches["forget"],
                retain_batches=self._batches["retain"],
            )
        if step % self._steps == 0:
            self.method.start_epoch(step // self._steps, validation)

    def is_last(self, step: int) -> bool:
        """Whether the method's last epoch ends with this step."""
        epochs = self.method.epochs
        return epochs is not None and step + 1 >= epochs * self._steps


def schedule_of(trainer: Any, method: Method, retain: Any, forget: Any) -> Schedule | None:
    """The schedule of a method that has one; None for others.

    Args:
        trainer: the `Trainer`.
        method: its method.
        retain: the data set to be retained.
        forget: that to be forgotten, or None.

    Raises:
        ValueError: no second data set, a stream to be retained, or no validation data.
    """
    if not isinstance(method, Scheduled):
        return None
    sized = hasattr(retain, "__len__") and hasattr(forget, "__len__")
    if not sized or trainer.eval_dataset is None:
        raise ValueError(
            f"method: {type(method).__name__} takes its schedule from the sizes of both sides and from data never "
            "seen; expected train_dataset= and forget_dataset= with a length, and eval_dataset=."
        )
    batch = items_of_a_step(trainer.args, trainer.args.per_device_train_batch_size)
    return Schedule(method, {"forget": len(forget), "retain": len(retain)}, batch)


def items_of_a_step(args: Any, micro: int) -> int:
    """Items of each side in a step: those of all its micro-batches, on all processes."""
    items: int = micro * args.gradient_accumulation_steps * args.world_size
    return items


def validation_losses(trainer: Any) -> dict[str, float]:
    """{task: mean loss} over the `Trainer`'s evaluation data, in evaluation mode; random states stay.

    Raises:
        ValueError: there are no losses in it.
    """
    model = trainer.model
    was = model.training
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            for batch in trainer.get_eval_dataloader():
                given = dict(trainer._prepare_inputs(batch))
                # the model's forward does not know the column
                given.pop(trainer.forget_column, None)
                named, present = labelled(trainer.losses(model, given))
                held = {task: (loss, present[task]) for task, loss in named.items()}
                # of all processes, without what fills up their last batches
                for task, (loss, has) in trainer.accelerator.gather_for_metrics(held).items():
                    there = loss[has].double()
                    sums[task] = sums.get(task, 0.0) + float(there.sum())
                    counts[task] = counts.get(task, 0) + len(there)
    finally:
        model.train(was)
    if not any(counts.values()):
        raise ValueError(
            "eval_dataset: found no sample with a loss, expected at least one: the method's schedule looks at losses "
            "of data never seen. With dataloader_drop_last=True it holds no fewer than per_device_eval_batch_size on "
            "each process."
        )
    return {task: total / counts[task] for task, total in sums.items() if counts[task]}
