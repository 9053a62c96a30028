"""How the Grams' products are made on a GPU: dtypes, precision and tile by architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from mtu_fast.kernels.device import EQUAL_FLOAT64, FAST_FLOAT64, float64_dots, interpreted
from mtu_fast.kernels.tuned import BLOCKS

WIDE = torch.float64
# how float32 is multiplied where sums are not float64
MODES = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
# tensor cores that read shared memory themselves: what is read at a time costs no registers
WARPGROUPS = (90, 100)
LARGEST = 64  # rows of a tile of explicit rows, at most

Place = tuple[str, int, str, str, int]  # kernel, architecture, dtype, precision, tile


@dataclass(frozen=True)
class Plan:
    """How products are made: dtype of the operands and of the sums, Triton's precision, tile, depth, warps, stages."""

    operand: torch.dtype
    sums: torch.dtype
    mode: str
    tile: int
    depth: int
    warps: int
    stages: int


def row_plan(dtype: torch.dtype, rows: int, arch: int) -> Plan | None:
    """The tile for explicit rows; None where float64 products do not compile."""
    return _tuned(row_kernel(rows), arch, dtype, "highest", _row_plan(dtype, rows, arch))


def row_kernel(rows: int) -> str:
    """What the table calls the kernel of explicit rows: of many tiles it reads two blocks of rows at a time."""
    return "row" if rows <= LARGEST else "rows"


def ghost_plan(dtype: torch.dtype, precision: str, arch: int) -> Plan | None:
    """The tile for products of positions; None where float64 products do not compile."""
    return _tuned("ghost", arch, dtype, precision, _ghost_plan(dtype, precision, arch))


def form_plan(dtype: torch.dtype, precision: str, arch: int, linear: bool) -> Plan | None:
    """How rows are formed; None where a vendor's product is no slower, or float64 products do not compile.

    linear: of one tap, so that the vendor's product reads no more than the kernel does.
    """
    return _tuned("form", arch, dtype, precision, _form_plan(dtype, precision, arch, linear))


def place(kernel: str, arch: int, dtype: torch.dtype, precision: str, plan: Plan) -> Place:
    """Where measured blocks of a plan stand in the table."""
    return kernel, arch, str(dtype).removeprefix("torch."), precision, plan.tile


def _tuned(
    kernel: str, arch: int, dtype: torch.dtype, precision: str, plan: Plan | None
) -> Plan | None:
    """The plan with the blocks that were measured, if any were."""
    if plan is None or not BLOCKS:
        return plan
    measured = BLOCKS.get(place(kernel, arch, dtype, precision, plan))
    if measured is None:
        return plan
    depth, warps, stages = measured
    return replace(plan, depth=depth, warps=warps, stages=stages)


def _row_plan(dtype: torch.dtype, rows: int, arch: int) -> Plan | None:
    tile = min(LARGEST, max(16, triton.next_power_of_2(rows)))
    if dtype == WIDE or arch in FAST_FLOAT64:
        # each warp widens for itself what it multiplies: few rows are one warp's
        many = (32 if rows <= LARGEST else 16, 8, 3)
        depth, warps, stages = {16: (64, 1, 4), 32: (32, 1, 4), 64: many}[tile]
        return Plan(WIDE, WIDE, "ieee", tile, depth, warps, stages) if float64_dots(arch) else None
    depth, warps = (16, 8) if tile == 64 else (32, 4)
    return Plan(torch.float32, torch.float32, "ieee", tile, depth, warps, 3)


def _ghost_plan(dtype: torch.dtype, precision: str, arch: int) -> Plan | None:
    if dtype in (torch.float16, torch.bfloat16):
        # the interpreter multiplies the bits of bfloat16
        operand = torch.float32 if interpreted() else dtype
        return Plan(operand, torch.float32, "ieee", 64, 64 if arch in WARPGROUPS else 32, 4, 3)
    if dtype == torch.float32 and (precision != "highest" or arch not in FAST_FLOAT64):
        mode = MODES[precision]
        if arch in WARPGROUPS:
            return Plan(dtype, torch.float32, mode, 64, 32, 4, 2)
        depth, warps, stages = {"ieee": (16, 8, 2), "tf32x3": (8, 4, 3), "tf32": (32, 8, 2)}[mode]
        return Plan(dtype, torch.float32, mode, 64, depth, warps, stages)
    return Plan(WIDE, WIDE, "ieee", 64, 16, 8, 2) if float64_dots(arch) else None


def _form_plan(dtype: torch.dtype, precision: str, arch: int, linear: bool) -> Plan | None:
    if linear and (dtype != torch.float32 or precision == "highest" or arch not in FAST_FLOAT64):
        return None
    if dtype in (torch.float16, torch.bfloat16):
        operand = torch.float32 if interpreted() else dtype
        return Plan(operand, torch.float32, "ieee", 128, 32, 8, 4)
    if dtype == WIDE or (precision == "highest" and arch in EQUAL_FLOAT64):
        # where float64 is slow all time goes into products
        served = arch in FAST_FLOAT64 and float64_dots(arch)
        return Plan(WIDE, WIDE, "ieee", 64, 16, 8, 2) if served else None
    mode = MODES[precision]
    return Plan(dtype, torch.float32, mode, 64, 32, 8, 2 if mode == "ieee" else 3)
