"""The launches of `project`, in Triton's interpreter or on the GPU that is there, against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mtu_fast._ops.project import project_op
from tests.helpers.tolerance import assert_as_accurate
from tests.helpers.triton import compiled, table

kernels = pytest.importorskip("mtu_fast.kernels.project", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
RAGGED = (1024, 7, 0, 1, 2052)  # dense and aligned, neither, nothing, one element, a tail
Draw = tuple[list[Tensor], list[Tensor]]


def draw(
    k: int, m: int, sizes: Sequence[int], dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32)
) -> Draw:
    """g [m, P_l] and Q [k, P_l] with rows of about length one."""
    length = max(sum(sizes), 1) ** -0.5
    g = [torch.randn(m, p).to(dtypes[0]).to(DEVICE) for p in sizes]
    return g, [(torch.randn(k, p) * length).to(dtypes[1]).to(DEVICE) for p in sizes]


def joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.cpu() for t in parts], 1)


def check(g: list[Tensor], Q: list[Tensor], into: bool) -> None:
    found = kernels.project(g, Q, into)
    assert [t.shape for t in found] == [t.shape for t in g]
    assert [t.dtype for t in found] == [t.dtype for t in g]
    wide_g, wide_Q = joined([t.double() for t in g]), joined([t.double() for t in Q])
    inside = (wide_g @ wide_Q.T) @ wide_Q
    truth = inside if into else wide_g - inside
    plain = joined(project_op.reference([t.cpu() for t in g], [t.cpu() for t in Q], into))
    assert_as_accurate(f"{len(Q[0])} rows, {len(g[0])} g", joined(found), plain, truth)


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (F32, BF16), (BF16, F32), (F16, F16), (BF16, BF16), (F64, F64)]
)
def test_dtypes(dtypes: tuple[torch.dtype, torch.dtype], into: bool) -> None:
    check(*draw(5, 2, RAGGED, dtypes), into)


@pytest.mark.parametrize("m", [1, 3, 5])
@pytest.mark.parametrize("k", [0, 1, 17])
def test_numbers_of_rows(k: int, m: int) -> None:
    check(*draw(k, m, RAGGED), k == 1)


def test_mixed_dtypes_in_one_list() -> None:
    parts = [
        draw(3, 2, [p], dtypes)
        for p, dtypes in ((40, (F32, F32)), (9, (F64, BF16)), (64, (F32, F32)))
    ]
    check([g[0] for g, _ in parts], [Q[0] for _, Q in parts], False)


def test_runs_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "RUNS", 2)
    check(*draw(9, 1, (5000, 4096)), False)


def test_more_rows_than_a_tile() -> None:
    check(*draw(70, 1, (130,)), True)


def test_strides() -> None:
    def spaced(t: Tensor) -> Tensor:
        return t.repeat_interleave(2, 1)[:, ::2]

    (a, b, c, d, e), (q, r, s, t, u) = draw(6, 3, (600, 64, 64, 12, 64))
    g = [
        a.T.contiguous().T,
        spaced(b),
        c[:1].expand(3, -1),
        d[:, :1].expand(-1, 12),
        e.clone()[:, :],
    ]
    rows = [
        q,
        r.T.contiguous().T,
        spaced(s),
        t[:1].expand(6, -1),
        torch.cat([u, u[:, :4]], 1)[:, 3:67],
    ]
    assert not any(x.is_contiguous() for x in (*g[:4], *rows[1:]))
    check(g, rows, False)


def test_zero_and_duplicated_rows() -> None:
    g, Q = draw(4, 1, (300, 7))
    for rows in Q:
        rows[1], rows[3] = 0, rows[0]
    check(g, Q, True)
    for rows in Q:
        rows.zero_()
    assert all(torch.equal(a, b) for a, b in zip(kernels.project(g, Q, False), g, strict=True))


@pytest.mark.parametrize(("k", "m", "sizes"), [(2, 0, (3,)), (2, 1, (0, 0)), (0, 0, (0,))])
def test_empty(k: int, m: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_plan", None)  # a launch would fail
    found = kernels.project(*draw(k, m, sizes), False)
    assert [tuple(t.shape) for t in found] == [(m, p) for p in sizes]


def test_no_rows_span_nothing() -> None:
    g, Q = draw(0, 2, (30, 5))
    assert all(torch.equal(a, b) for a, b in zip(kernels.project(g, Q, False), g, strict=True))
    assert not any(t.any() for t in kernels.project(g, Q, True))


def test_what_is_not_finite_stays_in_its_g() -> None:
    g, Q = draw(3, 3, (40, 5))
    g[0][1, 7] = float("nan")
    found = kernels.project(g, Q, False)
    assert all(t[1].isnan().all() for t in found)
    assert all(t[::2].isfinite().all() for t in found)


def test_the_same_bits_twice() -> None:
    g, Q = draw(17, 2, (5000, 33))
    first, second = kernels.project(g, Q, False), kernels.project(g, Q, False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_left_to_the_reference() -> None:
    g, Q = draw(2, 1, (5,))
    assert kernels.project([t.to(torch.int64) for t in g], Q, False) is NotImplemented
    assert kernels.project(*draw(kernels.MAX_K + 1, 1, (2,)), False) is NotImplemented


@pytest.mark.gpu
def test_the_dispatcher_launches() -> None:
    g, Q = draw(5, 1, RAGGED)
    assert project_op.has_kernel("CUDA")
    assert all(map(torch.equal, project_op(g, Q, False), kernels.project(g, Q, False)))
    torch.library.opcheck(project_op.overload, (g, Q, False))


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    g, Q = draw(5, 1, RAGGED)
    kernels.project(g, Q, False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.project(g, Q, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


SPECIMENS = {
    f"K={k} M={m} {dtypes[0]} {dtypes[1]}": lambda k=k, m=m, dtypes=dtypes: kernels.project(
        [torch.zeros(m, 64, dtype=dtypes[0])], [torch.zeros(k, 64, dtype=dtypes[1])], False
    )
    for k, m, dtypes in [
        (16, 1, (F32, F32)),
        (16, 1, (F32, BF16)),
        (8, 4, (F32, BF16)),
        (4, 2, (F32, F32)),
    ]
}


@pytest.mark.slow
def test_compiles_without_spills() -> None:
    builds = compiled("tests.kernels.test_project:SPECIMENS")
    print(table(builds))
    assert {b.kernel for b in builds} == {"_coefficients", "_result"}
    assert not any(b.spills for b in builds)
    assert all(b.products == ("fma.rn.f64",) for b in builds)
