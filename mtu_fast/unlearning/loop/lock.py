"""One run at a time on a checkpoint, by a lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

from mtu_fast._checks.warned import warn
from mtu_fast.unlearning.loop.sealed import destination

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Nobody else runs on the checkpoint at `path` inside; a file beside it, `.lock`, says who does.

    A folder that cannot be written is not locked: a run that is over can be read from it.

    Raises:
        RuntimeError: another run does.
        OSError: the lock cannot be written for another reason than that.
    """
    lock = Lock(path)
    try:
        lock.take()
        yield
    finally:
        lock.release()


class Lock:
    """The lock of one checkpoint; it ends with the object, too, so that Ctrl-C at any moment leaves none.

    Args:
        path: the checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        # first, since `release` is called of one that was not made either
        self._handle: int | None = None
        self._held = False
        self._process = os.getpid()  # a fork of it holds nothing
        target = destination(path)
        self.path = path
        self.beside = target.with_name(f"{target.name}.lock")

    def take(self) -> None:
        """Lock, and write down who does.

        Raises:
            OSError: the lock cannot be written.
        """
        while not self._held:
            try:
                self._handle = os.open(self.beside, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                if error.errno in READ_ONLY:
                    return
                raise OSError(
                    error.errno, f"checkpoint: {self.path} could not be locked: {error.strerror}."
                ) from error
            self._lock(self._handle)
            if self._is_current(self._handle):
                self._held = True
            else:  # who held it has removed the file meanwhile
                self.release()
        if self._handle is not None:
            with suppress(OSError):  # on a full disk the lock holds without a name
                os.ftruncate(self._handle, 0)
                os.write(self._handle, _holder().encode())

    def release(self) -> None:
        """Unlock; the file goes first, so that nobody waits for one that is gone."""
        # a fork has the handle too, and must leave the file to its parent
        if self._held and self._process == os.getpid():
            with suppress(OSError):
                self.beside.unlink(missing_ok=True)
            self._held = False
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        self.release()

    def _lock(self, handle: int) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 1000, 0).decode(errors="replace") or "another process"
            raise RuntimeError(
                f"checkpoint: {self.path} is in use by {holder}; wait for that run or end it, or give this one a path "
                "of its own."
            ) from error
        except OSError as error:
            warn(
                f"checkpoint: {self.path} could not be locked ({error.strerror}); see to it that no other run uses it.",
            )

    def _is_current(self, handle: int) -> bool:
        """Whether the file that is locked is still the one beside the checkpoint."""
        try:
            there = os.stat(self.beside)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(handle), there)


def _holder() -> str:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}"
