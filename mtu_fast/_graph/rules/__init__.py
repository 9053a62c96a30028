"""Rules: autograd node -> use. One file per family of nodes; importing the package registers them all."""

from importlib import import_module
from pkgutil import iter_modules

from mtu_fast._graph.rules.base import RULES

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["RULES"]
