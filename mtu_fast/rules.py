"""Rules of your own: the row gradients of a parameter that enters the graph through an autograd node you know.

Every parameter is exact without a rule, by one local backward per row. A rule gives all rows at
once, and five lines do:

    from mtu_fast.rules import rule, summed

    @rule("ExpScaleBackward", slots=(1,))  # out = x · exp(g), g is the node's input number 1
    def exp_scale(node, slot, shape, b, rows):
        x, g = node.saved_tensors
        return summed(b * x * g.exp(), rows, shape)

What a rule is given:

* `node`: the autograd node, to be read and not to be run
* `slot`: which of the node's inputs the parameter is, an index into `node.next_functions`
* `shape`: the shape of that input
* `b`: the gradient of the losses with respect to the node's output
* `rows`: the `RowMap` of b, which row each of its elements belongs to

It returns a use, the gradients of all rows in their cheapest form: `Dense` (the rows themselves),
`Outer`, `Conv` or `Gather` (their factors), `Common` (directions that all rows share) or `Stacked`
(a use per block). It returns None where it does not apply; the exact generic way then serves. It
is registered before an engine first sees its node, and checked as the built-in ones are: rows that
do not add up to an ordinary backward are replaced by one backward per row, with a warning.

A node with several outputs, or with work that its inputs share, has an entry of its own in `RULES`:
`@RULES.entry("NodeName")` on a function `(node, {slot: shape}, gradients, row maps) -> {slot: use}`,
with a gradient and a map per output (None where no gradient comes).
"""

from mtu_fast._graph.rowmap import RowMap
from mtu_fast._graph.rules import RULES
from mtu_fast._graph.rules.base import rule, scaled, summed
from mtu_fast._ops._convolution import Geometry
from mtu_fast._rows.uses import Common, Conv, Dense, Gather, Outer, Stacked, Use

__all__ = [
    "RULES",
    "Common",
    "Conv",
    "Dense",
    "Gather",
    "Geometry",
    "Outer",
    "RowMap",
    "Stacked",
    "Use",
    "rule",
    "scaled",
    "summed",
]
