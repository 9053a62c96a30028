"""Operations whose weight is a function of parameters alone, and parameters that enter in odd ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.random_models.draw import Draw, Run, Step, operation

WEIGHTS = (
    "1 + w", "exp", "standardised", "low rank", "w w'", "product of two", "kron",
    "softmax", "repeat", "masked", "cat", "cumsum", "rolled", "normalised",
)  # fmt: skip


@operation(ways=WEIGHTS)
def computed_weight(d: Draw, seq: bool) -> Run:
    """A weight [F, F] that a function makes of a parameter."""
    f = d.width
    kind = d.way
    w = d.parameter(
        *{"low rank": (f, 2), "repeat": (f // 2, f), "cat": (f // 2, f)}.get(kind, (f, f))
    )
    v = d.parameter(
        *{"low rank": (2, f), "kron": (f // 2, f // 2), "cat": (f - f // 2, f)}.get(kind, (f, f))
    )

    def made() -> Tensor:
        ways: dict[str, Run] = {
            "1 + w": lambda: 1 + w,
            "exp": lambda: torch.exp(0.3 * w) - 1,
            "standardised": lambda: (
                (w - w.mean(1, keepdim=True)) / (w.var(1, keepdim=True) + 1e-3).sqrt()
            ),
            "low rank": lambda: w @ v,
            "w w'": lambda: w @ w.T,
            "product of two": lambda: w * torch.sigmoid(v),
            "kron": lambda: torch.kron(w[:2, :2].contiguous(), v),
            "softmax": lambda: w.softmax(1),
            "repeat": lambda: w.repeat(2, 1),
            "masked": lambda: w.tril(),
            "cat": lambda: torch.cat([w, v]),
            "cumsum": lambda: w.cumsum(0),
            "rolled": lambda: w.roll(1, 0),
            "normalised": lambda: F.normalize(w, dim=1),
        }
        return ways[kind]()

    return lambda step, h: F.linear(h, made())


@operation(ways=("weight norm", "spectral norm", "orthogonal"))
def normed_weight(d: Draw, seq: bool) -> Run:
    way = d.way
    layer = d.linear()
    if way == "weight norm":
        parametrizations.weight_norm(layer)
    elif way == "spectral norm":
        parametrizations.spectral_norm(layer).eval()
    else:
        parametrizations.orthogonal(layer, orthogonal_map="cayley")
    return lambda step, h: layer(h)


@operation(ways=("features", "number", "exp", "cut", "cat", "positions"))
def scale_and_shift(d: Draw, seq: bool) -> Run:
    """Elementwise parameters: of the features, a number, from a table, cut from a longer one."""
    way = d.way
    scale, shift = (
        d.parameter(*([] if way in ("number", "exp") else [2 * d.width])),
        d.parameter(d.width),
    )
    grid, bias = d.parameter(d.length, d.width), d.parameter(d.width // 2)

    def run(step: Step, h: Tensor) -> Tensor:
        if way == "number":
            return h * scale + shift
        if way == "exp":
            return h * torch.exp(scale) - shift
        if way == "cat":
            return h + torch.cat([bias, bias * 2])
        if way == "positions" and seq:
            return h * (1 + grid)
        at = d.width // 2 if way == "cut" and step.k else 0
        return h * scale[at : at + d.width] + shift.expand_as(h)

    return run


@operation(takes="seq")
def relative_positions(d: Draw, seq: bool) -> Run:
    """Attention with a bias read from a table by index, the index moving between calls."""
    table, v, moves = d.parameter(2 * d.length), d.linear(), d.when()
    at = torch.arange(d.length)[:, None] - torch.arange(d.length) + d.length - 1

    def run(step: Step, h: Tensor) -> Tensor:
        bias = table[at.flip(0) if moves(step) else at]
        return (h @ h.mT / 2 + bias).softmax(-1) @ v(h)

    return run


@operation()
def computed_table(d: Draw, seq: bool) -> Run:
    """Rows of a table that a layer makes of parameters, read by ids."""
    base, layer = d.parameter(5, d.width), d.linear()
    way = d.pick("embedding", "index", "one-hot")

    def run(step: Step, h: Tensor) -> Tensor:
        table, ids = torch.tanh(layer(base)), torch.randint(5, h.shape[:-1])
        if way == "embedding":
            return h + F.embedding(ids, table)
        return h + (table[ids] if way == "index" else F.one_hot(ids, 5).double() @ table)

    return run


@operation()
def learned_slopes(d: Draw, seq: bool) -> Run:
    layer = d.layer(nn.PReLU(d.pick(1, d.width)))
    shared = layer.weight.numel() == 1
    return lambda step, h: layer(h) if shared or not seq else layer(h.mT).mT


@operation()
def mixed_layers(d: Draw, seq: bool) -> Run:
    """A softmax of three numbers weighs three layers."""
    alpha, parts = d.parameter(3), [d.linear() for _ in range(3)]

    def run(step: Step, h: Tensor) -> Tensor:
        return torch.stack([torch.tanh(f(h)) for f in parts], -1) @ alpha.softmax(0)

    return run


@operation()
def joined_biases(d: Draw, seq: bool) -> Run:
    """Query, key and value by one product with weights and biases put together."""
    parts, out = [d.layer(nn.Linear(d.width, d.width)) for _ in range(2)], d.linear(2 * d.width)

    def run(step: Step, h: Tensor) -> Tensor:
        w, b = torch.cat([f.weight for f in parts]), torch.cat([f.bias for f in parts])
        return out(F.linear(h, w, b))

    return run
