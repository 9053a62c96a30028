"""`Σ_j (L_j L_jᵀ) ∘ (R_j R_jᵀ)` on GPUs: the Grams of many sides in one launch, their products in another.

A side is multiplied once however many parameters have it, and rows that are one and the same tensor
in several of its blocks are, too. Products of sums are no sums of products, so splits of a side's
width are added before it meets the other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtu_fast.kernels.blocks import MANY, first_rows, identity, operands
from mtu_fast.kernels.device import arch, multiprocessors, on
from mtu_fast.kernels.explicit import WARPS, WAVES, aligned, store_tile, tile_gram
from mtu_fast.kernels.plans import WIDE, Plan, row_plan
from mtu_fast.kernels.shared import FLOATS, LANGUAGE, number, pick, unspecialised

TENSORS = 64  # of one launch, each a select in every program
PARTS = 1 << 25  # numbers that the Grams of one launch's sides take, of one split each: 256 MiB
NEVER = 1 << 29  # where a block begins that a side does not have
WIDTH = 128  # entries of G that a program makes: of more, registers spill where sides have several blocks


@triton.jit(do_not_specialize=["steps"])
def _sides(
    blocks, starts, strides, sizes, fresh, widths, firsts, offsets, out, steps,
    SIDES: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, OPERAND: tl.constexpr,
    EXACT: tl.constexpr, ONE_TILE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A tile of the Gram of one side, over a split of its width."""
    program, i, j = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(1).to(tl.int64),
        tl.program_id(2).to(tl.int64),
    )
    side = 0
    for s in tl.static_range(1, SIDES):
        side = tl.where(program >= number(firsts[s]), s, side)
    rows, width = number(pick(sizes, side, SIDES)).to(tl.int64), number(pick(widths, side, SIDES))
    # tiles on and above the diagonal, of rows that are not all known
    if (i <= j) & (j * TILE < rows) & (i * TILE < number(pick(fresh, side, SIDES))):
        row, column = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
        x_at = _pointers(blocks, starts, strides, row, side, SIDES, BLOCKS, ALIGNED)
        y_at = _pointers(blocks, starts, strides, column, side, SIDES, BLOCKS, ALIGNED)
        if ALIGNED:
            width = tl.multiple_of(width, 16)
        split = program - number(pick(firsts, side, SIDES))
        begin = split * steps * DEPTH
        end = tl.minimum(begin + steps * DEPTH, width)
        total = tile_gram(
            x_at, y_at, row < rows, column < rows, begin, end, width, 1, TILE, DEPTH, OPERAND, EXACT, ONE_TILE
        )  # fmt: skip
        store_tile(
            out + number(pick(offsets, side, SIDES)) + split * rows * rows, total, row, column, rows
        )


@triton.jit
def _pointers(
    blocks, starts, strides, row, side, SIDES: tl.constexpr, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """The first element of each row of a side, rows counted through its blocks."""
    COUNT: tl.constexpr = SIDES * BLOCKS
    at = pick(blocks, side * BLOCKS, COUNT) + row * number(pick(strides, side * BLOCKS, COUNT))
    for b in tl.static_range(1, BLOCKS):
        which = side * BLOCKS + b
        start = number(pick(starts, which, COUNT))
        own = pick(blocks, which, COUNT) + (row - start) * number(pick(strides, which, COUNT))
        at = tl.where(row >= start, own, at)
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit(do_not_specialize=["count", "rows"])
def _multiply_sides(
    parts, gram, count, firsts, pairs, sizes, splits, offsets, places, rows,
    PAIRS: tl.constexpr, SIDES: tl.constexpr, BLOCKS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Entries of G: the products of both sides' Grams, parameter by parameter."""
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    live = at < rows.to(tl.int64) * rows
    r, q = at // rows, at % rows
    total = tl.zeros([WIDTH], tl.float64)
    if not FIRST:
        total = tl.load(gram + at, mask=live, other=0.0)
    for j in range(count):
        one = _entry(
            parts, r, q, live, number(pick(pairs, 2 * j, 2 * PAIRS)), firsts, sizes, splits, offsets, places,
            SIDES, BLOCKS, WIDTH,
        )  # fmt: skip
        other = _entry(
            parts, r, q, live, number(pick(pairs, 2 * j + 1, 2 * PAIRS)), firsts, sizes, splits, offsets, places,
            SIDES, BLOCKS, WIDTH,
        )  # fmt: skip
        # ⟨a ⊗ b, a' ⊗ b'⟩ = ⟨a, a'⟩ ⟨b, b'⟩
        total += one * other
    tl.store(gram + at, total, mask=live)


@triton.jit
def _entry(
    parts, r, q, live, side, firsts, sizes, splits, offsets, places,
    SIDES: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Entries of the Gram of one side, its splits added in order."""
    size = number(pick(sizes, side, SIDES)).to(tl.int64)
    at = (
        number(pick(offsets, side, SIDES)) + _own_row(r, side, firsts, places, SIDES, BLOCKS) * size
    )
    at += _own_row(q, side, firsts, places, SIDES, BLOCKS)
    total = tl.zeros([WIDTH], tl.float64)
    for split in range(number(pick(splits, side, SIDES))):
        total += tl.load(parts + at + split * size * size, mask=live, other=0.0)
    return total


@triton.jit
def _own_row(r, side, firsts, places, SIDES: tl.constexpr, BLOCKS: tl.constexpr):
    """Which row of a side, whose equal blocks are one, a row of G is."""
    found = r + number(pick(places, side * BLOCKS, SIDES * BLOCKS))
    for b in tl.static_range(1, BLOCKS):
        start = number(firsts[b])
        own = r - start + number(pick(places, side * BLOCKS + b, SIDES * BLOCKS))
        found = tl.where(r >= start, own, found)
    return found


@dataclass(frozen=True)
class _Side:
    """The blocks of one side of a parameter.

    Attributes:
        blocks: equal ones once, of one dtype, neighbouring columns adjacent in memory.
        starts: the first row of each.
        places: for each block of G's rows, where its rows begin among these.
        rows: in all.
        fresh: how many of them come before those that are known.
    """

    blocks: list[Tensor]
    starts: list[int]
    places: list[int]
    rows: int
    fresh: int

    @staticmethod
    def of(blocks: Sequence[Tensor], fresh: int) -> _Side:
        """These, as many as G has, of which those that begin behind the first `fresh` rows are known."""
        firsts, met = first_rows(blocks), dict[tuple[object, ...], int]()
        for i, t in enumerate(blocks):
            met.setdefault(identity(t), i)
        once = [blocks[i] for i in met.values()]
        starts = first_rows(once)
        of_block = dict(zip(met, starts, strict=True))
        known = sum(len(blocks[i]) for i in met.values() if firsts[i] >= fresh)
        dtype = reduce(torch.promote_types, (t.dtype for t in once))
        laid = [t.to(dtype) if _is_dense(t) else t.to(dtype).contiguous() for t in once]
        rows = sum(map(len, once))
        return _Side(laid, starts, [of_block[identity(t)] for t in blocks], rows, rows - known)

    @property
    def width(self) -> int:
        return self.blocks[0].shape[1]

    @property
    def kind(self) -> tuple[torch.dtype, bool]:
        """What sides of one launch have in common: the dtype, and whether a load takes 16 bytes."""
        return self.blocks[0].dtype, self.width % 16 == 0 and all(map(aligned, self.blocks))


def _is_dense(t: Tensor) -> bool:
    return t.shape[1] == 1 or t.stride(1) == 1


def rank_one_gram(
    left: Sequence[Tensor], right: Sequence[Tensor], parameters: int, known: int = 0
) -> Tensor:
    """The Grams of all sides, then their products: a launch each for up to 64 tensors of a kind."""
    if any(t.dtype not in FLOATS for t in (*left, *right)):
        return NotImplemented
    blocks = len(left) // parameters
    rows = sum(map(len, left[:blocks]))
    gram = left[0].new_empty(rows, rows, dtype=WIDE)
    with on(gram):
        if any(
            row_plan(dtype, rows, arch()) is None for dtype in {t.dtype for t in (*left, *right)}
        ):
            return NotImplemented
        if rows:
            _sum(gram, left, right, blocks, rows - known)
    gram[rows - known :, rows - known :] = 0.0  # tiles on the border know some
    return gram


def _sum(
    gram: Tensor, left: Sequence[Tensor], right: Sequence[Tensor], blocks: int, fresh: int
) -> None:
    """G of all parameters, some at a time."""
    firsts = first_rows(left[:blocks])
    pairs = []
    for j in range(0, len(left), blocks):
        of = left[j : j + blocks], right[j : j + blocks]
        pairs.append(tuple([torch.cat(list(side))] if blocks > MANY else list(side) for side in of))
    firsts = firsts if blocks <= MANY else [0]
    step = max(1, min(TENSORS // len(firsts), PARTS // len(gram) ** 2) // 2)
    for k in range(0, len(pairs), step):
        _add(gram, pairs[k : k + step], firsts, fresh, first=k == 0)


def _add(
    gram: Tensor, pairs: Sequence[tuple[list[Tensor], ...]], firsts: list[int], fresh: int, *, first: bool
) -> None:  # fmt: skip
    """What some parameters add to G."""
    of_key: dict[object, _Side] = {}
    keys = []
    for blocks in chain.from_iterable(pairs):
        keys.append(tuple(map(identity, blocks)))
        if keys[-1] not in of_key:
            of_key[keys[-1]] = _Side.of(blocks, fresh)
    kinds: dict[tuple[torch.dtype, bool], list[object]] = {}
    for key, side in of_key.items():
        kinds.setdefault(side.kind, []).append(key)
    order = {key: i for i, key in enumerate(chain.from_iterable(kinds.values()))}
    sides = [of_key[key] for key in order]
    launches = [_Launch.of([of_key[key] for key in of], kind) for kind, of in kinds.items()]
    splits = [n for launch in launches for n in launch.splits]
    sizes = [n * side.rows**2 for n, side in zip(splits, sides, strict=True)]
    *offsets, total = accumulate(sizes, initial=0)
    parts = gram.new_empty(total)
    at = 0
    for launch in launches:
        launch.run(parts, offsets[at : at + len(launch.sides)])
        at += len(launch.sides)
    rows, count = len(gram), _power(len(sides))
    _multiply_sides[(triton.cdiv(rows * rows, WIDTH),)](
        parts, gram, len(pairs), unspecialised(firsts), _padded([order[key] for key in keys], 2 * _power(len(pairs))),
        _padded([side.rows for side in sides], count), _padded(splits, count), _padded(offsets, count),
        _padded([n for side in sides for n in side.places], count * len(firsts)), rows,
        PAIRS=_power(len(pairs)), SIDES=count, BLOCKS=len(firsts), FIRST=first, WIDTH=WIDTH,
    )  # fmt: skip


@dataclass(frozen=True)
class _Launch:
    """Sides of one kind.

    Attributes:
        sides: theirs.
        aligned: whether a load takes 16 bytes.
        plan: how products are made.
        steps: blocks of columns that a program adds up.
        splits: of each side.
    """

    sides: list[_Side]
    aligned: bool
    plan: Plan
    steps: int
    splits: list[int]

    @staticmethod
    def of(sides: list[_Side], kind: tuple[torch.dtype, bool]) -> _Launch:
        """So many splits that every multiprocessor has work, all of one length."""
        dtype, is_aligned = kind
        plan = row_plan(dtype, max(side.rows for side in sides), arch())
        assert plan is not None
        work = 0
        for side in sides:
            tiles = triton.cdiv(side.rows, plan.tile)
            work += triton.cdiv(side.width, plan.depth) * tiles * (tiles + 1) // 2
        programs = max(WAVES, WARPS // plan.warps) * multiprocessors(sides[0].blocks[0])
        steps = max(1, triton.cdiv(work, programs))
        splits = [triton.cdiv(side.width, steps * plan.depth) for side in sides]
        return _Launch(sides, is_aligned, plan, steps, splits)

    def run(self, parts: Tensor, offsets: list[int]) -> None:
        """Write the Grams of splits, those of a side where it is said."""
        plan, count = self.plan, _power(len(self.sides))
        blocks = [list(operands(side.blocks, plan)) for side in self.sides]
        most = max(map(len, blocks))
        *firsts, programs = accumulate(self.splits, initial=0)
        if not programs:
            return
        tiles = triton.cdiv(max(side.rows for side in self.sides), plan.tile)
        pointers: list[Tensor] = []
        strides: list[int] = []
        starts: list[int] = []
        for side, of in zip(self.sides, blocks, strict=True):
            rest = most - len(of)
            pointers += of + of[-1:] * rest
            strides += [t.stride(0) for t in of] + [0] * rest
            starts += side.starts + [NEVER] * rest
        pointers += pointers[-1:] * ((count - len(self.sides)) * most)
        _sides[(programs, tiles, tiles)](
            tuple(pointers), _padded(starts, count * most), _padded(strides, count * most),
            _padded([side.rows for side in self.sides], count), _padded([side.fresh for side in self.sides], count),
            _padded([side.width for side in self.sides], count), _padded(firsts, count, NEVER),
            _padded(offsets, count), parts, self.steps,
            SIDES=count, BLOCKS=most, TILE=plan.tile, DEPTH=plan.depth, OPERAND=LANGUAGE[plan.operand],
            EXACT=plan.sums == WIDE, ONE_TILE=tiles == 1, ALIGNED=self.aligned, num_warps=plan.warps,
            num_stages=plan.stages,
        )  # fmt: skip


def _power(n: int) -> int:
    """Tuples are as long as a power of two, so that few lengths are compiled."""
    return int(triton.next_power_of_2(n))


def _padded(values: Sequence[int], count: int, rest: int = 0) -> tuple[int, ...]:
    return unspecialised((*values, *(rest,) * (count - len(values))))
