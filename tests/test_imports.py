"""Imports follow the arrows of the flow and never turn back.

engine -> plans -> stream -> plan -> graph -> nodes is what the losses recorded, -> rules -> uses -> ops what is made of
it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mtu_fast"

# A room is a file or a folder of the package; it may import itself and the rooms on the right.
ARROWS: dict[str, set[str]] = {
    "__main__": {"__init__", "ops"},
    "__init__": {"engine", "rows", "update", "methods", "report", "subspace", "loop"},
    "engine": {
        "space", "statistics", "checks", "explain", "plans", "graph", "nodes", "rows", "block", "update", "uses",
        "methods", "subspace",
    },
    "space": {"block"},
    "loop": {"engine", "rows", "update", "checks", "methods", "subspace"},
    "subspace": {"rows", "update", "methods", "ops"},
    "explain": {"block", "joint", "uses"},
    "checks": {"methods"},
    "rows": {"block", "checks", "refine", "update", "joint", "uses", "methods", "ops"},
    "refine": {"methods", "ops"},
    "block": {"uses", "methods", "ops"},
    "update": {"checks", "methods", "ops"},
    "plans": {"plan", "stream", "probe", "explain", "graph", "block", "joint", "uses"},
    "probe": {"graph", "nodes", "ops"},
    "stream": {"plan", "pull", "graph", "nodes", "rowmap", "rules", "joint", "uses"},
    "pull": {"plan", "carry", "graph", "nodes", "rowmap", "rules", "uses", "ops"},
    "plan": {"reach", "moves", "carry", "rowmap", "graph", "nodes"},
    "reach": {"lookups", "moves", "carry", "rowmap", "nodes"},
    "lookups": {"carry", "rowmap"},
    "moves": {"carry", "rowmap", "nodes"},
    "carry": set(),
    "rowmap": set(),
    "statistics": {"graph", "nodes"},
    "graph": {"nodes"},
    "nodes": set(),
    "rules": {"carry", "rowmap", "uses", "ops"},
    "joint": {"uses", "ops"},
    "uses": {"ops"},
    "methods": {"ops"},
    "ops": {"kernels", "_C"},
    "kernels": set(),
    "reference": set(),
    "metrics": {"checks"},
    "report": {"checks", "engine", "methods", "metrics", "rows"},
}
NEEDED = {"torch", "numpy"}  # besides the standard library
OPTIONAL = {"matplotlib", "sklearn", "tqdm"}  # imported where they are used, within a function
METHODS_MAY_USE = "mtu_fast._ops.gram_schmidt"  # methods see R x R only


SEMI_PRIVATE = ("_input_metadata", "_raw_saved_", "_saved_tensors")  # of autograd nodes


def imported(source: str, package: str) -> Iterator[tuple[str, bool]]:
    """Full names of what `source`, a file of `package`, imports anywhere in it, and whether within a function."""
    tree = ast.parse(source)
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        within = id(node) in inner
        if isinstance(node, ast.Import):
            yield from ((alias.name, within) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
            module = ".".join([*parents, *filter(None, [node.module])]) if node.level else str(node.module)
            yield from ((f"{module}.{alias.name}", within) for alias in node.names)


def room(name: str) -> str:
    """The room that an imported name of the package lies in; a name of the package itself lies in __init__."""
    part = name.split(".")[1]
    is_room = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file() or part in {"kernels", "_C"}
    return part if is_room else "__init__"


def violations(file: str, source: str) -> list[str]:
    """What `file`, a path relative to the package, imports and should not."""
    parts = file.removesuffix(".py").split("/")
    if parts[0] not in ARROWS:
        return [f"{file}: {parts[0]} is no room of the house"]
    found = []
    for name, within in imported(source, ".".join(["mtu_fast", *parts[:-1]])):
        top = name.partition(".")[0]
        if top != "mtu_fast":
            allowed = top in NEEDED or top in sys.stdlib_module_names or (within and top in OPTIONAL)
        else:
            allowed = room(name) in {parts[0], *ARROWS[parts[0]]}
            if parts[0] == "methods" and room(name) == "ops":
                allowed = name.startswith(METHODS_MAY_USE)
        if not allowed:
            found.append(f"{file}: {parts[0]} must not import {name}")
    return found


@pytest.mark.parametrize("file", sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")))
def test_imports_follow_the_arrows(file: str) -> None:
    assert violations(file, (PACKAGE / file).read_text()) == []


def test_the_arrows_have_no_cycle() -> None:
    left = {name: set(arrows) & set(ARROWS) for name, arrows in ARROWS.items()}
    while left:
        ends = {name for name, arrows in left.items() if not arrows}
        assert ends, f"a cycle among {sorted(left)}"
        left = {name: arrows - ends for name, arrows in left.items() if name not in ends}


def test_one_file_depends_on_what_torch_does_not_promise() -> None:
    dependent = {path.name for path in PACKAGE.rglob("*.py") if any(name in path.read_text() for name in SEMI_PRIVATE)}
    assert dependent == {"nodes.py"}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/gram.py", "from mtu_fast._rows.uses import Outer"),
        ("ops/gram.py", "def f():\n    import mtu_fast.engine"),
        ("rules/linear.py", "from ..graph import Graph"),
        ("rules/linear.py", "from .. import engine"),
        ("methods/mean.py", "from mtu_fast.rows import Rows"),
        ("methods/mean.py", "from mtu_fast._ops.gram import row_gram"),
        ("reference/mean.py", "from mtu_fast.methods import Roles"),
        ("uses.py", "from mtu_fast import Engine"),
        ("metrics.py", "import pandas"),
        ("metrics.py", "from sklearn.metrics import roc_auc_score"),
        ("attic.py", "import torch"),
    ],
)
def test_a_backward_arrow_is_seen(file: str, source: str) -> None:
    assert len(violations(file, source)) == 1


def test_a_forward_arrow_passes() -> None:
    assert violations("rules/linear.py", "from .base import rule\nfrom ..uses import Outer\nimport torch, math") == []


def test_an_optional_package_may_be_imported_where_it_is_used() -> None:
    assert violations("metrics/membership.py", "def f():\n    from sklearn.metrics import roc_auc_score") == []
