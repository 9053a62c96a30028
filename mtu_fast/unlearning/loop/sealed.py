"""A file of plain values with a checksum at its end; at every moment it is the old one or the new one.

The file is what `torch.save` writes, then 40 bytes: `SEAL` and the SHA-256 of all before.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

SEAL = b"mtu_fast"
LENGTH = len(SEAL) + hashlib.sha256().digest_size
CHUNK = 1 << 20
NAMED = 16  # digits of the checksum in the name of a piece


class _Hashed:
    """A file to be written that counts what passes, and keeps the error that torch would hide."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sum = hashlib.sha256()
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            self.sum.update(data)
            return self.file.write(data)
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def destination(path: str | Path) -> Path:
    """The file that a path leads to, over symbolic links.

    Raises:
        OSError: the links lead round in a circle.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, f"checkpoint: {path} is a link that leads back to itself.")
    return target


def write(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings and their containers; the old file stays until the new one is complete.

    Args:
        path: the file; where it is a symbolic link, the file that it leads to.
        values: what to write.

    Raises:
        OSError: the file cannot be written (a full disk, a read-only folder); the old one is as it
            was.
    """
    target = destination(path)
    # in the same folder, so that to rename it is one step of the file system
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    _write(path, beside, values, lambda digest: target)


def write_piece(path: str | Path, piece: str, values: Mapping[str, Any]) -> tuple[str, str]:
    """Write a piece of what a file is to refer to, beside it, under a name of its own contents.

    Args:
        path: the file.
        piece: which one, as "0of2".
        values: what to write.

    Returns:
        The piece's name and its checksum.

    Raises:
        OSError: the piece cannot be written.
    """
    target = destination(path)
    # of the piece as well: on two machines processes may have one number
    beside = target.with_name(f"{target.name}.{piece}.{os.getpid()}.part")

    def named(digest: str) -> Path:
        return target.with_name(f"{target.name}.{piece}.{digest[:NAMED]}")

    # a piece that the file refers to now is never written over: its name is that of its contents
    digest = _write(path, beside, values, named)
    return named(digest).name, digest


def check_seen(path: str | Path, pieces: Sequence[str]) -> None:
    """The pieces that ranks wrote lie beside the file.

    Raises:
        FileNotFoundError: one does not, as where ranks of another machine have a disk of their own.
    """
    folder = destination(path).parent
    for rank, name in enumerate(pieces):
        if not (folder / name).exists():
            raise FileNotFoundError(
                errno.ENOENT,
                f"checkpoint: {path}: rank {rank} wrote {name}, and the first rank finds none in {folder}; expected a "
                "folder that all ranks see under one path.",
            )


def _write(
    path: str | Path, beside: Path, values: Mapping[str, Any], named: Callable[[str], Path]
) -> str:
    """Write a file under a name that may depend on its checksum, which is returned."""
    try:
        digest = _write_sealed(beside, values)
        # atomic: a reader sees the old file or the new one, never a part
        os.replace(beside, named(digest))
        _sync_folder(beside.parent)
    except OSError as error:
        raise OSError(
            error.errno,
            f"checkpoint: {path} could not be written: {error.strerror}. What was there before is as it was.",
        ) from error
    finally:
        _remove(beside)
    return digest


def _write_sealed(path: Path, values: Mapping[str, Any]) -> str:
    with path.open("wb") as file:
        hashed: Any = _Hashed(file)
        try:
            torch.save(dict(values), hashed)
        except RuntimeError as error:
            # torch says "unexpected pos" where a full disk or Ctrl-C has stopped it
            raise hashed.error or _first(error) from error
        file.write(SEAL + hashed.sum.digest())
        file.flush()
        # on the disk before the name points to it
        os.fsync(file.fileno())
    digest: str = hashed.sum.hexdigest()
    return digest


def _first(error: BaseException) -> BaseException:
    """What was raised before all that was raised while it was handled."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power failure, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    with suppress(OSError):  # a folder that is not writable; the error of the write says so
        path.unlink(missing_ok=True)


def remove_leftovers(path: str | Path) -> None:
    """Remove what writers of this file left behind when they were killed; nobody may be writing it."""
    _remove_like(path, r"(\d+of\d+\.)?\d+\.part")


def remove_pieces(path: str | Path, but: Collection[str] = ()) -> None:
    """Remove the pieces beside a file, but for those of these names."""
    _remove_like(path, rf"\d+of\d+\.[0-9a-f]{{{NAMED}}}", but)


def _remove_like(path: str | Path, ending: str, but: Collection[str] = ()) -> None:
    target = destination(path)
    pattern = re.compile(re.escape(target.name) + r"\." + ending)
    for beside in target.parent.iterdir():
        if beside.name not in but and pattern.fullmatch(beside.name):
            _remove(beside)


def read(path: str | Path, *, mapped: bool = False) -> Any:
    """What `write` wrote; no code of the file is run.

    Args:
        path: the file.
        mapped: whether tensors are left in the file, which is read where they are looked at.

    Raises:
        ValueError: the file is something else, or it was cut short or changed since.
        OSError: it cannot be read.
    """
    if Path(path).is_dir():
        raise ValueError(f"checkpoint: {path} is a folder, expected a file.")
    with Path(path).open("rb") as file:
        check_sum(path, file)
        file.seek(0)
        return load(path, None if mapped else file)


def load(path: str | Path, file: BinaryIO | None = None) -> Any:
    """What `write` wrote, its checksum not looked at; from the open file, else tensors are left in it.

    Raises:
        ValueError: the file is something else.
        OSError: it cannot be read.
    """
    try:
        if file is None:
            return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of any kind, by what the file holds
        raise ValueError(f"checkpoint: {path} is no checkpoint of mtu.unlearn: {error}") from error


def check_sum(path: str | Path, file: BinaryIO, whole: str | Path | None = None) -> str:
    """The checksum of an open file, which is the one at its end.

    Args:
        path: the file, for errors.
        file: it, open.
        whole: the checkpoint of which it is a piece.

    Raises:
        ValueError: it is not, or there is none.
    """
    remedy = f"Put back a copy, or remove {'it' if whole is None else whole} to begin anew."
    # of the file that is open: the name may point to a newer one by now
    size = os.fstat(file.fileno()).st_size
    left = size - LENGTH
    file.seek(max(left, 0))
    # the seal first: a file cut short is told before it is hashed
    end = file.read(LENGTH)
    if left < 0 or not end.startswith(SEAL):
        raise ValueError(
            f"checkpoint: {path} is no checkpoint of this version of mtu.unlearn, or it was cut short: its "
            f"{size} bytes do not end with a checksum. {remedy}"
        )
    file.seek(0)
    found = hashlib.sha256()
    while left > 0:
        data = file.read(min(CHUNK, left))
        if not data:
            break
        found.update(data)
        left -= len(data)
    if end != SEAL + found.digest():
        raise ValueError(
            f"checkpoint: {path} is damaged: its {size} bytes do not have the checksum they were written with. "
            f"{remedy}"
        )
    return found.hexdigest()
