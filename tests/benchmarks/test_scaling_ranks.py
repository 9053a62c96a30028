"""The bytes that two ranks send are those of the model, within a tenth."""

from __future__ import annotations

import pytest

from benchmarks import scaling_ranks
from benchmarks.scaling_ranks import Result, Sizes, compared, main

Found = dict[str, Result]


@pytest.fixture(scope="module")
def found() -> Found:
    return compared(2, Sizes(layers=4, width=64, positions=8, samples=8, steps=1))


def test_bytes_are_those_of_the_model(found: Found) -> None:
    assert found["one"].sent == 0
    for name in ("weak", "strong"):
        assert found[name].sent == pytest.approx(found[name].model, rel=0.1)


def test_a_table_is_printed(
    found: Found, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def again(ranks: int, sizes: Sizes) -> Found:
        asked.append((ranks, sizes))
        return found

    monkeypatch.setattr(scaling_ranks, "compared", again)
    main(["--layers", "2", "--width", "8", "--positions", "2", "--samples", "4", "--steps", "1"])
    assert asked == [(2, Sizes(layers=2, width=8, positions=2, samples=4, steps=1))]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["one", "weak", "strong"]
    sent = float(lines[2].split()[-2])
    assert sent == pytest.approx(found["weak"].sent / 2**20, abs=5e-4)
