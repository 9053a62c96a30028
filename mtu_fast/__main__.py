"""Which implementation of every op serves each device, and why no other does: `python -m mtu_fast`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable, Sequence

import torch

from mtu_fast import __version__
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


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the process's exit status."""
    parser = argparse.ArgumentParser(
        "python -m mtu_fast",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    return show()


if __name__ == "__main__":
    sys.exit(main())
