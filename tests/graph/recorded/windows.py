"""Pooling, padding and resampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tests.graph.recorded.cases import (
    case,
    u,
    x,
)

SPACE = {1: (6,), 2: (6, 4), 3: (4, 6, 4)}


def spatial(op: str, space: int, function: Callable[..., Any], plain: bool = True) -> None:
    """An op of images, of unbatched ones too, in either memory format."""
    case(op, lambda: function(x(2, 3, *SPACE[space])), lambda: function(x(6, 6, *SPACE[space])))
    if plain:
        case(op, lambda: function(x(3, *SPACE[space])))
    if space == 2:
        case(op, lambda: function(x(2, 3, *SPACE[space]).to(memory_format=torch.channels_last)))


spatial("AvgPool2D", 2, lambda a: F.avg_pool2d(a, 2))
spatial("AvgPool2D", 2, lambda a: F.avg_pool2d(a, 3, 1, 1))
spatial("AvgPool3D", 3, lambda a: F.avg_pool3d(a, 3, 1, 1))
spatial("AvgPool3D", 3, lambda a: F.avg_pool3d(a, 2))
spatial("AdaptiveAvgPool2D", 2, lambda a: F.adaptive_avg_pool2d(a, (3, 3)))
spatial("AdaptiveAvgPool3D", 3, lambda a: F.adaptive_avg_pool3d(a, 2))
spatial("AdaptiveMaxPool2D", 2, lambda a: F.adaptive_max_pool2d(a, 2))
spatial("AdaptiveMaxPool3D", 3, lambda a: F.adaptive_max_pool3d(a, 2))
spatial("MaxPool2DWithIndices", 2, lambda a: F.max_pool2d(a, 2))
spatial("MaxPool2DWithIndices", 2, lambda a: F.max_pool2d(a, 3, 1, 1))
spatial("MaxPool3DWithIndices", 3, lambda a: F.max_pool3d(a, 3, 1, 1))
spatial("MaxPool2DWithIndices", 1, lambda a: F.max_pool1d(a, 2))
spatial("MaxPool3DWithIndices", 3, lambda a: F.max_pool3d(a, 2))
spatial("FractionalMaxPool2D", 2, lambda a: F.fractional_max_pool2d(a, 2, output_size=2))
spatial("MaxUnpool2D", 2, lambda a: F.max_unpool2d(*F.max_pool2d(a, 2, return_indices=True), 2))
for _op, _space, _mode, _more in (
    ("UpsampleNearest1D", 1, "nearest", {}), ("UpsampleLinear1D", 1, "linear", {}),
    ("UpsampleNearest2D", 2, "nearest", {}), ("UpsampleBilinear2D", 2, "bilinear", {}),
    ("UpsampleBicubic2D", 2, "bicubic", {}), ("UpsampleBilinear2DAa", 2, "bilinear", {"antialias": True}),
    ("UpsampleBicubic2DAa", 2, "bicubic", {"antialias": True}), ("UpsampleNearest3D", 3, "nearest", {}),
    ("UpsampleTrilinear3D", 3, "trilinear", {}), ("UpsampleNearestExact1D", 1, "nearest-exact", {}),
    ("UpsampleNearestExact2D", 2, "nearest-exact", {}), ("UpsampleNearestExact3D", 3, "nearest-exact", {}),
):  # fmt: skip
    for _scale in (1.5, 0.5, 1.0):
        spatial(
            _op,
            _space,
            lambda a, m=_mode, k=_more, r=_scale: F.interpolate(a, scale_factor=r, mode=m, **k),
            plain=False,
        )
for _space in (1, 2, 3):
    _pads = (1, 2) * _space
    spatial(f"ReflectionPad{_space}D", _space, lambda a, p=_pads: F.pad(a, p, "reflect"))
    spatial(f"ReplicationPad{_space}D", _space, lambda a, p=_pads: F.pad(a, p, "replicate"))
case(
    "PixelShuffle",
    lambda: F.pixel_shuffle(x(2, 8, 3, 3), 2),
    lambda: F.pixel_shuffle(x(2, 3, 4, 2, 2), 2),
)
case(
    "PixelShuffle",
    lambda: F.pixel_shuffle(x(4, 2, 2), 2),
    lambda: F.pixel_shuffle(x(2, 4, 3, 3), 1),
)
case(
    "PixelUnshuffle",
    lambda: F.pixel_unshuffle(x(2, 2, 4, 4), 2),
    lambda: F.pixel_unshuffle(x(2, 3, 2, 4, 2), 2),
)
case("PixelUnshuffle", lambda: F.pixel_unshuffle(x(3, 4, 2), 2))
case(
    "Im2Col",
    lambda: F.unfold(x(2, 3, 4, 4), 2),
    lambda: F.unfold(x(3, 4, 4), 2, padding=1),
    lambda: F.unfold(x(2, 2, 2, 2), 1),
)
case(
    "Col2Im",
    lambda: F.fold(x(2, 12, 9), (4, 4), 2),
    lambda: F.fold(x(12, 9), (4, 4), 2),
    lambda: F.fold(x(4, 4, 4), (2, 2), 1),
)
case("GridSampler2D", lambda: F.grid_sample(x(2, 3, 4, 4), u(2, 2, 3, 2), align_corners=False))
case(
    "GridSampler2D",
    lambda: F.grid_sample(x(2, 2, 2, 2), u(2, 2, 2, 2), align_corners=True, mode="bicubic"),
)
case("Im2Col", lambda: F.unfold(x(4, 4, 4, 4), (1, 4)))
case("Col2Im", lambda: F.fold(x(4, 4, 4), (4, 4), (1, 4)))
case("GridSampler3D", lambda: F.grid_sample(x(2, 3, 3, 3, 3), u(2, 3, 3, 3, 3), align_corners=True))
case(
    "GridSampler3D", lambda: F.grid_sample(x(2, 3, 4, 4, 3), u(2, 2, 3, 2, 3), align_corners=False)
)
