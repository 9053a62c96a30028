"""The bytes that two ranks send are those of the model, within a tenth."""

from __future__ import annotations

import pytest

from benchmarks.scaling_ranks import Sizes, compared, main


def test_bytes_are_those_of_the_model() -> None:
    found = compared(2, Sizes(layers=4, width=64, positions=8, samples=8, steps=1))
    assert found["one"].sent == 0
    for name in ("weak", "strong"):
        assert found[name].sent == pytest.approx(found[name].model, rel=0.1)


def test_a_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--layers", "2", "--width", "8", "--positions", "2", "--samples", "4", "--steps", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["one", "weak", "strong"]
