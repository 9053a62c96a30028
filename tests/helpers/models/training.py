"""What training does to a graph: recurrence, dropout, checkpoints, in-place ops, adapters, frozen parts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.models.base import Net, Parts, case


@case()
def gru(n: int) -> Parts:
    return Parts(
        Net(lambda self, x: self.cells(x)[0], cells=nn.GRU(3, 4, batch_first=True)),
        (torch.randn(n, 5, 3),),
    )


@case()
def lstm(n: int) -> Parts:
    """Two layers, both directions, sequence first."""

    def run(self: Net, x: Tensor) -> Tensor:
        return self.cells(x.transpose(0, 1))[0].transpose(0, 1)

    return Parts(
        Net(run, cells=nn.LSTM(3, 2, num_layers=2, bidirectional=True)), (torch.randn(n, 4, 3),)
    )


@case()
def relu_inplace(n: int) -> Parts:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(24, 5))
    net.append(nn.ReLU(inplace=True))
    return Parts(net, (torch.randn(n, 2, 4, 5),))


@case()
def writes_in_place(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        h = self.inner(x).clone()  # [N, 5, 4]
        h[:, 0] += self.token
        h[:, 1:3] = self.mask
        return h.mul_(self.scale).add_(self.bias).tanh_()

    shapes = {"token": (4,), "mask": (2, 4), "scale": (4,), "bias": (5, 4)}
    parts = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    return Parts(Net(run, inner=nn.Linear(3, 4), **parts), (torch.randn(n, 5, 3),))


@case(dropout=True)
def dropout(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        return F.dropout(self.outer(self.drop(torch.tanh(self.inner(x)))), 0.3)

    return Parts(
        Net(run, inner=nn.Linear(3, 6), drop=nn.Dropout(0.4), outer=nn.Linear(6, 5)),
        (torch.randn(n, 5, 3),),
    )


@case()
def checkpointed(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        h = checkpoint(self.first, x, use_reentrant=False)
        return self.last(checkpoint(self.second, h, use_reentrant=False))

    first = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 2, 3))
    second = nn.Sequential(nn.Flatten(1), nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh())
    return Parts(
        Net(run, first=first, second=second, last=nn.Linear(5, 4)), (torch.randn(n, 3, 5),)
    )


@case(dropout=True)
def checkpointed_dropout(n: int) -> Parts:
    """The recomputation must see the masks of the forward."""
    block = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 4))
    net = Net(
        lambda self, x: torch.tanh(checkpoint(self.block, x, use_reentrant=False)), block=block
    )
    return Parts(net, (torch.randn(n, 5, 3),))


@case()
def frozen_parameters(n: int) -> Parts:
    """Whole layers, a bias and a norm's scale do not require grad; one parameter is never used."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.GroupNorm(2, 4), nn.Flatten()
    )
    net.append(nn.Linear(24, 5)).append(nn.Linear(5, 4))
    for p in (*net[0].parameters(), net[2].bias, net[3].weight, net[6].weight):
        p.requires_grad_(False)
    net.register_parameter("unused", nn.Parameter(torch.randn(3)))
    return Parts(net, (torch.randn(n, 2, 4, 5),))


def _lora() -> dict[str, Any]:
    base = nn.Linear(4, 6).requires_grad_(False)
    return {
        "base": base,
        "a": nn.Parameter(torch.randn(2, 4)),
        "b": nn.Parameter(torch.randn(6, 2)),
    }


@case()
def lora_factored(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + 0.5 * (x @ self.a.t() @ self.b.t()))

    return Parts(Net(run, **_lora()), (torch.randn(n, 5, 4),))


@case()
def lora_merged(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.base.weight + 0.5 * (self.b @ self.a), self.base.bias))

    return Parts(Net(run, **_lora()), (torch.randn(n, 5, 4),))


class _Swish(torch.autograd.Function):
    """x · sigmoid(β x) with a learned β: the gradient is written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(x, beta)
        return x * torch.sigmoid(beta * x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, beta = ctx.saved_tensors
        s = torch.sigmoid(beta * x)
        slope = s * (1 - s)
        return grad * (s + beta * x * slope), (grad * x * x * slope).sum_to_size(beta.shape)


@case()
def custom_function(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        return _Swish.apply(self.inner(x), self.beta)

    return Parts(
        Net(run, inner=nn.Linear(3, 4), beta=nn.Parameter(torch.rand(4))), (torch.randn(n, 5, 3),)
    )


class _Region(nn.Module):
    """Gives its hidden layer too: else that would be a donated buffer, which allows only one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.first(x))
        return h, self.second(h)


@case(compiled=True)
def compiled_region(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        return self.after(torch.cat(self.region(x), 1))

    region = torch.compile(_Region(), backend="aot_eager")
    return Parts(Net(run, region=region, after=nn.Linear(10, 5)), (torch.randn(n, 3),))
