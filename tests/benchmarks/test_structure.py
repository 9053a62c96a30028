"""The figures of code on functions whose figures are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import structure

SOURCE = '''"""A module."""
import math  # not counted as a statement


def plain(x):
    """One way through."""
    return x


def branched(xs, y):
    # two branches, one `and`, a comprehension with a condition, a conditional expression
    if y and xs:
        for x in xs:
            print(x)
    return [x for x in xs if x] if y else math
'''


def test_literal_figures(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(SOURCE)
    (file,) = structure.files_of(tmp_path)
    assert {f.where.split()[1]: f.complexity for f in file.functions} == {"plain": 1, "branched": 7}
    assert file.statements == 7  # two functions, two returns, if, for, print
    assert file.dense == 2
    assert file.comments == 2 and file.lines == 15


def test_the_table_names_the_worst(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "module.py").write_text(SOURCE)
    structure.main([str(tmp_path), "--worst", "1"])
    printed = capsys.readouterr().out
    assert "functions graded C or worse" in printed
    assert "complexity    7" in printed and printed.rstrip().endswith("branched")


def test_a_folder_without_code_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Python file"):
        structure.files_of(tmp_path)
