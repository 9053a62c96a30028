"""The CUDA kernels of `gram_schmidt` and `basis`: on the CPU under sanitizers, compiled, and on a GPU if any."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from mtu_fast._ops.gram_schmidt import TOLERANCE, basis, gram_schmidt
from tests.helpers import matrices
from tests.helpers.tolerance import FEW, assert_as_accurate
from tests.ops.test_gram_schmidt import true_projection

ROOT = Path(__file__).parents[2]
TOL = TOLERANCE[torch.float64]
EPS = torch.finfo(torch.float64).eps
SM_80 = 163 * 1024  # bytes of shared memory a block may ask for
SANITIZE = [
    "-std=c++17",
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]
ARCHITECTURES = ("80", "90", "100")


def compiled(source: str, folder: Path) -> Path:
    """tests/host/<source>.cpp, built for the CPU with the sanitizers."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    probe = ["g++", *SANITIZE, "-x", "c++", "-", "-o", str(folder / "probe")]
    if subprocess.run(
        probe, input="int main() {}", text=True, capture_output=True, check=False
    ).returncode:
        pytest.skip("g++ has no AddressSanitizer runtime")
    program = folder / source
    here = ROOT / "tests" / "host"
    command = [
        "g++",
        *SANITIZE,
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        f"-I{here}",
        str(here / f"{source}.cpp"),
    ]
    done = subprocess.run(
        [*command, "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("gram_schmidt", tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def misuse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("misuse", tmp_path_factory.mktemp("misuse"))


def on_host(driver: Path, head: tuple[int, int, int, int], tol: float, *inputs: Tensor) -> bytes:
    """What the kernels answer; a fault, or a result that depends on the order of threads, fails."""
    problems, results = driver.with_suffix(".in"), driver.with_suffix(".out")
    problems.write_bytes(
        struct.pack("<qqqqd", *head, tol)
        + b"".join(t.contiguous().numpy().tobytes() for t in inputs)
    )
    done = subprocess.run([driver, problems, results], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return results.read_bytes()


def read(data: bytes, dtype: torch.dtype, *shape: int) -> Tensor:
    return (
        torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
        if data
        else torch.zeros(shape, dtype=dtype)
    )


def host_solve(
    driver: Path, G: Tensor, rhs: Tensor, active: Tensor, limit: int
) -> tuple[Tensor, Tensor]:
    B, R = rhs.shape
    data = on_host(driver, (B, R, 0, limit), TOL, G, rhs, active)
    return read(data[: 8 * B * R], torch.float64, B, R), read(data[8 * B * R :], torch.int64, B)


def host_basis(driver: Path, G: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    B, K = G.shape[:2]
    data = on_host(driver, (B, K, 1, limit), TOL, G)
    return read(data[: 8 * B * K * K], torch.float64, B, K, K), read(
        data[8 * B * K * K :], torch.bool, B, K
    )


def rows(R: int, conditioned: int = 1) -> Tensor:
    """[conditioned + 1, R, P]: problems of condition 1e6, and one of duplicated and zero rows."""
    J = torch.stack([
        matrices.conditioned(R, R + 20, 1e6, 2 * seed) for seed in range(conditioned + 1)
    ])
    J[-1] = matrices.conditioned(R, R + 20, 6.0)
    half = R // 2
    J[-1, half : 2 * half] = -2.0 * J[-1, :half]  # equal to the bit once scaled
    J[-1, R // 3] = 0.0
    return J


def assert_projections_as_accurate(
    name: str, x: Tensor, plain: Tensor, J: Tensor, g: Tensor, active: Tensor
) -> None:
    """The problems of condition 1e6 together, as one's error is a matter of luck, and the one of dependent rows."""
    truth = torch.stack([true_projection(each[active], g)[0] for each in J])
    found, plain = ((weights[:, None] @ J).squeeze(1) for weights in (x, plain))
    assert_as_accurate(f"{name}, condition 1e6", found[:-1], plain[:-1], truth[:-1])
    assert_as_accurate(f"{name}, dependent rows", found[-1], plain[-1], truth[-1])


def assert_orthonormal_as_well(
    name: str, T: Tensor, kept: Tensor, plain: Tensor, its: Tensor, G: Tensor
) -> None:
    """`T G Tᵀ - diag(kept)` by the same rule; problems together as above."""
    for what, part in (("condition 1e6", slice(-1)), ("dependent rows", slice(-1, None))):
        error, plain_error = (
            float((t @ G @ t.mT - torch.diag_embed(k.double()))[part].norm())
            for t, k in ((T, kept), (plain, its))
        )
        allowed = 2 * plain_error + FEW * EPS * float(its[part].sum()) ** 0.5
        print(f"{name}, {what}: {error:.2e}, {error / max(allowed, EPS):.2f} of what is allowed")
        assert error <= allowed


def gram(J: Tensor) -> Tensor:
    """`J Jᵀ` in an order of sums that is the same for equal rows."""
    return (J[:, :, None] * J[:, None]).sum(-1) if J.shape[1] <= 64 else J @ J.mT


def problems(R: int) -> int:
    """How many: the fewer the rows, the more is luck."""
    return 64 if R <= 5 else 8 if R <= 64 else 2


# R, bytes of shared memory: the small form where the matrix fits, panels of 32 or fewer columns
# otherwise
FORMS = {
    **{f"{R} small": (R, SM_80) for R in (1, 2, 5, 31, 32, 33, 64, 128)},
    "5 by panels of 2": (5, 1100),
    "33 by panels of 16": (33, 7500),
    "129 by panels of 32": (129, 45_000),
    "161 by panels of 32": (161, SM_80),
    "40 by panels of 1": (40, 2600),
}


@pytest.mark.parametrize("form", FORMS)
def test_solves_as_the_reference_does(driver: Path, form: str) -> None:
    R, limit = FORMS[form]
    J = rows(R, problems(R))
    active = torch.arange(R) % 7 != 3
    g = matrices.random_vector(J.shape[-1])
    G, rhs = gram(J), J @ g
    x, rank = host_solve(driver, G, rhs, active, limit)
    plain, plain_rank = gram_schmidt.reference(G, rhs, active, TOL)
    assert rank.tolist() == plain_rank.tolist()
    assert ((x == 0) | active).all()
    assert_projections_as_accurate(form, x, plain, J, g, active)


@pytest.mark.parametrize("form", FORMS)
def test_basis_as_the_reference_does(driver: Path, form: str) -> None:
    R, limit = FORMS[form]
    G = gram(rows(R, problems(R)))
    T, kept = host_basis(driver, G, limit)
    plain, plain_kept = basis.reference(G, TOL)
    assert kept.sum(-1).tolist() == plain_kept.sum(-1).tolist()
    if R <= 64:  # where equal rows give equal entries, the first of them is kept
        assert torch.equal(kept, plain_kept)
    assert (T[~kept] == 0).all() and (T.mT[~kept] == 0).all()
    assert_orthonormal_as_well(form, T, kept, plain, plain_kept, G)


@pytest.mark.parametrize("limit", [SM_80, 3000])
def test_what_is_not_finite_shows_and_stays_in_its_problem(driver: Path, limit: int) -> None:
    J = matrices.conditioned(20, 30, 6.0)
    G = (J @ J.T).expand(4, 20, 20).clone()
    G[0, 3, 3] = float("nan")
    G[1, 2, 7] = G[1, 7, 2] = float("inf")
    G[2, 5], G[2, :, 5] = float("nan"), float("nan")
    rhs, active = J @ matrices.random_vector(30).expand(4, 30)[..., None], torch.arange(20) != 5
    x, rank = host_solve(driver, G, rhs.squeeze(-1), active, limit)
    assert [bool(each.isfinite().all()) for each in x] == [False, False, True, True]
    assert rank.tolist() == gram_schmidt.reference(G, rhs.squeeze(-1), active, TOL)[1].tolist()
    T, _ = host_basis(driver, G, limit)
    assert [bool(each.isfinite().all()) for each in T] == [False, False, False, True]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(driver: Path, shape: tuple[int, int]) -> None:
    G, rhs = torch.zeros(*shape, shape[1]).double(), torch.zeros(shape).double()
    x, rank = host_solve(driver, G, rhs, torch.ones(shape[1], dtype=torch.bool), SM_80)
    assert x.shape == shape and rank.tolist() == [0] * shape[0]
    assert host_basis(driver, G, SM_80)[1].shape == shape


def test_more_rows_than_the_device_serves_is_an_error(driver: Path) -> None:
    with pytest.raises(AssertionError, match="too many rows"):
        host_basis(driver, torch.eye(40).double()[None], 1000)


def test_an_error_of_cuda_is_named_and_not_taken_for_too_many_rows(driver: Path) -> None:
    G, active = torch.eye(4).double()[None], torch.ones(4, dtype=torch.bool)
    with pytest.raises(AssertionError, match="cudaErrorInvalidDevice, invalid device ordinal"):
        host_basis(driver, G, -1)
    with pytest.raises(AssertionError, match="cudaErrorInvalidDevice, invalid device ordinal"):
        host_solve(driver, G, torch.ones(1, 4).double(), active, -1)


CAUGHT = {
    "race": "depends on the order of threads",
    "diverged": r"divergence: thread .* __syncthreads at .*misuse\.cpp",
    "missed": r"(divergence|deadlock): thread .* waits in __sync",
    "ended early": "has ended without it",
    "out of bounds": "heap-buffer-overflow",
    "too much": "shared memory: 520 bytes taken, launched with 512",
    "uninitialised": "NaN from shared memory",
}


@pytest.mark.parametrize("fault", CAUGHT)
def test_the_host_catches(misuse: Path, fault: str) -> None:
    done = subprocess.run([misuse, fault], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.search(CAUGHT[fault], done.stderr)


def test_the_host_passes_what_is_right(misuse: Path) -> None:
    assert subprocess.run([misuse, "none"], check=False).returncode == 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_compiles_for_every_architecture_without_spills(tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ARCHITECTURES]
    source = ROOT / "csrc" / "cuda" / "gram_schmidt.cu"
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "-Xptxas",
        "-v",
        *targets,
        "-c",
        source,
        "-o",
        tmp_path / "object.o",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
        r"loads\n.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    for name, target, stack, stores, loads, registers in kernels:
        print(
            f"{target} {name}: {registers} registers, {stack} bytes of stack, {stores} + {loads} bytes spilled"
        )
    assert len(kernels) == 4 * len(ARCHITECTURES)
    assert {(stack, stores, loads) for _, _, stack, stores, loads, _ in kernels} == {
        ("0", "0", "0")
    }


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_bindings_compile_with_the_cuda_part(tmp_path: Path) -> None:
    include = [
        f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])
    ]
    names = {
        "MTU_FAST_CUDA": "sm",
        "MTU_FAST_FLAGS": "",
        "MTU_FAST_TORCH_TARGET": "2.11",
        "MTU_FAST_SOURCES": "",
    }
    defines = [f'-D{name}="{value}"' for name, value in names.items()]
    defines += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", *defines, *include]
    # the others are the same with and without it
    sources = [
        path
        for path in (ROOT / "csrc" / "bindings").glob("*.cpp")
        if "MTU_FAST_CUDA" in path.read_text()
    ]
    assert {path.name for path in sources} == {"module.cpp", "span.cpp"}
    for source in sources:
        done = subprocess.run([*command, source], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("R", [1, 5, 32, 33, 128, 160, 200, 512])
def test_on_a_gpu_as_the_reference(R: int) -> None:
    assert gram_schmidt.has_kernel("CUDA") and basis.has_kernel("CUDA")
    J = rows(R, 4)
    g = matrices.random_vector(J.shape[-1])
    G, rhs, active = gram(J), J @ g, torch.arange(R) % 7 != 3
    x, rank = gram_schmidt(G.cuda(), rhs.cuda(), active.cuda(), TOL)
    plain, plain_rank = gram_schmidt.reference(G, rhs, active, TOL)
    assert rank.tolist() == plain_rank.tolist()
    assert_projections_as_accurate(str(R), x.cpu(), plain, J, g, active)
    T, kept = (t.cpu() for t in basis(G.cuda(), TOL))
    reference, plain_kept = basis.reference(G, TOL)
    assert kept.sum(-1).tolist() == plain_kept.sum(-1).tolist()
    assert_orthonormal_as_well(str(R), T, kept, reference, plain_kept, G)


@pytest.mark.gpu
@pytest.mark.parametrize("R", [32, 200])
def test_on_a_gpu_no_waiting_any_stream_the_same_bits(R: int) -> None:
    J = torch.randn(16, R, 2 * R, dtype=torch.float64, device="cuda")
    G, rhs, active = (
        J @ J.mT,
        torch.randn_like(J[..., 0]),
        torch.ones(R, dtype=torch.bool, device="cuda"),
    )
    first = (*gram_schmidt(G, rhs, active, TOL), *basis(G, TOL))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            second = (*gram_schmidt(G, rhs, active, TOL), *basis(G, TOL))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 0, 4), (0,)])
def test_opcheck_on_a_gpu(shape: tuple[int, ...]) -> None:
    J = torch.randn(*shape, 9, dtype=torch.float64, device="cuda")
    G, active = J @ J.mT, torch.arange(shape[-1], device="cuda") != 1
    torch.library.opcheck(gram_schmidt.overload, (G, J[..., 0], active, TOL))
    torch.library.opcheck(basis.overload, (G, TOL))
