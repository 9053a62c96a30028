"""Random labels: train the forget samples on wrong answers, and how to draw these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast._arguments import check_dense, check_generator, check_tensors, check_whole
from mtu_fast.methods._arguments import check_fraction
from mtu_fast.methods.base import Method
from mtu_fast.methods.roles import FORGET, RETAIN, Roles, mean_weights


@dataclass(frozen=True)
class RandomLabels(Method):
    """w = alpha/k on the k retain rows and (1 - alpha)/m on the m forget rows of each task: descent on both.

    The losses of the forget rows are to be computed with wrong targets, drawn anew for every batch:
    `random_labels` for classes, `shuffled_targets` for everything else. With the true targets this
    is ordinary training. The weights of the two means are our reading: circulating code trains on
    the union of both sets, or on one after the other. Needs no Gram matrix: one weighted backward.

    Args:
        alpha: weight of the retain gradient, in [0, 1].

    Raises:
        TypeError: `alpha` is not a number.
        ValueError: `alpha` is outside [0, 1].

    Source: Golatkar, Achille and Soatto, "Eternal Sunshine of the Spotless Net", arXiv 1911.04933,
    where it is a baseline; uniform over the wrong classes as in Graves, Nagisetty and Ganesh,
    "Amnesiac Machine Learning", arXiv 2010.10981.
    """

    alpha: float = 0.5
    needs_gram = False

    def __post_init__(self) -> None:
        check_fraction("RandomLabels", "alpha", self.alpha)

    def __call__(self, G: Tensor | None, roles: Roles) -> Tensor:
        """Weights [R], float64; `G` is not read."""
        r, f = mean_weights(roles, RETAIN), mean_weights(roles, FORGET)
        return self.alpha * r + (1.0 - self.alpha) * f


def random_labels(target: Tensor, classes: int, generator: torch.Generator | None = None) -> Tensor:
    """(target + u) mod classes, u uniform in 1..classes-1: a wrong class, each of them equally likely.

    Entries outside 0..classes-1 (an ignored pixel, for example -1) stay as they are.

    Args:
        target: [...] integer true classes, of samples or of pixels.
        classes: number of classes C, at least 2.
        generator: draws; None for torch's default of the device.

    Returns:
        Labels [...] of the dtype and on the device of `target`.

    Raises:
        TypeError: `target` is not an integer tensor, `classes` no whole number, or `generator` is none.
        ValueError: fewer than two classes.
    """
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dtype == torch.bool:
        found = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(
            f"random_labels: target is {found}, expected integer classes; shuffled_targets takes the rest."
        )
    check_tensors(target=target)
    check_whole("random_labels: classes", classes, 2, 2**63 - 1)
    check_generator("random_labels: generator", generator)
    device = target.device if generator is None else generator.device
    # at least 1 and less than all classes: never back to the true one
    step = torch.randint(1, classes, target.shape, generator=generator, device=device).to(target)
    real = (target >= 0) & (target < classes)
    return torch.where(real, (target + step) % classes, target)


def shuffled_targets(target: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """target[σ] with σ a cyclic permutation of the N samples, uniform among these: nobody keeps their own.

    For dense and regression targets, where a wrong answer must still look like an answer. A
    permutation without fixed point over the batch is our reading; a single sample has nobody to
    swap with.

    Args:
        target: [N, ...] targets of a batch.
        generator: draws; None for torch's default of the device.

    Returns:
        The targets [N, ...], each sample with that of another.

    Raises:
        TypeError: `target` is no dense tensor, or `generator` is none.
        ValueError: fewer than two samples.
    """
    if not isinstance(target, Tensor):
        raise TypeError(
            f"shuffled_targets: found {type(target).__name__}, expected a tensor target [N, ...]."
        )
    check_dense("shuffled_targets: target", target)
    check_generator("shuffled_targets: generator", generator)
    if target.dim() == 0 or len(target) < 2:
        raise ValueError(
            f"shuffled_targets: target has shape {tuple(target.shape)}, expected [N, ...] with N >= 2: a sample needs "
            "another to take its target from. Use larger forget batches, or drop_last=True."
        )
    device = target.device if generator is None else generator.device
    cycle = torch.randperm(len(target), generator=generator, device=device).to(target.device)
    # along one cycle of all samples, so that nobody gets their own
    giver = torch.empty_like(cycle).scatter(0, cycle, cycle.roll(1))
    return target[giver]
