"""Errors of the package's own; bad arguments are TypeError and ValueError, as everywhere."""


class NotFiniteError(RuntimeError):
    """A row or an update is infinite or undefined; nothing was written to `.grad`."""
