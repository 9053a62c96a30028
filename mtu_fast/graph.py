"""The recorded autograd graph of the losses: the only file that touches nodes.

`_input_metadata`, `_raw_saved_*` and calling a node are semi-private in torch; whatever depends on them is here.

A node is *pure* when each element of its output gradient belongs to one row (`rules/rowmap.py` finds out). Row
gradients are taken where the graph leaves its pure part towards a parameter, at a *site*: by a rule if there is one,
else by one local vjp a row. Where rows mix in a node (batch statistics, a weight computed from others), the site is
the pure node above it, and row gradients are pushed down through the mixed region one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtu_fast.rules import RULES, RowMap, digits, infer
from mtu_fast.uses import Chain, Dense, Outer, Use

Grads = tuple[Tensor | None, ...]
Edge = tuple[int, int]  # (node, which of its outputs)
Seed = Callable[[int], Iterable[tuple[Edge, Tensor]]]  # row -> gradients to push down

# Views and casts: adjoints that keep inner products, so a Gram may be taken before them.
ISOMETRIES = frozenset(
    f"{name}Backward{i}"
    for name in (
        "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Alias", "ToCopy",
        "Clone", "Slice", "Select", "Split", "SplitWithSizes", "UnsafeSplit", "Unbind", "Flip", "Roll",
    )
    for i in (0, 1, 2, 3)
)  # fmt: skip

# Nodes whose map from rows to elements follows from shapes and integer arguments alone. A graph with any other node
# (indexing, routing, custom functions) may move rows differently next time: its row maps are made anew every time.
_PLAIN = """
Abs Acos Add Addbmm Addcdiv Addcmul Addmm Addmv Alias Amax Amin Angle Asin Atan Atan2 AvgPool2D AvgPool3D Baddbmm
BinaryCrossEntropy BinaryCrossEntropyWithLogits Bmm Cat Celu Ceil Clamp ClampMax ClampMin Clone ConstantPadNd
Convolution Cos Cosh CudnnBatchNorm CudnnConvolution Cumprod Cumsum Diagonal Div Dot Elu Embedding Erf Erfc Exp
Expand Expm1 Flip Floor Fmod FusedRmsNorm Gelu Glu HardSigmoid Hardsigmoid Hardswish Hardtanh Huber HuberLoss
L1Loss LeakyRelu Lerp LinalgVectorNorm Log Log10 Log1P Log2 LogSigmoid LogSoftmax Logaddexp Logsumexp MSELoss
MaskedFill MaxPool2DWithIndices MaxPool3DWithIndices Maximum Mean Minimum Mish Mm MseLoss Mul Mv NativeBatchNorm
NativeDropout NativeGroupNorm NativeLayerNorm Neg NllLoss NllLoss2D NllLossNd Norm Permute PixelShuffle
PixelUnshuffle Pow PreluKernel Prelu Prod Reciprocal ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu Repeat
ReplicationPad1D ReplicationPad2D ReplicationPad3D ReshapeAlias Roll Rsqrt Rsub
ScaledDotProductEfficientAttention ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu Select
SelectBackward Sgn Sigmoid Silu Sin Sinh Slice SmoothL1Loss Softmax Softplus Split SplitWithSizes Sqrt Squeeze
Stack Std Sub Sum T Tan Tanh Threshold ToCopy Transpose Tril Triu Unbind Unfold UnsafeSplit UnsafeView Unsqueeze
UpsampleBicubic2D UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D
UpsampleTrilinear3D Var View WeightNormInterface Where AdaptiveAvgPool2D AdaptiveAvgPool3D
"""
PLAIN = frozenset(_PLAIN.split())

ACCUMULATE = "torch::autograd::AccumulateGrad"


@dataclass(frozen=True)
class Site:
    """Where row gradients of a parameter are taken: the input `slot` of the pure node `node`.

    chain: the (node, output) pairs of the isometries down to parameter `parameter`; None where the way down is not
    one, and row gradients are pushed through the mixed region below.
    """

    node: int
    slot: int
    chain: tuple[Edge, ...] | None
    parameter: int | None


@dataclass
class Plan:
    """What is known of a graph signature: its sites and, per task, the row maps of their nodes' outputs.

    local: sites (node, slot) that no rule took. late: whether some site was visited after the pass. Both are found
    during the first pass.
    """

    sites: dict[int, list[Site]]
    terminal: frozenset[int]
    maps: list[dict[int, tuple[RowMap | None, ...]]]
    local: set[tuple[int, int]] = field(default_factory=set)
    late: bool = False

    @property
    def keep(self) -> bool:
        """Whether the graph must outlive a pass: for late sites, or to start again if a map proves stale."""
        return self.late or any(m is not None and m.gaps for of in self.maps for ms in of.values() for m in ms)

    def expected(self, task: int) -> Counter[int]:
        """How many uses of each parameter a pass of the task will visit."""
        reached = (site for i in self.maps[task] for site in self.sites[i] if not self.is_local(site))
        return Counter(site.parameter for site in reached if site.parameter is not None)

    def is_local(self, site: Site) -> bool:
        """Whether the site's rows come from local vjps or are pushed through a mixed region."""
        return site.chain is None or (site.node, site.slot) in self.local


class StaleMap(Exception):
    """A cached row map does not fit this batch: rows reach positions they did not reach before."""


class Graph:
    """The graph below the losses of one forward, in topological order (losses first)."""

    def __init__(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        self.losses = losses
        self.nodes: list[Any] = _topological([loss.grad_fn for loss in losses])
        index = {node: i for i, node in enumerate(self.nodes)}
        self.next: list[tuple[Edge | None, ...]] = [
            tuple(None if m is None else (index[m], k) for m, k in node.next_functions) for node in self.nodes
        ]
        which = {id(p): j for j, p in enumerate(parameters)}
        self.leaves = [node.variable for node in self.nodes if node.name() == ACCUMULATE]
        self.leaf: dict[int, int] = {
            i: which[id(node.variable)]
            for i, node in enumerate(self.nodes)
            if node.name() == ACCUMULATE and id(node.variable) in which
        }
        self.reaches = [False] * len(self.nodes)
        for i in reversed(range(len(self.nodes))):
            self.reaches[i] = i in self.leaf or any(e is not None and self.reaches[e[0]] for e in self.next[i])

    @property
    def dtype(self) -> torch.dtype:
        """The lowest precision that the recorded graph computes in."""
        dtypes = {m.dtype for node in self.nodes for m in node._input_metadata if m.dtype.is_floating_point}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def signature(self) -> tuple[object, bool]:
        """Structure, shapes and integer arguments as a key, and whether row maps may be kept under it (see PLAIN)."""
        live = [i for i, node in enumerate(self.nodes) if self.reaches[i] and node.name() != ACCUMULATE]
        if any(self.nodes[i].name().partition("Backward")[0] not in PLAIN for i in live):
            return tuple(self.nodes[i].name() for i in live), False
        shapes = [tuple((tuple(m.shape), m.dtype) for m in self.nodes[i]._input_metadata) for i in live]
        parts = [
            (i, self.nodes[i].name(), shape, self.next[i], _integers(self.nodes[i]))
            for i, shape in zip(live, shapes, strict=True)
        ]
        return (len(self.losses), tuple(self.leaf.items()), tuple(parts)), True

    # ---- discovery --------------------------------------------------------------------------------------------------

    def discover(self, limit: int, older: Plan | None = None) -> Plan:
        """Find the pure part, the sites and the row maps.

        Args:
            limit: bytes of gradients to hold at a time, about.
            older: a plan of the same signature, whose maps fill the gaps of the new ones.
        """
        maps: list[dict[int, tuple[RowMap | None, ...]]] = [{} for _ in self.losses]
        mixed = set()
        for chunk in self._chunks(limit):
            for task, loss in enumerate(self.losses):
                found = self._row_maps(loss, chunk)
                mixed |= {i for i, m in found.items() if m is None}
                maps[task].update({i: m for i, m in found.items() if m is not None})
        sites = self._sites(mixed)
        kept = [{i: m for i, m in of_task.items() if i in sites} for of_task in maps]
        if older is not None:
            for mine, theirs in zip(kept, older.maps, strict=True):
                mine.update({i: _filled(m, theirs[i]) for i, m in mine.items() if i in theirs})
        return Plan(sites, self._terminals(sites), kept)

    def _chunks(self, limit: int) -> Iterable[list[int]]:
        chunk: list[int] = []
        total = 0
        for i, node in enumerate(self.nodes):
            if not self.reaches[i] or i in self.leaf:
                continue
            size = sum(m.dtype.itemsize * torch.Size(m.shape).numel() for m in node._input_metadata)
            if chunk and total + size > limit:
                yield chunk
                chunk, total = [], 0
            chunk.append(i)
            total += size
        yield chunk

    def _row_maps(self, loss: Tensor, nodes: Sequence[int]) -> dict[int, tuple[RowMap | None, ...] | None]:
        """The row maps of the outputs of nodes that the loss reaches; None for a node where rows mix."""
        half = any(m.dtype == torch.float16 for node in self.nodes for m in node._input_metadata)
        base = 8 if half else 32  # powers up to 2**31 leave float32 and bfloat16 ample range; float16 has little
        widths = [len(self.nodes[i]._input_metadata) for i in nodes]
        edges = [GradientEdge(self.nodes[i], k) for i, width in zip(nodes, widths, strict=True) for k in range(width)]
        plain = iter(self._backward(loss, edges, torch.ones_like(loss)))
        numbers = digits(len(loss), base, loss.device)
        scaled = [iter(self._backward(loss, edges, torch.exp2(d).to(loss.dtype))) for d in numbers]
        found: dict[int, tuple[RowMap | None, ...] | None] = {}
        for i, width in zip(nodes, widths, strict=True):
            grads = [(next(plain), [next(s) for s in scaled]) for _ in range(width)]
            reached = [b is not None and b.numel() > 0 for b, _ in grads]
            maps = [
                infer(b, [s for s in others if s is not None], base, len(loss)) if b is not None and b.numel() else None
                for b, others in grads
            ]
            if any(r and m is None for r, m in zip(reached, maps, strict=True)):
                found[i] = None
            elif any(reached):
                found[i] = tuple(maps)
        return found

    def _backward(self, loss: Tensor, edges: Sequence[GradientEdge], weights: Tensor, keep: bool = True) -> Grads:
        return torch.autograd.grad([loss], edges, [weights], retain_graph=keep, allow_unused=True)

    def _sites(self, mixed: set[int]) -> dict[int, list[Site]]:
        sites: dict[int, list[Site]] = {}
        for i in range(len(self.nodes)):
            if i in mixed or i in self.leaf or not self.reaches[i]:
                continue
            for slot, edge in enumerate(self.next[i]):
                if edge is not None and self.reaches[edge[0]] and (edge[0] in mixed or edge[0] in self.leaf):
                    sites.setdefault(i, []).append(Site(i, slot, *self._chain(edge)))
        return sites

    def _chain(self, edge: Edge) -> tuple[tuple[Edge, ...] | None, int | None]:
        """The isometries from an edge down to a parameter, or (None, None)."""
        chain: list[Edge] = []
        while edge[0] not in self.leaf:
            onward = [e for e in self.next[edge[0]] if e is not None]
            if self.nodes[edge[0]].name() not in ISOMETRIES or len(onward) != 1:
                return None, None
            chain.append(edge)
            edge = onward[0]
        return tuple(chain), self.leaf[edge[0]]

    def _terminals(self, sites: dict[int, list[Site]]) -> frozenset[int]:
        """Sites below which there is no other: the nodes a pass need not run, only reach."""
        below = [False] * len(self.nodes)
        for i in reversed(range(len(self.nodes))):
            below[i] = any(e is not None and (e[0] in sites or below[e[0]]) for e in self.next[i])
        return frozenset(i for i in sites if not below[i])

    # ---- one pass of one task ---------------------------------------------------------------------------------------

    def stream(self, plan: Plan, task: int, visit: Callable[[int, Use], None], keep: bool) -> None:
        """One data-gradient pass: `visit(parameter, use)` for every site, as the pass reaches it.

        Weight gradients are not computed. Sites without a rule, and those whose saved tensors are recomputed on
        reading (checkpointing), are visited after the pass, which must then keep the graph.
        """
        maps = plan.maps[task]
        late: list[tuple[Site, Grads]] = []

        def reached(i: int, grads: Grads) -> None:
            for row_map, b in zip(maps[i], grads, strict=True):
                if b is not None and b.numel() and (row_map is None or not row_map.fits(b)):
                    raise StaleMap
            recomputed = self._recomputed(i)
            for site in plan.sites[i]:
                use = None if recomputed or plan.is_local(site) else self._use(site, maps[i], grads)
                if use is None:
                    late.append((site, grads))
                else:
                    visit(*self._through_chain(site, use))

        self._run(plan, task, reached, keep)
        plan.late = plan.late or bool(late)
        seeds: list[Seed] = []
        local: dict[int, tuple[set[int], Grads]] = {}
        for site, grads in late:
            use = None if (site.node, site.slot) in plan.local else self._use(site, maps[site.node], grads)
            if use is None:
                plan.local.add((site.node, site.slot))
                local.setdefault(site.node, (set(), grads))[0].add(site.slot)
            elif site.chain is None:
                seeds.append(self._rows_of(site, use))
            else:
                visit(*self._through_chain(site, use))
        seeds += [self._local_vjp(i, slots, maps[i], grads) for i, (slots, grads) in local.items()]
        for parameter, rows in self._push_rows(seeds, len(self.losses[task])).items():
            visit(parameter, Dense(tuple(rows.shape[1:]), rows))

    def _run(self, plan: Plan, task: int, reached: Callable[[int, Grads], None], keep: bool) -> None:
        """Run one backward pass; `reached` is called in the prehooks of running nodes, after it for terminal ones."""
        wanted = plan.maps[task]
        ends = [i for i in wanted if i in plan.terminal]
        edges = [GradientEdge(self.nodes[i], k) for i in ends for k in range(len(wanted[i]))]
        handles = [
            self.nodes[i].register_prehook(partial(reached, i)) for i in wanted if i not in plan.terminal
        ]
        loss = self.losses[task]
        try:
            captured = iter(self._backward(loss, edges, torch.ones_like(loss), keep))
        finally:
            for handle in handles:
                handle.remove()
        for i in ends:
            reached(i, tuple(next(captured) for _ in wanted[i]))

    def _recomputed(self, i: int) -> bool:
        """Whether reading a saved tensor of the node runs a part of the forward again (checkpointing)."""
        node = self.nodes[i]
        saved = (s for name in _raw_names(node) for s in _as_tuple(getattr(node, name)))
        return any(s.unpack_hook is not None for s in saved)

    def _use(self, site: Site, maps: Sequence[RowMap | None], grads: Grads) -> Use | None:
        """What the rule of the site's node makes of its output gradient."""
        function, b = RULES.get(self.nodes[site.node].name()), grads[0]
        if function is None or maps[0] is None or b is None or any(g is not None for g in grads[1:]):
            return None
        return function(self.nodes[site.node], site.slot, self._input_shape(site), b, maps[0])

    def _input_shape(self, site: Site) -> tuple[int, ...]:
        return tuple(self._metadata(self._below(site)).shape)

    def _below(self, site: Site) -> Edge:
        edge = self.next[site.node][site.slot]
        if edge is None:
            raise RuntimeError(f"{self.nodes[site.node].name()} has no graph at input {site.slot}")
        return edge

    def _metadata(self, edge: Edge) -> Any:
        return self.nodes[edge[0]]._input_metadata[edge[1]]

    def _through_chain(self, site: Site, use: Use) -> tuple[int, Use]:
        """The use with the map from its space to the parameter's."""
        if site.chain is None or site.parameter is None:
            raise RuntimeError("a use was visited at a site without a direct way to its parameter")
        names = [self.nodes[i].name() for i, _ in site.chain]
        if isinstance(use, Outer) and names in (["TBackward0"], ["TransposeBackward0"]):
            return site.parameter, use.transposed()
        if site.chain:
            key = tuple((self.nodes[i].name(), k, _integers(self.nodes[i])) for i, k in site.chain)
            use = replace(use, chain=Chain(key, partial(self._apply_chain, site.chain)))
        return site.parameter, use

    def _apply_chain(self, chain: Sequence[Edge], g: Tensor) -> Tensor:
        for edge in chain:
            ((_, _, g),) = self._vjp(edge[0], {edge[1]: g})
        return g

    def notes(self, plan: Plan) -> dict[int, list[str]]:
        """For each parameter, how its rows are obtained at each site."""
        notes: dict[int, list[str]] = {}
        for i, sites in plan.sites.items():
            for site in sites:
                name, below = self.nodes[i].name(), self._below(site)
                if not plan.is_local(site) and site.parameter is not None:
                    way = "rule" + (", tensors recomputed (checkpointing)" if self._recomputed(i) else "")
                    notes.setdefault(site.parameter, []).append(f"{name}: {way}")
                    continue
                region = self._region(below)
                through = [self.nodes[k].name() for k in region if k not in self.leaf]
                ruled = (site.node, site.slot) not in plan.local
                way = "rows by rule" if ruled else "one local vjp a row"
                way += f", pushed through {', '.join(dict.fromkeys(through))}, where rows mix" if through else ""
                for k in region & set(self.leaf):
                    notes.setdefault(self.leaf[k], []).append(f"{name}: {way}")
        return notes

    def _region(self, edge: Edge) -> set[int]:
        """Nodes at and below an edge that reach a parameter."""
        region, stack = set(), [edge[0]]
        while stack:
            i = stack.pop()
            if i not in region and self.reaches[i]:
                region.add(i)
                stack += [e[0] for e in self.next[i] if e is not None]
        return region

    # ---- the generic path -------------------------------------------------------------------------------------------

    def _vjp(self, i: int, grads: dict[int, Tensor]) -> list[tuple[int, Edge, Tensor]]:
        """The local vjp of one node: gradients of some outputs in, (slot, edge, gradient) of its inputs out."""
        node = self.nodes[i]
        given = [grads.get(k) for k in range(len(node._input_metadata))]
        if _is_python(node):
            # A Python node returns one gradient per argument of its forward, and wants no undefined gradients.
            full = [_zeros(m) if g is None else g for g, m in zip(given, node._input_metadata, strict=True)]
            returned = zip(_as_tuple(node.apply(*full)), node.needs_input_grad, strict=False)
            results = iter([g for g, needed in returned if needed])
            inputs = [None if edge is None else next(results, None) for edge in self.next[i]]
        else:
            inputs = list(_as_tuple(node(*given)))
        return [
            (slot, edge, self._conform(edge, g))
            for slot, (edge, g) in enumerate(zip(self.next[i], inputs, strict=True))
            if edge is not None and g is not None and self.reaches[edge[0]]
        ]

    def _conform(self, edge: Edge, g: Tensor) -> Tensor:
        """What the engine does between two nodes: undo broadcasting, sparsity and promotion."""
        meta = self._metadata(edge)
        return densified(g).sum_to_size(meta.shape).to(meta.dtype)

    def _local_vjp(self, i: int, slots: set[int], maps: Sequence[RowMap | None], grads: Grads) -> Seed:
        """Row by row: the node's vjp of its output gradient with every other row masked."""

        def seed(row: int) -> list[tuple[Edge, Tensor]]:
            outputs = enumerate(zip(grads, maps, strict=True))
            masked = {k: m.only(b, row) for k, (b, m) in outputs if b is not None and m is not None}
            return [(edge, g) for slot, edge, g in self._vjp(i, masked) if slot in slots]

        return seed

    def _rows_of(self, site: Site, use: Use) -> Seed:
        """Row by row: what the rule gives, on its way into a mixed region."""
        rows, below = use.dense().rows, self._below(site)
        return lambda row: [(below, rows[row].to(self._metadata(below).dtype))]

    def _push_rows(self, seeds: Sequence[Seed], count: int) -> dict[int, Tensor]:
        """Push seeds down to the parameters one row at a time; rows `[N, *shape]` per parameter reached."""
        rows: dict[int, Tensor] = {}
        for row in range(count if seeds else 0):
            arrived: dict[int, dict[int, Tensor]] = {}
            for seed in seeds:
                for edge, g in seed(row):
                    _accumulate(arrived, edge, g)
            while arrived:
                i = min(arrived)
                grads = arrived.pop(i)
                if i not in self.leaf:
                    for _, edge, g in self._vjp(i, grads):
                        _accumulate(arrived, edge, g)
                    continue
                parameter, g = self.leaf[i], grads[0]
                if parameter not in rows:
                    rows[parameter] = g.new_zeros(count, *g.shape)
                rows[parameter][row] += g
        return rows


def densified(g: Tensor) -> Tensor:
    """A gradient as a dense tensor; that of an embedding may be sparse."""
    return g.to_dense() if g.is_sparse else g


def _filled(maps: tuple[RowMap | None, ...], older: tuple[RowMap | None, ...]) -> tuple[RowMap | None, ...]:
    pairs = zip(maps, older, strict=True)
    return tuple(m if m is None or o is None or not m.gaps else m.filled(o) for m, o in pairs)


def _accumulate(arrived: dict[int, dict[int, Tensor]], edge: Edge, g: Tensor) -> None:
    at = arrived.setdefault(edge[0], {})
    at[edge[1]] = at[edge[1]] + g if edge[1] in at else g


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _zeros(meta: Any) -> Tensor:
    return torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)


def _topological(roots: Sequence[Any]) -> list[Any]:
    """Nodes below the roots, each before those it feeds gradients to."""
    order: list[Any] = []
    seen = set()
    for root in reversed(roots):
        stack = [(root, iter(root.next_functions))]
        if root in seen:
            continue
        seen.add(root)
        while stack:
            node, following = stack[-1]
            for child, _ in following:
                if child is not None and child not in seen:
                    seen.add(child)
                    stack.append((child, iter(child.next_functions)))
                    break
            else:
                order.append(node)
                stack.pop()
    return order[::-1]


@cache
def _attributes(kind: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a node type's saved tensors (raw), and of its other saved arguments."""
    names = dir(kind)
    raw = tuple(n for n in names if n.startswith("_raw_saved_"))
    plain = tuple(n for n in names if n.startswith("_saved_") and f"_raw{n}" not in raw)
    return raw, plain


def _is_python(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _raw_names(node: Any) -> tuple[str, ...]:
    return () if _is_python(node) else _attributes(type(node))[0]


def _integers(node: Any) -> tuple[object, ...]:
    """Integer arguments of a node: dimensions, starts, sizes. Floats (a loss weight, a step size) may change freely."""
    found: list[object] = []
    for name in _attributes(type(node))[1]:
        value = getattr(node, name)
        if isinstance(value, (int, str)) or (isinstance(value, tuple) and all(isinstance(v, int) for v in value)):
            found.append((name, value))
    return tuple(found)
