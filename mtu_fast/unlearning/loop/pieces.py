"""A checkpoint of a model in slices: a piece from each rank, and a file that names the pieces by their checksums.

A piece holds the slices that its rank has (of the ranks that have the same one the first writes it),
and what each share of the data has of its own. The file holds all else, and where the slices lie.
Nobody ever holds a whole tensor; ranks of another number read the parts that they need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mtu_fast._distributed.chunks import Chunk, chunk_of, held_as, is_cut, local_of
from mtu_fast._distributed.crew import Crew
from mtu_fast._distributed.ranks import Ranks
from mtu_fast.unlearning.loop import sealed
from mtu_fast.unlearning.loop.copies import copied

WHAT = "unlearn: checkpoint"
Place = tuple[str | int, ...]  # keys that lead to a tensor of a state
Like = Callable[[Place], Tensor]  # the tensor of model or optimizer that one at a place is cut as


# ---- writing -------------------------------------------------------------------------------------


def write_pieces(
    path: str | Path, crew: Crew, ranks: Ranks, state: Mapping[str, Any], own: Any, like: Like
) -> dict[str, Any]:
    """Write a piece of each rank; a collective.

    Args:
        path: the file of which they are pieces.
        crew: of the run.
        ranks: those that hold slices.
        state: model and optimizer as this rank holds them, and all that is alike on all ranks.
        own: what is this share's of the data.
        like: what the state's tensors are cut as.

    Returns:
        What is left to write to the file itself, once all pieces are there.

    Raises:
        Exception: of the kind that one of the ranks found.
    """
    cut: dict[Place, Any] = {}
    rest = ranks.agreed(WHAT, lambda: _cut_out(state, (), cut, like))
    # the places are alike on all ranks, and need not travel
    table = _table(cut, ranks.objects(WHAT, [chunk_of(t) for t in cut.values()]))
    written = [at for at, entry in table.items() if ranks.rank in entry["chunks"]]
    mine = {at: local_of(cut[at]).cpu() for at in written}
    # ranks that share the data have the same
    is_one = crew.size == ranks.size or crew.is_first
    values = {"slices": mine, "own": copied(own, "state") if is_one else {}}
    piece = f"{ranks.rank}of{ranks.size}"
    found = ranks.agreed(WHAT, lambda: sealed.write_piece(path, piece, values))
    pieces = ranks.objects(f"{WHAT}: pieces", found)
    return {**rest, "pieces": pieces, "cut": table, "shares": crew.size, "others": []}


def _cut_out(part: Any, at: Place, found: dict[Place, Any], like: Like) -> Any:
    """A state with None in the place of its DTensors, which are found.

    Raises:
        TypeError: one of them could not be put back.
    """
    if is_cut(part):
        _check_cut(part, at, like)
        found[at] = part
        return None
    if isinstance(part, Mapping):
        parts = {key: _cut_out(each, (*at, key), found, like) for key, each in part.items()}
        return type(part)(parts)  # type: ignore[call-arg]
    if isinstance(part, list | tuple):
        return type(part)(_cut_out(each, (*at, i), found, like) for i, each in enumerate(part))
    return part


def _check_cut(t: Any, at: Place, like: Like) -> None:
    """A DTensor is one of the model's, or of the optimizer's for one parameter, cut as that is.

    Raises:
        TypeError: it is not.
    """
    is_known = (at[0], len(at)) == ("model", 2) or (at[:2], len(at)) == (("optimizer", "state"), 4)
    wanted: Any = like(at) if is_known else None
    if wanted is None or (t.shape, t.placements) != (wanted.shape, wanted.placements):
        raise TypeError(
            f"checkpoint: {_named(at)} is a DTensor of shape {tuple(t.shape)}, expected one only in the state of the "
            "model, and in the optimizer's where it is cut as its parameter; go without a checkpoint."
        )


def _table(
    cut: Mapping[Place, Any], of_ranks: Sequence[Sequence[Chunk]]
) -> dict[Place, dict[str, Any]]:
    """{place: shape, dtype, and {rank: start and sizes} of the slices}, each written once."""
    table = {}
    for (at, t), chunks in zip(cut.items(), zip(*of_ranks, strict=True), strict=True):
        writers: dict[Chunk, int] = {}
        for rank, chunk in enumerate(chunks):
            if chunk.numel:
                writers.setdefault(chunk, rank)
        places = {rank: tuple(chunk) for chunk, rank in writers.items()}
        table[at] = {"shape": tuple(t.shape), "dtype": t.dtype, "chunks": places}
    return table


def _named(at: Place) -> str:
    return ".".join(map(str, at))


# ---- reading -------------------------------------------------------------------------------------


class Pieces:
    """The pieces of a file, each opened when something in it is asked for.

    Args:
        path: the file.
        named: (name, checksum) of each.
        shares: of the data, those of the first pieces.

    Attributes:
        shares: as given.
    """

    def __init__(self, path: str | Path, named: Sequence[tuple[str, str]], shares: int) -> None:
        self.shares = shares
        self._path = path
        self._folder = sealed.destination(path).parent
        self._named = named
        self._read: dict[int, Mapping[str, Any]] = {}

    def __reduce__(self) -> tuple[type[Pieces], tuple[Any, ...]]:
        # on another rank they are opened anew, where that rank needs them
        return Pieces, (self._path, self._named, self.shares)

    def check(self, first: int, step: int) -> None:
        """Every so many of the pieces are those that the file was written with.

        Raises:
            ValueError: one is missing, damaged, or another.
        """
        for name, digest in self._named[first::step]:
            beside = self._folder / name
            try:
                with beside.open("rb") as file:
                    found = sealed.check_sum(beside, file, self._path)
            except OSError as error:
                raise ValueError(
                    f"checkpoint: {self._path} is in pieces, and {beside} cannot be read: {error.strerror}. "
                    "Put it back; all ranks must see the folder."
                ) from error
            if found != digest:
                raise ValueError(
                    f"checkpoint: {beside} is not the piece that {self._path} was written with. Put that back."
                )

    def own_of(self, share: int) -> Mapping[str, Any]:
        """What a share of the data had of its own."""
        found: Mapping[str, Any] = self._piece(share)["own"]
        return found

    def slice_at(self, at: Place, rank: int) -> Tensor:
        """The slice of a tensor that a rank wrote, left in its file."""
        found: Tensor = self._piece(rank)["slices"][at]
        return found

    def _piece(self, i: int) -> Mapping[str, Any]:
        if i not in self._read:
            beside = self._folder / self._named[i][0]
            found = sealed.load(beside)
            for part in ("own", "slices"):
                if not isinstance(found, Mapping) or not isinstance(found.get(part), Mapping):
                    raise ValueError(f"checkpoint: {beside} is incomplete: it holds no {part}.")
            self._read[i] = found
        return self._read[i]


def fill(path: str | Path, state: dict[str, Any], like: Like, sliced: bool) -> None:
    """Put this rank's part of every tensor into a state that was read, of slices and of whole tensors.

    Args:
        path: the file, for errors.
        state: with None where slices belong.
        like: what the state's tensors are to be cut as.
        sliced: whether the model is in slices now.

    Raises:
        ValueError: a tensor is of another shape, or not all of it is there.
    """
    parts: dict[Place, Callable[[Tensor], Tensor]] = {}
    if sliced:
        parts = {at: partial(_cut, t) for at, t in _tensors(state).items()}
    for at, entry in state.get("cut", {}).items():
        parts[at] = partial(_read, entry, partial(state["pieces"].slice_at, at))
    for at, part in parts.items():
        try:
            _put(state, at, part(like(at)))
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"checkpoint: {path} does not fit this run, or is damaged: {_named(at)}: {error}"
            ) from error


def _read(entry: Mapping[str, Any], slice_of: Callable[[int], Tensor], like: Tensor) -> Tensor:
    """A tensor from the slices of those ranks that wrote one."""
    if tuple(entry["shape"]) != tuple(like.shape):
        raise ValueError(f"found shape {tuple(entry['shape'])}, expected {tuple(like.shape)}.")
    ranks = list(entry["chunks"])
    chunks = [Chunk(*entry["chunks"][rank]) for rank in ranks]

    def part(i: int) -> Tensor:
        found = slice_of(ranks[i])
        if (tuple(found.shape), found.dtype) != (chunks[i].sizes, entry["dtype"]):
            raise ValueError(
                f"found a slice of shape {tuple(found.shape)} and {found.dtype}, expected {chunks[i].sizes} and "
                f"{entry['dtype']}."
            )
        return found

    return held_as(like, entry["dtype"], chunks, part)


def _cut(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor."""
    # a count of steps is no tensor of its parameter's shape, and stays
    if not is_cut(like) or whole.shape != like.shape:
        return whole
    return held_as(like, whole.dtype, [chunk_of(whole)], lambda _: whole)


def _tensors(state: Mapping[str, Any]) -> dict[Place, Tensor]:
    """The tensors of model and optimizer that are whole."""
    found: dict[Place, Any] = {("model", name): t for name, t in state["model"].items()}
    for i, parts in state["optimizer"].get("state", {}).items():
        found |= {("optimizer", "state", i, name): t for name, t in parts.items()}
    return {at: t for at, t in found.items() if isinstance(t, Tensor)}


def _put(state: Any, at: Place, t: Tensor) -> None:
    for key in at[:-1]:
        state = state[key]
    state[at[-1]] = t
