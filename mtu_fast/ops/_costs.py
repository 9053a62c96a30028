"""What the routes of a Gram cost on each device: as shipped, or as measured on this machine and kept in a file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import warnings
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

FILE = Path.home() / ".cache" / "mtu_fast" / "costs.json"


@dataclass(frozen=True)
class Costs:
    """What a unit of work costs, relative to one float32 multiply-add inside a large product.

    Attributes:
        product: A multiply-add of two products of positions, of which half are made at most.
        reduce: Adding a shifted product of pixels, or multiplying two products and summing, an element.
        widen: Reading an element of the positions.
        row_product: A multiply-add between rows, of which half are made at most.
        row: Writing an element of explicit rows and reading it back.
        tile: The same in cache, where a kernel forms rows and multiplies them at once; None without such a kernel.
        pack: Laying out an element of the positions for it.
        call: A vendor call per sample.
        weight: The same, a weight element: small weights, large ones, and the border between them.
        image: Pixels of an image up to which products of pixels are made once; larger ones are cut, which costs more
            than this rule knows.
        patches: Whether products of positions are made of whole patches, tap by tap, not of pixels that are shifted.
    """

    product: float
    reduce: float
    widen: float
    row_product: float
    row: float
    tile: float | None
    pack: float
    call: float
    weight: tuple[float, float, int]
    image: int
    patches: bool = False


COSTS = {  # measured, see CONTRIBUTING.md
    "plain torch": Costs(2.0, 50.0, 0.0, 2.0, 40.0, None, 0.0, 0.0, (30.0, 175.0, 1 << 19), 1 << 62),
    "cpu": Costs(0.9, 6.0, 36.0, 1.0, 36.0, 8.0, 16.0, 4.5e6, (45.0, 205.0, 1 << 19), 256),
    # Estimated from the data sheets of GPUs with fast float64: an element read costs 30, a launch 2e8. Not yet verified
    # on hardware.
    "cuda": Costs(0.5, 0.0, 30.0, 0.5, 40.0, None, 0.0, 1e9, (0.0, 0.0, 0), 1 << 62, patches=True),
}


# ---- measured -------------------------------------------------------------------------------------------------------


def store(device: torch.device, costs: Costs) -> None:
    """Keep the costs for this machine's `device`, beside those of others; the file is whole at every moment."""
    every = _read()
    today = datetime.date.today().isoformat()
    every[machine(device)] = {"measured": today, **asdict(costs)}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    part = FILE.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(every, indent=2) + "\n")
    part.replace(FILE)
    _stored.cache_clear()


def stored(device: torch.device) -> tuple[Costs, str] | None:
    """The costs kept for this machine's `device` and the day they were measured on; None if there are none."""
    return _stored(machine(device))


@cache
def _stored(key: str) -> tuple[Costs, str] | None:
    entry = _read().get(key)
    if not isinstance(entry, dict):
        return None
    day = entry.pop("measured", "")
    try:
        found = Costs(**entry)
    except TypeError:  # of another version, which is no error
        return None
    small, large, border = found.weight
    return replace(found, weight=(small, large, border)), day


def _read() -> dict[str, Any]:
    try:
        found = json.loads(FILE.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            f"mtu_fast: {FILE} cannot be read ({error}), so the shipped costs serve; remove it, or measure anew with "
            "`python -m mtu_fast calibrate`.", RuntimeWarning, stacklevel=2,
        )  # fmt: skip
        return {}
    return found if isinstance(found, dict) else {}


def machine(device: torch.device) -> str:
    """What costs depend on: the processor, torch and, of a CPU, the number of threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@cache
def processor() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
