"""The order of bases: a mixin's methods count only where it stands before the framework's class."""

from __future__ import annotations


def check_order(kind: type, mixin: type, packages: tuple[str, ...]) -> None:
    """No class of the framework stands before the mixin.

    Args:
        kind: the class that is being made.
        mixin: one of its bases.
        packages: the framework's names.

    Raises:
        TypeError: one does.
    """
    order = kind.__mro__
    first = next((each for each in order if each.__module__.split(".")[0] in packages), None)
    if first is not None and order.index(first) < order.index(mixin):
        raise TypeError(
            f"{kind.__qualname__}: found {first.__name__} before {mixin.__name__} among the bases, whose methods then "
            f"take the place of the mixin's; expected class {kind.__name__}({mixin.__name__}, {first.__name__})."
        )
