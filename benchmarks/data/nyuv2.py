"""NYUv2 in the layout of the multi-task literature: segmentation (13 classes), depth in metres, surface normals."""

from __future__ import annotations

from pathlib import Path

from benchmarks.data.folder import Folder, open_folder

TASKS = ("segmentation", "depth", "normal")
CLASSES = 13


def load(root: Path | str, split: str, classes: int = CLASSES) -> Folder:
    """The split "train" (795 images) or "val" (654), read item by item; errors as in `open_folder`."""
    return open_folder(root, split, TASKS, classes)
