"""How dense the code is: sizes, statements, branches and comments of a package, as a table.

    python -m benchmarks.structure [FOLDER ...] [--worst K]

FOLDER is `mtu_fast` by default; of an installed package it is its folder in site-packages. Measured
over all its Python files: lines of a file; AST nodes a statement (docstrings and imports left out);
comprehensions and conditional expressions per 100 statements; cyclomatic complexity of functions
(McCabe: 1 + branches, loops, handlers, boolean operators, comprehensions and their conditions), of
which more than 10 is graded C or worse; share of comment lines among lines of code; line width.
`--worst` lists the functions of the highest complexity and the longest.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from benchmarks.measure import ROOT

GRADE_C = 11
DENSE = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp)
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Function:
    """A function: where it is, its complexity and its lines."""

    where: str
    complexity: int
    lines: int


@dataclass(frozen=True)
class File:
    """What is counted of one file."""

    lines: int
    statements: int
    nodes: int
    dense: int
    comments: int
    code: int
    widths: tuple[int, ...]
    functions: tuple[Function, ...]


def complexity(function: ast.AST) -> int:
    """McCabe's number of the function's own body; functions within it count for themselves."""
    found = 1
    for node in _own(function):
        if isinstance(node, BRANCHES):
            found += 1
        elif isinstance(node, ast.BoolOp):
            found += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            found += 1 + len(node.ifs)
        elif isinstance(node, ast.match_case):
            found += 1
    return found


def _own(function: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(function):
        if isinstance(child, FUNCTIONS):
            continue
        yield child
        yield from _own(child)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _statements(tree: ast.AST) -> list[ast.stmt]:
    skipped = (ast.Import, ast.ImportFrom)
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return [s for s in statements if not isinstance(s, skipped) and not _is_docstring(s)]


def _size(statement: ast.stmt) -> int:
    """AST nodes of a statement; statements within it count for themselves."""
    found = 1
    waiting = list(ast.iter_child_nodes(statement))
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.stmt, ast.expr_context)):
            continue
        found += 1
        waiting += ast.iter_child_nodes(node)
    return found


def _comment_lines(source: str) -> tuple[int, int]:
    """Lines that hold a comment, and lines that hold code."""
    comments: set[int] = set()
    code: set[int] = set()
    blank = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in blank:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(comments), len(code)


def measure(path: Path, name: str) -> File:
    """Counts of the file at `path`, called `name`."""
    source = path.read_text()
    tree = ast.parse(source)
    statements = _statements(tree)
    functions = [
        Function(f"{name}:{node.lineno} {node.name}", complexity(node), _length(node))
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS)
    ]
    comments, code = _comment_lines(source)
    lines = source.splitlines()
    return File(
        lines=len(lines),
        statements=len(statements),
        nodes=sum(map(_size, statements)),
        dense=sum(isinstance(node, DENSE) for node in ast.walk(tree)),
        comments=comments,
        code=code,
        widths=tuple(len(line) for line in lines if line.strip()),
        functions=tuple(functions),
    )


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    body = function.body
    if body and _is_docstring(body[0]):
        end = body[0].end_lineno or 0
        return (function.end_lineno or 0) - end + 1
    return (function.end_lineno or 0) - function.lineno + 1


def files_of(folder: Path) -> list[File]:
    """Every Python file of a folder, measured.

    Raises:
        ValueError: it holds none.
    """
    paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]
    if not paths:
        raise ValueError(f"structure: found no Python file in {folder}")
    return [measure(path, path.relative_to(folder.parent).as_posix()) for path in paths]


def summary(files: Sequence[File]) -> dict[str, float]:
    """The figures of the table."""
    functions = [function for file in files for function in file.functions]
    statements = sum(file.statements for file in files)
    widths = sorted(width for file in files for width in file.widths)
    short = sum(function.lines <= 16 for function in functions)
    return {
        "files": len(files),
        "lines a file, median": median(file.lines for file in files),
        "lines a file, largest": max(file.lines for file in files),
        "AST nodes a statement": sum(file.nodes for file in files) / statements,
        "comprehensions and conditional expressions per 100 statements": 100
        * sum(file.dense for file in files)
        / statements,
        "cyclomatic complexity, mean": mean(f.complexity for f in functions),
        "functions graded C or worse": sum(f.complexity >= GRADE_C for f in functions),
        "functions within 16 lines, %": 100 * short / len(functions),
        "comment lines of code lines, %": 100
        * sum(file.comments for file in files)
        / sum(file.code for file in files),
        "line width, 90 %": widths[int(0.9 * (len(widths) - 1))],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / "mtu_fast"])
    parser.add_argument("--worst", type=int, default=0, help="functions to list")
    chosen = parser.parse_args(arguments)
    measured = {folder: files_of(folder) for folder in chosen.folders}
    found = {folder: summary(files) for folder, files in measured.items()}
    print(f"{'':62s}" + "".join(f"{folder.name:>14s}" for folder in found))
    for name in next(iter(found.values())):
        print(f"{name:62s}" + "".join(f"{figures[name]:14.1f}" for figures in found.values()))
    functions = [f for files in measured.values() for file in files for f in file.functions]
    for what in ("complexity", "lines"):
        for function in sorted(functions, key=lambda f: -getattr(f, what))[: chosen.worst]:
            print(f"{what} {getattr(function, what):4d}  {function.where}")


if __name__ == "__main__":
    main()
