"""Growth and fit: what is measured is written down, and the largest N is the largest."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import plot_scaling, scaling
from benchmarks.models import Sizes, build
from benchmarks.peers.base import Peer, Steps

pytestmark = pytest.mark.usefixtures("one_thread")

PEAKS: dict[str, Callable[[int], float]] = {
    "linear": lambda n: 40 + 9.3 * n,
    "through zero": lambda n: 2.5 * n,
    "quadratic": lambda n: 5 * n + 0.02 * n * n,
    "in steps": lambda n: 64 * math.ceil(n / 7),
    "root": lambda n: 30 * math.sqrt(n),
}


@pytest.mark.parametrize("name", PEAKS)
@pytest.mark.parametrize("memory", [10.0, 100.0, 555.0, 1024.0])
def test_the_largest_that_fits(name: str, memory: float) -> None:
    peak, asked = PEAKS[name], []

    def measured(n: int) -> float:
        asked.append(n)
        return peak(n)

    found, mib = scaling.largest(measured, memory)
    assert mib == (peak(found) if found else 0.0) and mib <= memory
    more = found + max(1, found // 16)
    assert found == scaling.MOST or peak(more) > memory
    assert len(asked) == len(set(asked)) <= 14 and max(asked) <= scaling.MOST


def test_no_more_is_asked_for_than_there_may_be() -> None:
    assert scaling.largest(lambda n: 1.0, 100.0, most=16) == (16, 1.0)
    assert scaling.largest(lambda n: 101.0, 100.0, most=16) == (0, 0.0)


def test_the_base_is_on_every_axis_once() -> None:
    found = scaling.points(quick=False)
    assert (
        len(found)
        == len(set(found))
        == 1 + sum(len(values) - 1 for values in scaling.AXES.values())
    )
    assert scaling.Point(**scaling.BASE) in found
    case = scaling.Point(3, 2, 5, 64).case()
    assert case.inputs.shape == (3, 5) and len(case.labels) == 2
    assert case.model.backbone.positions.shape == (5, 64)


@pytest.mark.filterwarnings("ignore")  # attention under vmap
def test_rows_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = ["mtu_fast", "vmap(grad), J kept"]
    arguments = ["--quick", "--repeats", "1", "--memory", "--out", str(tmp_path), "--ways", *ways]
    scaling.main(arguments)
    rows = list(csv.DictReader((tmp_path / "scaling.csv").open()))
    points = scaling.points(quick=True)
    assert len(rows) == len(points) * 3 and "mtu_fast" in capsys.readouterr().out
    assert all(float(row["ratio"]) > 0 and not row["why_not"] for row in rows)
    assert {float(row["ratio"]) for row in rows if row["way"] == "plain"} == {1.0}
    monkeypatch.setattr(
        plot_scaling, "BASE", {axis: values[0] for axis, values in scaling.QUICK.items()}
    )
    assert plot_scaling.plot_scaling(tmp_path / "scaling.csv", tmp_path).stat().st_size > 10_000


def test_a_way_that_cannot_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: object) -> Steps:
        raise NotImplementedError("no such layer")

    monkeypatch.setitem(scaling.WAYS, "Opacus", Peer(broken))
    found = scaling.grown(scaling.Point(2, 1, 3, 16), ["Opacus"], 1, memory=False)
    assert (
        found["Opacus"] == {"why_not": "NotImplementedError: no such layer"}
        and "ms" in found["plain"]
    )


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("resnet", Sizes(width=64), "width is 64 for 'resnet'"),
        ("mlp", Sizes(positions=4), "positions is 4 for 'mlp'"),
        ("mlp", Sizes(samples=0), "samples is 0"),
    ],
)
def test_a_size_that_a_model_does_not_have(name: str, sizes: Sizes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, 1, sizes=sizes)
