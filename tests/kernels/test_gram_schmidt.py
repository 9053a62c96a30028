"""The launches of `transform`, in Triton's interpreter or on the GPU that is there, against float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtu_fast._ops.gram_schmidt import transform
from tests.helpers.tolerance import assert_as_accurate
from tests.helpers.triton import compiled, table

kernels = pytest.importorskip("mtu_fast.kernels.gram_schmidt", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(DEVICE)


def check(rows: list[Tensor], T: Tensor) -> None:
    for found, t in zip(kernels.transform(rows, T), rows, strict=True):
        assert found.shape == t.shape and found.dtype == t.dtype and found.is_contiguous()
        plain = transform.reference([t.cpu()], T.cpu())[0]
        assert_as_accurate(
            f"{list(t.shape)}, {t.dtype}", found.cpu(), plain, (T @ t.double()).cpu()
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 17, 70])
def test_ragged_lists(dtype: torch.dtype, k: int) -> None:
    check([draw(k, p, dtype=dtype) for p in (1, 130, 0, 33)], draw(k, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches(dtype: torch.dtype) -> None:
    check([draw(3, 5, 70, dtype=dtype)], draw(3, 5, 5))


def test_several_tiles() -> None:
    check([draw(33, 300, dtype=torch.float32), draw(33, 64)], draw(33, 33))


def test_strides() -> None:
    rows = [
        draw(40, 6).T,
        draw(6, 60)[:, ::2],
        draw(1, 9).expand(6, 9),
        draw(6, 1).expand(6, 9),
        draw(12, 9)[::2],
    ]
    check(rows, draw(6, 6).T)
    check(
        [draw(5, 4, 9).transpose(0, 1), draw(1, 5, 9).expand(4, 5, 9)],
        draw(1, 5, 5).expand(4, 5, 5),
    )


def test_dropped_rows_are_zero() -> None:
    T = draw(6, 6)
    T[2], T[5] = 0, T[1]
    rows = draw(6, 50, dtype=torch.float32)
    found = kernels.transform([rows], T)[0]
    assert not found[2].any()
    assert torch.equal(found[5], found[1])


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_transform", None)  # a launch would fail
    assert (
        kernels.transform([draw(*shape)], draw(*shape[:-2], shape[-2], shape[-2]))[0].shape == shape
    )


def test_the_same_bits_twice() -> None:
    rows, T = [draw(20, 500, dtype=torch.float32)], draw(20, 20)
    assert torch.equal(kernels.transform(rows, T)[0], kernels.transform(rows, T)[0])


def test_what_is_left_to_the_reference() -> None:
    assert kernels.transform([draw(2, 3).to(torch.int64)], draw(2, 2)) is NotImplemented
    assert kernels.transform([draw(2, 3)], draw(2, 2).float()) is NotImplemented
    k = kernels.MAX_K + 1
    assert kernels.transform([draw(k, 1)], draw(k, k)) is NotImplemented


@pytest.mark.gpu
def test_the_dispatcher_launches() -> None:
    rows, T = [draw(5, 100, dtype=torch.float32)], draw(5, 5)
    assert transform.has_kernel("CUDA")
    assert torch.equal(transform(rows, T)[0], kernels.transform(rows, T)[0])
    torch.library.opcheck(transform.overload, (rows, T))


SPECIMENS = {
    f"K={k} {dtype}": lambda k=k, dtype=dtype: kernels.transform(
        [draw(k, 256, dtype=dtype)], draw(k, k)
    )
    for k in (16, 64, 128)
    for dtype in (torch.float32, torch.bfloat16)
}


@pytest.mark.slow
def test_compiles_without_spills() -> None:
    builds = compiled("tests.kernels.test_gram_schmidt:SPECIMENS")
    print(table(builds))
    assert {b.kernel for b in builds} == {"_transform"}
    assert not any(b.spills for b in builds)
    assert all(b.products and all("f64" in product for product in b.products) for b in builds)
