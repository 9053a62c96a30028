"""Normalisations, with their affine parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers.models.base import Net, Parts, case


@case()
def layer_norm(n: int) -> Parts:
    net = nn.Sequential(
        nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.LayerNorm((5, 6)), nn.Linear(6, 2)
    )
    return Parts(net, (torch.randn(n, 5, 3),))


@case()
def layer_norm_no_bias(n: int) -> Parts:
    net = nn.Sequential(
        nn.LayerNorm(3, bias=False), nn.Linear(3, 4), nn.LayerNorm(4, elementwise_affine=False)
    )
    return Parts(net, (torch.randn(n, 3),))


@case()
def rms_norm(n: int) -> Parts:
    return Parts(
        nn.Sequential(nn.Linear(3, 6), nn.RMSNorm(6), nn.Linear(6, 4)), (torch.randn(n, 5, 3),)
    )


@case()
def rms_norm_by_hand(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        h = self.inner(x)
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
        return torch.tanh(self.weight * h)

    return Parts(
        Net(run, inner=nn.Linear(3, 6), weight=nn.Parameter(torch.ones(6))), (torch.randn(n, 5, 3),)
    )


@case()
def group_norm(n: int) -> Parts:
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 4, 2)
    )
    return Parts(net, (torch.randn(n, 2, 4, 5),))


@case()
def group_norm_2d(n: int) -> Parts:
    return Parts(
        nn.Sequential(nn.Linear(3, 6), nn.GroupNorm(2, 6), nn.Tanh()), (torch.randn(n, 3),)
    )


@case()
def instance_norm(n: int) -> Parts:
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, affine=True), nn.Tanh())
    return Parts(net, (torch.randn(n, 2, 4, 5),))


def _batch_norm() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(2, 5, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(60, 4)
    )
    net.append(nn.BatchNorm1d(4))
    for layer in net:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return net


@case()
def batch_norm_eval(n: int) -> Parts:
    return Parts(_batch_norm().eval(), (torch.randn(n, 2, 4, 5),))


@case(couples=True)
def batch_norm_train(n: int) -> Parts:
    return Parts(_batch_norm().train(), (torch.randn(n, 2, 4, 5),))
