"""MUNBa: a bargain between the retain and the forget side."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast.methods.base import (
    FORGET,
    RETAIN,
    Roles,
    check_gram,
    dependence_tolerance,
    mean_weights,
)
from mtu_fast.methods.signed import pair_gram

FALLBACK = 0.1  # weight of the forget side where there is no bargain


class MUNBa:
    """Direction w_1 r + w_2 f with w_1 = 1 / √(g_11 + g_12 √(g_11 / g_22)), w_2 = w_1 √(g_11 / g_22).

    r is the mean retain gradient and f minus the mean forget gradient, each summed over tasks, g
    their 2x2 Gram: the Nash bargaining solution of two players, of length √2 whatever the scale of
    the losses. Without a bargain (f opposite to r to the dependence tolerance, or a side that is
    missing or has no gradient) the direction is r + 0.1 f. Subspace rows take no part. With a
    bargain losses times S leave d as it is, and a loss scaler, which divides `.grad` by S, then
    makes the step S times too short; hand over unscaled losses. Our reading: ascent on the forget
    losses as they are, one player for all tasks.

    Source: Wu and Harandi, "MUNBa: Machine Unlearning via Nash Bargaining", arXiv 2411.15537, and
    its code.
    """

    per = "task"
    granularity = "global"
    needs_gram = True

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles` a ValueError.
        """
        G = check_gram("MUNBa", G, roles)
        r, f = mean_weights(roles, RETAIN), -mean_weights(roles, FORGET)
        rr, rf, ff = pair_gram(G, r, f)
        share = 1.0 + rf / (rr * ff).sqrt()  # 1 + cosine; not a number where a side is zero
        bargain = share > dependence_tolerance(roles.dtype) ** 2
        one, few = torch.ones_like(share), torch.full_like(share, FALLBACK)
        up = torch.where(bargain, (rr * share).rsqrt(), one)
        down = torch.where(bargain, (ff * share).rsqrt(), few)
        return up[..., None] * r + down[..., None] * f

    def outside(self, roles: Roles) -> Tensor:
        """The weights of r + f, [R]: each loss by itself."""
        return mean_weights(roles, RETAIN) - mean_weights(roles, FORGET)

    def __repr__(self) -> str:
        return "MUNBa()"
