"""Operations in which samples meet: a mixture, and the way in which it enters, which may be shut in the first calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_models.draw import Draw, Run, Step, operation, per_sample
from tests.random_models.functions import Centered

Mixture = Callable[[Draw], Run]
MIXTURES: dict[str, Mixture] = {}


def mixture(make: Mixture) -> Mixture:
    """Register a mixture as an operation: it gives a tensor of h's shape, and never sees one sample alone."""

    def coupled(d: Draw, seq: bool) -> Run:
        mix = make(d)
        return _entering(d, lambda step, h: mix(step, h) if step.n > 1 else h * 1.0)

    coupled.__name__ = f"mixture_{make.__name__}"
    operation()(coupled)
    return make


def _entering(d: Draw, mix: Run) -> Run:
    """How a mixture enters: on or off by a schedule, wholly or in part."""
    on = d.when()
    way = d.choose(
        "enters", "number", "tensor", "parameter", "per sample", "where", "some samples", "branch", "lerp", "half",
        "half by cat", "by a layer",
    )  # fmt: skip
    gate = d.parameter() if way == "parameter" else torch.zeros(())
    layer, half = d.linear() if way == "by a layer" else nn.Identity(), d.width // 2

    def run(step: Step, h: Tensor) -> Tensor:
        s = 0.6 if on(step) else 0.0
        if way == "branch":
            return mix(step, h) if s else h
        if way == "half":
            a, b = h.chunk(2, -1)
            return torch.cat([a - s * mix(step, h)[..., half:], b], -1)
        if way == "half by cat":
            a, b = h.chunk(2, -1)
            return torch.cat(
                [torch.tanh(a), mix(step, torch.cat([b, b], -1))[..., half:] if s else b * 1.0], -1
            )
        mixed = mix(step, h)
        if way == "number":
            return h + s * mixed
        if way == "tensor":
            return h + torch.tensor(s).double() * mixed
        if way == "per sample":
            return h + per_sample(s * torch.randint(0, 3, (step.n,)).double(), h) * mixed
        if way == "where":
            return torch.where((torch.arange(d.width) < half) & (s > 0), mixed, h)
        if way == "some samples":
            chosen = (
                torch.arange(step.n) < (step.n + 1) // 2
                if s
                else torch.zeros(step.n, dtype=torch.bool)
            )
            return torch.where(per_sample(chosen, h), mixed, h)
        if way == "lerp":
            return torch.lerp(h, mixed, s)
        if way == "by a layer":
            return h + s * torch.tanh(layer(mixed))
        with torch.no_grad():
            gate.fill_(s)
        return h + gate * mixed

    return run


@mixture
def flip(d: Draw) -> Run:
    return lambda step, h: h.flip(0)


@mixture
def roll(d: Draw) -> Run:
    shift = d.pick(1, -1)
    return lambda step, h: h.roll(shift, 0)


@mixture
def mean(d: Draw) -> Run:
    keep = d.pick(True, False)
    return lambda step, h: h.mean(0, keepdim=keep).expand_as(h)


@mixture
def centered(d: Draw) -> Run:
    return lambda step, h: h - h.mean(0)


@mixture
def standardised(d: Draw) -> Run:
    return lambda step, h: (h - h.mean(0)) / (h.var(0, unbiased=False) + 0.1).sqrt()


@mixture
def cumulated(d: Draw) -> Run:
    return lambda step, h: h.cumsum(0) / step.n


@mixture
def softmax(d: Draw) -> Run:
    return lambda step, h: h.softmax(0) * step.n


@mixture
def logsumexp(d: Draw) -> Run:
    return lambda step, h: h - h.logsumexp(0)


@mixture
def sorting(d: Draw) -> Run:
    return lambda step, h: h.sort(0).values


@mixture
def maximum(d: Draw) -> Run:
    how = d.pick("max", "amax", "running")
    if how == "running":
        return lambda step, h: h.cummax(0).values
    return lambda step, h: h - (h.max(0).values if how == "max" else h.amax(0))


@mixture
def whole_numbers(d: Draw) -> Run:
    """A product with a matrix of small whole numbers: sums that may look like a row."""
    what = d.pick("any", "permutation", "powers")

    def run(step: Step, h: Tensor) -> Tensor:
        if what == "permutation":
            m = torch.eye(step.n)[torch.randperm(step.n)]
        elif what == "powers":
            m = torch.exp2(torch.randint(0, 3, (step.n, step.n)).float()) * torch.randint(
                0, 2, (step.n, step.n)
            )
        else:
            m = torch.randint(-1, 3, (step.n, step.n))
        return torch.einsum("nm,m...->n...", m.double() / 2, h)

    return run


@mixture
def shifted_by_padding(d: Draw) -> Run:
    def run(step: Step, h: Tensor) -> Tensor:
        return F.pad(h, (*[0] * (2 * h.dim() - 2), 1, 0))[:-1]

    return run


@mixture
def reflected(d: Draw) -> Run:
    at = d.pick(0, 1, 2)
    return lambda step, h: F.pad(h.movedim(0, -1), (1, 1), mode="reflect")[
        ..., at : at + step.n
    ].movedim(-1, 0)


@mixture
def windows(d: Draw) -> Run:
    """Pairs of neighbours by unfold, the last sample alone."""

    def run(step: Step, h: Tensor) -> Tensor:
        pairs = h.unfold(0, 2, 1)
        return torch.cat([pairs[..., 0] * pairs[..., 1], h[-1:]])

    return run


@mixture
def repeated(d: Draw) -> Run:
    tiles = d.pick("repeat", "repeat_interleave")

    def run(step: Step, h: Tensor) -> Tensor:
        if tiles == "repeat":
            return h.repeat(2, *[1] * (h.dim() - 1))[1 : 1 + step.n]
        return h.repeat_interleave(2, 0)[: step.n]

    return run


@mixture
def convolution(d: Draw) -> Run:
    """A kernel over the samples, constant or learned."""
    learned = d.pick(True, False)
    kernel = d.parameter(1, 1, 3) if learned else d.normal(1, 1, 3)

    def run(step: Step, h: Tensor) -> Tensor:
        x = h.flatten(1).T[:, None]
        return F.conv1d(x, kernel, padding=1)[:, 0].T.reshape(h.shape)

    return run


@mixture
def attention_across(d: Draw) -> Run:
    """Attention between samples; a mask that may leave each alone."""
    layer, alone = d.linear(), d.when()
    way = d.pick("mask", "bias", "sdpa")

    def run(step: Step, h: Tensor) -> Tensor:
        x = h.flatten(1)
        apart = ~torch.eye(step.n, dtype=torch.bool) & (not alone(step))
        if way == "sdpa":
            return F.scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=~apart)[
                0
            ].view_as(h)
        scores = x @ x.T / 4
        scores = scores.masked_fill(apart, -torch.inf) if way == "mask" else scores - 1e9 * apart
        return torch.einsum("nm,m...->n...", scores.softmax(1), layer(h))

    return run


@mixture
def kernel(d: Draw) -> Run:
    """Similarities by distance."""

    def run(step: Step, h: Tensor) -> Tensor:
        x = h.flatten(1)
        near = torch.exp(-(x[:, None] - x).square().mean(-1))
        return torch.einsum("nm,m...->n...", near, h) / step.n

    return run


@mixture
def recurrent_over_samples(d: Draw) -> Run:
    layer = d.layer(nn.RNN(d.width, d.width))
    return lambda step, h: layer(h if h.dim() == 3 else h[:, None])[0].view(h.shape)


@mixture
def running_state(d: Draw) -> Run:
    """A loop over samples that hands a state on."""
    layer, decay = d.linear(), d.pick(0.5, 1.0)

    def run(step: Step, h: Tensor) -> Tensor:
        state, found = torch.zeros_like(h[0]), []
        for x in h:
            state = torch.tanh(layer(x) + decay * state)
            found.append(state)
        return torch.stack(found)

    return run


@mixture
def leave_one_out(d: Draw) -> Run:
    """A loop over samples, each against the mean of the others."""

    def run(step: Step, h: Tensor) -> Tensor:
        others = [torch.cat([h[:i], h[i + 1 :]]).mean(0) for i in range(step.n)]
        return torch.stack([x - m for x, m in zip(h, others, strict=True)])

    return run


@mixture
def pairs(d: Draw) -> Run:
    """The first half times the second."""

    def run(step: Step, h: Tensor) -> Tensor:
        k = step.n // 2
        return torch.cat([h[:k] * h[k : 2 * k], h[k:]])

    return run


@mixture
def reshaped(d: Draw) -> Run:
    """Rows and columns read in another order."""
    return lambda step, h: h.transpose(0, -1).reshape(h.shape)


@mixture
def spectrum_over_samples(d: Draw) -> Run:
    return lambda step, h: torch.fft.fft(h, dim=0, norm="ortho").real + h


@mixture
def own_function(d: Draw) -> Run:
    return lambda step, h: Centered.apply(h)


@mixture
def groups_of_two(d: Draw) -> Run:
    """A norm over pairs of samples; an odd one is left as it is."""

    def run(step: Step, h: Tensor) -> Tensor:
        even = step.n // 2 * 2
        x = h[:even].unflatten(0, (2, -1))
        return torch.cat([(x - x.mean(0)).flatten(0, 1), h[even:]])

    return run


@mixture
def shares(d: Draw) -> Run:
    return lambda step, h: h / (0.5 + h.abs().sum(0))


@mixture
def second_moments(d: Draw) -> Run:
    """Features whitened, or nearly, by a matrix of all samples."""
    return lambda step, h: h @ torch.tanh(h.flatten(0, -2).T @ h.flatten(0, -2) / step.n)


@mixture
def neighbours_of_two_kinds(d: Draw) -> Run:
    """One product of a layer's output with that for other samples."""
    layer = d.linear()
    return lambda step, h: torch.tanh(layer(h)) * layer(h.roll(1, 0))


@mixture
def writes_between_samples(d: Draw) -> Run:
    """In place: one sample's activations are written over another's."""
    how = d.pick("copy", "add", "index")

    def run(step: Step, h: Tensor) -> Tensor:
        y = h * 1.0
        if how == "copy":
            y[1:] = h[:-1]
        elif how == "add":
            y[0].add_(h[-1])
        else:
            y[torch.arange(step.n) % 2 == 0] = h[:1].tanh()
        return y

    return run


@operation(ways=("nothing", "relu_", "add_", "slice"))
def batch_norm(d: Draw, seq: bool) -> Run:
    """Statistics of the batch; of one sample, those of before."""
    layer, writes = d.layer(nn.BatchNorm1d(d.width)), d.way

    def run(step: Step, h: Tensor) -> Tensor:
        layer.train(step.n > 1)
        y = layer(h.transpose(1, 2)).transpose(1, 2) if seq else layer(h)
        if writes == "relu_":
            return y.relu_()
        if writes == "add_":
            return y.add_(h)
        if writes == "slice":
            y[:, :2] = 0.5
        return y

    return run


@operation(
    ways=("stack", "cat", "unbind", "layers in turn", "assigned", "assigned in order", "in reverse")
)
def loop(d: Draw, seq: bool) -> Run:
    """A loop over samples that keeps them apart."""
    layers = [d.linear(), d.linear()]
    way = d.way

    def run(step: Step, h: Tensor) -> Tensor:
        f = layers[0]
        if way == "cat":
            return torch.cat([f(h[i : i + 1]) for i in range(step.n)])
        if way == "unbind":
            return torch.stack([torch.tanh(f(x)) for x in h.unbind(0)])
        if way == "layers in turn":
            return torch.stack([layers[(i + step.k) % 2](h[i]) for i in range(step.n)])
        if way == "in reverse":
            return torch.stack([f(h[i]) for i in reversed(range(step.n))])
        if way == "stack":
            return torch.stack([f(h[i]) for i in range(step.n)])
        order = torch.randperm(step.n) if step.k and way == "assigned" else torch.arange(step.n)
        y = torch.zeros_like(h)
        for i, at in enumerate(order.tolist()):
            y[at] = f(h[i])
        return y

    return run
