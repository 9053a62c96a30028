"""Files to be written."""

from __future__ import annotations

import os
from pathlib import Path


def check_folder(name: str, path: str | Path) -> None:
    """There is a folder for the file to be written.

    Raises:
        TypeError: it is no path.
        ValueError: a folder itself, or a name that no file can have.
        FileNotFoundError: there is none.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"{name}: found {path!r}, expected the path of a file, for example 'run.pt'."
        )
    if "\0" in str(path):
        raise ValueError(f"{name}: found {str(path)!r}, expected a name without NUL characters.")
    if Path(path).is_dir():
        raise ValueError(f"{name}: {path} is a folder, expected a file.")
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name}: there is no folder {folder} for {Path(path).name}; make it first, "
            f"Path({str(folder)!r}).mkdir(parents=True)."
        )
