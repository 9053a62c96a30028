"""MUNBa: a bargain between the retain and the forget side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast.methods._arguments import check_gram
from mtu_fast.methods._gram import pair_gram
from mtu_fast.methods.base import Method, dependence_tolerance
from mtu_fast.methods.roles import FORGET, RETAIN, Roles, mean_weights

FALLBACK = 0.1  # weight of the forget side where there is no bargain


@dataclass(frozen=True)
class MUNBa(Method):
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
    scale_equivariant = False

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles` a ValueError.
        """
        G = check_gram("MUNBa", G, roles)
        r = mean_weights(roles, RETAIN)
        f = -mean_weights(roles, FORGET)
        rr, rf, ff = pair_gram(G, r, f)
        share = 1.0 + rf / (rr * ff).sqrt()  # 1 + cosine; not a number where a side is zero
        bargain = share > dependence_tolerance(roles.dtype) ** 2
        # g_11 + g_12 √(g_11 / g_22) = g_11 (1 + cosine)
        up = torch.where(bargain, (rr * share).rsqrt(), 1.0)
        down = torch.where(bargain, (ff * share).rsqrt(), FALLBACK)
        return up[..., None] * r + down[..., None] * f

    def outside(self, roles: Roles) -> Tensor:
        """The weights of r + f, [R]: each loss by itself."""
        return mean_weights(roles, RETAIN) - mean_weights(roles, FORGET)
