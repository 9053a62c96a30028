"""Ops of matrices, and transforms."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.graph.recorded.cases import (
    case,
    x,
)

_shape: tuple[int, ...]  # of every loop below


def posed(*shape: int) -> Tensor:
    """Positive definite matrices."""
    a = x(*shape, 3, 3)
    return a @ a.mT + 3 * torch.eye(3).double()


for _shape in ((), (2,), (2, 3), (1, 3)):
    case("LinalgInvEx", lambda s=_shape: torch.linalg.inv(posed(*s)))
    case("LinalgCholeskyEx", lambda s=_shape: torch.linalg.cholesky(posed(*s)))
    case(
        "LinalgSolveTriangular",
        lambda s=_shape: torch.linalg.solve_triangular(posed(*s), x(*s, 3, 2), upper=True),
    )
    case("Cholesky", lambda s=_shape: torch.ops.aten.cholesky(posed(*s)))
    case(
        "CholeskySolve",
        lambda s=_shape: torch.cholesky_solve(x(*s, 3, 2), torch.linalg.cholesky(posed(*s))),
    )
case(
    "LinalgSolveTriangular",
    lambda: torch.linalg.solve_triangular(posed(2, 1), x(3, 3, 3), upper=False),
)
case(
    "LinalgSolveTriangular",
    lambda: torch.linalg.solve_triangular(posed(2), x(2, 4, 3), upper=True, left=False),
)
case("CholeskySolve", lambda: torch.cholesky_solve(x(2, 3, 3, 2), torch.linalg.cholesky(posed(3))))
for _dim in (0, 1, 2, -1):
    for _shape in ((4, 4, 4), (3, 4, 6)):
        case("FftC2C", lambda d=_dim, s=_shape: torch.fft.fft(torch.complex(x(*s), x(*s)), dim=d))
        case("FftR2C", lambda d=_dim, s=_shape: torch.fft.rfft(x(*s), dim=d))
        case("FftR2C", lambda d=_dim, s=_shape: torch.fft.fft(x(*s), dim=d))
        case("FftC2R", lambda d=_dim, s=_shape: torch.fft.irfft(torch.complex(x(*s), x(*s)), dim=d))
case("FftC2C", lambda: torch.fft.fft2(torch.complex(x(3, 4, 4), x(3, 4, 4))))
case("FftR2C", lambda: torch.fft.rfftn(x(3, 4, 4), dim=(0, -1)))
case("FftC2R", lambda: torch.fft.irfftn(torch.complex(x(3, 4, 4), x(3, 4, 4)), dim=(-1, 0)))
case(
    "ViewAsComplex", lambda: torch.view_as_complex(x(2, 3, 2)), lambda: torch.view_as_complex(x(2))
)
case("ViewAsReal", lambda: torch.view_as_real(torch.complex(x(2, 3), x(2, 3))))
case(
    "ViewAsReal",
    lambda: torch.view_as_real(torch.complex(x(2), x(2))),
    lambda: torch.view_as_real(torch.complex(x(), x())),
)
