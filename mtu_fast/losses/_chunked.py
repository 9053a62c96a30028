"""Losses of single positions from logits `[N, S, V]`, a few positions at a time.

The graph keeps the logits as they are and one number a position; softmaxes are made again in the
backward, chunk by chunk, and written into the one gradient `[N, S, V]` in the dtype of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**20  # entries of the logits that are widened at a time: 4 MiB in float32
ROWS_GO_ALONG = {0: 0, 1: 1}  # samples and positions of a loss are those of the logits


def token_losses(logits: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """`−log softmax(logits)[target]`, `[N, S]` float32 (float64 of float64); 0 where it does not count.

    Args:
        logits: `[N, S, V]`.
        target: `[N, S]` int64; any value where it does not count.
        counts: `[N, S]` bool.
    """
    return _TokenLoss.apply(logits, torch.where(counts, target, 0), counts)


def divergences(logits: Tensor, frozen: Tensor, counts: Tensor) -> Tensor:
    """`KL(softmax(frozen) ‖ softmax(logits))` of each position, `[N, S]` as of `token_losses`.

    Args:
        logits: `[N, S, V]`.
        frozen: the same shape; no gradient goes to it.
        counts: `[N, S]` bool.
    """
    return _Divergence.apply(logits, frozen.detach(), counts)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, counts: Tensor) -> Tensor:
        norm, found = _positions(logits), _positions(logits)
        for at in _chunks(logits):
            z = _wide(logits[:, at])
            # −log p_y = logsumexp(z) − z_y; the norm is kept, so that the backward needs no second
            # sum
            norm[:, at] = z.logsumexp(-1)
            found[:, at] = norm[:, at] - z.gather(-1, target[:, at, None]).squeeze(-1)
        # the logits are the model's own tensor: nothing of their size is added
        ctx.save_for_backward(logits, target, counts, norm)
        # what the engine reads: sample n of the loss is sample n of the logits
        ctx.rows_go_along = ROWS_GO_ALONG
        # a pass that only frees the graph brings no gradient and shall make none
        ctx.set_materialize_grads(False)
        return found.masked_fill_(~counts, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor | None) -> tuple[Tensor | None, None, None]:
        if b is None:
            return None, None, None
        logits, target, counts, norm = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for at in _chunks(logits):
            # softmax(z) = exp(z − logsumexp(z))
            p = (_wide(logits[:, at]) - norm[:, at, None]).exp_()
            picked = target[:, at, None]
            # ∂/∂z (−log p_y) = p − e_y
            p.scatter_(-1, picked, p.gather(-1, picked) - 1)
            gradient[:, at] = _weighted(p, b[:, at], counts[:, at])
        return gradient, None, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, frozen: Tensor, counts: Tensor) -> Tensor:
        found = _positions(logits)
        for at in _chunks(logits):
            log_q = _wide(frozen[:, at]).log_softmax(-1)
            # KL(q ‖ p) = Σ q (log q − log p)
            gap = log_q - _wide(logits[:, at]).log_softmax(-1)
            q = log_q.exp_()
            found[:, at] = (q * gap.masked_fill_(q == 0, 0)).sum(-1)  # of logits -inf
        ctx.save_for_backward(logits, frozen, counts)
        ctx.rows_go_along = ROWS_GO_ALONG
        ctx.set_materialize_grads(False)
        return found.masked_fill_(~counts, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor | None) -> tuple[Tensor | None, None, None]:
        if b is None:
            return None, None, None
        logits, frozen, counts = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for at in _chunks(logits):
            # ∂/∂z KL(q ‖ softmax(z)) = p − q
            p = _wide(logits[:, at]).softmax(-1).sub_(_wide(frozen[:, at]).softmax(-1))
            gradient[:, at] = _weighted(p, b[:, at], counts[:, at])
        return gradient, None, None


def _weighted(p: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """`b · p`, and 0 where a position does not count: its logits may be anything."""
    return p.mul_(b[..., None]).masked_fill_(~counts[..., None], 0)


def _positions(logits: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.empty(logits.shape[:2], dtype=wide, device=logits.device)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chunks(logits: Tensor) -> Iterator[slice]:
    samples, positions, classes = logits.shape
    # along positions, so that a chunk holds every sample
    step = max(1, CHUNK // max(1, samples * classes))
    for start in range(0, positions, step):
        yield slice(start, start + step)
