"""The ranks of one engine: the collectives it uses, the bytes they send, and errors that all ranks raise together.

Every collective is called by every rank in the same order. What one rank finds is therefore never
raised between two collectives: it is kept, told to the others at the next one, and then raised by
all.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mtu_fast._rows.space import Leaves
from mtu_fast.errors import NotFiniteError

T = TypeVar("T")

# the first that fits: NotFiniteError is a RuntimeError as well
_KINDS: tuple[type[Exception], ...] = (
    NotFiniteError,
    TypeError,
    ValueError,
    FileNotFoundError,
    OSError,
    RuntimeError,
)


# collectives that give a new tensor; by their ops, whose Python names differ between torch versions
_functional = torch.ops._c10d_functional


class Outcome(NamedTuple):
    """What a function gave on this rank, or the error it ended in."""

    value: Any
    error: Exception | None

    def get(self) -> Any:
        """What the function gave; its error is raised."""
        if self.error is not None:
            raise self.error
        return self.value


def _nothing() -> None:
    """There is nothing to check."""


def attempt(function: Callable[[], Any]) -> Outcome:
    """Call a function that holds no collective; its error is kept for the next one."""
    try:
        return Outcome(function(), None)
    except Exception as error:  # of whatever kind: the other ranks wait
        return Outcome(None, error)


class Ranks:
    """The ranks of a process group.

    Args:
        group: two or more processes, this one among them.
        device: where the model is.

    Attributes:
        group: as given.
        outside: gives the parameters outside the shared ones, in one order on all ranks.
        check_step: raises where the model's wrapper is in a state in which no step may be taken.
        rank: this process's number in the group.
        size: their number W.
        slices: how the model's parameters are held, where ranks hold slices of them.
        wire: the dtype in which uses travel; None for their own.
        sent: collective -> bytes that this rank has sent, where a ring carries it: an all-gather of
            b bytes a rank sends (W - 1) b, a sum or a reduction of b bytes 2 (W - 1) / W b.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.outside: Callable[[], Sequence[Tensor]] = list
        self.check_step: Callable[[], None] = _nothing
        self.slices: Leaves | None = None
        self.wire: torch.dtype | None = None
        # NCCL wants tensors on the GPU; gloo has every collective on the CPU alone
        self._wire = device if dist.get_backend(group) == "nccl" else torch.device("cpu")
        self._name = group.group_name
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.sent: Counter[str] = Counter()

    # ---- collectives -----------------------------------------------------------------------------

    def gathered(self, what: str, numbers: Sequence[int]) -> list[list[int]]:
        """The whole numbers of every rank, as many on each."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=self._wire)
        return [each.tolist() for each in self._all_gather(what, mine)]

    def gathered_rows(self, what: str, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """The rows `[counts[rank], K]` of every rank."""
        # an all-gather wants tensors of one shape
        padded = rows.new_zeros(max(counts), *rows.shape[1:], device=self._wire)
        padded[: len(rows)] = rows
        found = self._all_gather(what, padded)
        return [each[:n].to(rows.device) for each, n in zip(found, counts, strict=True)]

    def objects(self, what: str, mine: object) -> list[Any]:
        """A plain value of every rank.

        Raises:
            ValueError: another rank is at another exchange.
        """
        words = torch.frombuffer(bytearray(pickle.dumps((what, mine))), dtype=torch.uint8)
        lengths = [length for (length,) in self.gathered(what, [len(words)])]
        found = self.gathered_rows(what, words, lengths)
        told = [pickle.loads(each.numpy().tobytes()) for each in found]
        places = [place for place, _ in told]
        if len(set(places)) > 1:
            raise ValueError(
                f"{what}: found the ranks at different exchanges, {places}, expected one: every rank calls the engine "
                "equally often, in the same order, with the same method and the same settings."
            )
        return [value for _, value in told]

    def sum(self, what: str, t: Tensor) -> Tensor:
        """The sum of a dense tensor over ranks, the same bits on each."""
        wire = self._wired(t)
        self.sent[what] += 2 * (self.size - 1) * wire.nbytes // self.size
        found = self._run(what, lambda: _functional.all_reduce(wire, "sum", self._name))
        return found.to(t.device)

    def scattered(self, what: str, pieces: Tensor) -> Tensor:
        """Of `[W, n]` the sum over ranks of this rank's line, `[n]`."""
        wire = self._wired(pieces).flatten()
        self.sent[what] += (self.size - 1) * wire.nbytes // self.size
        found = self._run(
            what, lambda: _functional.reduce_scatter_tensor(wire, "sum", self.size, self._name)
        )
        return found.to(pieces.device)

    def sum_at(self, what: str, t: Tensor, rank: int) -> Tensor:
        """The sum of a dense tensor over ranks, right on one of them."""
        # a reduction to one rank has no functional form, and is made in place
        wire = self._wired(t).clone()
        self.sent[what] += (self.size - 1) * wire.nbytes // self.size
        # torch counts by ranks of the whole world
        at = dist.get_global_rank(self.group, rank)
        self._run(what, lambda: dist.reduce(wire, at, group=self.group) or wire)
        return wire.to(t.device)

    def first(self, what: str, t: Tensor) -> Tensor:
        """The tensor of rank 0."""
        wire = self._wired(t)
        self.sent[what] += wire.nbytes if self.rank == 0 else 0
        found = self._run(what, lambda: _functional.broadcast(wire, 0, self._name))
        return found.to(t.device)

    def same_generator(self, method: object) -> None:
        """A method that draws random numbers draws those of rank 0 on every rank."""
        generators: Any = getattr(method, "generators", list)
        for generator in generators():
            # the state and no seed: some numbers may have been drawn from it
            generator.set_state(self.first("rows.backward: generator", generator.get_state()))

    def exchanged(
        self, what: str, pieces: Sequence[Tensor], sizes: Sequence[int], device: torch.device
    ) -> list[Tensor]:
        """One piece of bytes for each rank; what each of them had for this one.

        Args:
            what: the name of the collective.
            pieces: uint8 vectors, one a rank.
            sizes: bytes that come from each.
            device: where they are wanted.

        Returns:
            uint8 vectors, one a rank.
        """
        given, taken = [len(piece) for piece in pieces], list(sizes)
        self.sent[what] += sum(given) - given[self.rank]
        sent = torch.cat([piece.to(self._wire) for piece in pieces])
        found = self._run(
            what, lambda: _functional.all_to_all_single(sent, taken, given, self._name)
        )
        return list(found.to(device).split(taken))

    # ---- errors ----------------------------------------------------------------------------------

    def agreed(self, what: str, function: Callable[[], T]) -> T:
        """What a function without collectives gives on this rank, if it gives something on all.

        Raises:
            Exception: it raised on a rank: of its kind, the rank named.
        """
        # told without an error, too: all ranks meet in this collective, or none does
        value, error = attempt(function)
        self.told(what, error, [])
        return value

    def alike(self, what: str, settings: object, function: Callable[[], T]) -> T:
        """What a function without collectives gives, if it gives something on all ranks, of the same settings.

        Args:
            what: whose settings they are.
            settings: plain values.
            function: what is asked.

        Raises:
            Exception: it raised on a rank: of its kind, the rank named.
            ValueError: the settings differ.
        """
        value, error = attempt(function)
        found = self.objects(what, (described(error), settings))
        check_errors([told for told, _ in found], error)
        every = [of_rank for _, of_rank in found]
        if any(of_rank != every[0] for of_rank in every):
            raise ValueError(
                f"{what}: found other settings on some ranks, {every}, expected the same on all."
            )
        return value

    def told(self, what: str, error: Exception | None, mine: Sequence[int]) -> list[list[int]]:
        """The whole numbers of every rank, where none has found an error.

        Raises:
            Exception: of the kind that one of the ranks found.
        """
        found = self.gathered(what, [error is not None, *mine])
        self.check(what, [numbers[0] for numbers in found], error)
        return [numbers[1:] for numbers in found]

    def check(self, what: str, failed: Sequence[int], error: Exception | None) -> None:
        """Raise on all ranks where some failed; `error` is this rank's own.

        Raises:
            Exception: of the kind of the first rank that failed.
        """
        # words travel only after an error, in a collective that all ranks then enter
        if any(failed):
            check_errors(self.objects(what, described(error)), error)

    def _wired(self, t: Tensor) -> Tensor:
        """On the wire's device, dense: autograd hands out expanded tensors, too."""
        return t.detach().to(self._wire).contiguous()

    def _all_gather(self, what: str, mine: Tensor) -> Sequence[Tensor]:
        """Of `[n, ...]` that of every rank."""
        self.sent[what] += (self.size - 1) * mine.nbytes
        found = self._run(
            what, lambda: _functional.all_gather_into_tensor(mine, self.size, self._name)
        )
        return found.view(self.size, *mine.shape).unbind()

    def _run(self, what: str, collective: Callable[[], Tensor]) -> Tensor:
        """What a collective gives, once it is there: on a GPU its stream waits, and the host goes on."""
        try:
            found: Tensor = _functional.wait_tensor(collective())
            return found
        except RuntimeError as error:
            raise RuntimeError(
                f"{what}: the exchange did not end on rank {self.rank} of {self.size}: {error}. "
                "Expected that every rank calls the engine and its rows equally often, in the same "
                "order; a rank that has no samples gives losses of length 0. Did a rank die, or "
                "leave the loop early?"
            ) from error


def everyone(processes: int, device: torch.device) -> Ranks | None:
    """The ranks of all processes; None where there is one."""
    group = dist.group.WORLD if dist.is_available() and processes > 1 else None
    return None if group is None else Ranks(group, device)


def described(error: Exception | None) -> tuple[int, str] | None:
    """An error as a plain value: its kind, and its words."""
    if error is None:
        return None
    is_of = (k for k, kind in enumerate(_KINDS) if isinstance(error, kind))
    kind = next(is_of, None)
    if kind is None:
        # other kinds may not be made from a string: their name goes into the words
        return len(_KINDS) - 1, f"{type(error).__name__}: {error}"
    return kind, str(error)


def check_errors(found: Sequence[tuple[int, str] | None], own: Exception | None) -> None:
    """Raise what the first rank found that found something; `own` is this rank's.

    Raises:
        Exception: of its kind.
    """
    told = [(rank, each) for rank, each in enumerate(found) if each is not None]
    if not told:
        return
    (first, (kind, words)), *rest = told
    others = f" (ranks {[rank for rank, _ in rest]} failed too)" if rest else ""
    raise _KINDS[kind](f"rank {first}: {words}{others}") from own
