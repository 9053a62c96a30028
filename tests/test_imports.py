"""Imports follow the arrows between folders and never turn back: engine -> _graph -> _rows -> _ops."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mtu_fast"

# A module here is a file or a folder of the package; it may import itself and those on the right.
ARROWS: dict[str, set[str]] = {
    "__main__": {"__init__", "_build", "_ops"},
    "_build": set(),
    "__init__": {
        "engine",
        "rows",
        "subspace",
        "memory",
        "methods",
        "unlearning",
        "errors",
        "_rows",
    },
    "unlearning": {
        "_arguments",
        "_distributed",
        "_kept",
        "engine",
        "rows",
        "subspace",
        "memory",
        "methods",
        "errors",
        "_checks",
        "_rows",
    },
    "engine": {
        "_arguments",
        "_graph",
        "_rows",
        "_ops",
        "_checks",
        "_distributed",
        "rows",
        "_kept",
        "subspace",
        "memory",
        "methods",
        "accumulation",
        "_uncollected",
    },
    "accumulation": {"rows", "_distributed", "_rows"},
    "subspace": {"_arguments", "_kept", "rows", "methods", "_checks", "_rows", "_ops"},
    "memory": {"_arguments", "_checks", "_keepable", "_kept", "rows", "methods", "_rows", "_ops"},
    "_kept": {"_arguments", "rows", "methods", "_rows", "_ops"},
    "rows": {
        "_arguments",
        "methods",
        "errors",
        "_checks",
        "_distributed",
        "_keepable",
        "_rows",
        "_ops",
        "_uncollected",
    },
    "_keepable": {"methods", "_checks", "_distributed", "_rows"},
    "_distributed": {"methods", "errors", "_checks", "_rows", "_ops"},
    "rules": {"_graph", "_rows", "_ops"},
    "_graph": {"methods", "_checks", "_rows", "_ops"},
    "_rows": {"_arguments", "methods", "errors", "_checks", "_later", "_ops"},
    "_checks": {"_arguments", "methods", "_later"},
    "methods": {"_ops", "_arguments", "_later"},
    "_arguments": set(),
    "_later": set(),
    "_uncollected": set(),
    "_ops": {"_arguments", "_build", "kernels", "_C"},
    "kernels": set(),
    "reference": {"_arguments"},
    "errors": set(),
    "losses": {"_arguments"},
    "integrations": {
        "_arguments",
        "_distributed",
        "engine",
        "subspace",
        "losses",
        "methods",
        "errors",
        "_checks",
        "_rows",
    },
}
NEEDED = {"torch", "numpy"}  # besides the standard library
OPTIONAL = {
    "matplotlib",
    "sklearn",
    "tqdm",
    "transformers",
    "lightning",
}  # imported where they are used, within a function
# methods see R x R only
METHODS_MAY_USE = (
    "mtu_fast._ops.gram_schmidt",
    "mtu_fast._ops.complementary",
    "mtu_fast._ops._host_linalg",
)


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
            module = (
                ".".join([*parents, *filter(None, [node.module])])
                if node.level
                else str(node.module)
            )
            yield from ((f"{module}.{alias.name}", within) for alias in node.names)


def module(name: str) -> str:
    """The module that an imported name lies in; a name of the package itself lies in __init__."""
    part = name.split(".")[1]
    is_module = (
        (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file() or part in {"kernels", "_C"}
    )
    return part if is_module else "__init__"


def violations(file: str, source: str) -> list[str]:
    """What `file`, a path relative to the package, imports and should not."""
    parts = file.removesuffix(".py").split("/")
    if parts[0] not in ARROWS:
        return [f"{file}: {parts[0]} is no module of the package"]
    found = []
    for name, within in imported(source, ".".join(["mtu_fast", *parts[:-1]])):
        top = name.partition(".")[0]
        if top != "mtu_fast":
            allowed = (
                top in NEEDED or top in sys.stdlib_module_names or (within and top in OPTIONAL)
            )
        else:
            allowed = module(name) in {parts[0], *ARROWS[parts[0]]}
            if parts[0] == "methods" and module(name) == "_ops":
                allowed = name.startswith(METHODS_MAY_USE)
        if not allowed:
            found.append(f"{file}: {parts[0]} must not import {name}")
    return found


@pytest.mark.parametrize(
    "file", sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
)
def test_imports_follow_the_arrows(file: str) -> None:
    assert violations(file, (PACKAGE / file).read_text()) == []


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """The modules that import one another in a circle, and those that need them; [] if none."""
    left = {name: set(ends) & set(arrows) for name, ends in arrows.items()}
    while ends := {name for name, others in left.items() if not others}:
        left = {name: others - ends for name, others in left.items() if name not in ends}
    return sorted(left)


def file_of(name: str) -> str:
    """The file that an imported name of the package lies in, without its ending."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    while not path.with_suffix(".py").is_file() and not (path / "__init__.py").is_file():
        path = path.parent
    return path.relative_to(PACKAGE).as_posix()


def test_the_arrows_have_no_cycle() -> None:
    assert cycle(ARROWS) == []


def test_no_two_files_import_one_another() -> None:
    arrows = {}
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__")
        package = ".".join(["mtu_fast", *path.relative_to(PACKAGE).parts[:-1]])
        names = [name for name, within in imported(path.read_text(), package) if not within]
        arrows[file] = {file_of(n) for n in names if n.startswith("mtu_fast.")} - {file, "."}
    assert cycle(arrows) == []


def test_a_cycle_is_seen() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_one_folder_knows_torch_distributed() -> None:
    knows = set()
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE)
        package = ".".join(["mtu_fast", *file.parts[:-1]])
        names = imported(path.read_text(), package)
        knows |= {file.parts[0] for name, _ in names if name.startswith("torch.distributed")}
    assert knows == {"_distributed"}


def test_one_file_depends_on_what_torch_does_not_promise() -> None:
    dependent = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if any(name in path.read_text() for name in SEMI_PRIVATE)
    }
    assert dependent == {"nodes.py"}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("_ops/gram.py", "from mtu_fast._rows.uses import Outer"),
        ("_ops/gram.py", "def f():\n    import mtu_fast.engine"),
        ("_graph/rules/linear.py", "from ...rows import Rows"),
        ("_graph/rules/linear.py", "from ... import engine"),
        ("_rows/uses.py", "from ..rows import Rows"),
        ("methods/mean.py", "from mtu_fast.rows import Rows"),
        ("methods/mean.py", "from mtu_fast._ops.gram import row_gram"),
        ("reference/mean.py", "from mtu_fast.methods import Roles"),
        ("_rows/uses.py", "from mtu_fast import Engine"),
        ("unlearning/metrics.py", "import pandas"),
        ("unlearning/metrics.py", "from sklearn.metrics import roc_auc_score"),
        ("attic.py", "import torch"),
    ],
)
def test_a_backward_arrow_is_seen(file: str, source: str) -> None:
    assert len(violations(file, source)) == 1


def test_a_forward_arrow_passes() -> None:
    source = "from .base import rule\nfrom ..._rows.uses import Outer\nimport torch, math"
    assert violations("_graph/rules/linear.py", source) == []


def test_an_optional_package_may_be_imported_where_it_is_used() -> None:
    source = "def f():\n    from sklearn.metrics import roc_auc_score"
    assert violations("unlearning/metrics.py", source) == []
