"""`python -m mtu_fast`: which implementation of every op serves each device, and why no other does."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence

import torch

from mtu_fast import __version__
from mtu_fast.ops import _library


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns, the first row a heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


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


def main() -> None:
    """Print the table of ops and the facts below it."""
    ops = [(each.op, each.device, each.serves, each.why) for each in _library.implementations()]
    print(table([("op", "device", "served by", "why no kernel"), *ops]), "\n")
    print("\n".join(f"{name:24}{value}" for name, value in facts()))


if __name__ == "__main__":
    main()
