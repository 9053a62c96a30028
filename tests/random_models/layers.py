"""Operations that keep samples apart: layers, attention within a sample, recurrence, pooling, work in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.random_models.draw import Draw, Run, Step, operation


@operation()
def linear(d: Draw, seq: bool) -> Run:
    layer = d.linear()
    return lambda step, h: layer(h)


@operation(ways=("F.linear", "product", "transposed", "both ways"))
def tied_linear(d: Draw, seq: bool) -> Run:
    w, way = d.tied(), d.way

    def run(step: Step, h: Tensor) -> Tensor:
        if way == "product":
            return h @ w
        if way == "both ways":
            return torch.tanh(h @ w) @ w.T
        return F.linear(h, w if way == "F.linear" else w.T)

    return run


@operation()
def bottleneck(d: Draw, seq: bool) -> Run:
    inner, outer = d.linear(d.width, 3), d.linear(3, d.width)
    return lambda step, h: h + outer(F.gelu(inner(h)))


@operation()
def layer_norm(d: Draw, seq: bool) -> Run:
    whole = seq and d.pick(True, False)
    layer = d.layer(nn.LayerNorm([d.length, d.width] if whole else d.width))
    return lambda step, h: layer(h)


@operation()
def rms_norm(d: Draw, seq: bool) -> Run:
    layer = d.layer(nn.RMSNorm(d.width))
    return lambda step, h: layer(h)


@operation()
def frozen_batch_norm(d: Draw, seq: bool) -> Run:
    layer = d.layer(nn.BatchNorm1d(d.width)).eval()
    return lambda step, h: layer(h.transpose(1, 2)).transpose(1, 2) if seq else layer(h)


@operation()
def group_norm(d: Draw, seq: bool) -> Run:
    layer = d.layer(nn.GroupNorm(2, d.width))
    return lambda step, h: layer(h.transpose(1, 2)).transpose(1, 2) if seq else layer(h)


@operation(takes="seq", ways=("nothing", "relu_", "add_", "slice"))
def instance_norm(d: Draw, seq: bool) -> Run:
    layer = d.layer(nn.InstanceNorm1d(d.width, affine=True))
    writes = d.way

    def run(step: Step, h: Tensor) -> Tensor:
        return write(layer(h.transpose(1, 2)), writes).transpose(1, 2)

    return run


def write(h: Tensor, how: str) -> Tensor:
    """Work in place on a fresh tensor."""
    if how == "relu_":
        return h.relu_()
    if how == "add_":
        return h.add_(0.3)
    if how == "mul_":
        return h.mul_(0.7)
    if how == "masked_fill_":
        return h.masked_fill_(h.detach() > 0.5, 0.1)
    if how == "slice":
        h[:, :2] = h[:, 1:3] * 0.5 if h.shape[1] > 2 else 0.25
    return h


@operation(ways=("relu_", "add_", "mul_", "masked_fill_", "slice"))
def in_place(d: Draw, seq: bool) -> Run:
    layer, how = d.linear(), d.way
    return lambda step, h: write(layer(h), how)


@operation(takes="seq", ways=("one", "two", "depthwise"))
def convolution_1d(d: Draw, seq: bool) -> Run:
    groups = {"one": 1, "two": 2, "depthwise": d.width}[d.way]
    layer = d.layer(nn.Conv1d(d.width, d.width, 3, padding=1, groups=groups))
    return lambda step, h: layer(h.transpose(1, 2)).transpose(1, 2)


@operation(takes="seq")
def convolution_2d(d: Draw, seq: bool) -> Run:
    """Half of the features are channels, the others a side of the image."""
    channels = d.width // 2
    groups = d.pick(1, channels)
    d.say(f"{groups} groups")
    layer = d.layer(nn.Conv2d(channels, channels, 3, padding=1, groups=groups))
    return lambda step, h: (
        layer(h.unflatten(2, (channels, 2)).movedim(2, 1)).movedim(1, 2).flatten(2)
    )


@operation(takes="seq", ways=("embedded", "slice", "expanded"))
def positions(d: Draw, seq: bool) -> Run:
    """A table of positions, broadcast over the batch."""
    table = d.layer(nn.Embedding(d.length + 2, d.width))
    way, start = d.way, d.pick(0, 1, 2)

    def run(step: Step, h: Tensor) -> Tensor:
        at = start if step.k else 0
        if way == "slice":
            return h + table.weight[at : at + d.length]
        if way == "embedded":
            return h + table(torch.arange(at, at + d.length))
        return h + table(torch.arange(d.length)[None].expand(step.n, -1))

    return run


@operation(takes="seq")
def attention(d: Draw, seq: bool) -> Run:
    q, k, v = d.linear(), d.linear(), d.linear()
    return lambda step, h: torch.bmm((torch.bmm(q(h), k(h).mT) / 2).softmax(-1), v(h))


@operation(takes="seq")
def causal_attention(d: Draw, seq: bool) -> Run:
    q, k, v = d.linear(), d.linear(), d.linear()

    def heads(h: Tensor) -> Tensor:
        return h.unflatten(-1, (2, -1)).transpose(1, 2)

    def run(step: Step, h: Tensor) -> Tensor:
        read = F.scaled_dot_product_attention(heads(q(h)), heads(k(h)), heads(v(h)), is_causal=True)
        return read.transpose(1, 2).flatten(2)

    return run


@operation(takes="seq")
def multihead_attention(d: Draw, seq: bool) -> Run:
    first = d.pick(True, False)
    d.say("batch first" if first else "sequence first", *([] if first else ["sequence first"]))
    layer = d.layer(nn.MultiheadAttention(d.width, 2, batch_first=first))

    def run(step: Step, h: Tensor) -> Tensor:
        x = h if first else h.transpose(0, 1)
        y = layer(x, x, x, need_weights=False)[0]
        return y if first else y.transpose(0, 1)

    return run


@operation(takes="seq", ways=("GRU", "LSTM", "RNN"))
def recurrent(d: Draw, seq: bool) -> Run:
    kind, first = d.way, d.pick(True, False)
    kinds: dict[str, Callable[..., nn.RNNBase]] = {"GRU": nn.GRU, "LSTM": nn.LSTM, "RNN": nn.RNN}
    d.say("batch first" if first else "sequence first", *([] if first else ["sequence first"]))
    layer = d.layer(kinds[kind](d.width, d.width, batch_first=first))
    return lambda step, h: layer(h)[0] if first else layer(h.transpose(0, 1))[0].transpose(0, 1)


@operation(takes="seq")
def packed_recurrent(d: Draw, seq: bool) -> Run:
    """Lengths that are data: sequences sorted and packed."""
    layer, lengths = d.layer(nn.GRU(d.width, d.width, batch_first=True)), d.when()

    def run(step: Step, h: Tensor) -> Tensor:
        each = (
            torch.randint(1, d.length + 1, (step.n,))
            if lengths(step)
            else torch.full((step.n,), d.length)
        )
        packed = nn.utils.rnn.pack_padded_sequence(h, each, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(
            layer(packed)[0], batch_first=True, total_length=d.length
        )[0]

    return run


@operation(takes="seq")
def recurrent_cell(d: Draw, seq: bool) -> Run:
    """A loop over positions with a zero first state."""
    cell = d.layer(nn.GRUCell(d.width, d.width))

    def run(step: Step, h: Tensor) -> Tensor:
        state, found = h.new_zeros(step.n, d.width), []
        for x in h.unbind(1):
            state = cell(x, state)
            found.append(state)
        return torch.stack(found, 1)

    return run


@operation(takes="seq", gives="flat", ways=("mean", "last", "max", "sum", "first and last"))
def pooled(d: Draw, seq: bool) -> Run:
    how = d.way
    ways: dict[str, Run] = {
        "mean": lambda h: h.mean(1),
        "last": lambda h: h[:, -1],
        "max": lambda h: h.max(1).values,
        "sum": lambda h: h.sum(1),
        "first and last": lambda h: h[:, 0] * h[:, -1],
    }
    return lambda step, h: ways[how](h)


@operation(takes="flat", gives="seq", ways=("expanded", "repeated", "by a layer"))
def spread(d: Draw, seq: bool) -> Run:
    """One vector a sample becomes S of them."""
    layer, how = d.linear(d.width, d.width * d.length), d.way

    def run(step: Step, h: Tensor) -> Tensor:
        if how == "expanded":
            return h[:, None].expand(-1, d.length, -1)
        return (
            h[:, None].repeat(1, d.length, 1)
            if how == "repeated"
            else layer(h).unflatten(1, (d.length, -1))
        )

    return run


@operation(takes="seq")
def sequence_first(d: Draw, seq: bool) -> Run:
    layer, norm = d.linear(), d.layer(nn.LayerNorm(d.width))
    how = d.pick("product", "3d", "flat")

    def run(step: Step, h: Tensor) -> Tensor:
        x = norm(h.transpose(0, 1))
        if how == "flat":
            return layer(x.reshape(-1, d.width)).view(d.length, -1, d.width).transpose(0, 1)
        y = layer(x) if how == "3d" else x @ layer.weight
        return (y * torch.arange(1, d.length + 1)[:, None, None]).transpose(0, 1)

    return run


@operation()
def bilinear(d: Draw, seq: bool) -> Run:
    layer = d.layer(nn.Bilinear(d.width, d.width, d.width))
    return lambda step, h: torch.tanh(layer(h, h.flip(-1)))


@operation()
def weights_of_each_sample(d: Draw, seq: bool) -> Run:
    """A hypernetwork: matrices [N, F, F] made from the samples."""
    make = d.linear(d.width, d.width**2)

    def run(step: Step, h: Tensor) -> Tensor:
        w = torch.tanh(make(h.mean(1) if seq else h)).unflatten(1, (d.width, d.width))
        return torch.bmm(h if seq else h[:, None], w).view_as(h)

    return run


@operation()
def dropout(d: Draw, seq: bool) -> Run:
    layer = d.linear()
    return lambda step, h: F.dropout(layer(h), 0.4)


@operation()
def checkpointed(d: Draw, seq: bool) -> Run:
    part = nn.Sequential(d.linear(), nn.Tanh(), d.linear())
    on = d.when()
    return lambda step, h: checkpoint(part, h, use_reentrant=False) if on(step) else part(h)


@operation()
def float32_island(d: Draw, seq: bool) -> Run:
    layer = d.linear().float()
    d.say("float32", "float32")
    return lambda step, h: torch.tanh(layer(h.float())).double()


@operation()
def stopped_gradient(d: Draw, seq: bool) -> Run:
    layer, how = d.linear(), d.pick("factor", "samples", "mean")

    def run(step: Step, h: Tensor) -> Tensor:
        if how == "factor":
            return layer(h) * h.detach()
        if how == "mean":
            return layer(h - h.detach().mean(0))
        return torch.cat([layer(h[: step.n // 2]), layer(h[step.n // 2 :].detach())])

    return run


@operation()
def spectrum(d: Draw, seq: bool) -> Run:
    """Complex numbers on the way, over the features."""
    scale = d.parameter(d.width // 2 + 1)
    return lambda step, h: torch.fft.irfft(
        torch.fft.rfft(h, norm="ortho") * scale, n=d.width, norm="ortho"
    )


@operation(inputs=2, ways=("sum", "product", "cat", "gated", "in place"))
def joined(d: Draw, seq: bool) -> Run:
    layer, how = d.linear(2 * d.width, d.width), d.way

    def run(step: Step, h: Tensor, other: Tensor) -> Tensor:
        if how == "in place":
            return layer(torch.cat([h, h], -1)).add_(other)
        if how == "cat":
            return layer(torch.cat([h, other], -1))
        return (
            h + other
            if how == "sum"
            else h * other
            if how == "product"
            else torch.sigmoid(h) * other
        )

    return run
