"""Files to be written."""

from __future__ import annotations

from pathlib import Path


def check_folder(name: str, path: str | Path) -> None:
    """There is a folder for the file to be written.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name}: there is no folder {folder} for {Path(path).name}; make it first, "
            f"Path({str(folder)!r}).mkdir(parents=True)."
        )
