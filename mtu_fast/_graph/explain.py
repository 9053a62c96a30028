"""What the engine did with each parameter, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtu_fast._rows.products import route
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.uses import Dense, Use


@dataclass(frozen=True)
class Line:
    """One parameter: where it is used, how its rows are known, and what that holds.

    Attributes:
        name: the parameter's name in the model.
        shape: its shape.
        sites: autograd node and way at each place of use.
        kept: "rows" or "factors"; "-" where no row reaches the parameter.
        route: how its Gram is computed.
        bytes: what is held for it, over all tasks.
        slow: whether rows come one by one instead of by a rule.
    """

    name: str
    shape: tuple[int, ...]
    sites: tuple[str, ...]
    kept: str
    route: str
    bytes: int
    slow: bool


@dataclass(frozen=True)
class Explanation:
    """A line for every parameter; printing it gives a table.

    Attributes:
        lines: of the parameters, in the engine's order.
        trials: autograd nodes that move rows as the data say, and are therefore looked at anew in
            every step.
        anew: why the plan was made anew for this step although one of the same shapes was known; ""
            if it was not.
    """

    lines: tuple[Line, ...]
    trials: tuple[str, ...] = ()
    anew: str = ""

    @staticmethod
    def of(
        notes: Mapping[int, Sequence[str]],
        shared: Shared,
        uses: Sequence[Mapping[int, Use]],
        trials: tuple[str, ...] = (),
        anew: str = "",
    ) -> Explanation:
        """Lines from the graph's notes and the uses of each task."""
        return Explanation(
            tuple(
                _line(name, tuple(p.shape), notes.get(j, ()), [of[j] for of in uses if j in of])
                for j, (name, p) in enumerate(zip(shared.names, shared.parameters, strict=True))
            ),
            trials,
            anew,
        )

    def __str__(self) -> str:
        table = [("parameter", "shape", "kept", "route", "MiB", "uses"), *map(_cells, self.lines)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        text = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        if self.trials:
            text.append(
                f"looked at in every step, since data say how rows move: {', '.join(_counted(self.trials))}"
            )
        if self.anew:
            text.append(f"the plan was made anew for this step: {self.anew}")
        return "\n".join(text)


def _cells(line: Line) -> tuple[str, ...]:
    shape = "×".join(map(str, line.shape)) or "scalar"
    uses = ("SLOW " if line.slow else "") + "; ".join(_counted(line.sites))
    return line.name, shape, line.kept, line.route, f"{line.bytes / 2**20:.2f}", uses


def _line(name: str, shape: tuple[int, ...], sites: Sequence[str], uses: Sequence[Use]) -> Line:
    if not uses:
        return Line(name, shape, tuple(sites), "-", "no row reaches it", 0, False)
    slow = any("vjp" in site or "pulled" in site or "backward" in site for site in sites)
    kept = "rows" if isinstance(uses[0], Dense) else "factors"
    return Line(name, shape, tuple(sites), kept, route(uses), sum(use.held for use in uses), slow)


def _counted(sites: Sequence[str]) -> list[str]:
    counts = {site: sites.count(site) for site in dict.fromkeys(sites)}
    return [f"{n} × {site}" if n > 1 else site for site, n in counts.items()]
