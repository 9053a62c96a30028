"""What a run was asked for: checked, and as text to tell one run from another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast._arguments import check_function, check_positive, check_whole
from mtu_fast._checks.files import check_folder
from mtu_fast._rows.inner import inner
from mtu_fast._rows.update import check_method
from mtu_fast.memory import Memory, check_memory
from mtu_fast.methods import Method
from mtu_fast.subspace import Subspace, check_subspace
from mtu_fast.unlearning.arguments import check_loader, check_model, check_optimizer
from mtu_fast.unlearning.loaders import length_of
from mtu_fast.unlearning.loop.levels import Levels
from mtu_fast.unlearning.loop.schedule import Scheduled, check_schedule
from mtu_fast.unlearning.reading import LossFunction, ScoreFunction

Bound = float | Mapping[str, float] | None


def check_given(method: object) -> None:
    """What a run is given is a method.

    Raises:
        TypeError: it is something else, or weights of rows, which differ from batch to batch.
    """
    check_method(method)
    if not isinstance(method, Method):
        raise TypeError("method: found weights of rows, expected an mtu.Method: batches differ.")


@dataclass(frozen=True)
class Settings:
    """The arguments of `unlearn`, as given."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    forget: Iterable[Any]
    retain: Iterable[Any]
    losses: LossFunction
    method: Method
    targets: Sequence[str] | None
    params: list[Tensor] | None
    validation: Iterable[Any] | None
    score: ScoreFunction | None
    forget_losses: LossFunction | None
    monitor: Iterable[Any] | None
    max_steps: int | None
    epochs: int | None
    every: int
    settle: int | None
    max_drift: Bound
    scheduler: Any
    clip: float | None
    checkpoint: str | Path | None
    subspace: Subspace | None
    memory: Memory | None
    levels: Levels | None
    generators: tuple[torch.Generator, ...]

    def __post_init__(self) -> None:
        check_model("model", self.model)
        self._check_optimizer()
        self._check_functions()
        check_schedule(self.method)
        check_subspace(self.method, self.subspace)
        check_memory(self.method, self.memory)
        self._check_levels()
        self._check_settle()
        for name in ("forget", "retain", "validation", "monitor"):
            loader = getattr(self, name)
            if loader is not None or name in ("forget", "retain"):
                check_loader(name, loader)
        check_whole("every", self.every, 1)
        for name in ("max_steps", "epochs"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        self._check_bounds()
        self._check_end()
        if self.checkpoint is not None:
            check_folder("checkpoint", self.checkpoint)
            self.method.describe()  # raises where a checkpoint could not tell it from another

    def _check_levels(self) -> None:
        name = type(self.method).__name__
        if self.levels is None and self.method.needs_levels:
            raise ValueError(
                f"levels: {name} goes by the losses and scores of data never seen; pass validation, and leave levels "
                "at its default. OrthoGrad with memory=mtu.Memory() is the same without them."
            )
        if self.levels is not None and self.validation is None:
            raise ValueError(
                f"levels: found {self.levels!r} without validation; pass a loader of data never seen, which they are "
                "measured on."
            )

    def _check_settle(self) -> None:
        if self.settle is None:
            return
        check_whole("settle", self.settle, 1)
        name = type(self.method).__name__
        if isinstance(self.method, Scheduled):
            raise ValueError(f"settle: {name} ends by a schedule of its own; leave settle out.")
        if self.levels is None:
            fix = "pass validation" if self.validation is None else "leave levels at their default"
            raise ValueError(
                f"settle: {name} without levels goes on forgetting at the level; {fix}."
            )
        for group in self.optimizer.param_groups:
            # some that find their own rates have None there
            if group.get("lr") is None:
                raise ValueError(
                    f"settle: a group of {type(self.optimizer).__name__} has no lr, expected one that can fall to "
                    "zero; leave settle out, or take another optimizer."
                )

    def _check_bounds(self) -> None:
        _bound("clip", self.clip)
        if not isinstance(self.max_drift, Mapping):
            _bound("max_drift", self.max_drift)
            return
        for task, bound in self.max_drift.items():
            _bound(f"max_drift[{task!r}]", bound)

    def _check_end(self) -> None:
        if self.scheduler is not None:
            check_function("scheduler.step", getattr(self.scheduler, "step", None), "")
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise TypeError(
                "scheduler: ReduceLROnPlateau waits for a score; expected one that is stepped every step."
            )
        if self.validation is not None:
            return
        if isinstance(self.method, Scheduled):
            raise ValueError(
                f"validation: {self.method!r} takes its schedule from held-out data; pass a loader of it."
            )
        if self.max_steps is None and self.epochs is None:
            raise ValueError(
                "unlearn: nothing would end this run; pass validation (it stops at the held-out level), max_steps or "
                "epochs."
            )

    def _check_functions(self) -> None:
        check_function("losses", self.losses, "model, batch")
        if self.forget_losses is not None:
            check_function("forget_losses", self.forget_losses, "model, batch")
        if self.score is not None:
            check_function("score", self.score, "model, loader")

    def _check_optimizer(self) -> None:
        check_optimizer("optimizer", self.optimizer)
        mine = set(map(id, self.model.parameters()))
        for group in self.optimizer.param_groups:
            # by identity: == of tensors compares their numbers
            if not mine.isdisjoint(map(id, group["params"])):
                return
        raise ValueError(
            "optimizer: none of its parameters is the model's; build it from model.parameters()."
        )

    def describe(self) -> dict[str, Any]:
        """What tells this run from others, as text and numbers; limits of its length are no part of it."""
        groups = map(_rates, self.optimizer.param_groups)
        return {
            "model": self._shapes(),
            "params": self._shared(),
            "method": self.method.describe(),
            "optimizer": [type(self.optimizer).__name__, *groups],
            "scheduler": None if self.scheduler is None else type(self.scheduler).__name__,
            "targets": None if self.targets is None else list(self.targets),
            "every": self.every,
            "settle": self.settle,
            "max_drift": dict(self.max_drift)
            if isinstance(self.max_drift, Mapping)
            else self.max_drift,
            "clip": self.clip,
            "generators": len(self.generators),
            "subspace": None if self.subspace is None else self.subspace.options,
            "memory": None if self.memory is None else self.memory.options,
            "levels": None if self.levels is None else self.levels.options,
            "batches": {"forget": length_of(self.forget), "retain": length_of(self.retain)},
        }

    def _shapes(self) -> list[str]:
        """Name, shape and type of what the model's state holds."""
        found = []
        for name, p in inner(self.model).state_dict().items():
            if isinstance(p, Tensor):
                found.append(f"{name} {tuple(p.shape)} {p.dtype}")
        return found

    def _shared(self) -> list[str]:
        """Names of the parameters that the method works on."""
        given = self.model.parameters() if self.params is None else self.params
        inside = set(map(id, given))
        return [name for name, p in inner(self.model).named_parameters() if id(p) in inside]

    def drift_bound(self, task: str) -> float:
        """How much the task's mean loss on what is retained may rise."""
        bound = self.max_drift
        if isinstance(bound, Mapping):
            bound = bound.get(task)
        return math.inf if bound is None else bound


def _bound(name: str, value: Any) -> None:
    """A positive number, or None for no bound."""
    if value is not None:
        check_positive(name, value)


def _rates(group: Mapping[str, Any]) -> str:
    # a scheduler changes lr as it goes; what was asked for is the first one
    rate = group.get("initial_lr", group.get("lr"))
    return f"lr {rate}, weight decay {group.get('weight_decay')}"
