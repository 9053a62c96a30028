"""The projection out of and into a span, as dispatched (the kernel, where it is built) and as the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from mtu_fast._ops import _library
from mtu_fast._ops import project as module
from mtu_fast._ops.gram_schmidt import orthonormalize
from mtu_fast._ops.project import project, project_op
from tests.helpers.tolerance import assert_as_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Run = Callable[[Sequence[Tensor], Sequence[Tensor], bool], list[Tensor]]
IMPLEMENTATIONS: dict[str, Run] = {"dispatched": project_op, "reference": project_op.reference}


@pytest.fixture(params=IMPLEMENTATIONS)
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(module, "TILE", 1 << 12)  # the reference's: several tiles
    return IMPLEMENTATIONS[request.param]


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-2, 3, shape).to(dtype)


def true_projection(g: Sequence[Tensor], Q: Sequence[Tensor], into: bool) -> Tensor:
    """In extended precision, the list joined."""
    wide, rows = (
        torch.cat([t.double() for t in side], 1).numpy().astype(np.longdouble) for side in (g, Q)
    )
    inside = wide @ rows.T @ rows
    return torch.from_numpy((inside if into else wide - inside).astype(np.float64))


def plain(g: Sequence[Tensor], Q: Sequence[Tensor], into: bool) -> Tensor:
    """In the precision of g, the list joined."""
    vectors, rows = torch.cat(list(g), 1), torch.cat(list(Q), 1).to(g[0].dtype)
    inside = vectors @ rows.T @ rows
    return inside if into else vectors - inside


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows_dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 6])
def test_errs_at_most_twice_what_plain_torch_errs(
    run: Run, dtype: torch.dtype, rows_dtype: torch.dtype, m: int, into: bool
) -> None:
    widths = [700, 1, 5_003, 64]
    Q = orthonormalize([torch.randn(7, p).to(rows_dtype) for p in widths])[0]
    g = [torch.randn(m, p).to(dtype) for p in widths]
    found = run(g, Q, into)
    assert all(part.dtype == dtype for part in found)
    name = f"{dtype} by {rows_dtype}, into={into}"
    assert_as_accurate(name, torch.cat(found, 1), plain(g, Q, into), true_projection(g, Q, into))


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize(
    "counts", [(1, 1), (1, 16), (2, 3), (3, 4), (4, 5), (5, 9), (9, 2), (1, 0), (0, 3), (0, 0)]
)
@pytest.mark.parametrize("widths", [[1], [7, 0, 9], [0], [63, 64, 65], [300, 5_000, 1, 9_001]])
def test_every_shape(run: Run, counts: tuple[int, int], widths: list[int], into: bool) -> None:
    """Integers, so that every order of sums gives the same; that Q is orthonormal is not what the formula needs."""
    m, k = counts
    g, Q = [integers(m, p) for p in widths], [integers(k, p) for p in widths]
    found = run(g, Q, into)
    assert [part.shape for part in found] == [part.shape for part in g]
    assert torch.equal(torch.cat(found, 1).double(), true_projection(g, Q, into))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 5])
def test_every_number_of_half_precision_is_read_and_written(
    run: Run, dtype: torch.dtype, m: int
) -> None:
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    g = numbers.expand(m, -1)
    (found,) = run([g], [torch.zeros(0, numbers.numel())], False)
    finite = numbers.isfinite()
    assert torch.equal(found[:, finite], g[:, finite])
    assert torch.equal(found.isnan(), g.isnan()) and torch.equal(found.isinf(), g.isinf())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_are_rounded_as_torch_rounds(run: Run, dtype: torch.dtype) -> None:
    Q = torch.logspace(-9, 5.5, 4_001, dtype=torch.float64)[None]
    Q[0, 0] = 1.0
    g = torch.zeros(1, 4_001, dtype=dtype)
    g[0, 0] = 1.0  # the only coefficient is 1
    (found,) = run([g], [Q], True)
    assert torch.equal(found, Q.to(dtype))


def test_views(run: Run) -> None:
    g = [
        integers(30, 2).T,
        integers(2, 60)[:, ::2],
        integers(30)[None].expand(2, 30),
        integers(8, 40)[::5, 7:37],
    ]
    Q = [
        integers(60, 3)[::2].T,
        integers(1, 30).expand(3, 30),
        integers(9, 30)[::3],
        integers(3, 1).expand(3, 30),
    ]
    before = [t.clone() for t in (*g, *Q)]
    assert torch.equal(torch.cat(run(g, Q, False), 1).double(), true_projection(g, Q, False))
    assert all(torch.equal(t, copy) for t, copy in zip((*g, *Q), before, strict=True))


@pytest.mark.parametrize("shapes", [[(3, 4), (5,), (), (2, 3, 2, 2)], [(0, 4), (3,)]])
def test_parameters_of_any_shape(shapes: list[tuple[int, ...]]) -> None:
    Q, kept = orthonormalize([torch.randn(2, *shape).double() for shape in shapes])
    assert kept.all()
    g = [torch.randn(shape).double() for shape in shapes]
    outside, inside = project(g, Q), project(g, Q, into=True)
    assert [t.shape for t in outside] == [t.shape for t in g]
    for k in range(2):
        assert abs(sum((q[k] * t).sum() for q, t in zip(Q, outside, strict=True))) <= 1e-14
    for whole, a, b in zip(g, outside, inside, strict=True):
        torch.testing.assert_close(a + b, whole, rtol=1e-14, atol=1e-15)
    several = project([torch.stack([t, 2 * t, -t]) for t in g], Q)
    for part, one in zip(several, outside, strict=True):
        torch.testing.assert_close(part, torch.stack([one, 2 * one, -one]), rtol=1e-13, atol=1e-14)


def test_one_tensor() -> None:
    Q, _ = orthonormalize(torch.randn(3, 50).double())
    g = torch.randn(4, 50).double()
    torch.testing.assert_close(project(g, Q), g - g @ Q.T @ Q)
    torch.testing.assert_close(project(g[0], Q, into=True), (g @ Q.T @ Q)[0])
    weight = torch.randn(5, 2, 7, 3).double()  # K = 5 rows of a parameter (2, 7, 3)
    assert project(weight[0], orthonormalize([weight])[0][0]).abs().max() <= 1e-14


def test_nothing_to_project() -> None:
    assert project([], []) == []


def test_rows_of_zeros_change_nothing(run: Run) -> None:
    Q, kept = orthonormalize(torch.randn(3, 40).repeat(2, 1))
    assert kept.sum() == 3
    g = torch.randn(1, 40)
    torch.testing.assert_close(
        run([g], [Q], False)[0], run([g], [Q[kept]], False)[0], rtol=1e-6, atol=1e-7
    )


def test_carries_no_gradient() -> None:
    Q, _ = orthonormalize(torch.randn(3, 40))
    assert not project(torch.randn(40, requires_grad=True), Q.requires_grad_()).requires_grad


@pytest.mark.parametrize("m", [1, 3])
def test_opcheck(m: int) -> None:
    g, Q = (
        [torch.randn(m, 5), torch.randn(m, 9).half()],
        [torch.randn(2, 5).bfloat16(), torch.randn(2, 9)],
    )
    torch.library.opcheck(project_op.overload, (g, Q, False))


built = pytest.mark.skipif(_library.EXTENSION is None, reason=_library.MISSING or "built")


@built
def test_the_kernel_is_what_runs() -> None:
    assert project_op.has_kernel("CPU")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        project([torch.randn(50), torch.randn(3)], [torch.randn(2, 50), torch.randn(2, 3)])
    names = {event.key for event in profile.key_averages()}
    assert "mtu_fast::project" in names
    # what the reference is made of
    assert not names & {"aten::addmm_", "aten::mm", "aten::cat", "aten::copy_"}


@built
@pytest.mark.parametrize("m", [1, 6])
def test_the_same_bits_whatever_the_threads(m: int) -> None:
    widths = [100_003, 7, 60_000]
    g, Q = [torch.randn(m, p) for p in widths], [torch.randn(5, p) for p in widths]
    several = torch.cat(project_op(g, Q, False), 1)
    assert torch.equal(torch.cat(project_op(g, Q, False), 1), several)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(torch.cat(project_op(g, Q, False), 1), several)
    finally:
        torch.set_num_threads(threads)


@built
@pytest.mark.parametrize(
    ("g", "Q", "message"),
    [
        ([torch.ones(1, 3)], [], "got 1 and 0"),
        ([torch.ones(3)], [torch.ones(2, 3)], "got 1 and 2 dimensions"),
        ([torch.ones(1, 3)], [torch.ones(2, 4)], "width: 3 and 4"),
        (
            [torch.ones(1, 3), torch.ones(2, 3)],
            [torch.ones(2, 3), torch.ones(2, 3)],
            "the same numbers",
        ),
        ([torch.ones(1, 3).int()], [torch.ones(2, 3)], "expected float64, float32"),
    ],
)
def test_the_kernel_checks_its_own_arguments(
    g: list[Tensor], Q: list[Tensor], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        project_op.overload(g, Q, False)


@pytest.mark.parametrize(
    ("g", "Q", "error", "message"),
    [
        (torch.ones(3), [torch.ones(2, 3)], TypeError, "two tensors or two lists"),
        ([torch.ones(3)], [], ValueError, "g has 1 tensors, Q has 0"),
        ([torch.ones(3)], [2], TypeError, r"Q\[0\] is int, expected a tensor"),
        ([torch.ones(2, 3)], [torch.ones(3)], ValueError, "Are g and Q exchanged"),
        ([torch.ones(3).int()], [torch.ones(2, 3)], TypeError, r"g\[0\] is torch\.int32"),
        ([torch.ones(3)], [torch.ones(2, 3).long()], TypeError, r"Q\[0\] is torch\.int64"),
        (
            [torch.ones(3)],
            [torch.ones(2, 4)],
            ValueError,
            r"g\[0\] has shape \[3\], expected \[4\]",
        ),
        (
            [torch.ones(3), torch.ones(5, 4)],
            [torch.ones(2, 3), torch.ones(2, 4)],
            ValueError,
            r"g\[1\] has shape",
        ),
        (
            [torch.ones(3), torch.ones(3)],
            [torch.ones(2, 3), torch.ones(1, 3)],
            ValueError,
            "the same K rows",
        ),
        ([torch.ones(())], [torch.ones(())], ValueError, "is a scalar"),
        ([torch.ones(3, device="meta")], [torch.ones(2, 3)], ValueError, r"g\[0\] is on meta"),
    ],
)
def test_errors_teach(
    g: Tensor | list[Tensor], Q: Tensor | list[Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        project(g, Q)
