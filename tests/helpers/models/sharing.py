"""Parameters used more than once, through functions of them, in parts, or joined with others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.helpers.models.base import Loss, Net, Parts, case


@case()
def tied_language_model(n: int) -> Parts:
    """Embedding and output share one matrix; the loss predicts the next token."""

    def run(self: Net, index: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embedding(index)))
        return F.linear(h, self.embedding.weight)  # [N, S, 7]

    index = torch.randint(0, 7, (n, 6))

    def next_token(t: int, _: Tensor) -> tuple[nn.Module, Loss]:
        def loss(y: Tensor) -> Tensor:
            return F.cross_entropy(
                y[:, :-1].transpose(1, 2), (index[:, 1:] + t) % 7, reduction="none"
            ).mean(1)

        return nn.Linear(7, 7, bias=False) if t else nn.Identity(), loss

    return Parts(Net(run, embedding=nn.Embedding(7, 4), mix=nn.Linear(4, 4)), (index,), next_token)


@case()
def reused_module(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))

    return Parts(Net(run, inner=nn.Linear(4, 4)), (torch.randn(n, 4),))


@case()
def reused_in_a_loop(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 4)
        for step in x.unbind(1):
            h = torch.tanh(self.inside(h) + self.outside(step))
        return h

    return Parts(
        Net(run, inside=nn.Linear(4, 4), outside=nn.Linear(3, 4, bias=False)),
        (torch.randn(n, 5, 3),),
    )


@case()
def functional_child_weight(n: int) -> Parts:
    """The child is never called, its weight is; and called once besides."""

    def run(self: Net, x: Tensor) -> Tensor:
        return F.linear(
            torch.tanh(F.linear(x, self.child.weight)), self.child.weight, self.child.bias
        ) + self.child(x)

    return Parts(Net(run, child=nn.Linear(4, 4)), (torch.randn(n, 5, 4),))


@case()
def tied_autoencoder(n: int) -> Parts:
    """Decoder = encoder transposed."""

    def run(self: Net, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.bias)

    return Parts(
        Net(run, encoder=nn.Linear(3, 6), bias=nn.Parameter(torch.randn(3))), (torch.randn(n, 3),)
    )


@case()
def shared_between_kinds(n: int) -> Parts:
    """One parameter as a linear weight, a convolution kernel, an embedding and a scale."""

    def run(self: Net, x: Tensor, index: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.w))  # [N, 5, 4]
        h = h + F.conv1d(x.transpose(1, 2), self.w[:, :, None]).transpose(1, 2)
        return h + F.embedding(index, self.w.t()) * self.w[:, 1]

    return Parts(
        Net(run, w=nn.Parameter(torch.randn(4, 3))),
        (torch.randn(n, 5, 3), torch.randint(0, 3, (n, 5))),
    )


@case()
def root_parameter_twice(n: int) -> Parts:
    """Once as a shift, once as a vector in a product."""

    def run(self: Net, x: Tensor) -> Tensor:
        h = self.inner(x) + self.u
        return torch.tanh(h) * (h @ self.u)[:, None]

    return Parts(
        Net(run, inner=nn.Linear(3, 4), u=nn.Parameter(torch.randn(4))), (torch.randn(n, 3),)
    )


@case()
def weight_norm(n: int) -> Parts:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 4))
    return Parts(net, (torch.randn(n, 3),))


@case()
def weight_norm_conv(n: int) -> Parts:
    return Parts(
        parametrizations.weight_norm(nn.Conv1d(3, 4, 3, padding=1)), (torch.randn(n, 3, 5),)
    )


@case()
def spectral_norm(n: int) -> Parts:
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 4))
    return Parts(net.eval(), (torch.randn(n, 3),))  # eval: the power iteration rests


@case()
def orthogonal_weight(n: int) -> Parts:
    return Parts(nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 3))), (torch.randn(n, 4),))


@case()
def standardized_kernel(n: int) -> Parts:
    """A convolution kernel centred and scaled per output channel."""

    def run(self: Net, x: Tensor) -> Tensor:
        w = self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)
        return torch.tanh(
            F.conv2d(x, w / w.flatten(1).std(1)[:, None, None, None], self.conv.bias, padding=1)
        )

    return Parts(Net(run, conv=nn.Conv2d(2, 4, 3)), (torch.randn(n, 2, 3, 4),))


@case()
def packed_projections(n: int) -> Parts:
    """A packed parameter read by chunk, split, slice and select."""

    def run(self: Net, x: Tensor) -> Tensor:
        q, k, v = self.packed.chunk(3)  # [4, 3] each
        bq, bkv = self.bias.split([4, 8])
        h = torch.softmax(F.linear(x, q, bq) @ F.linear(x, k, bkv[:4]).transpose(1, 2), -1)
        return h @ F.linear(x, v, bkv[4:]) + self.packed[2, 1]

    parts = {"packed": nn.Parameter(torch.randn(12, 3)), "bias": nn.Parameter(torch.randn(12))}
    return Parts(Net(run, **parts), (torch.randn(n, 5, 3),))


@case()
def joined_parameters(n: int) -> Parts:
    """Weights concatenated from some parameters and stacked from others."""

    def run(self: Net, x: Tensor) -> Tensor:
        # [N, 6]
        h = torch.tanh(F.linear(x, torch.cat([self.u, self.v]), torch.cat([self.b, self.c])))
        return h[:, :5] @ torch.stack([self.r, self.s, self.r], 1)

    shapes = {"u": (2, 3), "v": (4, 3), "b": (2,), "c": (4,), "r": (5,), "s": (5,)}
    parts = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    return Parts(Net(run, **parts), (torch.randn(n, 3),))


@case()
def reshaped_parameters(n: int) -> Parts:
    """Views, transposes, permutations, squeezes and flips between parameter and op."""

    def run(self: Net, x: Tensor) -> Tensor:
        # [N, 5, 6]
        h = torch.tanh(F.linear(x, self.flat.view(4, 3)) @ self.cube.permute(2, 0, 1).flatten(1))
        h = F.conv1d(h.transpose(1, 2), self.kernel.squeeze(0).unsqueeze(-1), self.bias.flip(0))
        return h * self.column.t()[:, :, None]

    shapes = {"flat": (12,), "cube": (2, 3, 4), "kernel": (1, 5, 6), "bias": (5,), "column": (5, 1)}
    parts = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    return Parts(Net(run, **parts), (torch.randn(n, 5, 3),))


@case()
def generated_weights(n: int) -> Parts:
    """A hypernetwork: a weight made from parameters alone, and one made for each sample."""

    def run(self: Net, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.maker(self.code).view(4, 3)))
        return torch.bmm(self.per_sample(x).view(-1, 2, 4), h[:, :, None])

    parts = {
        "maker": nn.Linear(2, 12),
        "code": nn.Parameter(torch.randn(2)),
        "per_sample": nn.Linear(3, 8),
    }
    return Parts(Net(run, **parts), (torch.randn(n, 3),))
