"""Costs measured on the machine: solved from times, kept in a file, and what the planner goes by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mtu_fast import __main__ as command
from mtu_fast._ops import _calibration as calibration
from mtu_fast._ops import _costs as kept
from mtu_fast._ops import _library
from mtu_fast._ops._costs import COSTS, Costs
from mtu_fast._ops.gram import costs, outer_ghost

CPU = torch.device("cpu")
built = pytest.mark.skipif(_library.EXTENSION is None, reason=_library.MISSING or "built")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "folder" / "costs.json"
    monkeypatch.setattr(kept, "FILE", path)
    monkeypatch.setattr(command, "devices", lambda: [CPU])
    kept._stored.cache_clear()
    yield path
    kept._stored.cache_clear()


def times(c: Costs, unit: float) -> dict[str, float]:
    """Seconds of the calls on a machine that has exactly these costs."""
    found = {"unit": calibration.SIDE**3, "call": c.call}
    for n in calibration.POSITIONS:
        for width in calibration.WIDTHS:
            found[f"ghost {n} {width}"] = (
                c.reduce * n**2 + 2 * (c.product * n + c.widen) * n * width
            )
    for r in calibration.ROWS:
        found[f"rows {r}"] = (c.row_product * r + 3.0) * r * calibration.COLUMNS
    r, p = calibration.TALL, calibration.EDGE**2
    found["tile"] = r * p + ((c.tile or 0.0) + c.row_product * r) * r * p
    found["row"] = r * p + (c.row + c.row_product * r) * r * p
    for channels, weight in zip(calibration.CHANNELS, c.weight, strict=False):
        found[f"weight {channels}"] = (
            c.call + (calibration.PIXELS + weight) * calibration.TAPS * channels**2
        )
    return {name: unit * units for name, units in found.items()}


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_costs_behind_the_times_are_found(device: str, factor: float) -> None:
    shipped = COSTS[device]
    truth = replace(
        shipped, product=shipped.product * factor, widen=shipped.widen / factor, reduce=shipped.reduce * factor + 1,
        row_product=shipped.row_product * factor, row=shipped.row / factor, call=shipped.call * factor,
        tile=None if shipped.tile is None else shipped.tile * factor, weight=(50.0, 150.0, shipped.weight[2]),
    )  # fmt: skip
    found = calibration.solve(times(truth, unit=1e-11), shipped)
    for name in ("product", "widen", "reduce", "row_product", "row", "call", "weight"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-6), name
    assert found.tile == (None if truth.tile is None else pytest.approx(truth.tile, rel=1e-6))
    assert (found.image, found.patches, found.pack) == (
        shipped.image,
        shipped.patches,
        shipped.pack,
    )


def test_a_disturbed_measurement_stays_near_what_is_shipped() -> None:
    shipped = COSTS["cpu"]
    seconds = times(shipped, unit=1e-11)
    seconds |= {"tile": 0.0, "row": 1e3}
    found = calibration.solve(seconds, shipped)
    assert found.tile is not None and shipped.tile is not None
    assert found.tile == pytest.approx(shipped.tile / calibration.FAR)
    assert found.row == pytest.approx(shipped.row * calibration.FAR)


@built
def test_this_machine_is_measured_kept_and_planned_by(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert costs(CPU) == COSTS["cpu"]
    assert command.main(["calibrate"]) == 0
    printed = capsys.readouterr().out
    assert str(file) in printed and "row_product" in printed
    found, _ = kept.stored(CPU) or pytest.fail("nothing was kept")
    assert costs(CPU) == found != COSTS["cpu"]
    assert list(json.loads(file.read_text())) == [kept.machine(CPU)]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    command.main([])
    assert "costs, cpu              measured " in capsys.readouterr().out


def test_other_machines_and_other_threads_keep_theirs(
    file: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    mine, other = (replace(COSTS["cpu"], product=product) for product in (3.0, 4.0))
    kept.store(CPU, mine)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert kept.stored(CPU) is None
    kept.store(CPU, other)
    assert costs(CPU) == other
    monkeypatch.undo()
    monkeypatch.setattr(kept, "FILE", file)
    assert costs(CPU) == mine


DAMAGED = {
    "not json": "{",
    "another field": {"speed": 1.0},
    "a word for a number": {"product": "0.9"},
    "nothing for a number": {"product": None},
    "no number": {"row": float("nan")},
    "less than nothing": {"row": -1.0},
    "one weight": {"weight": 3.0},
    "two weights": {"weight": [1.0, 2.0]},
    "no entry": [],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_says_so_and_does_not_serve(file: Path, name: str) -> None:
    file.parent.mkdir()
    damage = DAMAGED[name]
    entry = (
        {"measured": "2026-01-01", **asdict(COSTS["cpu"]), **damage}
        if isinstance(damage, dict)
        else damage
    )
    file.write_text(damage if isinstance(damage, str) else json.dumps({kept.machine(CPU): entry}))
    with pytest.warns(RuntimeWarning, match=r"costs\.json does not serve, so the shipped costs do"):
        assert costs(CPU) == COSTS["cpu"]


@built
def test_a_home_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kept, "FILE", tmp_path / "file" / "costs.json")
    monkeypatch.setattr(command, "devices", lambda: [CPU])
    assert command.main(["calibrate"]) == 1
    assert "row_product" in (printed := capsys.readouterr().out) and "cpu: not kept: " in printed


def test_without_a_home_the_shipped_costs_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(kept, "FILE", None)
    monkeypatch.setattr(Path, "home", none)
    kept._stored.cache_clear()
    assert kept.stored(CPU) is None
    with pytest.raises(OSError, match="no home directory"):
        kept.store(CPU, COSTS["cpu"])


def test_plain_torch_has_its_own_costs(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outer_ghost, "why_no_kernel", lambda device: "none was built")
    assert command.main(["calibrate"]) == 1
    assert "cpu: plain torch serves here (none was built)" in capsys.readouterr().out
    assert not file.exists()
