"""GDR-GMA: rectify the directions of retain and forget gradient, weigh them by the retain loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast._arguments import check_number, check_positive
from mtu_fast.methods._arguments import check_gram, check_granularity
from mtu_fast.methods._gram import pair_gram
from mtu_fast.methods.base import Granularity, Method
from mtu_fast.methods.roles import FORGET, RETAIN, Roles, mean_weights


@dataclass(frozen=True)
class GDRGMA(Method):
    """Direction (1 - λ) r' + λ f' with λ = 1 / (1 + exp(slope · (L - threshold))).

    Where <r, f> < 0, r' = r - <r, f> / ‖f‖² · f and f' = f - <r, f> / ‖r‖² · r'; elsewhere r' = r
    and f' = f. r is the mean retain gradient and f minus the mean forget gradient, each summed over
    tasks; L is the mean retain loss. Our reading with several tasks: L is the mean over the tasks
    that have retain rows, so that the threshold means the same for any number of tasks; without any
    L is 0. The forget step is thus taken while the retain loss is low. A side that is missing or
    zero conflicts with nothing; subspace rows take no part. λ reads the value of the
    loss: under a loss scaler L is S times as large and the forget step never taken; hand over
    unscaled losses.

    Args:
        granularity: "tensor" as in the original code, "layer" or "global": where the two are
            rectified on their own.
        slope: how sharply λ falls with the retain loss.
        threshold: retain loss at which λ is one half.

    Raises:
        TypeError: `slope` or `threshold` is no number.
        ValueError: `granularity` is unknown, `slope` is negative, or a number is not finite.

    Source: Lin et al., "GDR-GMA: Machine Unlearning via Direction-Rectified and Magnitude-Adjusted
    Gradients", ACM Multimedia 2024, and its code, whose constants are the defaults.
    """

    granularity: Granularity = "tensor"
    slope: float = 100.0
    threshold: float = 0.02
    per = "task"
    scale_equivariant = False

    def __post_init__(self) -> None:
        check_granularity("GDRGMA", self.granularity)
        check_positive("GDRGMA: slope", self.slope, zero=True)
        check_number("GDRGMA: threshold", self.threshold)

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles` a ValueError.
        """
        G = check_gram("GDRGMA", G, roles)
        r = mean_weights(roles, RETAIN)
        f = -mean_weights(roles, FORGET)
        rr, rf, ff = pair_gram(G, r, f)
        conflict = rf.clamp(max=0.0)
        along_f = torch.where(ff > 0, conflict / ff, 0.0)
        along_r = torch.where(rr > 0, conflict / rr, 0.0)
        upright = r - along_f[..., None] * f
        # as in the code: of the r that is rectified already
        rectified = f - along_r[..., None] * upright
        share = self.forget_share(roles)
        return (1.0 - share) * upright + share * rectified

    def outside(self, roles: Roles) -> Tensor:
        """The weights of (1 - λ) r + λ f, [R]: the magnitudes adjusted, the directions as they are."""
        share = self.forget_share(roles)
        return (1.0 - share) * mean_weights(roles, RETAIN) - share * mean_weights(roles, FORGET)

    def forget_share(self, roles: Roles) -> Tensor:
        """λ, [] float64, from the retain losses in `roles`."""
        weights = mean_weights(roles, RETAIN)
        tasks = weights.sum().round().clamp(min=1.0)  # how many have retain rows
        loss = torch.where(weights > 0, roles.loss.to(weights), 0.0)
        mean = (weights * loss).sum() / tasks
        return torch.sigmoid(self.slope * (self.threshold - mean))
