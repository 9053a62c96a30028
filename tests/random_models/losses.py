"""How a task reads its tensor: to one loss a sample, and what may enter it from elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.random_models.draw import Draw, Run, Step

READS = ("square", "cross entropy", "absolute", "huber", "binary", "loop", "signed")
EXTRAS = (
    "penalty", "weighted samples", "neighbour", "contrastive", "ranking", "moved", "share of all", "common part",
    "silent samples", "smooth maximum",
)  # fmt: skip


def loss(d: Draw, seq: bool, shapes: list[Tensor]) -> Run:
    """A function of (step, h) that returns [N].

    Args:
        d: what it is drawn with.
        seq: whether h has positions.
        shapes: parameters that a penalty may be on.
    """
    head = d.choose("head", "own layer", "tied", "none")
    layer, w = (d.linear() if head == "own layer" else None), (d.tied() if head == "tied" else None)
    pool, read = (d.pick("mean", "flat", "last") if seq else ""), d.choose("reads", *READS)
    if pool:
        d.say(pool)
    extra = _extra(d, d.choose("loss", *EXTRAS), shapes) if d.rng.random() < 0.5 else None

    def run(step: Step, h: Tensor) -> Tensor:
        h = layer(h) if layer is not None else h @ w if w is not None else h
        h = h.mean(1) if pool == "mean" else h[:, -1] if pool == "last" else h.flatten(1)
        found = _read(h, read)
        return found if extra is None else extra(step, found, h)

    return run


def _read(h: Tensor, read: str) -> Tensor:
    if read == "cross entropy":
        return F.cross_entropy(h, torch.randint(h.shape[1], (len(h),)), reduction="none")
    if read == "binary":
        return F.binary_cross_entropy_with_logits(h, torch.rand_like(h), reduction="none").mean(1)
    if read == "huber":
        return F.smooth_l1_loss(h, torch.randn_like(h), reduction="none").mean(1)
    if read == "loop":
        return torch.stack([(x - 0.1 * i).square().mean() for i, x in enumerate(h)])
    if read == "signed":
        return (h * torch.randn_like(h)).sum(1)
    return h.square().mean(1) if read == "square" else (h - 0.3).abs().sum(1)


def _extra(d: Draw, what: str, shapes: list[Tensor]) -> Run:
    """A function of (step, loss [N], h [N, F])."""
    on = d.when()
    p = d.rng.choice(shapes)
    among = d.normal(1, 1)

    def run(step: Step, found: Tensor, h: Tensor) -> Tensor:
        s = 0.5 if on(step) else 0.0
        weights = torch.randint(0, 4, (step.n,)).double()
        if what == "penalty":
            return found + s * p.double().square().sum() * (weights if p.numel() % 4 else 1.0)
        if what == "weighted samples":
            return found * (weights if s else 1.0)
        if what == "silent samples":
            return found * (torch.arange(step.n) % 2 if s else torch.ones(step.n)).double()
        if what == "neighbour":
            return found + s * (h - h.roll(1, 0)).square().mean(1)
        if what == "contrastive":
            x = F.normalize(h + 0.1, dim=1)
            return found + s * F.cross_entropy(x @ x.T, torch.arange(step.n), reduction="none")
        if what == "ranking":
            return found + s * F.softplus(found[:, None] - found[None]).mean(1)
        if what == "moved":
            return found[torch.randperm(step.n) if s else torch.arange(step.n)]
        if what == "share of all":
            return found / (1 + s * found.square().sum())
        if what == "smooth maximum":
            return found + s * found.logsumexp(0)
        return found + s * torch.tanh(h.sum() * among.item())

    return run
