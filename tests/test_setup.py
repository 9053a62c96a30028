"""What setup.py chooses to build, with an nvcc that is a script of the test: nothing is compiled here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

setuptools = pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[1]
# nvcc 12.6's, in part
OLD = ("compute_50", "compute_75", "compute_80", "compute_86", "compute_90", "compute_90a")
NEW = (*OLD, "compute_100", "compute_120")


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.ABSENT == ""
    return module


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A torch with CUDA, and an empty CUDA_HOME beside which there is no nvcc."""
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return tmp_path


def nvcc(home: Path, listed: tuple[str, ...], compiling: str = "") -> Path:
    """A compiler that lists architectures, notes its arguments, and fails saying `compiling` if that is not empty."""
    program = home / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        f"case $1 in --list-gpu-arch) printf '%s\\n' {' '.join(listed)}; exit 0;;\n"
        f"--dryrun) echo '#$ LIBRARIES= \"-L{home}/lib\"' >&2; exit 0;; esac\n"
        f'echo "$@" >> {home}/arguments\n'
        + (f"echo 'one warning' >&2; echo '{compiling}' >&2; exit 2\n" if compiling else "")
    )
    program.chmod(0o755)
    return program


def build(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, fails: bool = False
) -> list[Any]:
    """The extensions that building ends with; torch's own build command does nothing, or fails."""

    def compiled(self: Any) -> None:
        if fails:
            raise RuntimeError("no compiler")

    monkeypatch.setattr(script.build_ext, "run", compiled)
    (folder / "mtu_fast").mkdir()
    distribution = setuptools.Distribution()
    distribution.ext_modules = [script.extension()]
    command = script.BuildExtension(distribution)
    command.build_lib, command.build_temp, command.inplace = (
        str(folder),
        str(folder / "temp"),
        False,
    )
    command.extensions = distribution.ext_modules
    command.run()
    return list(command.extensions)


@pytest.mark.parametrize(("listed", "expected"), [(NEW, ("80", "90", "100")), (OLD, ("80", "90"))])
def test_only_architectures_that_nvcc_knows(
    script: ModuleType, cuda_torch: Path, listed: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    program = nvcc(cuda_torch, listed)
    assert script.cuda_part() == script.Cuda(str(program), expected)


@pytest.mark.parametrize(
    ("listed", "why"),
    [(("compute_75", "compute_89"), "names none of compute_80, compute_90, compute_100, but 75 89"),
     (("",), "names none of compute_80, compute_90, compute_100, but nothing")],
)  # fmt: skip
def test_an_nvcc_that_knows_none_is_left_out(
    script: ModuleType, cuda_torch: Path, listed: tuple[str, ...], why: str
) -> None:
    program = nvcc(cuda_torch, listed)
    assert script.cuda_part() == script.Cuda(absent=f"{program} --list-gpu-arch {why}")


def test_an_nvcc_of_another_machine_is_left_out(script: ModuleType, cuda_torch: Path) -> None:
    program = nvcc(cuda_torch, NEW)
    program.write_bytes(b"\x7fELF of another machine")
    found = script.cuda_part()
    assert not found.nvcc and found.absent == f"{program} does not run: Exec format error"


def test_no_nvcc_and_no_cuda_torch(
    script: ModuleType, cuda_torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(cuda_torch))
    assert script.cuda_part() == script.Cuda(absent="nvcc was not found in CUDA_HOME or PATH")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert script.cuda_part() == script.Cuda(
        absent=f"torch {torch.__version__} is built without CUDA"
    )


def test_an_old_nvcc_builds_what_it_can_with_ptx_of_the_last(
    script: ModuleType, cuda_torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc(cuda_torch, OLD)
    (extension,) = build(script, monkeypatch, cuda_torch)
    assert '-DMTU_FAST_CUDA="sm_80 sm_90"' in extension.extra_compile_args
    assert (
        "torch_cuda" in extension.libraries and f"-L{cuda_torch}/lib" in extension.extra_link_args
    )
    arguments = (cuda_torch / "arguments").read_text().split()
    assert [each for each in arguments if each.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]  # fmt: skip


def test_a_failing_nvcc_costs_the_cuda_part_only_and_says_why(
    script: ModuleType,
    cuda_torch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    nvcc(cuda_torch, NEW, compiling="gram_schmidt.cu(3): error: a name is undefined")
    (extension,) = build(script, monkeypatch, cuda_torch)
    why = "compiling failed (nvcc: gram_schmidt.cu(3): error: a name is undefined)"
    assert f'-DMTU_FAST_NO_CUDA="no: {why}"' in extension.extra_compile_args
    assert (
        "-DUSE_CUDA" not in extension.extra_compile_args and "torch_cuda" not in extension.libraries
    )
    assert f"mtu_fast: built without CUDA kernels: {why}" in capfd.readouterr().err
    assert not (cuda_torch / "mtu_fast" / "_C.missing").exists()


def test_without_any_compiler_there_is_a_note_instead_of_an_extension(
    script: ModuleType,
    cuda_torch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    nvcc(cuda_torch, NEW)
    assert build(script, monkeypatch, cuda_torch, fails=True) == []
    assert (
        cuda_torch / "mtu_fast" / "_C.missing"
    ).read_text() == "compiling failed (no compiler)\n"
    assert "built without mtu_fast._C: compiling failed (no compiler)" in capfd.readouterr().err


def test_an_older_setuptools_builds_the_extension_and_refuses_the_rest(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    package = script.Package()
    monkeypatch.setattr("sys.argv", ["setup.py", "bdist_wheel"])
    package.parse_config_files()
    assert package.metadata.name == "mtu_fast"
    monkeypatch.setattr(setuptools, "__version__", "70.3.0")
    with pytest.raises(
        SystemExit, match=r"setuptools 70\.3\.0 cannot .*: `pip install 'setuptools>=77'`"
    ):
        script.Package().parse_config_files()
    monkeypatch.setattr("sys.argv", ["setup.py", "build_ext", "--inplace"])
    package = script.Package()
    package.parse_config_files()
    assert package.metadata.name is None
