"""What the routes of a Gram cost on each device: as shipped, or as measured on this machine and kept in a file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import torch

PRICES = 1  # counted up when a formula or a kernel changes what a constant means
FILE: Path | None = None  # in place of the one in the home directory


@dataclass(frozen=True)
class Costs:
    """What a unit of work costs, relative to one float32 multiply-add inside a large product.

    Attributes:
        product: A multiply-add of two products of positions, of which half are made at most.
        reduce: Adding a shifted product of pixels, or multiplying two products and summing, an
            element.
        widen: Reading an element of the positions.
        row_product: A multiply-add between rows, of which half are made at most.
        row: Writing an element of explicit rows and reading it back.
        tile: The same in cache, where a kernel forms rows and multiplies them at once; None without
            such a kernel.
        pack: Laying out an element of the positions for it.
        call: A vendor call per sample.
        weight: The same, a weight element: small weights, large ones, and the border between them.
        image: Pixels of an image up to which products of pixels are made once; larger ones are cut,
            which costs more than this rule knows.
        patches: Whether products of positions are made of whole patches, tap by tap, not of pixels
            that are shifted.
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
    "plain torch": Costs(
        2.0, 50.0, 0.0, 2.0, 40.0, None, 0.0, 0.0, (30.0, 175.0, 1 << 19), 1 << 62
    ),
    "cpu": Costs(0.9, 6.0, 36.0, 1.0, 36.0, 8.0, 16.0, 4.5e6, (45.0, 205.0, 1 << 19), 256),
    # Estimated from the data sheets of GPUs with fast float64: an element read costs 30, a launch
    # 2e8. Not yet verified on hardware.
    "cuda": Costs(0.5, 0.0, 30.0, 0.5, 40.0, None, 0.0, 1e9, (0.0, 0.0, 0), 1 << 62, patches=True),
}


# ---- measured ------------------------------------------------------------------------------------


def file() -> Path | None:
    """Where measured costs are kept; None where there is no home."""
    try:
        return FILE or Path.home() / ".cache" / "mtu_fast" / "costs.json"
    except RuntimeError:
        return None


def store(device: torch.device, costs: Costs) -> Path:
    """Keep the costs for this machine's `device`, beside those of others; the file is whole at every moment.

    Raises:
        OSError: there is no home, or it cannot be written to.
    """
    path = file()
    if path is None:
        raise OSError("there is no home directory")
    every = _read() | {
        machine(device): {"measured": datetime.date.today().isoformat(), **asdict(costs)}
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    try:
        part.write_text(json.dumps(every, indent=2) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _stored.cache_clear()
    return path


def stored(device: torch.device) -> tuple[Costs, str] | None:
    """The costs kept for this machine's `device` and the day they were measured on; None if there are none."""
    return _stored(machine(device), device.type)


@cache
def _stored(key: str, device: str) -> tuple[Costs, str] | None:
    entry = _read().get(key)
    if entry is None:
        return None
    found = dict(entry) if isinstance(entry, dict) else {}
    day = str(found.pop("measured", ""))
    shipped = asdict(COSTS[device])
    if found.keys() != shipped.keys() or not all(
        _like(found[name], shipped[name]) for name in shipped
    ):
        _warn(f"what it says of {key!r} is not what this version writes")
        return None
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in found.items()
    }
    return Costs(**values), day


def _like(value: object, shipped: object) -> bool:
    """Whether a value that was read is of the kind that is shipped: numbers finite, and no less than 0."""
    if isinstance(shipped, tuple):
        return (
            isinstance(value, list)
            and len(value) == len(shipped)
            and all(map(_like, value, shipped))
        )
    if isinstance(shipped, bool) or shipped is None:
        return value is shipped
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < inf


def _read() -> dict[str, Any]:
    path = file()
    try:
        found = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    except (OSError, ValueError) as error:
        _warn(f"it cannot be read ({error})")
        return {}
    return found if isinstance(found, dict) else {}


def _warn(why: str) -> None:
    warnings.warn(
        f"mtu_fast: {file()} does not serve, so the shipped costs do: {why}. `python -m mtu_fast calibrate` measures "
        "them anew.", RuntimeWarning, stacklevel=2,
    )  # fmt: skip


def machine(device: torch.device) -> str:
    """What costs depend on: the processor, its vector instructions and threads, torch, and what prices them here."""
    where = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return f"{where}, torch {torch.__version__}, prices {PRICES}"


@cache
def processor() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
