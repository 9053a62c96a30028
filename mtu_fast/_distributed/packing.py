"""Uses as bytes: a head that says what they are, and their tensors behind it.

A chain travels by its key alone. What arrives serves inner products on this side of the chain, and
is never pushed through it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtu_fast._ops._blocks import memory
from mtu_fast._rows.uses import Chain, Use

ALIGNED = 16  # bytes: every tensor starts at a multiple, whatever its dtype
Parts = dict[int, Use]  # which of the rows' parts -> its use of one parameter


@dataclass(frozen=True)
class Parcel:
    """The uses of one parameter, ready to be written.

    Attributes:
        head: what they are, bytes of a whole number of `ALIGNED`.
        tensors: what they hold, each piece of memory once.
    """

    head: bytes
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return len(self.head) + sum(_aligned(t.numel() * t.element_size()) for t in self.tensors)

    def bytes_of(self) -> Tensor:
        """uint8 `[nbytes]`."""
        device = self.tensors[0].device
        found = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        # of a copy that may be written: torch warns of bytes
        head = torch.frombuffer(bytearray(self.head), dtype=torch.uint8)
        found[: len(head)] = head.to(device)
        start = len(head)
        for t in self.tensors:
            size = t.numel() * t.element_size()
            found[start : start + size] = _bytes(t)
            start += _aligned(size)
        return found


def rounded(parts: Parts, wire: torch.dtype) -> Parts:
    """The uses with their numbers as they arrive where they travel in another dtype."""
    found: Parts = {}
    for k, use in parts.items():
        found[k] = use.with_tensors(*(_rounded(t, wire) for t in use.tensors))
    return found


def _rounded(t: Tensor, wire: torch.dtype) -> Tensor:
    return t.to(wire).to(t.dtype) if _travels_as(t, wire) == wire else t


def _travels_as(t: Tensor, wire: torch.dtype | None) -> torch.dtype:
    """The shorter of a dtype and that of the wire; whole numbers as they are."""
    shorter = wire is not None and t.is_floating_point() and t.dtype.itemsize > wire.itemsize
    return wire if shorter and wire is not None else t.dtype


def packed(parts: Parts, wire: torch.dtype | None = None) -> Parcel:
    """The uses of one parameter as a parcel, their numbers in the dtype of the wire."""
    body = io.BytesIO()
    pickler = _Pickler(body)
    pickler.dump(parts)
    sent = [t.to(_travels_as(t, wire)) for t in pickler.tensors]
    specs = []
    for t, travels in zip(pickler.tensors, sent, strict=True):
        specs.append((tuple(t.shape), travels.dtype, t.dtype))
    words = pickle.dumps((body.getvalue(), specs))
    # the length comes first, since nobody was told it
    head = len(words).to_bytes(8, "little") + words
    # filled up, so that the tensors behind it are aligned
    return Parcel(head.ljust(_aligned(len(head)), b"\0"), tuple(sent))


def unpacked(found: Tensor) -> Parts:
    """The uses in the bytes of a parcel; their tensors are views of them where they came in their own dtype."""
    length = int.from_bytes(_read(found, 0, 8), "little")
    # bytes of a rank of this run, never of a file
    body, specs = pickle.loads(_read(found, 8, 8 + length))
    start, tensors = _aligned(8 + length), []
    for shape, travels, dtype in specs:
        size = torch.Size(shape).numel() * travels.itemsize
        # a view in another dtype needs an address that is a multiple of its size
        tensors.append(found[start : start + size].view(travels).view(shape).to(dtype))
        start += _aligned(size)
    parts: Parts = _Unpickler(io.BytesIO(body), tensors).load()
    return parts


class _Pickler(pickle.Pickler):
    """Takes tensors out, each piece of memory once, and of chains all but the key."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._at: dict[object, int] = {}

    def persistent_id(self, obj: Any) -> tuple[str, object] | None:
        if isinstance(obj, Tensor):
            return "tensor", self._place(obj)
        if isinstance(obj, Chain):
            return "chain", obj.key
        return None

    def _place(self, t: Tensor) -> int:
        key = (memory(t), t.dtype)
        if key not in self._at:
            self._at[key] = len(self.tensors)
            self.tensors.append(t)
        return self._at[key]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor | Chain:
        kind, value = pid
        return self._tensors[value] if kind == "tensor" else Chain(value)


def _bytes(t: Tensor) -> Tensor:
    # a minus sign that torch has put off is no part of the memory
    return t.detach().resolve_neg().contiguous().view(-1).view(torch.uint8)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _read(found: Tensor, start: int, stop: int) -> bytes:
    return found[start:stop].cpu().numpy().tobytes()
