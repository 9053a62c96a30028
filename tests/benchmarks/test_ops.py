"""The microbenchmarks on tiny sizes: right implementations get rows, wrong or untested ones none, plots are made."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.floor import Ceilings, Cost, ceilings
from benchmarks.ops import __main__ as command
from benchmarks.ops import gram, table, tested
from benchmarks.ops.case import KERNEL, REFERENCE, Bench, Case, check
from benchmarks.ops.project import uneven
from benchmarks.plot_ops import plot_ops
from mtu_fast._ops import _library
from mtu_fast._ops._library import ops

pytestmark = pytest.mark.usefixtures("only_new_objects")  # every round collects
QUICK = ["--quick", "--budget", "0.01", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def report(path: Path, outcome: str = "") -> Path:
    """A report in which every test file of every op ran one test, with this outcome (passed if empty)."""
    files = {file for op in ops() for file in tested.files_of(op)}
    inside = f"<{outcome}/>" if outcome else ""
    names = [file.with_suffix("").as_posix().replace("/", ".") for file in sorted(files)]
    cases = "".join(
        f'<testcase classname="{name}" name="test_it[a]">{inside}</testcase>' for name in names
    )
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_case_gets_rows_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "why_untrusted", lambda op, reports: "")
    path = tmp_path / "new" / "ops.csv"
    command.main([*QUICK, "--csv", str(path), "--tested-by", str(path)])
    found = rows(path)
    assert {(row["op"], row["case"]) for row in found} == {
        (case.op, case.name) for case in table.cases("quick")
    }
    for row in found:
        assert (
            float(row["seconds"]) > 0
            and float(row["floor_seconds"]) > 0
            and float(row["ratio"]) > 0
        )
        assert float(row["fraction_of_floor"]) == pytest.approx(
            float(row["floor_seconds"]) / float(row["seconds"]), rel=1e-2
        )
        assert (row["error"] == "") == (row["note"] == "a part")
        assert row["torch"] == torch.__version__ and row["threads"] == "1" and row["commit"]
    assert all(float(row["ratio"]) == 1 for row in found if row["implementation"] == REFERENCE)
    plots = plot_ops(path, tmp_path)
    assert {plot.name for plot in plots} == {f"ops_{case.op}.png" for case in table.cases("quick")}
    assert all(plot.stat().st_size > 10_000 for plot in plots)


def test_rows_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "ops.csv"
    arguments = [
        *QUICK,
        "--ops",
        "gram_schmidt",
        "--csv",
        str(path),
        "--tested-by",
        str(report(tmp_path / "r.xml")),
    ]
    command.main(arguments)
    first = path.read_text()
    command.main(arguments)
    assert path.read_text().startswith(first)
    assert len(rows(path)) == 2 * len(first.splitlines()) - 2
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"has the columns \['a', 'b'\], expected \['date'"):
        table.append(path, [])


def doubled(right: Bench) -> Bench:
    """The bench with an implementation whose result is off by a hundred-thousandth, and one that gives NaN."""

    def off() -> Tensor:
        return (1 + 1e-5) * right.implementations[REFERENCE]()

    def nan() -> Tensor:
        return float("nan") * right.implementations[REFERENCE]()

    return replace(right, implementations={**right.implementations, "off": off, "nan": nan})


def with_wrong_ones(size: str) -> list[Case]:
    case = next(case for case in table.cases(size) if case.op == "row_gram")
    return [replace(case, make=lambda device: doubled(case.make(device)))]


def test_a_wrong_implementation_gets_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ops.csv"
    arguments = [*QUICK, "--csv", str(path), "--tested-by", str(report(tmp_path / "r.xml"))]
    with pytest.raises(SystemExit, match="2 refused"):
        command.main(arguments, table=with_wrong_ones)
    found = {row["implementation"]: row for row in rows(path)}
    assert found["off"]["seconds"] == "" and "errs 1.00e-05, allowed" in found["off"]["note"]
    assert found["nan"]["seconds"] == "" and "wrong: errs nan" in found["nan"]["note"]
    assert float(found[REFERENCE]["seconds"]) > 0 and float(found["untiled"]["seconds"]) > 0
    assert capsys.readouterr().out.count("NOT TIMED: wrong") == 2


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        ("failure", "its tests are red"),
        ("error", "its tests are red"),
        ("skipped", "no test of it has passed"),
    ],
)
def test_an_op_with_red_tests_gets_no_time(tmp_path: Path, outcome: str, why: str) -> None:
    path = tmp_path / "ops.csv"
    arguments = [
        "--ops",
        "gram_schmidt",
        "--csv",
        str(path),
        "--tested-by",
        str(report(tmp_path / "r.xml", outcome)),
    ]
    with pytest.raises(SystemExit, match="1 refused"):
        command.main([*QUICK, *arguments])
    (row,) = rows(path)
    assert row["seconds"] == "" and f"refused, gram_schmidt: {why}" in row["note"]


def test_a_case_that_fails_is_a_row_and_the_next_one_runs(tmp_path: Path) -> None:
    def broken(device: str) -> Bench:
        raise RuntimeError("out of memory")

    def both(size: str) -> list[Case]:
        case = next(case for case in table.cases(size) if case.op == "gram_schmidt")
        return [replace(case, name="broken", make=broken), case]

    path = tmp_path / "ops.csv"
    with pytest.raises(SystemExit, match="1 refused"):
        command.main(
            [*QUICK, "--csv", str(path), "--tested-by", str(report(tmp_path / "r.xml"))], table=both
        )
    assert [row["note"] for row in rows(path) if row["case"] == "broken"] == [
        "failed: RuntimeError: out of memory"
    ]
    assert any(row["seconds"] for row in rows(path))


def test_a_check_times_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ops.csv"
    arguments = [
        "--check",
        "--ops",
        "row_gram",
        "--csv",
        str(path),
        "--tested-by",
        str(report(tmp_path / "r.xml")),
    ]
    command.main([*QUICK, *arguments])
    assert not path.exists()
    assert "right: errs" in capsys.readouterr().out


def test_tests_run_once_for_a_state_of_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("ops", "kernels"):
        (tmp_path / "tests" / folder).mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "tests" / "conftest.py").write_text("")
    file = tmp_path / "tests" / "ops" / "test_thing.py"
    file.write_text("def test_thing(): pass\n")
    monkeypatch.setattr(tested, "ROOT", tmp_path)
    assert tested.files_of("thing") == [] and tested.files_of("test_thing") == [
        Path("tests/ops/test_thing.py")
    ]
    first = tested.run(["test_thing"])
    assert tested.why_untrusted("test_thing", [first]) == ""
    written = first.stat().st_mtime_ns
    assert tested.run(["test_thing"]).stat().st_mtime_ns == written
    file.write_text("def test_thing(): assert False\n")
    assert "red: 1 of 1, the first tests.ops.test_thing" in tested.why_untrusted(
        "test_thing", [tested.run(["test_thing"])]
    )


def test_the_tests_of_every_op_are_found() -> None:
    for op in ("row_gram", "gram_schmidt"):
        assert Path(f"tests/ops/test_{op}.py") in tested.files_of(op)


@pytest.mark.parametrize("size", table.SIZES)
def test_cases_name_ops_that_exist_and_have_names_of_their_own(size: str) -> None:
    found = table.cases(size)
    assert {op for case in found for op in case.ops} <= set(ops())
    assert len({(case.op, case.name) for case in found}) == len(found)


def test_the_kernel_is_left_out_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in table.cases("quick") if case.op == "row_gram")
    monkeypatch.setattr(Case, "why_no_kernel", lambda self, device: "no compiler")
    _, found = command.run_case(case, "cpu", 0.01)
    assert KERNEL not in found and found[REFERENCE].times is not None


@pytest.mark.parametrize("op", dict.fromkeys(case.op for case in table.cases("quick")))
def test_every_implementation_is_right(op: str) -> None:
    for case in table.cases("quick"):
        if case.op == op:
            assert {
                name: verdict.wrong
                for name, verdict in check(case.make("cpu")).items()
                if verdict.wrong
            } == {}


def test_the_floor_is_the_longer_of_moving_and_computing() -> None:
    machine = Ceilings(read=10.0, copy=5.0, float32=100.0, float64=50.0)
    assert machine.floor(Cost(read=20.0, written=5.0)) == 3.0
    assert machine.floor(Cost(read=20.0, flops32=200.0, flops64=100.0)) == 4.0
    measured = ceilings("cpu", quick=True)
    assert min(measured.read, measured.copy, measured.float32, measured.float64) > 1e6


# where plain torch is given the kernels' precision
EXACT = {"row_gram", "rank_one_gram", "outer_ghost", "conv_ghost"}


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        (80, torch.float64),
        (86, torch.float32),
        (89, torch.float32),
        (90, torch.float64),
        (120, torch.float32),
    ],
)
def test_what_is_measured_against_is_what_the_gpus_kernels_plan(
    monkeypatch: pytest.MonkeyPatch, arch: int, expected: torch.dtype
) -> None:
    kernels = pytest.importorskip("mtu_fast.kernels.device")
    monkeypatch.setattr(_library, "why_no_triton", lambda: "")
    monkeypatch.setattr(kernels, "arch", lambda: arch)
    assert gram.products("cuda") == gram.row_products("cuda", 48) == expected
    assert gram.products("cpu") == gram.row_products("cpu", 48) == torch.float64
    monkeypatch.setattr(gram, "products", lambda device: expected)  # of a case made on the CPU
    monkeypatch.setattr(gram, "row_products", lambda device, rows: expected)
    for case in gram.cases("quick"):
        bench = case.make("cpu")
        assert (bench.cost.flops64 > 0) == (expected == torch.float64)
        precise = bench.plain().dtype == torch.float64
        assert precise == (expected == torch.float64 and case.op in EXACT)


def test_without_triton_a_gpu_has_plain_torch_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "why_no_triton", lambda: "no C compiler")
    assert gram.products("cuda") == gram.row_products("cuda", 48) == torch.float64


def test_uneven_sizes_add_up() -> None:
    sizes = uneven(10_000_000, 60)
    assert sum(sizes) == 10_000_000 and min(sizes) > 0 and max(sizes) > 20 * min(sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--budget", "0"], "must be positive"), (["--device", "tpu"], "invalid choice: 'tpu'")],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no case for lu; there are row_gram"):
        command.main([*QUICK, "--ops", "lu"])
