"""Losses of picked classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.graph.recorded.cases import (
    REDUCTIONS,
    case,
    index,
    x,
)

for _reduction in REDUCTIONS:
    case("NllLoss", lambda r=_reduction: F.nll_loss(x(4, 3), index(3, 4), reduction=r))
    case(
        "NllLoss",
        lambda r=_reduction: F.nll_loss(x(3, 3), index(3, 3), torch.rand(3).double(), reduction=r),
    )
    case("NllLoss", lambda r=_reduction: F.nll_loss(x(3), index(3), reduction=r))
    case(
        "NllLoss",
        lambda r=_reduction: F.nll_loss(x(4, 3), torch.tensor([0, -100, 2, 1]), reduction=r),
    )
    case(
        "NllLoss2D", lambda r=_reduction: F.nll_loss(x(2, 3, 4, 5), index(3, 2, 4, 5), reduction=r)
    )
    case(
        "NllLoss2D", lambda r=_reduction: F.nll_loss(x(3, 3, 3, 3), index(3, 3, 3, 3), reduction=r)
    )
    case(
        "NllLoss2D",
        lambda r=_reduction: F.nll_loss(x(2, 3, 4, 2, 2), index(3, 2, 4, 2, 2), reduction=r),
    )
    case(
        "MultiMarginLoss",
        lambda r=_reduction: F.multi_margin_loss(x(4, 3), index(3, 4), reduction=r),
    )
    case("MultiMarginLoss", lambda r=_reduction: F.multi_margin_loss(x(3), index(3), reduction=r))
    case(
        "MultilabelMarginLoss",
        lambda r=_reduction: F.multilabel_margin_loss(x(4, 3), index(3, 4, 3), reduction=r),
    )
    case(
        "MultilabelMarginLoss",
        lambda r=_reduction: F.multilabel_margin_loss(x(3), index(3, 3), reduction=r),
    )
    case(
        "CtcLoss",
        lambda r=_reduction: F.ctc_loss(
            x(6, 3, 4).log_softmax(-1),
            index(3, 3, 2) + 1,
            torch.tensor([6, 5, 4]),
            torch.tensor([2, 1, 2]),
            reduction=r,
        ),
        lambda r=_reduction: F.ctc_loss(
            x(6, 4).log_softmax(-1), index(3, 2) + 1, torch.tensor(6), torch.tensor(2), reduction=r
        ),
    )
