"""Tables of functions by the name of the op or node they are for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Table(dict[str, F]):
    """What is known of each op; every entry is written in one place, by the decorator `entry`."""

    def entry(self, names: str) -> Callable[[F], F]:
        """Register a function for some names, parted by spaces.

        Raises:
            ValueError: a name has an entry already.
        """

        def register(function: F) -> F:
            for name in names.split():
                self.enter(name, function)
            return function

        return register

    def enter(self, name: str, function: F) -> None:
        """Register a function for one name.

        Raises:
            ValueError: it has an entry already.
        """
        if name in self:
            there, here = self[name].__module__, function.__module__
            raise ValueError(
                f"two entries for {name}: in {there} and {here}; keep one of them "
                f"(del RULES[{name!r}] takes a rule out)."
            )
        self[name] = function
