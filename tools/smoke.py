"""A user's script: one step and one Gram matrix on a small model, equal to what autograd gives row by row.

It runs against whatever mtu_fast is installed, and `mypy --strict` reads it as it is. With
`--kernels` it also expects every op that has a C++ kernel to be served by it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import mtu_fast as mtu

SAMPLES = 6
# what no C++ kernel is for: plain torch's products are as good
BY_REFERENCE = "this version has no CPU kernel"


class Net(nn.Module):
    """A convolution, positions of a linear map, and two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(2, 4, 3, padding=1)
        self.first = nn.Linear(8, 3)
        self.second = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[N, 2, 4, 8]` to the outputs of both tasks."""
        z = self.image(x).tanh()
        return self.first(z).flatten(1), self.second(z.mean(1).flatten(1))


def losses_of(net: Net, x: Tensor) -> dict[str, Tensor]:
    """Unreduced losses, one value per sample."""
    first, second = net(x)
    return {"first": first.pow(2).mean(1), "second": second.squeeze(1).pow(2)}


def jacobian(net: Net, losses: Mapping[str, Tensor]) -> Tensor:
    """Every row's gradient by a backward of its own, `[R, P]`."""
    parameters = list(net.parameters())
    rows = []
    for loss in losses.values():
        for value in loss:
            grads = torch.autograd.grad(
                value, parameters, retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def written(net: Net) -> Tensor:
    """`.grad` of all parameters as one vector."""
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def same(found: Tensor, expected: Tensor) -> None:
    """Fail unless both agree to float64's rounding."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def check_step(net: Net, x: Tensor) -> None:
    """A step by the mean of all rows, and one that may not change the retained samples."""
    engine: mtu.Engine = mtu.Engine(net)
    rows = jacobian(net, losses_of(net, x))
    net.zero_grad()
    update: mtu.Update = engine.backward(losses_of(net, x), mtu.Mean())
    same(written(net), rows.sum(0) / SAMPLES)
    assert update.weights.shape == (2 * SAMPLES,)

    forget = torch.arange(SAMPLES) < 2
    net.zero_grad()
    engine.backward(losses_of(net, x), mtu.OrthoGrad(alpha=0.0), forget=forget)
    retained = rows[~forget.repeat(2)]
    felt = retained @ written(net)
    assert written(net).norm() > 1e-6
    assert felt.abs().max() < 1e-10 * retained.norm()


def check_gram(net: Net, x: Tensor) -> None:
    """The Gram matrix of the rows' gradients."""
    rows = jacobian(net, losses_of(net, x))
    same(mtu.Engine(net).rows(losses_of(net, x)).gram(), rows @ rows.T)


def check_kernels() -> None:
    """`python -m mtu_fast`: no op is left to plain torch on the CPU that a kernel exists for."""
    command = [sys.executable, "-m", "mtu_fast"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    served = 0
    for line in table.splitlines():
        if line.split()[1:2] == ["CPU"]:
            assert "kernel (mtu_fast._C)" in line or BY_REFERENCE in line, line
            served += "kernel (mtu_fast._C)" in line
    assert served >= 8, table


def main() -> None:
    """Run the checks and say where and with what."""
    torch.manual_seed(0)
    net = Net().double()
    x = torch.randn(SAMPLES, 2, 4, 8, dtype=torch.float64)
    check_step(net, x)
    check_gram(net, x)
    if "--kernels" in sys.argv[1:]:
        check_kernels()
    python = ".".join(map(str, sys.version_info[:3]))
    print(
        f"mtu_fast {mtu.__version__} works in {mtu.__file__}: Python {python}, {torch.__version__}"
    )


if __name__ == "__main__":
    main()
