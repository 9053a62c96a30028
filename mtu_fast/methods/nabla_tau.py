"""∇τ: ascend on forget until its loss is that of data never seen, with a schedule that is derived, not tuned."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtu_fast._arguments import (
    MOST,
    check_function,
    check_mapping,
    check_number,
    check_whole,
    held_in,
)
from mtu_fast.methods.base import Scheduled
from mtu_fast.methods.roles import FORGET, RESTING, RETAIN, Roles, check_roles, mean_weights

REFRESH = 5  # epochs between two looks at the validation data
LIMIT = 0.3  # share of the training samples that the paper forgets at most


@dataclass
class _Schedule:
    """Where the schedule stands: alpha at the start and in this epoch, epochs in all, {task: τ}."""

    start: float = 0.0
    alpha: float = 0.0
    epochs: int | None = None
    tau: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class NablaTau(Scheduled):
    """w = -2 alpha (τ_t - L_t)₊ / m on the m forget rows of task t, (1 - alpha)/k on its k retain rows.

    The gradient of Σ_t alpha (τ_t - L_t)₊² + (1 - alpha) · mean retain loss, where L_t is the mean
    forget loss of the batch and τ_t the mean loss on validation data: the ascent ends by itself
    where the forget loss is that of data never seen. Needs no Gram matrix: one weighted backward.
    One τ per task, summed, is our reading.

    Not homogeneous: losses times S make the retain part S times as long, the forget part S² times
    where τ is of scaled losses too, and end the ascent where S L_t exceeds a τ of unscaled ones. A
    loss scaler undoes none of this by dividing `.grad` by S: hand over unscaled losses.

    Nothing is to be chosen. With f the forget share of the training samples, R and F the numbers of
    retain and forget
    batches: alpha starts at 5/3 · f and falls by that over E after every epoch, E = int(6R / 2F)
    epochs, and τ is refreshed every 5 epochs. An epoch is one pass over the forget batches, so that
    a run makes three passes over the retained data (our reading). `mtu.unlearn` does all this by
    the two hooks

        prepare(...)                      # before the first step
        start_epoch(epoch, validation)    # before every epoch, counted from 0

    which a loop of one's own calls the same way. A fact of the paper, not enforced: `RECOMMENDED`,
    the optimizer and batches it used, with BatchNorm in eval mode.

    Source: Trippa et al., "∇τ: Gradient-based and Task-Agnostic machine Unlearning", arXiv
    2403.14339, and its code.
    """

    _now: _Schedule = field(default_factory=_Schedule, init=False, repr=False, compare=False)
    needs_gram = False
    scale_equivariant = False
    epoch_of = "forget"

    RECOMMENDED: ClassVar[Mapping[str, Any]] = MappingProxyType({
        "optimizer": "AdamW",
        "lr": 1e-3,
        "decay": "linear, to 0.1 of it",
        "forget_batch": 256,
        "retain_batch": 256,
    })

    @property
    def alpha(self) -> float:
        """The weight of the forget term in this epoch."""
        return self._now.alpha

    @property
    def tau(self) -> dict[str, float]:
        """{task: the forget loss at which the ascent ends}, a copy."""
        return dict(self._now.tau)

    @property
    def epochs(self) -> int | None:
        """E, passes over the forget batches; None before `prepare`."""
        return self._now.epochs

    def prepare(
        self, *, forget: int, retain: int, forget_batches: int, retain_batches: int
    ) -> None:
        """alpha₀ = 5/3 · forget / (forget + retain), E = max(1, int(6 · retain_batches / (2 · forget_batches))).

        Args:
            forget: samples to forget.
            retain: samples to retain.
            forget_batches: batches of a pass over the former.
            retain_batches: batches of a pass over the latter.

        Raises:
            TypeError: a number that is not whole.
            ValueError: a number below 1, or so large a forget share that alpha₀ exceeds 1.
        """
        check_whole("NablaTau: forget", forget, 1, MOST)
        check_whole("NablaTau: retain", retain, 1, MOST)
        check_whole("NablaTau: forget_batches", forget_batches, 1, MOST)
        check_whole("NablaTau: retain_batches", retain_batches, 1, MOST)
        share = forget / (forget + retain)
        if 5 * share > 3:
            raise ValueError(
                f"NablaTau: forget: {forget} of {forget + retain} samples are to be forgotten ({share:.0%}), which "
                f"gives the retain rows a negative weight 1 - 5/3 · {share:.2f}; the paper goes to 30 %. Retrain on "
                f"the {retain} that stay instead."
            )
        if share > LIMIT:
            warnings.warn(
                f"NablaTau: {forget} of {forget + retain} samples are to be forgotten ({share:.0%}); the paper tried "
                "the schedule up to 30 %. Consider retraining.", UserWarning, stacklevel=2,
            )  # fmt: skip
        self._now.start = self._now.alpha = 5.0 / 3.0 * share
        self._now.epochs = max(1, int(6 * retain_batches / (2 * forget_batches)))

    def start_epoch(self, epoch: int, validation: Callable[[], Mapping[str, float]]) -> None:
        """alpha = alpha₀ · max(0, 1 - epoch/E); τ = validation() where epoch is a multiple of 5.

        Args:
            epoch: counted from 0.
            validation: gives {task: mean validation loss}; called only where it is needed.

        Raises:
            TypeError: `epoch` is no whole number, or `validation` no function that gives {task: number}.
            ValueError: `epoch` is below 0, or a loss is not finite.
            RuntimeError: `prepare` was not called before.
        """
        check_whole("NablaTau: epoch", epoch, 0, MOST)
        check_function("NablaTau: validation", validation, "")
        now = self._now
        if now.epochs is None:
            raise RuntimeError(
                "NablaTau: start_epoch was called before prepare(forget=..., retain=..., ...)."
            )
        if epoch % REFRESH == 0 or not now.tau:
            now.tau = _checked(validation())
        now.alpha = now.start * max(0.0, 1.0 - epoch / now.epochs)

    def __call__(self, G: Tensor | None, roles: Roles) -> Tensor:
        """Weights [R], float64; `G` is not read.

        Raises:
            RuntimeError: the hooks were not called before.
            ValueError: a task with forget rows has no τ.
        """
        check_roles(roles)
        now = self._now
        if now.epochs is None or not now.tau:
            raise RuntimeError(
                "NablaTau: alpha and τ are not known yet. mtu.unlearn sets them; in a loop of your own call "
                "method.prepare(forget=..., retain=..., forget_batches=..., retain_batches=...) once and "
                "method.start_epoch(epoch, validation) before each pass over the forget batches."
            )
        self._check_known(roles)
        f = mean_weights(roles, FORGET)
        every = f + mean_weights(roles, RESTING)  # L_t is of all forget rows, as τ_t is of all data
        # Filled on the device: a copy from the host would wait for it.
        tau = torch.stack([f.new_full((), now.tau.get(task, 0.0)) for task in roles.tasks])
        # task by task: sums have one order on every device, and what is not finite stays in its task
        of_task = roles.task == torch.arange(len(tau), device=tau.device)[:, None]
        loss = torch.where(of_task, every * roles.loss, 0.0).sum(1)
        below = (tau - loss).clamp(min=0.0)[roles.task]
        return (1.0 - now.alpha) * mean_weights(roles, RETAIN) - 2.0 * now.alpha * below * f

    def _check_known(self, roles: Roles) -> None:
        """Every task with forget rows has a τ; one that is only retained needs none."""
        missing = [i for i, task in enumerate(roles.tasks) if task not in self._now.tau]
        if not missing:  # the rows are not looked at, which would wait for the device
            return
        forgotten = roles.task[roles.kind == FORGET].unique().tolist()
        lacking = [roles.tasks[i] for i in missing if i in forgotten]
        if lacking:
            raise ValueError(
                f"NablaTau: no τ for tasks {lacking}; validation gave a loss for {list(self._now.tau)} only."
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands: plain numbers."""
        return asdict(self._now)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        held_in("NablaTau: state", state, "start", "alpha", "epochs", "tau")
        start, alpha, tau = float(state["start"]), float(state["alpha"]), dict(state["tau"])
        self._now.start, self._now.alpha = start, alpha
        self._now.epochs, self._now.tau = state["epochs"], tau


def _checked(losses: object) -> dict[str, float]:
    """What `validation` gave: {task: finite number}."""
    found = {}
    for task, loss in check_mapping("NablaTau: validation", losses, "{task: loss}").items():
        value = loss.item() if isinstance(loss, Tensor) and loss.numel() == 1 else loss
        check_number(f"NablaTau: validation[{task!r}]", value)
        found[task] = float(value)
    return found
