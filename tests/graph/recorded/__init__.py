"""Ways to record every op that structure knows, by family; importing a family enters its cases."""

from tests.graph.recorded import (
    elementwise,
    indexed,
    layers,
    matrices,
    picked,
    products,
    reduced,
    views,
    windows,
)
from tests.graph.recorded.cases import CASES

__all__ = [
    "CASES",
    "elementwise",
    "indexed",
    "layers",
    "matrices",
    "picked",
    "products",
    "reduced",
    "views",
    "windows",
]
