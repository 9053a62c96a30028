"""Rows: the gradients of a set of losses, known well enough for `G = J Jᵀ` and `d = Jᵀ w`, never built as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf, prod

import torch
from torch import Tensor

from mtu_fast._checks import all_finite, check_direction
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._ops.gram import inexact, row_gram
from mtu_fast._ops.gram_schmidt import effective_rank
from mtu_fast._rows import joint
from mtu_fast._rows.block import Block, Shared, join_roles
from mtu_fast._rows.refine import refined, sensitive
from mtu_fast._rows.update import (
    NotFiniteError,
    Update,
    accumulate,
    check_finite,
    check_meant,
    check_method,
)
from mtu_fast._rows.uses import Dense, Gather, Outer, Use
from mtu_fast.methods import FORGET, RETAIN, SUBSPACE, Method, Roles
from mtu_fast.methods.base import dependence_tolerance

SIDES = {RETAIN: "to retain", FORGET: "to forget", SUBSPACE: "kept for the subspace"}
Span = tuple[int, int]  # rows start .. stop - 1 of all
Spans = tuple[Span, ...]


class Rows:
    """R row gradients over the engine's parameters; made by `Engine.rows`, joined by `cat`, used up by `backward`.

    Attributes:
        roles: task, sample, kind and loss of every row, each `[R]`; task-major within a call, calls
            in order.
    """

    def __init__(self, shared: Shared, blocks: Sequence[Block]) -> None:
        self._shared = shared
        self._blocks = list(blocks)
        self.roles = join_roles([block.roles for block in self._blocks])

    def __len__(self) -> int:
        return len(self.roles)

    def __repr__(self) -> str:
        forget = int((self.roles.kind == FORGET).sum())
        return f"Rows({len(self)} rows: {forget} to forget, tasks {', '.join(self.roles.tasks)})"

    def gram(self, per: str = "total") -> Tensor:
        """`G = J Jᵀ`, inner products of all pairs of rows.

        Args:
            per: "total" for all parameters together, "layer" for one matrix a module, "tensor" for
                one a parameter.

        Returns:
            float64 `[R, R]`, or `[L, R, R]` in the order of the engine's parameters.

        Raises:
            ValueError: an unknown `per`.
            RuntimeError: the rows are used up, or a row's gradient is not finite.
        """
        self._check_open()
        groups = self._shared.groups(per)
        gram = self.roles.loss.new_zeros(len(groups), len(self), len(self))
        for g, group in enumerate(groups):
            self._add_grams(gram[g], group)
        self._check_finite(gram)
        return gram[0] if per == "total" else gram

    def names(self, per: str = "layer") -> tuple[str, ...]:
        """The modules ("layer") or parameters ("tensor") that the matrices of `gram(per)` belong to, in their order.

        Raises:
            ValueError: an unknown `per`.
        """
        return tuple(dict.fromkeys(self._shared.keys(per)))

    def combine(self, w: Tensor) -> dict[Tensor, Tensor]:
        """`d = Jᵀ w`.

        Args:
            w: weights `[R]`, or `[L, R]` with L the number of layers or of parameter tensors.

        Returns:
            {parameter: tensor of its shape}; parameters that no row reaches are left out.

        Raises:
            TypeError: weights that are no tensor.
            ValueError: weights of the wrong shape.
            RuntimeError: the rows are used up, or parameters changed since.
        """
        self._check_open()
        spread = self._spread(w)
        narrowed: dict[tuple[int, Span, torch.dtype], Tensor] = {}

        def weights(j: int, span: Span, dtype: torch.dtype) -> Tensor:
            key = (id(spread[j]), span, dtype)  # one conversion for all parameters, not one each
            if key not in narrowed:
                narrowed[key] = spread[j][slice(*span)].to(dtype)
            return narrowed[key]

        found: dict[Tensor, Tensor] = {}
        for j, parameter in enumerate(self._shared.parameters):
            where, uses = self._spans_and_uses(j)
            if uses:
                parts = [
                    weights(j, span, working_dtype(u.tensors[-1]))
                    for span, u in zip(where, uses, strict=True)
                ]
                found[parameter] = (
                    joint.combine(uses, parts).view(parameter.shape).to(parameter.dtype)
                )
        return found

    def push(self, d: Mapping[Tensor, Tensor], per: str = "total") -> Tensor:
        """`J d`, what each row feels of a direction: its loss changes by `ε (J d)_r` where parameters move by ε d.

        Products and sums are float64, in one pass over what the rows hold.

        Args:
            d: {parameter: tensor of its shape}, as `combine` gives it; parameters that are left out
                do not move.
            per: "total", or "layer" or "tensor" for what the rows feel of each block of parameters
                alone.

        Returns:
            float64 `[R]`, or `[L, R]` in the order of `names(per)`.

        Raises:
            TypeError: d is no mapping of parameters to real tensors.
            ValueError: an unknown `per`, something else than the engine's parameters, or not of
                their shape and device.
            RuntimeError: the rows are used up, or parameters changed since.
        """
        self._check_open()
        check_direction(d, self.parameters)
        groups = self._shared.groups(per)
        found = self.roles.loss.new_zeros(len(groups), len(self))
        for g, group in enumerate(groups):
            for j in group:
                moved = d.get(self._shared.parameters[j])
                if moved is not None:
                    for at, use in self._uses(j):
                        found[g, at] += use.push(moved)
        return found[0] if per == "total" else found

    def jacobian(self) -> dict[Tensor, Tensor]:
        """J itself, `[R, *shape]` for each parameter that a row reaches: R times the memory of a gradient.

        Returns:
            {parameter: its rows}; parameters that no row reaches are left out.

        Raises:
            RuntimeError: the rows are used up.
        """
        self._check_open()
        found: dict[Tensor, Tensor] = {}
        for j, parameter in enumerate(self._shared.parameters):
            parts = [(at, use.grounded().rows) for at, use in self._uses(j)]
            if parts:
                found[parameter] = parts[0][1].new_zeros(len(self), *parameter.shape)
            for at, rows in parts:
                found[parameter][at] = rows.view(-1, *parameter.shape)
        return found

    def kept(self, tasks: Iterable[str] | None = None) -> Rows:
        """The rows of these tasks (of all by default) as rows of kind SUBSPACE, which outlive the step.

        They belong to the point where they were taken, stay when parameters move, and are not used
        up by `backward`.

        Raises:
            RuntimeError: the rows are used up.
        """
        self._check_open()
        wanted = set(self.roles.tasks if tasks is None else tasks)
        chosen = [block.keep() for block in self._blocks if wanted.issuperset(block.roles.tasks)]
        return Rows(self._shared, chosen)

    def replaced(self, vectors: Mapping[str, Tensor], task: str, dtype: torch.dtype) -> Rows:
        """Other rows of kind SUBSPACE in the same space, explicit, as `explicit` makes them."""
        return explicit(self._shared, vectors, task, dtype)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """{name: parameter}, the space the rows lie in."""
        return dict(zip(self._shared.names, self._shared.parameters, strict=True))

    @property
    def held(self) -> int:
        """Bytes that the rows keep alive; memory that several of them share counts once."""
        tensors = [t for b in self._blocks for use in b.uses.values() for t in use.tensors]
        tensors += [gram for b in self._blocks for gram in b.grams.values()]
        storages = (t.untyped_storage() for t in tensors)
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def rank(self) -> Tensor:
        """The effective rank of all rows together: those above the dependence tolerance of their dtype; `[]` int64."""
        return effective_rank(self.gram(), dependence_tolerance(self.roles.dtype))

    def backward(self, method: Method | Tensor, *, outside: Tensor | None = None) -> Update:
        """Add `Jᵀ w` to `.grad`, and the weighted losses' gradient to `.grad` of the parameters outside.

        Args:
            method: a method, or weights `[R]`.
            outside: weights `[R]` of the losses for the parameters outside, equal within each
                (kind, task); by default the method's `outside(roles)`, or the weights themselves.

        Returns:
            The weights, the roles and the Gram matrix they were made from.

        Raises:
            TypeError: neither a method nor weights.
            ValueError: rows that the method is not meant for, weights of the wrong shape, or that
                differ within a role for parameters outside.
            RuntimeError: the rows are used up, parameters changed since, or something is not
                finite; `.grad` is untouched on any error.
        """
        check_method(method)
        if not isinstance(method, Tensor):
            check_meant(method, self.roles)
        return self.update(method, outside=outside)

    def update(self, method: Method | Tensor, *, outside: Tensor | None = None) -> Update:
        """`backward` without asking whether the method is meant for such rows; arguments and errors are the same."""
        check_method(method)
        gram, constraint, per = None, None, "total"
        if isinstance(method, Tensor):
            weights, others = method, method
        else:
            if method.needs_gram:
                granularity = getattr(method, "granularity", "global")
                per = "total" if granularity == "global" else granularity
                gram = self.gram(per)
            else:
                self._check_open()
            weights = method(gram, self.roles)
            if gram is not None and inexact(gram.device, self.roles.dtype, self._shared.precision):
                constraint = sensitive(method, gram, self.roles, weights)
            others = method.outside(self.roles) if self._has_outside else weights
        if gram is None or constraint is None:
            found, residual = self.combine(weights), None
        else:
            found, residual = refined(
                self, weights, constraint, gram, self._shared.places(per), per
            )
        heads = self._outside(others if outside is None else outside)
        # Rows whose Gram is finite are finite, and so is what finite weights make of them, but for
        # half precision.
        unsure = (
            g
            for g in found.values()
            if gram is None or constraint is not None or g.dtype.itemsize < 4
        )
        check_finite([weights, *heads.values(), *unsure])
        for parameter, g in heads.items():
            found[parameter] = found[parameter] + g if parameter in found else g
        accumulate(self._as_autograd_has_it(found))
        for block in self._blocks:
            if block.kept:
                continue
            block.spent = True
            block.uses, block.outside = {}, {}
        return Update(weights, self.roles, gram, residual)

    # ---- inside ----------------------------------------------------------------------------------

    def _as_autograd_has_it(self, found: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """With sparse gradients of tables of which every use is a look-up that gives one: SparseAdam takes no other."""
        for j, parameter in enumerate(self._shared.parameters):
            uses = [use for _, use in self._uses(j)]
            looked_up = [
                use.index.flatten() for use in uses if isinstance(use, Gather) and use.sparse
            ]
            if looked_up and len(looked_up) == len(uses) and parameter in found:
                entries, d = torch.cat(looked_up).unique(), found[parameter]
                found[parameter] = torch.sparse_coo_tensor(
                    entries[None], d[entries], d.shape, is_coalesced=True, check_invariants=False
                )
        return found

    @property
    def _has_outside(self) -> bool:
        return any(gradients for block in self._blocks for gradients in block.outside.values())

    def _uses(self, j: int) -> Iterator[tuple[slice, Use]]:
        start = 0
        for block in self._blocks:
            if j in block.uses:
                yield slice(start, start + len(block)), block.uses[j]
            start += len(block)

    def _spans_and_uses(self, j: int) -> tuple[Spans, list[Use]]:
        """The uses of a parameter, and which rows each of them has."""
        found = list(self._uses(j))
        return tuple((at.start, at.stop) for at, _ in found), [use for _, use in found]

    def _add_grams(self, gram: Tensor, group: Sequence[int]) -> None:
        """Add the Gram of a group of parameters; those of small explicit rows go together, those of rank one too."""
        known = self._add_known(gram, group)
        together: dict[Spans, list[list[Use]]] = {}
        rank_one: dict[Spans, list[list[Outer]]] = {}
        for j in group:
            where, uses = self._spans_and_uses(j)
            if not uses:
                continue
            held = known if where[-1][1] == len(self) else 0
            if held and prod(uses[-1].shape) <= joint.SMALL:
                uses = [use.grounded() for use in uses]
            if joint.small(uses):
                together.setdefault(where, []).append(uses)
            elif held:
                self._add(gram, where, joint.gram(uses, self._shared.precision, held))
            elif outers := joint.rank_one(uses):
                rank_one.setdefault(where, []).append(outers)
            else:
                self._add(gram, where, joint.gram(uses, self._shared.precision))
        for where, of_one in rank_one.items():
            part, together[where] = joint.rank_one_gram(of_one, together.get(where, []))
            self._add(gram, where, part)
        for where, many in together.items():
            for rows in joint.side_by_side(many):
                self._add(gram, where, row_gram(rows, known if where[-1][1] == len(self) else 0))

    def _add_known(self, gram: Tensor, group: Sequence[int]) -> int:
        """Add the last block's products with itself where they are known from a step before; its rows, 0 if not.

        They are known of a block that is kept and explicit, from its first step on.
        """
        last, key = self._blocks[-1], tuple(group)
        if (
            len(self._blocks) == 1
            or not last.kept
            or not all(isinstance(use, Dense) for use in last.uses.values())
        ):
            return 0
        if key not in last.grams:
            held = [last.uses[j].grounded().matrix() for j in group if j in last.uses]
            last.grams[key] = sum(
                map(row_gram, ([rows] for rows in held)), gram.new_zeros(len(last), len(last))
            )
        own = slice(len(self) - len(last), len(self))
        gram[own, own] += last.grams[key]
        return len(last)

    @staticmethod
    def _add(gram: Tensor, where: Spans, part: Tensor) -> None:
        if part.shape == gram.shape:
            gram += part
            return
        at = torch.cat([torch.arange(*span, device=gram.device) for span in where])
        gram[at[:, None], at] += part

    def _spread(self, w: Tensor) -> list[Tensor]:
        """Weights `[R]` for every parameter."""
        if not isinstance(w, Tensor):
            raise TypeError(
                f"weights: found {type(w).__name__}, expected a tensor [{len(self)}], one weight per row."
            )
        shapes = {per: len(self._shared.groups(per)) for per in ("layer", "tensor")}
        if (
            w.shape[-1:] != (len(self),)
            or w.dim() > 2
            or (w.dim() == 2 and len(w) not in shapes.values())
        ):
            raise ValueError(
                f"weights: found shape {tuple(w.shape)}, expected [{len(self)}], one per row, or "
                f"[{shapes['layer']}, {len(self)}] per layer, [{shapes['tensor']}, {len(self)}] per tensor."
            )
        w = w.detach().to(self.roles.loss)
        if w.dim() == 1:
            return [w] * len(self._shared.names)
        groups = self._shared.groups("layer" if len(w) == shapes["layer"] else "tensor")
        of = {j: mine for mine, group in zip(w.unbind(), groups, strict=True) for j in group}
        return [of[j] for j in range(len(self._shared.names))]

    def _outside(self, w: Tensor) -> dict[Tensor, Tensor]:
        """`Σ w_group · gradient of the group's summed losses`, over the groups (kind, task) of every block."""
        found: dict[Tensor, Tensor] = {}
        if self._has_outside and (not isinstance(w, Tensor) or w.shape[-1:] != (len(self),)):
            what = f"shape {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(f"outside: found {what}, expected weights [{len(self)}], one per row.")
        start, w, uneven = 0, w.detach(), []
        for block in self._blocks:
            mine = w[..., start : start + len(block.roles)].double()
            start += len(block.roles)
            for kind, gradients in block.outside.items():
                if not gradients:
                    continue
                if mine.dim() != 1:
                    raise ValueError(
                        "weights per layer say nothing of parameters outside; use a method instead."
                    )
                others = block.roles.kind != kind
                weight, least = (
                    mine.masked_fill(others, -inf).amax(),
                    mine.masked_fill(others, inf).amin(),
                )
                uneven.append(weight != least)
                for parameter, g in gradients.items():
                    part = g * weight.to(g.dtype)
                    found[parameter] = found[parameter] + part if parameter in found else part
        # one wait for the device, whatever the groups
        if uneven and bool(torch.stack(uneven).any()):
            check_finite([w])
            raise ValueError(
                "weights differ between rows of one kind and task, but the engine has parameters outside `params`, "
                "whose gradients are known per kind and task only; say what those get by backward(w, outside=weights "
                "[R]) or a method whose outside() is equal within them, or take rows with per='task'."
            )
        return found

    def _check_open(self) -> None:
        if any(block.spent for block in self._blocks):
            raise RuntimeError(
                "rows: backward was called before and used these rows up; call engine.rows again."
            )
        now = self._shared.versions()
        if any(block.changed() for block in self._blocks):
            raise RuntimeError(
                "rows: an activation or input that these rows are made of changed in place since they were taken (an "
                "input buffer that is filled again?); use a fresh tensor per batch, or call backward first."
            )
        if any(block.versions[0] != now and not block.kept for block in self._blocks):
            raise RuntimeError(
                "rows: parameters changed in place since these rows were taken (an optimizer step?), so their "
                "gradients belong to another point; take the rows again, and step only after backward."
            )

    def _check_finite(self, gram: Tensor) -> None:
        if not all_finite([gram]):
            bad = (~torch.isfinite(gram.diagonal(dim1=-2, dim2=-1))).any(0).nonzero().flatten()
            at: dict[str, list[tuple[str, int]]] = {}
            for r in bad[:8]:
                sample = self.roles.tasks[self.roles.task[r]], int(self.roles.sample[r])
                at.setdefault(SIDES[int(self.roles.kind[r])], []).append(sample)
            raise NotFiniteError(
                f"rows: the gradient of (task, sample) {', '.join(f'{side} {which}' for side, which in at.items())} is "
                "not finite although its loss is (an overflow in half precision, a square root or norm at zero, zero "
                "times infinity?); .grad is untouched. Guard it in the loss, (x.square().sum() + eps).sqrt() say, "
                "rescale the loss, or leave these rows out by `present`."
            )


def explicit(shared: Shared, vectors: Mapping[str, Tensor], task: str, dtype: torch.dtype) -> Rows:
    """K vectors, `[K, *shape]` for each parameter by name, as rows of kind SUBSPACE that outlive a step.

    Args:
        shared: the parameters whose space they lie in.
        vectors: {name of a parameter: its part of every vector}; zero where a parameter is left
            out.
        task: the task they are said to be of.
        dtype: the precision in which they were computed, whatever they are held in.

    Returns:
        K rows.
    """
    uses: dict[int, Use] = {
        shared.names.index(name): Dense(tuple(v.shape[1:]), v) for name, v in vectors.items()
    }
    device = shared.parameters[0].device
    nobody = torch.full((max((use.count for use in uses.values()), default=0),), -1, device=device)
    loss = torch.zeros(len(nobody), dtype=torch.float64, device=device)
    roles = Roles(
        torch.zeros_like(nobody), nobody, torch.full_like(nobody, SUBSPACE), loss, (task,), dtype
    )
    return Rows(shared, [replace(Block.of(roles, uses, {}, shared), kept=True)])


def cat(*rows: Rows) -> Rows:
    """All rows of several calls, in order; Gram matrices hold the cross terms.

    The calls may come from different forwards and be of unequal size, but from one engine and one
    point in parameter space. Tasks are matched by name.

    Raises:
        TypeError: something else than rows.
        ValueError: nothing given, or rows of different engines.
        RuntimeError: rows that are used up, or taken before and after a change of the parameters.
    """
    if not rows:
        raise ValueError("cat: found no rows, expected at least one.")
    for each in rows:
        if not isinstance(each, Rows):
            raise TypeError(
                f"cat: found {type(each).__name__}, expected Rows as engine.rows returns them."
            )
        if each._shared is not rows[0]._shared:
            raise ValueError(
                "cat: found rows of different engines, expected one engine: its parameters are the space."
            )
        each._check_open()
    return Rows(rows[0]._shared, [block for each in rows for block in each._blocks])
