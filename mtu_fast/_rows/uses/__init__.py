"""The kinds of use: what is known of the rows' gradients at one place where a parameter enters the graph.

A use stands for the matrix of row gradients `[R, P]` of one parameter without being it:

=======  ==========================================  =========================================
kind     holds                                       row gradient
=======  ==========================================  =========================================
Outer    left `[R, S, A]`, right `[R, S, B]`         `Σ_s left[r, s] ⊗ right[r, s]`, `[A, B]`
Conv     x `[R, F, C, *]`, b `[R, F, O, *]`          the convolution's weight gradient, `[O, C/g, *k]`
Gather   index `[R, S]`, values `[R, S, D]`          `Σ_s e_index[r, s] ⊗ values[r, s]`, `[V, *D]`
Common   scale `[R, K]`, direction `[K, *shape]`     `Σ_k scale[r, k] direction[k]`
Dense    rows `[R, *shape]`                          itself
Several  parts, uses of several of these kinds       the sum of theirs
Stacked  parts, uses of some blocks                  theirs beside one another, `[E, *block]`
=======  ==========================================  =========================================

Between a use and its parameter there may be a `Chain` of views and casts: linear maps whose
adjoints keep inner products. A Gram is therefore taken on this side of the chain, a combination is
pushed through it once, and a direction is pulled back to this side before the rows' inner products
with it are taken.
"""

from mtu_fast._rows.uses.base import DIRECT, Chain, Dense, Use, bytes_of, weigh
from mtu_fast._rows.uses.common import Common
from mtu_fast._rows.uses.conv import Conv
from mtu_fast._rows.uses.gather import Gather
from mtu_fast._rows.uses.outer import Outer
from mtu_fast._rows.uses.parts import Several, Stacked

__all__ = [
    "DIRECT",
    "Chain",
    "Common",
    "Conv",
    "Dense",
    "Gather",
    "Outer",
    "Several",
    "Stacked",
    "Use",
    "bytes_of",
    "weigh",
]
