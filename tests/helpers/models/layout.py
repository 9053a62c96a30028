"""Where a sample lies: sequence first, windows, routing, shuffles, ragged sets, loops over samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers.models.base import Net, Parts, case


@case()
def sequence_first(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        return self.mlp(x.transpose(0, 1).contiguous()).transpose(0, 1)  # [S, N, D] inside

    return Parts(
        Net(run, mlp=nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))),
        (torch.randn(n, 5, 3),),
    )


@case()
def samples_last(n: int) -> Parts:
    """A convolution whose width is the batch."""

    def run(self: Net, x: Tensor) -> Tensor:
        h = self.conv(x.permute(1, 2, 0)[None])  # [1, O, S', N]
        return torch.tanh(h)[0].permute(2, 0, 1)

    return Parts(Net(run, conv=nn.Conv2d(3, 4, (2, 1))), (torch.randn(n, 3, 5),))


@case()
def windows(n: int) -> Parts:
    """Cyclic shift, 2×2 windows folded into the batch, attention inside them, the shift undone."""

    def run(self: Net, x: Tensor) -> Tensor:
        h = torch.roll(x, (-1, -1), (1, 2))  # [N, 4, 6, D]
        h = h.reshape(-1, 2, 2, 3, 2, 4).transpose(2, 3).reshape(-1, 4, 4)  # [N*6, 4, D]
        q, k, v = self.qkv(h).chunk(3, -1)
        h = torch.softmax(q @ k.transpose(1, 2) + self.bias, -1) @ v
        h = h.reshape(-1, 2, 3, 2, 2, 4).transpose(2, 3).reshape(-1, 4, 6, 4)
        return x + self.out(torch.roll(h, (1, 1), (1, 2)))

    parts = {
        "qkv": nn.Linear(4, 12),
        "out": nn.Linear(4, 4),
        "bias": nn.Parameter(torch.randn(4, 4)),
    }
    return Parts(Net(run, **parts), (torch.randn(n, 4, 6, 4),))


@case()
def mixture_of_experts(n: int) -> Parts:
    """Top-1 routing of tokens: each expert sees a subset that depends on the data."""

    def run(self: Net, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # [N*S, 4]
        score, choice = torch.softmax(self.gate(tokens), -1).max(-1)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            index = (choice == e).nonzero()[:, 0]
            out = out.index_add(
                0, index, expert(tokens.index_select(0, index)) * score[index, None]
            )
        return out.view_as(x)

    experts = nn.ModuleList(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(3)
    )
    return Parts(Net(run, gate=nn.Linear(4, 3), experts=experts), (torch.randn(n, 5, 4),))


@case()
def routed_by_scatter(n: int) -> Parts:
    """Tokens sorted by expert, one block per expert with zero padding, scattered back."""

    def run(self: Net, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        score, choice = torch.softmax(self.gate(tokens), -1).max(-1)
        order = choice.argsort(stable=True)
        rank = torch.arange(len(order)) - (choice[order][:, None] > choice[order][None]).sum(1)
        slots = choice[order] * len(order) + rank
        blocks = tokens.new_zeros(2 * len(order), 4).index_copy(0, slots, tokens[order])
        blocks = torch.bmm(blocks.view(2, -1, 4), self.experts).flatten(0, 1)
        h = torch.zeros_like(tokens).scatter(0, order[:, None].expand(-1, 4), blocks[slots])
        return (h * score[:, None]).view_as(x)

    parts = {"gate": nn.Linear(4, 2), "experts": nn.Parameter(torch.randn(2, 4, 4))}
    return Parts(Net(run, **parts), (torch.randn(n, 5, 4),))


@case()
def shuffled_batch(n: int) -> Parts:
    def run(self: Net, x: Tensor, order: Tensor) -> Tensor:
        return self.after(torch.tanh(self.inner(x[order]))[order.argsort()])

    parts = {"inner": nn.Linear(3, 6), "after": nn.Linear(6, 4)}
    return Parts(Net(run, **parts), (torch.randn(n, 5, 3), torch.randperm(n)))


@case()
def shuffled_anew(n: int) -> Parts:
    """The order is drawn at every forward."""

    def run(self: Net, x: Tensor) -> Tensor:
        order = torch.randperm(x.shape[0])
        return torch.tanh(self.inner(x[order]))[order.argsort()]

    return Parts(Net(run, inner=nn.Linear(3, 6)), (torch.randn(n, 3),))


@case()
def ragged_sets(n: int) -> Parts:
    """Points of all samples in one long list, summed per sample."""

    def run(self: Net, points: Tensor, owner: Tensor) -> Tensor:
        h = torch.tanh(self.each(points))  # [points, 4]
        return self.whole(h.new_zeros(n, 4).index_add(0, owner, h))

    owner = torch.arange(n).repeat_interleave(torch.arange(n) % 3 + 1)
    owner = owner[torch.randperm(len(owner))]
    return Parts(
        Net(run, each=nn.Linear(3, 4), whole=nn.Linear(4, 5)), (torch.randn(len(owner), 3), owner)
    )


@case()
def loop_over_samples(n: int) -> Parts:
    """One call per sample: as many uses as samples, each with one row."""

    def run(self: Net, x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(self.inner(row)) for row in x])

    return Parts(Net(run, inner=nn.Linear(3, 4)), (torch.randn(n, 3),))


@case()
def half_the_batch(n: int) -> Parts:
    """Some layers see only some samples."""

    def run(self: Net, x: Tensor) -> Tensor:
        k = x.shape[0] // 2
        h = torch.cat([self.first(x[:k]), self.second(x[k:])])
        return torch.tanh(h + torch.where(x[:, :1] > 0, self.bias, -self.bias))

    parts = {
        "first": nn.Linear(3, 4),
        "second": nn.Linear(3, 4),
        "bias": nn.Parameter(torch.randn(4)),
    }
    return Parts(Net(run, **parts), (torch.randn(n, 3),))
