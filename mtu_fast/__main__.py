"""Which implementation of every op serves each device, and why no other does.

python -m mtu_fast              the table
python -m mtu_fast calibrate    a second's measurement of what routes of a Gram cost here, kept for later processes
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import torch

from mtu_fast import __version__
from mtu_fast.ops import _calibration, _costs, _library


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
    for device in devices():
        kept = _costs.stored(device)
        yield f"costs, {device.type}", f"measured {kept[1]}" if kept else "as shipped (calibrate measures them)"
    if _library.EXTENSION is None:
        yield "mtu_fast._C", _library.MISSING
        return
    yield "mtu_fast._C", str(_library.EXTENSION.__file__)
    for name, value in _library.EXTENSION.build_facts().items():
        yield f"  {name}", value


def devices() -> list[torch.device]:
    """The CPU, and the GPU if there is one."""
    return [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()


def calibrate() -> None:
    """Measure every device that has kernels, keep what was found, and print it beside what is shipped."""
    for device in devices():
        try:
            found = _calibration.measure(device)
        except RuntimeError as error:
            print(error)
            continue
        _costs.store(device, found)
        shipped = asdict(_costs.COSTS[device.type])
        rows = [(name, _short(shipped[name]), _short(value)) for name, value in asdict(found).items()]
        print(table([(device.type, "shipped", "measured"), *rows]), "\n")
    print(f"kept in {_costs.FILE}")


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of ops and the facts below it, or calibrate."""
    parser = argparse.ArgumentParser(
        "python -m mtu_fast", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=["calibrate"])
    if parser.parse_args(argv).command == "calibrate":
        calibrate()
        return
    ops = [(each.op, each.device, each.serves, each.why) for each in _library.implementations()]
    print(table([("op", "device", "served by", "why no kernel"), *ops]), "\n")
    print("\n".join(f"{name:24}{value}" for name, value in facts()))


if __name__ == "__main__":
    main()
