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


def _hooked(h: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Tensor:
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


def _clipped(g: Tensor, most: float) -> Tensor | None:
    """At most of this norm, all samples together; left alone below it."""
    norm = g.norm()
    return g * (most / norm) if norm > most else None


def _guarded(g: Tensor) -> Tensor | None:
    """Nothing of a gradient that is large anywhere, as of one that is not finite."""
    return torch.zeros_like(g) if bool((g.abs() > 0.5).any()) else None


# What a hook, or a backward of one's own, may make of a gradient; the bound is of about the size of
# gradients.
CHANGES: dict[str, Callable[[Tensor, float], Tensor | None]] = {
    "mixes": lambda g, bound: g - g.mean(0),
    "clamps": lambda g, bound: g.clamp(-bound, bound),
    "clips the norm": _clipped,
    "divides by the norm": lambda g, bound: g / (g.norm() + bound),
    "signs": lambda g, bound: torch.sign(g),
    "guards": lambda g, bound: _guarded(g),
    "drops what is small": lambda g, bound: torch.where(g.abs() < bound, 0.0, g),
}
Change = Callable[[Tensor], "Tensor | None"]


def _module_hooked(h: Tensor, change: Change) -> Tensor:
    """Through a module with a full backward hook."""
    module = torch.nn.Tanh()

    def hook(_: object, grads: Any, __: object) -> Any:
        changed = None if grads[0] is None else change(grads[0])
        return None if changed is None else (changed,)

    module.register_full_backward_hook(hook)
    return module(h)


class Changed(torch.autograd.Function):
    """x, with a backward that changes the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Change) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        changed = ctx.change(grads[0])
        return (grads[0] if changed is None else changed), None


PLACES: dict[str, Callable[[Tensor, Change], Tensor]] = {
    "tensor": _hooked,
    "module": _module_hooked,
    "function": lambda h, change: Changed.apply(h, change),
}


def changing(kind: str, first: int) -> Callable[[Draw, bool], Run]:
    """A change by a hook or a function; set from the call `first` on."""

    def make(d: Draw, seq: bool) -> Run:
        bound = d.pick(0.01, 0.1)
        # the two kinds that were there first stay on tensors
        places = ("tensor",) if kind in ("mixes", "clamps") else tuple(PLACES)
        place = PLACES[d.choose("hook on", *places) if len(places) > 1 else places[0]]
        return lambda step, h: place(h, lambda g: CHANGES[kind](g, bound)) if step.k >= first else h

    return make


def _named(kind: str, first: int) -> str:
    return f"hook that {kind}" + (", set later" if first else "")


PARAMETER, PARAMETER_LATER = "hook on a parameter", "hook on a parameter, set later"
RARE_HOOKS = {_named(kind, first): changing(kind, first) for kind in CHANGES for first in (0, 1)}
# What need not be linear may be refused, by words that speak of hooks, from the call on that sets
# it.
NOT_LINEAR = {_named(kind, first): first for kind in CHANGES if kind != "mixes" for first in (0, 1)}
