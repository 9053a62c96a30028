"""Linear maps: layers, bare parameters on either side of a product, einsum, scales and shifts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.models.base import Net, Parts, case


@case()
def mlp(n: int) -> Parts:
    return Parts(
        nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.GELU()), (torch.randn(n, 3),)
    )


@case()
def mlp_3d_no_bias(n: int) -> Parts:
    net = nn.Sequential(nn.Linear(3, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False))
    return Parts(net, (torch.randn(n, 5, 3),))


@case()
def mlp_4d(n: int) -> Parts:
    return Parts(
        nn.Sequential(nn.Linear(3, 6), nn.SiLU(), nn.Linear(6, 4)), (torch.randn(n, 2, 5, 3),)
    )


@case()
def scales(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        h = self.inner(x) * self.scale + self.shift  # [N, S, 4]
        h = h * self.position - self.offset / self.divisor
        return torch.tanh(h / self.temperature) * self.gate.exp()

    parts = {
        "inner": nn.Linear(3, 4),
        "scale": nn.Parameter(torch.rand(4) + 0.5),
        "shift": nn.Parameter(torch.randn(4)),
        "position": nn.Parameter(torch.rand(5, 1) + 0.5),
        "offset": nn.Parameter(torch.randn(1, 5, 4)),
        "divisor": nn.Parameter(torch.rand(()) + 1.0),
        "temperature": nn.Parameter(torch.rand(()) + 1.0),
        "gate": nn.Parameter(torch.randn(1)),
    }
    return Parts(Net(run, **parts), (torch.randn(n, 5, 3),))


@case()
def scaled_sums(n: int) -> Parts:
    """`alpha` and `beta` of add, sub and addmm, easily dropped by a rule."""

    def run(self: Net, x: Tensor) -> Tensor:
        h = torch.addmm(self.bias, x, self.w.t(), beta=2.0, alpha=0.5)  # [N, 4]
        h = torch.add(h, self.shift, alpha=0.3)
        h = torch.sub(h, self.offset, alpha=-1.7)
        return torch.tanh(torch.rsub(h, self.minuend))

    parts = {name: nn.Parameter(torch.randn(4)) for name in ("bias", "shift", "offset", "minuend")}
    return Parts(Net(run, w=nn.Parameter(torch.randn(4, 3)), **parts), (torch.randn(n, 3),))


@case()
def parameter_on_the_left(n: int) -> Parts:
    """Samples are columns: W [O, I] @ x [I, N]."""

    def run(self: Net, x: Tensor) -> Tensor:
        h = torch.tanh(self.w @ x.t() + self.bias)  # [6, N]
        return (self.v @ h).t()

    parts = {
        "w": nn.Parameter(torch.randn(6, 3)),
        "bias": nn.Parameter(torch.randn(6, 1)),
        "v": nn.Parameter(torch.randn(4, 6)),
    }
    return Parts(Net(run, **parts), (torch.randn(n, 3),))


@case()
def parameter_on_the_left_batched(n: int) -> Parts:
    """W [5, S] mixes positions: W @ x [N, S, I]."""

    def run(self: Net, x: Tensor) -> Tensor:
        return torch.tanh(self.w @ x) @ self.v

    parts = {"w": nn.Parameter(torch.randn(6, 5)), "v": nn.Parameter(torch.randn(3, 2))}
    return Parts(Net(run, **parts), (torch.randn(n, 5, 3),))


@case()
def einsum_and_bmm(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("nsi,hio->nhso", x, self.heads))  # [N, 2, S, 4]
        h = h.permute(1, 0, 2, 3).flatten(1, 2)  # [2, N*S, 4]
        h = torch.bmm(h, self.mix)  # [2, N*S, 6]
        h = torch.baddbmm(self.bias, h, self.out, alpha=0.7)  # [2, N*S, 3]
        return h.unflatten(1, (x.shape[0], 5)).transpose(0, 1)

    parts = {
        "heads": nn.Parameter(torch.randn(2, 3, 4)),
        "mix": nn.Parameter(torch.randn(2, 4, 6)),
        "bias": nn.Parameter(torch.randn(2, 1, 3)),
        "out": nn.Parameter(torch.randn(2, 6, 3)),
    }
    return Parts(Net(run, **parts), (torch.randn(n, 5, 3),))


@case()
def vector_products(n: int) -> Parts:
    """Matrix-vector and outer products with a parameter vector; bilinear; a parametric activation."""

    def run(self: Net, x: Tensor) -> Tensor:
        h = self.act(self.pair(x, x.flip(1)))  # [N, 4]
        return torch.cat([h, (h @ self.v)[:, None] * self.u, torch.outer(h[:, 0], self.u)], 1)

    parts = {"pair": nn.Bilinear(3, 3, 4), "act": nn.PReLU(4)}
    vectors = {"v": nn.Parameter(torch.randn(4)), "u": nn.Parameter(torch.randn(5))}
    return Parts(Net(run, **parts, **vectors), (torch.randn(n, 3),))


@case(float64=False)
def cast_parameter(n: int) -> Parts:
    """float32 parameters that enter float64 arithmetic."""

    def run(self: Net, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x.double(), self.w.double(), self.bias.to(torch.float64)))
        return (h * self.scale).to(torch.float32)

    parts = {"w": torch.randn(4, 3), "bias": torch.randn(4), "scale": torch.rand(4) + 0.5}
    return Parts(
        Net(run, **{k: nn.Parameter(v) for k, v in parts.items()}), (torch.randn(n, 5, 3),)
    )


@case(float64=False)
def mlp_float32(n: int) -> Parts:
    return Parts(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5)), (torch.randn(n, 3),))
