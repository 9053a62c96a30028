"""Each instruction set's CPU kernels by themselves: the machine that runs the others' tests chooses one of them only.

The sources of csrc/cpu are compiled once; what they choose by is named by tests/host. Integers are
exact in any order.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtu_fast._ops._blocks import working_dtype
from mtu_fast._ops.gram_schmidt import TOLERANCE
from mtu_fast._ops.gram_schmidt import basis as basis_op
from mtu_fast._ops.gram_schmidt import gram_schmidt as gram_schmidt_op
from mtu_fast._ops.grouped import grouped_rows
from tests.helpers import matrices
from tests.helpers.tolerance import assert_as_accurate
from tests.ops.positions.exact import conv_exact, integers, outer_exact, walk
from tests.ops.test_gram_schmidt_cuda import (
    assert_orthonormal_as_well,
    assert_projections_as_accurate,
    gram,
    rows,
)

ROOT = Path(__file__).parents[2]
HOST = ROOT / "tests" / "host"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]  # as Element counts them
COMPILE = [
    "g++",
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-Wall",
    "-fvisibility=hidden",
]
TOL = TOLERANCE[torch.float64]
# what gram_schmidt.cpp chooses from by its own means
CLONES = {"Any": [], "Avx2": ["-mfma"], "Avx512": ["-mfma"]}

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64",
    reason="needs g++, and x86-64: one set elsewhere",
)


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("objects")
    done = []
    sources = [
        path
        for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
        if path.stem != "gram_schmidt"
    ]
    with ThreadPoolExecutor(2) as pool:
        for source in sources:
            target = folder / f"{source.stem}.o"
            done.append(
                pool.submit(
                    run, *COMPILE, "-include", HOST / "vectors.h", "-c", source, "-o", target
                )
            )
    for each in done:
        each.result()
    return sorted(folder.glob("*.o"))


@pytest.fixture(scope="module", params=CLONES)
def library(
    request: pytest.FixtureRequest, objects: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp(request.param)
    solver, shared = folder / "gram_schmidt.o", folder / "library.so"
    source = ROOT / "csrc" / "cpu" / "gram_schmidt.cpp"
    run(*COMPILE, *CLONES[request.param], "-DMTU_FAST_CLONES=", "-c", source, "-o", solver)
    own = [f"-DWANTED={request.param}", "-fvisibility=default", HOST / "cpu.cpp"]
    run(*COMPILE, "-shared", *own, *objects, solver, "-o", shared)
    found = ctypes.CDLL(str(shared))
    if not found.runs():
        pytest.skip(f"this machine has no {request.param}")
    return found


def pointer(t: Tensor) -> ctypes.c_void_p:
    assert t.is_contiguous()
    return ctypes.c_void_p(t.data_ptr())


def sizes(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(n) for n in numbers]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("R", "P"), [(1, 1), (3, 7), (5, 300), (13, 4_101)])
def test_row_gram(library: ctypes.CDLL, dtype: torch.dtype, R: int, P: int) -> None:
    J, G = integers(R, P, dtype=dtype), torch.empty(R, R, dtype=torch.float64)
    for known in {0, R // 2, R}:
        expected = J.double() @ J.double().T
        expected[R - known :, R - known :] = 0
        library.row_gram(pointer(J), DTYPES.index(dtype), *sizes(R, P, known), pointer(G))
        assert torch.equal(G, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ["ghost", "direct"])
@pytest.mark.parametrize(
    ("R", "S", "A", "B"), [(1, 1, 1, 1), (3, 13, 5, 9), (2, 97, 33, 16), (7, 31, 270, 35)]
)
def test_outer(
    library: ctypes.CDLL, route: str, dtype: torch.dtype, R: int, S: int, A: int, B: int
) -> None:
    left, right = integers(R, S, A, dtype=dtype), integers(2, R, S, B, dtype=dtype)
    G = torch.empty(2 * R, 2 * R, dtype=torch.float64)
    call = getattr(library, f"outer_{route}")
    call(pointer(left), pointer(right), DTYPES.index(dtype), *sizes(R, S, A, B, 2), pointer(G))
    assert torch.equal(G, outer_exact([left, left], list(right)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ["ghost", "direct"])
@pytest.mark.parametrize(("C", "size"), [(3, (4, 4)), (17, (5, 9)), (2, (19, 17))])
def test_conv(
    library: ctypes.CDLL, route: str, dtype: torch.dtype, C: int, size: tuple[int, int]
) -> None:
    x, b = integers(5, 1, C, *size, dtype=dtype), integers(5, 1, 4, *size, dtype=dtype)
    G = torch.empty(5, 5, dtype=torch.float64)
    getattr(library, f"conv_{route}")(
        pointer(x), pointer(b), DTYPES.index(dtype), *sizes(5, C, 4, *size), pointer(G)
    )
    assert torch.equal(G, conv_exact([x], [b], walk()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("groups", "kernel", "stride"), [(6, 3, 1), (3, 7, 2), (1, 4, 3), (2, 1, 2)]
)
def test_grouped_rows(
    library: ctypes.CDLL, dtype: torch.dtype, groups: int, kernel: int, stride: int
) -> None:
    x = integers(2, 1, 6, 9, 21, dtype=dtype)
    grid = [(n + kernel // 2 * 2 - kernel) // stride + 1 for n in (9, 21)]
    b = integers(2, 1, 12, *grid, dtype=dtype)
    walk = ([kernel] * 2, [stride] * 2, [kernel // 2] * 2, [1] * 2)
    expected = grouped_rows.reference(x.double(), b.double(), groups, *walk)
    found = torch.zeros_like(expected, dtype=working_dtype(x))
    shape = sizes(2, 6, 12, 9, 21, groups, kernel, stride)
    library.grouped_rows(pointer(x), pointer(b), DTYPES.index(dtype), *shape, pointer(found))
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize(("K", "M", "P"), [(1, 1, 5), (5, 2, 301), (3, 7, 4_200)])
def test_project(
    library: ctypes.CDLL, dtype: torch.dtype, into: bool, K: int, M: int, P: int
) -> None:
    Q = torch.linalg.qr(torch.randn(P, K, dtype=torch.float64)).Q.T.to(dtype).contiguous()
    g = torch.randn(M, P, dtype=torch.float64).to(dtype)
    out = torch.empty_like(g)
    library.project(
        pointer(Q), pointer(g), DTYPES.index(dtype), *sizes(K, M, P), int(into), pointer(out)
    )
    inside = (g.double() @ Q.double().T) @ Q.double()
    truth = inside if into else g.double() - inside
    assert_as_accurate(f"project {dtype} into={into} {K, M, P}", out, truth.to(dtype), truth)


@pytest.mark.parametrize("R", [1, 5, 33])
def test_gram_schmidt_and_basis(library: ctypes.CDLL, R: int) -> None:
    J = rows(R, 6)
    active, g = torch.arange(R) % 7 != 3, matrices.random_vector(J.shape[-1])
    G, rhs = gram(J).contiguous(), (J @ g).contiguous()
    x, rank = torch.empty_like(rhs), torch.empty(len(J), dtype=torch.int64)
    arguments = pointer(G), pointer(rhs), pointer(active), *sizes(len(J), R), ctypes.c_double(TOL)
    library.gram_schmidt(*arguments, pointer(x), pointer(rank))
    plain, plain_rank = gram_schmidt_op.reference(G, rhs, active, TOL)
    assert rank.tolist() == plain_rank.tolist()
    assert_projections_as_accurate(str(R), x, plain, J, g, active)
    T, kept = torch.empty_like(G), torch.empty(len(J), R, dtype=torch.bool)
    library.basis(pointer(G), *sizes(len(J), R), ctypes.c_double(TOL), pointer(T), pointer(kept))
    plain, plain_kept = basis_op.reference(G, TOL)
    # of equal rows, either
    assert torch.equal(kept[:-1], plain_kept[:-1]) and kept[-1].sum() == plain_kept[-1].sum()
    assert_orthonormal_as_well(str(R), T, kept, plain, plain_kept, G)
