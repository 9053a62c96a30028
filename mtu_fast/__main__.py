"""Which implementation of every op serves each device, and why no other does.

python -m mtu_fast              the table
python -m mtu_fast calibrate    a second's measurement of what routes of a Gram cost here, kept for later processes
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import torch

from mtu_fast import __version__
from mtu_fast._ops import _calibration, _costs, _library
from mtu_fast._ops.gram import outer_ghost


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns, the first row a heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def facts() -> Iterable[tuple[str, str]]:
    """Versions, and how the extension was built or why it is absent."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield "mtu_fast", f"{__version__}, Python {platform.python_version()}"
    yield "torch", f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads"
    for device in devices():
        yield f"costs, {device.type}", _costs_of(device)
    if _library.EXTENSION is None:
        yield "mtu_fast._C", _library.MISSING
        return
    yield "mtu_fast._C", str(_library.EXTENSION.__file__)
    for name, value in _library.EXTENSION.build_facts().items():
        yield f"  {name}", value


def devices() -> list[torch.device]:
    """The CPU, and the GPU if there is one."""
    return [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()


def _costs_of(device: torch.device) -> str:
    if outer_ghost.why_no_kernel(device.type.upper()):
        return "plain torch's, which are fixed"
    kept = _costs.stored(device)
    return f"measured {kept[1]}" if kept else "as shipped (calibrate measures them)"


def calibrate() -> int:
    """Measure every device that has kernels, print what was found beside what is shipped, and keep it.

    Returns:
        0, or 1 if nothing was kept.
    """
    kept = None
    for device in devices():
        if why := outer_ghost.why_no_kernel(device.type.upper()):
            print(f"{device.type}: plain torch serves here ({why}); its costs are fixed.")
            continue
        found = _calibration.measure(device)
        shipped = asdict(_costs.COSTS[device.type])
        rows = [
            (name, _short(shipped[name]), _short(value)) for name, value in asdict(found).items()
        ]
        print(table([(device.type, "shipped", "measured"), *rows]), "\n")
        try:
            kept = _costs.store(device, found)
        except OSError as error:
            print(
                f"{device.type}: not kept: {error}. Costs are kept in the home directory, which must be writable."
            )
    if kept is None:
        return 1
    print(f"kept in {kept}")
    return 0


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of ops and the facts below it, or calibrate; the process's exit status."""
    parser = argparse.ArgumentParser(
        "python -m mtu_fast",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=["calibrate"])
    if parser.parse_args(argv).command == "calibrate":
        return calibrate()
    ops = [(each.op, each.device, each.serves, each.why) for each in _library.implementations()]
    print(table([("op", "device", "served by", "why no kernel"), *ops]), "\n")
    print("\n".join(f"{name:24}{value}" for name, value in facts()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
