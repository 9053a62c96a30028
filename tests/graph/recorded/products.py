"""Products and attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.recorded.cases import (
    Case,
    case,
    x,
)

_shape: tuple[int, ...]  # of every loop below


case(
    "Mm",
    lambda: x(3, 4) @ x(4, 5),
    lambda: x(3, 3) @ x(3, 3),
    lambda: x(1, 3) @ x(3, 1),
    lambda: x(4, 3).t() @ x(4, 3),
)
case(
    "Addmm",
    *(
        lambda s=s: torch.addmm(x(*s), x(3, 4), x(4, 5), beta=2)
        for s in ((5,), (3, 5), (3, 1), (1, 5), ())
    ),
)
case(
    "Addmm",
    lambda: torch.addmm(x(3), x(3, 3), x(3, 3)),
    lambda: torch.addmm(x(3, 1), x(3, 3), x(3, 3)),
)
case(
    "Baddbmm",
    lambda: torch.baddbmm(x(3), x(3, 3, 3), x(3, 3, 3)),
    lambda: torch.baddbmm(x(3, 3), x(3, 3, 3), x(3, 3, 3)),
)
case("Addmm", lambda: F.linear(x(2, 3, 4), x(5, 4), x(5)))
case("Mv", lambda: x(3, 4) @ x(4), lambda: x(3, 3) @ x(3))
case("Dot", lambda: x(3) @ x(3))
case("Bmm", lambda: torch.bmm(x(2, 3, 4), x(2, 4, 5)), lambda: torch.bmm(x(3, 3, 3), x(3, 3, 3)))
case(
    "Bmm",
    lambda: x(2, 3, 4) @ x(4, 5).expand(2, 4, 5),
    lambda: torch.einsum("bik,bjk->bij", x(2, 3, 4), x(2, 5, 4)),
)
case(
    "Cat",
    lambda: torch.cat([x(2, 3), x(4, 3)], 0),
    lambda: torch.cat([x(2, 3), x(2, 1), x(2, 2)], -1),
)
case(
    "Cat",
    lambda: torch.cat([x(2, 3).detach(), x(4, 3)], 0),
    lambda: torch.cat([x(1, 3), x(2, 3).detach()], 0),
)
case("GroupedMm", lambda: torch._grouped_mm(
    torch.rand(6, 16, requires_grad=True), torch.rand(2, 16, 8, requires_grad=True), offs=torch.tensor([2, 6]).int()
))  # fmt: skip
for _shape in ((2, 3, 5), (5,), (3, 1), (1, 3, 5), (2, 1, 1)):
    case("Baddbmm", lambda s=_shape: torch.baddbmm(x(*s), x(2, 3, 4), x(2, 4, 5), beta=0.5))


def attended(
    heads: int, groups: int, mask: tuple[int, ...] | None, causal: bool = False, size: int = 4
) -> Case:
    """Attention [2, heads, 3, size] to 5 positions, maybe with a bias."""

    def make() -> Tensor:
        q, k, v = x(2, heads, 3, size), x(2, groups, 5, size), x(2, groups, 5, size)
        bias = None if mask is None else x(*mask)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(
                q, k, v, bias, is_causal=causal, enable_gqa=heads != groups
            )

    return make


def fused(mask: tuple[int, ...] | None, size: int, groups: int = 3) -> Case:
    """The CPU's own op."""

    def make() -> Tensor:
        q, k, v = x(2, 3, 4, size), x(2, groups, 5, size), x(2, groups, 5, size)
        bias = None if mask is None else torch.randn(mask).double()
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=bias
        )[0]
        return found

    return make


case(
    "ScaledDotProductFlashAttentionForCpu",
    fused(None, 6),
    fused((4, 5), 6),
    fused((2, 1, 4, 5), 5),
    fused(None, 4),
)
case(
    "ScaledDotProductFlashAttentionForCpu",
    attended(2, 2, None, causal=True),
    attended(2, 2, None, size=5),
)
case(
    "ScaledDotProductFlashAttentionForCpu", attended(4, 2, None), attended(3, 1, None, causal=True)
)
