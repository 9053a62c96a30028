"""`gather_gram` in Triton: table look-ups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs Triton")
from mtu_fast.kernels import gram as kernels
from tests.kernels.gram.blocks import DEVICES, DTYPES, Blocks, check, draw

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("device", DEVICES)]


def gather_rows(index: Blocks, values: Blocks, size: int) -> Callable[[torch.dtype], Blocks]:
    return lambda to: [
        torch.einsum("rsv,rsd->rvd", F.one_hot(i.long(), size).to(to), v.to(to)).flatten(1)
        for i, v in zip(index, values, strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_gram(device: str, dtype: torch.dtype) -> None:
    """Indices repeat within a row, across rows and across blocks; two tasks share theirs."""
    index = [torch.randint(0, 7, size).to(device) for size in ((3, 5), (2, 35), (2, 0))]
    index.append(index[0])
    values = [draw(device, *i.shape, 4, dtype=dtype) for i in index]
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    check(
        f"gather {dtype}",
        kernels.gather_gram(index, values),
        gather_rows(index, values, 7),
        precision,
    )


def test_gather_gram_where_nothing_matches(device: str) -> None:
    index = torch.arange(6).view(2, 3).to(device) * 10**10
    values = draw(device, 2, 3, 4)
    values[1, 2, 3] = float("nan")  # meets itself alone
    found = kernels.gather_gram([index], [values])
    assert found[1, 1].isnan() and found[0, 1] == 0 and found[0, 0].isfinite()
    assert kernels.gather_gram([index.double()], [values]) is NotImplemented
