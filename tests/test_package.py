"""The package as a user meets it: complete without the extension, honest about what runs where, and installable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mtu_fast
from mtu_fast import __main__ as command
from mtu_fast._ops import _library

ROOT = Path(__file__).parents[1]
WITHOUT_EXTENSION = "import sys; sys.modules['mtu_fast._C'] = None\n"


def python(*arguments: str, folder: Path = ROOT, **environment: str) -> str:
    """Standard output of this interpreter, in `folder`; its standard error in the failure if there is one."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines_of(table: str, op: str) -> list[str]:
    return [line for line in table.splitlines() if line.split()[:1] == [op]]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, without anything built."""
    copy = tmp_path_factory.mktemp("tree")
    for path in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(path, copy)
    for folder in ("csrc", "kernels", "mtu_fast"):
        shutil.copytree(
            ROOT / folder,
            copy / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "_C.*"),
        )
    return copy


def test_memory_is_poisoned_in_tests() -> None:
    assert torch.empty(3).isnan().all()
    assert (
        torch.empty(3).new_empty(2, dtype=torch.int64).tolist()
        == [torch.iinfo(torch.int64).max] * 2
    )


def test_every_op_has_a_line_for_each_device() -> None:
    table = python("-m", "mtu_fast")
    positions = {"outer_direct", "conv_direct", "outer_ghost", "conv_ghost"}
    assert {"gram_schmidt", "row_gram", "gather_gram"} | positions <= set(_library.ops())
    for name in _library.ops():
        assert [line.split()[1] for line in lines_of(table, name)] == list(_library.DEVICES)
    assert torch.__version__ in table


def test_each_reference_says_why_there_is_no_kernel() -> None:
    for each in _library.implementations():
        served = _library.ops()[each.op].has_kernel(each.device) and (
            each.device == "CPU" or torch.cuda.is_available()
        )
        assert (each.why == "") == served == each.serves.startswith("kernel")


def test_where_triton_does_not_work_the_reference_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(name: str) -> None:
        raise RuntimeError(f"no C compiler for {name}")

    monkeypatch.setattr(_library, "import_module", fails)
    _library.why_no_triton.cache_clear()
    with pytest.warns(
        RuntimeWarning, match=r"Triton does not work here: RuntimeError: no C compiler"
    ):
        assert "mtu_fast.kernels.probe" in _library.why_no_triton()
    _library.why_no_triton.cache_clear()


@pytest.mark.parametrize("answer", ["a Gram", "nothing", "no Triton"])
def test_what_a_launcher_does_not_implement_goes_to_the_reference(
    monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    calls: list[object] = []
    rows, gram = [torch.arange(6.0).view(2, 3)], torch.eye(2).double()

    def launcher(blocks: list[torch.Tensor]) -> object:
        calls.append(blocks)
        return gram if answer == "a Gram" else NotImplemented

    def kernels(name: str) -> SimpleNamespace:
        assert name == "mtu_fast.kernels.gram"
        return SimpleNamespace(row_gram=launcher)

    op = _library.ops()["row_gram"]
    monkeypatch.setattr(op, "triton_file", "gram")
    monkeypatch.setattr(_library, "import_module", kernels)
    monkeypatch.setattr(
        _library, "why_no_triton", lambda: "no C compiler" if answer == "no Triton" else ""
    )
    expected = gram if answer == "a Gram" else torch.tensor([[5.0, 14.0], [14.0, 50.0]]).double()
    assert torch.equal(op.launch(rows), expected)
    assert calls == ([] if answer == "no Triton" else [rows])


@pytest.mark.skipif(util.find_spec("triton") is None, reason="needs Triton")
def test_the_dispatcher_holds_the_launcher_of_every_op_that_has_one() -> None:
    with_launcher = {name for name, op in _library.ops().items() if op.triton_file}
    assert {
        "row_gram",
        "rank_one_gram",
        "outer_ghost",
        "conv_ghost",
        "gather_gram",
        "grouped_rows",
        "project",
        "transform",
        "unordered_rows",
    } == with_launcher
    assert all(_library.ops()[name].has_kernel("CUDA") for name in with_launcher)


@pytest.mark.skipif(_library.EXTENSION is None, reason=_library.MISSING or "built")
def test_the_extension_says_how_it_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert _library.EXTENSION is not None
    assert set(_library.EXTENSION.build_facts()) >= {
        "compiler",
        "flags",
        "torch (headers)",
        "torch (oldest served)",
    }
    command.main([])
    printed = capsys.readouterr().out
    assert "kernel (mtu_fast._C)" in lines_of(printed, "gram_schmidt")[0]
    assert all(value in printed for value in _library.EXTENSION.build_facts().values())


@pytest.mark.skipif(
    _library.EXTENSION is None or not shutil.which("nm"), reason="needs the extension and nm"
)
def test_the_extension_uses_only_the_stable_abi() -> None:
    assert _library.EXTENSION is not None
    nm = ["nm", "-D", "-C", "--undefined-only", str(_library.EXTENSION.__file__)]
    symbols = subprocess.run(nm, capture_output=True, text=True, check=True).stdout
    assert "torch_call_dispatcher" in symbols
    assert not [
        line
        for line in symbols.splitlines()
        if "c10::" in line or "at::" in line or "torch::" in line
    ]


def test_everything_works_without_the_extension_and_the_first_engine_says_so() -> None:
    script = WITHOUT_EXTENSION + (
        "import warnings\n"
        "import torch, mtu_fast as mtu\n"
        "from mtu_fast.__main__ import main\n"
        "net = torch.nn.Linear(5, 1).double()\n"
        "x = torch.randn(4, 5, dtype=torch.float64)\n"
        "forget = torch.tensor([True, False, False, False])\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    engine = mtu.Engine(net)\n"
        "    mtu.Engine(net)\n"
        "print(len(caught), caught[0].category.__name__, caught[0].filename, caught[0].message)\n"
        "engine.backward(net(x).squeeze(1) ** 2, mtu.OrthoGrad(alpha=0.0), forget=forget)\n"
        "change = x[1:] @ net.weight.grad[0] + net.bias.grad\n"
        "print('moved', float(net.weight.grad.norm()) > 1e-3, float(change.abs().max()) < 1e-10)\n"
        "main()\n"
    )
    warned, moved, *_ = (printed := python("-c", script)).splitlines()
    assert warned.startswith("1 RuntimeWarning <string> mtu_fast._C is absent: ")
    assert warned.endswith("`python -m mtu_fast build` compiles the kernels here.")
    assert moved == "moved True True"
    assert "reference (plain torch)" in lines_of(printed, "gram_schmidt")[0]
    assert "mtu_fast._C is absent" in printed


@pytest.mark.skipif(_library.EXTENSION is None, reason=_library.MISSING or "built")
def test_with_the_extension_nothing_is_said() -> None:
    _library.announce()


def test_the_kernels_package_is_there_in_a_bare_checkout(tree: Path) -> None:
    """No installation: `mtu_fast/kernels` is a link to `kernels`."""
    if (ROOT / "mtu_fast" / "kernels").is_symlink():  # not so in an unpacked sdist
        assert (tree / "mtu_fast" / "kernels").is_symlink()
    script = "import mtu_fast.kernels as found; print(found.__file__)"
    printed = python("-c", f"import sys; sys.path.insert(0, {str(tree)!r}); {script}")
    assert Path(printed.strip()).parent == tree / "mtu_fast" / "kernels"


def test_build_says_what_is_missing(tree: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mtu_fast", "build"],
        cwd=tree,
        env={**os.environ, "CXX": "false", "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("mtu_fast: compiling failed (false: exit status 1)\n")


def test_a_failed_compilation_costs_the_extension_only_and_is_told(
    tree: Path, tmp_path: Path
) -> None:
    wheel = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        ".",
    ]
    python(*wheel, folder=tree, CXX="false")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert not [
        name
        for name in names
        if name.endswith(".so") or name.startswith(("tests", "benchmarks", "csrc"))
    ]
    assert "mtu_fast/py.typed" in names
    assert {name for name in names if name.endswith(".py")} == {
        f"{prefix}{path.relative_to(tree).as_posix()}"
        for prefix, folder in (("", "mtu_fast"), ("mtu_fast/", "kernels"))
        for path in (tree / folder).rglob("*.py")
    }
    # An editable install would offer its own _C to the extracted package.
    alone = "import runpy, sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in f.__module__]"
    table = python("-c", f"{alone}; sys.path.insert(0, '.'); runpy.run_module('mtu_fast', run_name='__main__')",
                   folder=tmp_path)  # fmt: skip
    assert "mtu_fast._C is absent: compiling failed" in table


def test_without_torch_at_build_time_the_wheel_is_pure_python_with_the_sources(
    tree: Path, tmp_path: Path
) -> None:
    build = ["setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path)]
    python(*build, folder=tree, MTU_FAST_TORCH=str(tmp_path))
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name == f"mtu_fast-{mtu_fast.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert "no torch at build time" in archive.read("mtu_fast/_C.missing").decode()
    assert {f"mtu_fast/_{name}" for name in files("csrc")} <= names


def test_the_source_distribution_can_build_the_extension_and_has_no_results(
    tree: Path, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "benchmarks", tree / "benchmarks")
    python("setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path), folder=tree)
    packed = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(packed) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files("csrc") <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "mtu_fast/py.typed"} <= names
    assert "benchmarks/step_cost.py" in names
    assert not [name for name in names if name.startswith("benchmarks/results/")]
    assert packed.stat().st_size < 1 << 20


def files(folder: str) -> set[str]:
    paths = filter(Path.is_file, (ROOT / folder).rglob("*"))
    return {path.relative_to(ROOT).as_posix() for path in paths}
