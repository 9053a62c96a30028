"""Data sets: labelled images in memory, rendered rooms, and readers of the layout of the multi-task literature."""

from __future__ import annotations

from benchmarks.data.folder import Folder, open_folder
from benchmarks.data.samples import Dataset, Index, Samples, concat

__all__ = ["Dataset", "Folder", "Index", "Samples", "concat", "open_folder"]
