"""Cityscapes in the layout of the multi-task literature: segmentation (7 classes) and inverse depth, no normals."""

from __future__ import annotations

from pathlib import Path

from benchmarks.data.folder import Folder, open_folder

TASKS = ("segmentation", "depth")
CLASSES = 7


def load(root: Path | str, split: str, classes: int = CLASSES) -> Folder:
    """The split "train" (2975 images) or "val" (500), read item by item; errors as in `open_folder`."""
    return open_folder(root, split, TASKS, classes)
