"""Losses of other shapes: masked tokens, ignored pixels, samples without gradient, dense tasks, pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.models.base import Loss, Net, Parts, case, pointwise


@case()
def masked_tokens(n: int) -> Parts:
    """Most positions have no gradient, in one sample all but one."""
    keep = torch.rand(n, 5) < 0.5
    keep[:, 4], keep[0] = True, torch.arange(5) == 4

    def task(t: int, features: Tensor) -> tuple[nn.Module, Loss]:
        goal = torch.randn(n, 5, 3 + t)
        head = nn.Linear(features.shape[-1], 3 + t)
        return head, lambda y: ((y - goal).square().mean(-1) * keep).sum(1) / keep.sum(1)

    return Parts(nn.Sequential(nn.Linear(3, 6), nn.Tanh()), (torch.randn(n, 5, 3),), task)


@case()
def ignored_pixels(n: int) -> Parts:
    def task(t: int, features: Tensor) -> tuple[nn.Module, Loss]:
        labels = torch.randint(-1, 3 + t, (n, 4, 5))
        head = nn.Conv2d(features.shape[1], 3 + t, 1)
        return head, lambda y: F.cross_entropy(y, labels, ignore_index=-1, reduction="none").sum((
            1,
            2,
        ))

    return Parts(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh()), (torch.randn(n, 2, 4, 5),), task
    )


@case()
def sample_without_gradient(n: int) -> Parts:
    """The first sample's rows are exactly zero."""

    def task(t: int, features: Tensor) -> tuple[nn.Module, Loss]:
        inner, weight = pointwise(t, (n,), 3), torch.arange(n).clamp(max=1)
        return nn.Linear(features.shape[-1], 3), lambda y: inner(y) * weight

    return Parts(
        nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5)), (torch.randn(n, 3),), task
    )


@case()
def dead_units(n: int) -> Parts:
    """A sample with every unit off: its rows are zero in the first layer by the data, not by the loss."""
    x = torch.randn(n, 3)
    x[0] = 0.0
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4))
    torch.nn.init.constant_(net[0].bias, -0.5)
    return Parts(net, (x,))


@case()
def dense_tasks(n: int) -> Parts:
    """A small U: down, up, concatenated skip; every task reads pixels."""

    def run(self: Net, x: Tensor) -> Tensor:
        skip = torch.relu(self.enter(x))  # [N, 4, 4, 6]
        low = torch.relu(self.norm(self.down(skip)))  # [N, 6, 2, 3]
        high = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        return torch.relu(self.join(torch.cat([high, skip], 1)))

    parts = {
        "enter": nn.Conv2d(3, 4, 3, padding=1),
        "down": nn.Conv2d(4, 6, 3, stride=2, padding=1),
        "norm": nn.BatchNorm2d(6),
        "join": nn.Conv2d(10, 5, 3, padding=1),
    }

    def task(t: int, features: Tensor) -> tuple[nn.Module, Loss]:
        inner = pointwise(t, (n, 4, 6), 3 + t)
        return nn.Conv2d(features.shape[1], 3 + t, 1), lambda y: inner(y.movedim(1, -1))

    return Parts(Net(run, **parts).eval(), (torch.randn(n, 3, 4, 6),), task)


@case()
def pooled_and_shuffled_pixels(n: int) -> Parts:
    """Max pooling, pixel shuffle, unfold and adaptive pooling between convolutions."""

    def run(self: Net, x: Tensor) -> Tensor:
        h = F.pixel_shuffle(F.max_pool2d(self.first(x), 2), 2)  # [N, 2, 4, 6]
        patches = F.unfold(h, 2, stride=2).transpose(1, 2)  # [N, 6, 8]
        return F.adaptive_avg_pool1d(torch.tanh(self.patch(patches)).transpose(1, 2), 2)

    return Parts(
        Net(run, first=nn.Conv2d(3, 8, 3, padding=1), patch=nn.Linear(8, 5)),
        (torch.randn(n, 3, 4, 6),),
    )


@case(couples=True)
def contrastive(n: int) -> Parts:
    """Each sample's loss reads the features of all."""

    def task(t: int, features: Tensor) -> tuple[nn.Module, Loss]:
        def loss(y: Tensor) -> Tensor:
            z = F.normalize(y, dim=1)
            return F.cross_entropy(z @ z.t() / 0.5, (torch.arange(n) + t) % n, reduction="none")

        return nn.Linear(features.shape[-1], 3 + t), loss

    return Parts(nn.Sequential(nn.Linear(3, 6), nn.Tanh()), (torch.randn(n, 3),), task)


@case()
def penalised_loss(n: int) -> Parts:
    """Every sample's loss also holds a penalty on a weight: one use feeds all rows without telling them apart."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))

    def task(t: int, features: Tensor) -> tuple[nn.Module, Loss]:
        inner = pointwise(t, (n,), 3)
        return nn.Linear(
            features.shape[-1], 3
        ), lambda y: inner(y) + 0.1 * net[0].weight.square().sum()

    return Parts(net, (torch.randn(n, 3),), task)
