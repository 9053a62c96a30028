"""Which implementation of every op serves each device, and why no other does; or the kernels, built here.

python -m mtu_fast          the table
python -m mtu_fast build    compile the kernels for the torch that is installed, into the package's folder
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable, Sequence

import torch

from mtu_fast import __version__, _build
from mtu_fast._ops import _library


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns, the first row a heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = map(str.ljust, cells, widths)
    return "  ".join(padded).rstrip()


def facts() -> Iterable[tuple[str, str]]:
    """Versions, and how the extension was built or why it is absent."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield "mtu_fast", f"{__version__}, Python {platform.python_version()}"
    yield "torch", f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads"
    if _library.EXTENSION is None:
        yield "mtu_fast._C", _library.MISSING
        return
    yield "mtu_fast._C", str(_library.EXTENSION.__file__)
    for name, value in _library.EXTENSION.build_facts().items():
        yield f"  {name}", value


def show() -> int:
    """Print the table of ops and the facts below it."""
    ops = [(each.op, each.device, each.serves, each.why) for each in _library.implementations()]
    print(table([("op", "device", "served by", "why no kernel"), *ops]), "\n")
    for name, value in facts():
        print(f"{name:24}{value}")
    return 0


def build() -> int:
    """Compile the kernels and say where they are, or what is missing."""
    try:
        print(f"built {_build.build_in_place()}; `python -m mtu_fast` shows what it serves")
    except _build.BuildError as error:
        print(f"mtu_fast: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or build; the process's exit status."""
    parser = argparse.ArgumentParser(
        "python -m mtu_fast",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=["build"])
    return build() if parser.parse_args(argv).command == "build" else show()


if __name__ == "__main__":
    sys.exit(main())
