"""What the build chooses, with an nvcc and a C++ compiler that are scripts of the test: nothing is compiled here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import mtu_fast
from mtu_fast import _build
from mtu_fast._build import BuildError, Cuda, Torch
from mtu_fast._ops._library import EXTENSION

setuptools = pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[1]
# nvcc 12.6's, in part
OLD = ("compute_50", "compute_75", "compute_80", "compute_86", "compute_90", "compute_90a")
NEW = (*OLD, "compute_100", "compute_120")
TORCH = Torch(Path("/torch"), "2.12.0+cu126", "12.6")


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return path


def nvcc(home: Path, listed: tuple[str, ...], compiling: str = "") -> Path:
    """A compiler that lists architectures, notes its arguments, and fails saying `compiling` if that is not empty."""
    script = (
        f"case $1 in --list-gpu-arch) printf '%s\\n' {' '.join(listed)}; exit 0;;\n"
        f"--dryrun) echo '#$ LIBRARIES= \"-L{home}/lib\"' >&2; exit 0;; esac\n"
        f'echo "$@" >> {home}/arguments\n'
    )
    if compiling:
        script += f"echo 'one warning' >&2; echo '{compiling}' >&2; exit 2\n"
    return program(home / "bin" / "nvcc", script)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A torch with CUDA, an empty CUDA_HOME, and a C++ compiler that notes its arguments and writes what is asked."""
    monkeypatch.setattr(_build, "find_torch", lambda: TORCH)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("MTU_FAST_CUDA", raising=False)
    written = f'for last; do :; done\necho "$@" >> {tmp_path}/c++\necho built > "$last"\n'
    monkeypatch.setenv("CXX", str(program(tmp_path / "cxx", written)))
    return tmp_path


def links(home: Path) -> list[str]:
    """The arguments of the last call of the C++ compiler."""
    return (home / "c++").read_text().splitlines()[-1].split()


# ---- which torch ---------------------------------------------------------------------------------


def torch_folder(folder: Path, version: str, cuda: str) -> Path:
    folder.mkdir()
    stated = f"__version__ = '{version}'\ndebug = False\ncuda: Optional[str] = {cuda}\nhip = '6'\n"
    (folder / "version.py").write_text(stated)
    return folder


@pytest.mark.parametrize(("stated", "cuda"), [("'13.0'", "13.0"), ("None", "")])
def test_the_torch_of_another_python_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: str, cuda: str
) -> None:
    folder = torch_folder(tmp_path / "torch", "2.11.0+x", stated)
    monkeypatch.setenv("MTU_FAST_TORCH", str(folder))
    assert _build.find_torch() == Torch(folder, "2.11.0+x", cuda)


def test_an_older_torch_and_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTU_FAST_TORCH", str(torch_folder(tmp_path / "torch", "2.9.1+cpu", "None")))
    with pytest.raises(BuildError, match=r"torch 2\.9\.1\+cpu at build time, older than 2\.11"):
        _build.find_torch()
    monkeypatch.setenv("MTU_FAST_TORCH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no torch at build time \(.* has no version\.py\)"):
        _build.find_torch()
    monkeypatch.delenv("MTU_FAST_TORCH")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"no torch at build time$"):
        _build.find_torch()


# ---- CUDA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("listed", "expected"), [(NEW, ("80", "90", "100")), (OLD, ("80", "90"))])
def test_only_architectures_that_nvcc_knows(
    home: Path, listed: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    path = nvcc(home, listed)
    assert _build.find_cuda(TORCH) == Cuda(str(path), expected)


@pytest.mark.parametrize(
    ("listed", "why"),
    [(("compute_75", "compute_89"), "names none of compute_80, compute_90, compute_100, but 75 89"),
     (("",), "names none of compute_80, compute_90, compute_100, but nothing")],
)  # fmt: skip
def test_an_nvcc_that_knows_none_is_left_out(home: Path, listed: tuple[str, ...], why: str) -> None:
    path = nvcc(home, listed)
    assert _build.find_cuda(TORCH) == Cuda(absent=f"{path} --list-gpu-arch {why}")


def test_an_nvcc_of_another_machine_is_left_out(home: Path) -> None:
    path = nvcc(home, NEW)
    path.write_bytes(b"\x7fELF of another machine")
    found = _build.find_cuda(TORCH)
    assert not found.nvcc and found.absent == f"{path} does not run: Exec format error"


def test_no_nvcc_and_no_cuda_torch(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))
    assert _build.find_cuda(TORCH) == Cuda(absent="nvcc was not found in CUDA_HOME or PATH")
    plain = Torch(Path("/torch"), "2.12.0+cpu", "")
    assert _build.find_cuda(plain) == Cuda(absent="torch 2.12.0+cpu is built without CUDA")
    monkeypatch.setenv("MTU_FAST_CUDA", "0")
    assert _build.find_cuda(TORCH) == Cuda(absent="left out by MTU_FAST_CUDA=0")


def test_an_old_nvcc_builds_what_it_can_with_ptx_of_the_last(home: Path) -> None:
    nvcc(home, OLD)
    _build.build(home / "_C.so")
    assert '-DMTU_FAST_CUDA="sm_80 sm_90"' in (home / "c++").read_text()
    assert {"-ltorch_cuda", "-lcudart_static", f"-L{home}/lib", "-L/torch/lib"} <= {*links(home)}
    arguments = (home / "arguments").read_text().split()
    assert [each for each in arguments if each.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]  # fmt: skip


def test_a_failing_nvcc_costs_the_cuda_part_only_and_says_why(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nvcc(home, NEW, compiling="gram_schmidt.cu(3): error: a name is undefined")
    _build.build(home / "_C.so")
    why = "compiling failed (nvcc: gram_schmidt.cu(3): error: a name is undefined)"
    arguments = (home / "c++").read_text()
    assert f'-DMTU_FAST_NO_CUDA="no: {why}"' in arguments
    assert "-DUSE_CUDA" not in arguments and "-ltorch_cuda" not in links(home)
    assert f"mtu_fast: built without CUDA kernels: {why}" in capfd.readouterr().err


# ---- C++ -----------------------------------------------------------------------------------------


def test_every_source_is_compiled_and_linked_into_a_whole_file(home: Path) -> None:
    _build.build(home / "folder" / "_C.so")
    calls = (home / "c++").read_text()
    for source in (ROOT / "csrc").rglob("*.cpp"):
        assert f"-c {source} " in calls
    assert "-ltorch_cpu" in links(home)
    assert [path.name for path in (home / "folder").iterdir()] == ["_C.so"]


def test_a_failing_compiler_leaves_what_was_there(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "_C.so").write_text("before")
    failing = program(home / "bad", "echo 'span.cpp:3:1: error: no such name' >&2; exit 1\n")
    monkeypatch.setenv("CXX", str(failing))
    said = r"compiling failed \(bad: span\.cpp:3:1: error: no such name\)"
    with pytest.raises(BuildError, match=said):
        _build.build(home / "_C.so")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"compiling failed \(no-such-compiler: No such file"):
        _build.build(home / "_C.so")
    assert (home / "_C.so").read_text() == "before"


def test_headers_of_python_that_are_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build.sysconfig, "get_path", lambda name: str(home))
    with pytest.raises(BuildError, match=r"Python's headers are not in .*python3-dev"):
        _build.build(home / "_C.so")


def installed(folder: Path) -> Path:
    """A package as pip installs it, with the sources and a record of its files."""
    package = folder / "mtu_fast"
    (package / "_csrc" / "bindings").mkdir(parents=True)
    (package / "_csrc" / "bindings" / "module.cpp").write_text("")
    (package / "_C.missing").write_text("no torch at build time\n")
    facts = folder / "mtu_fast-0.1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: mtu_fast\nVersion: 0.1.0\n")
    (facts / "RECORD").write_text("mtu_fast/__init__.py,,\nmtu_fast-0.1.0.dist-info/RECORD,,\n")
    return package


def test_built_in_place_it_is_of_the_package_that_pip_removes(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = installed(home / "site")
    monkeypatch.setattr(_build, "PACKAGE", package)
    monkeypatch.syspath_prepend(str(package.parent))
    target = _build.build_in_place()
    assert _build.build_in_place() == target
    assert f"-c {package}/_csrc/bindings/module.cpp " in (home / "c++").read_text()
    assert target.parent == package and target.is_file()
    assert not (package / "_C.missing").exists()
    record = (package.parent / "mtu_fast-0.1.0.dist-info" / "RECORD").read_text()
    assert record.count(f"mtu_fast/{target.name},,\n") == 1


def test_a_folder_that_cannot_be_written_to_and_sources_that_are_missing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_build, "PACKAGE", home / "nowhere" / "mtu_fast")
    with pytest.raises(BuildError, match="nowhere/mtu_fast cannot be written to"):
        _build.build_in_place()
    with pytest.raises(BuildError, match=r"the C\+\+ sources are neither in"):
        _build.sources()


def test_a_binary_of_other_sources_is_outdated(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a pull; of an installed package the sources are those it was built from."""
    package, binary = home / "tree" / "mtu_fast", home / "_C.so"
    source = package.parent / "csrc" / "bindings" / "module.cpp"
    source.parent.mkdir(parents=True)
    package.mkdir()
    source.write_text("int a;")
    monkeypatch.setattr(_build, "PACKAGE", package)
    binary.write_bytes(b"before " + _build.stamp().encode() + b" behind")
    assert _build.outdated(binary) == ""
    source.write_text("int b;")
    assert "mtu_fast._C is outdated" in _build.outdated(binary)
    source.write_text("int a;")
    assert _build.outdated(binary) == ""
    source.with_name("more.h").write_text("")
    assert str(binary) in _build.outdated(binary)
    (package / "_csrc").mkdir()
    assert _build.outdated(binary) == ""


@pytest.mark.skipif(EXTENSION is None, reason="needs the extension")
def test_an_outdated_binary_is_not_loaded(home: Path) -> None:
    """Its kernels would be called by schemas that are not theirs."""
    shutil.copytree(
        ROOT / "mtu_fast", home / "mtu_fast", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "csrc", home / "csrc")
    program = (
        "from mtu_fast._ops import _library; print(_library.EXTENSION is None, _library.MISSING)"
    )
    found = []
    for text in ("", "// another line\n"):
        with (home / "csrc" / "bindings" / "module.cpp").open("a") as file:
            file.write(text)
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONPATH": str(home)},
            cwd=home, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append(done.stdout.split(" ", 1))
    assert found[0] == ["False", "\n"]
    assert found[1][0] == "True" and "mtu_fast._C is outdated" in found[1][1]


# ---- setup.py ------------------------------------------------------------------------------------


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.absent() == ""
    return module


def test_without_any_compiler_there_is_a_note_instead_of_an_extension(
    script: ModuleType,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", "false")
    (home / "mtu_fast").mkdir()
    distribution = setuptools.Distribution()
    distribution.ext_modules = [setuptools.Extension("mtu_fast._C", sources=[])]
    command = script.BuildExtension(distribution)
    command.build_lib, command.build_temp = str(home), str(home / "temp")
    command.ensure_finalized()
    command.run()
    assert command.extensions == []
    why = "compiling failed (false: exit status 1)"
    assert (home / "mtu_fast" / "_C.missing").read_text() == f"{why}\n"
    assert f"built without mtu_fast._C: {why}" in capfd.readouterr().err


def test_an_older_setuptools_builds_the_extension_and_refuses_the_rest(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    package = script.Package({"packages": ["mtu_fast"]})
    monkeypatch.setattr("sys.argv", ["setup.py", "bdist_wheel"])
    package.parse_config_files()
    assert package.metadata.name == "mtu_fast"
    assert package.metadata.version == mtu_fast.__version__
    monkeypatch.setattr(setuptools, "__version__", "70.3.0")
    with pytest.raises(
        SystemExit, match=r"setuptools 70\.3\.0 cannot .*: `pip install 'setuptools>=77'`"
    ):
        script.Package().parse_config_files()
    monkeypatch.setattr("sys.argv", ["setup.py", "build_ext", "--inplace"])
    package = script.Package()
    package.parse_config_files()
    assert package.metadata.name is None
