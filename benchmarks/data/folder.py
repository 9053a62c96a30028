"""The layout in which the multi-task literature hands out NYUv2 and Cityscapes, read item by item.

    <root>/train/{image,label,depth,normal}/0.npy, 1.npy, …      <root>/val/ the same

Images [H, W, 3] in 0..1, labels [H, W] with -1 where unlabelled, depth [H, W, 1] and normals [H, W,
3] with zeros where not measured. Opening looks at names and headers only; an item is read, and its
values are checked, when it is indexed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.data.samples import Index, Samples

SPLITS = ("train", "val")
CHANNELS = {"image": (3,), "label": (), "depth": (1,), "normal": (3,)}  # after H and W
FOLDERS = {"segmentation": "label", "depth": "depth", "normal": "normal"}  # of each task


@dataclass(frozen=True)
class Folder:
    """Images and labels of one split, read when indexed; `items` [N] are the numbers of their files."""

    path: Path
    tasks: tuple[str, ...]
    classes: int
    items: Tensor

    def __len__(self) -> int:
        """N."""
        return len(self.items)

    def __getitem__(self, index: Index) -> Samples:
        """The samples at `index` ([n] int64, [N] bool, or a slice), read into memory."""
        chosen = self.items[index]
        numbers = chosen.tolist()
        labels = {task: self._read(FOLDERS[task], numbers) for task in self.tasks}
        return Samples(self._read("image", numbers), labels, chosen)

    def subset(self, index: Index) -> Folder:
        """The samples at `index`, not read yet."""
        return replace(self, items=self.items[index])

    def _read(self, folder: str, numbers: Sequence[int]) -> Tensor:
        files = [self.path / folder / f"{i}.npy" for i in numbers]
        arrays = [np.load(file, allow_pickle=False) for file in files]
        for file, array in zip(files, arrays, strict=True):
            _check_values(file, folder, array, self.classes)
        if folder == "label":
            return torch.from_numpy(np.stack(arrays).astype(np.int64))
        return torch.from_numpy(np.stack(arrays).astype(np.float32)).movedim(-1, 1).contiguous()


def open_folder(root: Path | str, split: str, tasks: tuple[str, ...], classes: int) -> Folder:
    """One split of a data set in this layout.

    Args:
        root: the folder that holds `train` and `val`.
        split: "train" or "val".
        tasks: of `segmentation`, `depth`, `normal`.
        classes: of the segmentation, numbered from 0.

    Returns:
        The samples, not read yet.

    Raises:
        FileNotFoundError: a folder is missing or empty, or a number is missing among its files.
        ValueError: `split` is unknown, or folders differ in their number of files, or files in
            their shapes.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    path = Path(root) / split
    folders = ("image", *(FOLDERS[task] for task in tasks))
    counts = {folder: _count(path / folder) for folder in folders}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{path}: found {counts} files, expected one of each for every image")
    _check_shapes(path, counts)
    return Folder(path, tasks, classes, torch.arange(counts["image"]))


def _count(folder: Path) -> int:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; expected <root>/{folder.parent.name}/{folder.name}/0.npy, 1.npy, ... "
            "(--root names the folder that holds train and val)"
        )
    names = {file.name for file in folder.glob("*.npy")}
    absent = next(name for name in (f"{i}.npy" for i in range(len(names) + 1)) if name not in names)
    if absent != f"{len(names)}.npy" or not names:
        raise FileNotFoundError(
            f"{folder} holds {len(names)} .npy files and no {absent}; expected 0.npy, 1.npy, ... without a gap"
        )
    return len(names)


def _check_shapes(path: Path, counts: Mapping[str, int]) -> None:
    """Every file has the shape of its kind, and all have the height and width of the first image."""
    size: tuple[int, ...] | None = None
    for folder, count in counts.items():
        for i in range(count):
            file = path / folder / f"{i}.npy"
            shape = np.load(file, mmap_mode="r", allow_pickle=False).shape
            size = size or shape[:2]
            if shape != (*size, *CHANNELS[folder]) or len(size) != 2:
                dims = ", ".join(str(n) for n in (*size, *CHANNELS[folder]))
                raise ValueError(
                    f"{file} has shape {list(shape)}, expected [{dims}]: H and W as in image/0.npy"
                )


def _check_values(file: Path, folder: str, array: NDArray[np.generic], classes: int) -> None:
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(
            f"{file}: {bad} of {array.size} values are NaN or infinite; what was not measured is 0, unlabelled is -1"
        )
    low, high = float(array.min()), float(array.max())
    if folder == "image" and not 0 <= low <= high <= 1:
        raise ValueError(
            f"{file}: values in {low:g}..{high:g}, expected an image in 0..1; divide bytes by 255"
        )
    if folder == "label" and (low < -1 or high >= classes or (array != np.floor(array)).any()):
        raise ValueError(
            f"{file}: classes in {low:g}..{high:g}, expected whole numbers in -1..{classes - 1}, -1 where unlabelled"
        )
