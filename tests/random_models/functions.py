"""Autograd functions of one's own, and hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.random_models.draw import Draw, Run, Step, operation, per_sample


class Squared(torch.autograd.Function):
    """x², kept apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


class Product(torch.autograd.Function):
    """The last dimension of x times a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (g,), (x, w) = grads, ctx.saved_tensors
        return g @ w.T, x.flatten(0, -2).T @ g.flatten(0, -2)


class Centered(torch.autograd.Function):
    """x less its mean over the samples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] - grads[0].mean(0)


class PartlyCentered(torch.autograd.Function):
    """x less a share of its mean over the samples, a number that is no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x - share * x.mean(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] - ctx.share * grads[0].mean(0), None


@operation(ways=("squared", "product", "partly centered"))
def custom_function(d: Draw, seq: bool) -> Run:
    way = d.way
    w, on = d.parameter(d.width, d.width), d.when()

    def run(step: Step, h: Tensor) -> Tensor:
        if way == "product":
            return Product.apply(h, w)
        if way == "squared":
            return Squared.apply(torch.tanh(h))
        return PartlyCentered.apply(h, 0.5 if on(step) else 0.0)

    return run


def _hooked(h: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor of its own, equal to h, with a hook on its gradient."""
    y = h * 1.0
    y.register_hook(lambda g: None if g is None else hook(g))
    return y


@operation(ways=("all", "features", "samples", "positions"))
def scaling_hook(d: Draw, seq: bool) -> Run:
    """Linear, and each row by itself."""
    on, way, scale = d.when(), d.way, d.normal(d.width)

    def run(step: Step, h: Tensor) -> Tensor:
        if not on(step):
            return h
        c = torch.randn(step.n, dtype=torch.float64)
        if way == "samples":
            return _hooked(h, lambda g: g * per_sample(c, g))
        if way == "positions":
            return _hooked(h, lambda g: g * torch.arange(g[0].numel()).view_as(g[0]))
        return _hooked(h, lambda g: g * 0.5 if way == "all" else g * scale)

    return run


def mixing_hook(first: int) -> Callable[[Draw, bool], Run]:
    """Linear, but rows meet; set from the call `first` on."""

    def make(d: Draw, seq: bool) -> Run:
        return lambda step, h: _hooked(h, lambda g: g - g.mean(0)) if step.k >= first else h

    return make


def clamping_hook(first: int) -> Callable[[Draw, bool], Run]:
    """Not linear; set from the call `first` on."""

    def make(d: Draw, seq: bool) -> Run:
        bound = d.pick(0.01, 0.1)
        return lambda step, h: (
            _hooked(h, lambda g: g.clamp(-bound, bound)) if step.k >= first else h
        )

    return make


MIXES, MIXES_LATER = "hook that mixes", "hook that mixes, set later"
CLAMPS, CLAMPS_LATER = "hook that clamps", "hook that clamps, set later"
PARAMETER, PARAMETER_LATER = "hook on a parameter", "hook on a parameter, set later"
RARE_HOOKS = {
    MIXES: mixing_hook(0),
    MIXES_LATER: mixing_hook(1),
    CLAMPS: clamping_hook(0),
    CLAMPS_LATER: clamping_hook(1),
}
