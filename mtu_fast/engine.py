"""The engine: from unreduced losses to rows, and from rows to `.grad`. It strings the steps together, no more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mtu_fast._checks import Losses, Mask, Who, kinds, named_losses, presence, who_gives
from mtu_fast._graph.explain import Explanation
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.nodes import densified
from mtu_fast._graph.plans import Plans
from mtu_fast._graph.statistics import used_up
from mtu_fast._rows.block import Block, Shared, join_roles
from mtu_fast._rows.space import Space
from mtu_fast._rows.update import Update, accumulate, check_finite, check_method
from mtu_fast._rows.uses import Dense, Use
from mtu_fast.methods import Method, Roles
from mtu_fast.rows import Rows, explicit
from mtu_fast.subspace import Subspace, check_subspace


class Engine:
    """Interference-free gradients of one model: nothing on the model is touched, all is read from the recorded graph.

    Args:
        model: any torch module.
        params: the shared parameters that the method works on; every parameter that requires grad
            by default. All others get the weighted gradient of the losses (see `Method.outside`).
        memory_budget: bytes (at least 0) of row gradients that a call of `rows` may keep beyond the
            smaller of rows and factors of each layer, where that costs less than a Gram of factors
            and a second weight gradient in `combine`.
        precision: how exact the products under a Gram's float64 sums must be, in the words of
            `torch.set_float32_matmul_precision`: "highest", "high" (TF32×3) or "medium" (TF32). A
            GPU may make use of it; on the CPU products of rows are float64 throughout.

    Parameters in the graph that are not the model's (another module, a learned loss weight) are
    left alone: pass one module that holds them all.

    Raises:
        TypeError: `model` is no module, `params` are no tensors or complex ones, or `memory_budget`
            is not a whole number.
        ValueError: no parameter requires grad, one of `params` is not the model's, `memory_budget`
            is negative, or `precision` is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Tensor] | None = None,
        *,
        memory_budget: int = 0,
        precision: str = "highest",
    ) -> None:
        if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
            raise TypeError(
                f"memory_budget: found {memory_budget!r}, expected a whole number of bytes, 2**30 say."
            )
        if memory_budget < 0:
            raise ValueError(f"memory_budget: found {memory_budget}, expected at least 0 bytes.")
        self._space = Space(model, params, precision)
        self._budget = memory_budget
        self._plans = Plans(self._shared, memory_budget)

    @property
    def _shared(self) -> Shared:
        return self._space.shared

    def backward(
        self,
        losses: Losses,
        method: Method | Tensor,
        *,
        forget: Mask = None,
        present: Mapping[str, Tensor] | None = None,
        subspace: Subspace | None = None,
    ) -> Update:
        """`.grad += Jᵀ w`, w = method(J Jᵀ): the line that stands for `loss.mean().backward()`.

        Args:
            losses: unreduced, one value a sample: `[N]`, or `{task: [N]}`.
            method: a method, or weights `[R]`.
            forget: the rows to forget: True, a mask `[N]` (full-task), or `{task: [N]}`
                (partial-task).
            present: `{task: [N]}`, False where a sample has no label for the task and so gives no
                row.
            subspace: rows kept from earlier steps, which this step's rows join and then fill.

        Returns:
            The weights, roles and Gram matrix of this update.

        Raises:
            TypeError: arguments of the wrong kind.
            ValueError: losses or masks that are not as described.
            RuntimeError: the graph is gone or out of date, or a gradient is not finite; `.grad` is
                then untouched.
        """
        check_method(method)
        check_subspace(method, subspace)
        if isinstance(method, Tensor):
            return self.rows(losses, forget=forget, present=present).backward(method)
        if method.needs_gram:
            rows = self.rows(losses, forget=forget, per=method.per, present=present)
            return rows.backward(method) if subspace is None else subspace.step(rows, method)
        return self._weighted_backward(losses, method, forget, present)

    def rows(
        self,
        losses: Losses,
        *,
        forget: Mask = None,
        per: str = "sample",
        present: Mapping[str, Tensor] | None = None,
    ) -> Rows:
        """The row gradients of the losses; the graph is used up, as by `backward()`.

        Args:
            losses: unreduced, one value a sample: `[N]`, or `{task: [N]}`.
            forget: the rows to forget: True, a mask `[N]` (full-task), or `{task: [N]}`
                (partial-task).
            per: "sample" for a row per (task, sample), "task" for the mean row of each (task,
                role).
            present: `{task: [N]}`, False where a sample has no label for the task and so gives no
                row.

        Raises:
            TypeError: arguments of the wrong kind.
            ValueError: losses or masks that are not as described.
            RuntimeError: the graph is gone or out of date, or does not give the gradients that
                autograd gives.
        """
        named = named_losses(losses)
        kind, there = kinds(forget, named), presence(present, named)
        if per not in ("sample", "task"):
            raise ValueError(f"rows: per is {per!r}, expected 'sample' or 'task'.")
        device = next(iter(named.values())).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False), _teaching():
            make = self._sample_blocks if per == "sample" else self._task_blocks
            if all(loss.numel() for loss in named.values()):
                graph = self._graph(named)
                with used_up(graph, self._space.model):
                    blocks = make(graph, named, kind, there)
            else:
                blocks = [self._empty_block(task, loss) for task, loss in named.items()]
            # the shared parameters as they are after a look at the graph
            return Rows(self._shared, blocks)

    def kept(
        self, vectors: Mapping[str, Tensor], task: str, dtype: torch.dtype | None = None
    ) -> Rows:
        """K explicit vectors, a basis from elsewhere say, as rows of kind SUBSPACE: `mtu.cat` joins them to others.

        Args:
            vectors: {name of a parameter: `[K, *shape]`}; zero where a parameter is left out.
            task: the task they are said to be of.
            dtype: the precision in which they were computed; that of the parameters by default.

        Raises:
            ValueError: an unknown name, or a shape that is not [K, *shape of the parameter] with
                one K for all.
        """
        shapes = dict(
            zip(self._shared.names, (p.shape for p in self._shared.parameters), strict=True)
        )
        counts = {len(v) for v in vectors.values() if v.dim()}
        for name, v in vectors.items():
            if name not in shapes or v.shape[1:] != shapes[name] or v.dim() == 0 or len(counts) > 1:
                expected = (
                    f"[K, *{tuple(shapes[name])}], one K for all"
                    if name in shapes
                    else "a shared parameter"
                )
                raise ValueError(
                    f"kept: vectors[{name!r}] has shape {tuple(v.shape)}, expected {expected}."
                )
        return explicit(self._shared, vectors, task, dtype or self._shared.parameters[0].dtype)

    def explain(self) -> Explanation:
        """How each parameter's rows were obtained in the last call of `rows`: uses, route, cost, and why if slow.

        Raises:
            RuntimeError: no rows were taken yet.
        """
        if self._plans.explanation is None:
            raise RuntimeError(
                "explain: found no rows yet, expected a call of engine.rows or engine.backward first."
            )
        return self._plans.explanation

    # ---- rows per sample -------------------------------------------------------------------------

    def _sample_blocks(
        self,
        graph: Graph,
        losses: dict[str, Tensor],
        kind: dict[str, Tensor],
        present: dict[str, Tensor],
    ) -> list[Block]:
        self._refuse_hooks(graph)
        who = who_gives(kind, present)
        outside = {
            task: self._outside_gradients(graph, loss, who[task]) for task, loss in losses.items()
        }
        kept = [
            None if who[task].all else mask.nonzero().flatten() for task, mask in present.items()
        ]
        blocks = []
        for (task, loss), rows, uses in zip(
            losses.items(), kept, self._plans.uses(graph, kept), strict=True
        ):
            roles = _roles(
                task, torch.arange(len(loss), device=loss.device), kind[task], loss, graph.dtype
            )
            roles = roles if rows is None else _select(roles, rows)
            blocks.append(Block.of(roles, uses, outside[task], self._shared))
        return blocks

    def _refuse_hooks(self, graph: Graph) -> None:
        """No shared parameter that the losses reach has a hook on its gradient.

        Raises:
            RuntimeError: one has.
        """
        for j in graph.leaf.values():
            if self._shared.parameters[j]._backward_hooks:
                raise RuntimeError(
                    f"rows: {self._shared.names[j]} has a hook on its gradient (register_hook), which would see rows "
                    "that are never built; .grad is untouched. Remove it and change .grad after backward, or what the "
                    "rows make by rows.combine; per='task' obeys it."
                )

    # ---- rows per task ---------------------------------------------------------------------------

    def _task_blocks(
        self,
        graph: Graph,
        losses: dict[str, Tensor],
        kind: dict[str, Tensor],
        present: dict[str, Tensor],
    ) -> list[Block]:
        """One ordinary backward per (task, kind): the mean row, exact on any graph."""
        who, blocks = who_gives(kind, present), []
        for task, loss in losses.items():
            for which, chosen in who[task].of.items():
                weights = chosen.to(loss.dtype) / chosen.sum()
                inside, outside = self._gradients(graph, loss, weights)
                uses: dict[int, Use] = {
                    j: Dense(tuple(g.shape), g[None]) for j, g in inside.items()
                }
                mean = (weights.double() @ loss.double())[None]
                role = torch.full((1,), which, device=loss.device)
                roles = _roles(task, torch.full_like(role, -1), role, mean, graph.dtype)
                blocks.append(Block.of(roles, uses, {which: outside}, self._shared))
        return blocks or [self._empty_block(task, loss[:0]) for task, loss in losses.items()]

    def _gradients(
        self, graph: Graph, loss: Tensor, weights: Tensor, inside: bool = True
    ) -> tuple[dict[int, Tensor], dict[Tensor, Tensor]]:
        """Gradients of the weighted loss by the shared parameters (by index) and by those outside."""
        shared = (
            dict(sorted((j, self._shared.parameters[j]) for j in graph.leaf.values()))
            if inside
            else {}
        )
        outside = [p for p in graph.leaves if id(p) in self._space.outside]
        wanted = [*shared.values(), *outside]
        if not wanted:
            return {}, {}
        grads = torch.autograd.grad([loss], wanted, [weights], retain_graph=True, allow_unused=True)
        return (
            {j: densified(g) for j, g in zip(shared, grads, strict=False) if g is not None},
            {p: g for p, g in zip(outside, grads[len(shared) :], strict=True) if g is not None},
        )

    # ---- what both have in common ----------------------------------------------------------------

    def _graph(self, losses: Mapping[str, Tensor]) -> Graph:
        """The graph of the losses, which reaches a parameter.

        Raises:
            ValueError: it does not.
        """
        graph = Graph(list(losses.values()), self._shared.parameters)
        if self._follow(graph.leaves):
            graph = Graph(list(losses.values()), self._shared.parameters)
        if not graph.leaf:
            raise ValueError(
                f"losses: found none of the engine's parameters ({', '.join(self._shared.names[:3])}, ...) in their "
                "graph, expected at least one. Are they of another model than the engine's (a copy made since?), or "
                "were the parameters frozen after the engine was made?"
            )
        return graph

    def _follow(self, leaves: Iterable[Tensor]) -> bool:
        """Whether the model has other parameters than before; plans are then made anew."""
        moved = self._space.follow(leaves)
        if moved:
            self._plans = Plans(self._shared, self._budget)
        return moved

    def _outside_gradients(
        self, graph: Graph, loss: Tensor, who: Who
    ) -> dict[int, dict[Tensor, Tensor]]:
        return {
            which: self._gradients(graph, loss, chosen.to(loss.dtype), inside=False)[1]
            for which, chosen in who.of.items()
        }

    def _empty_block(self, task: str, loss: Tensor) -> Block:
        nothing = torch.zeros(0, dtype=torch.int64, device=loss.device)
        return Block.of(_roles(task, nothing, nothing, loss, loss.dtype), {}, {}, self._shared)

    def _weighted_backward(
        self, losses: Losses, method: Method, forget: Mask, present: Mapping[str, Tensor] | None
    ) -> Update:
        """A method that needs no Gram: one ordinary backward of the weighted losses."""
        named = named_losses(losses)
        kind, there = kinds(forget, named), presence(present, named)
        self._follow(p for p in self._space.model.parameters() if p.requires_grad)
        parts = {
            task: _roles(
                task, torch.arange(len(loss), device=loss.device), kind[task], loss, loss.dtype
            )
            for task, loss in named.items()
        }
        kept = {task: mask.nonzero().flatten() for task, mask in there.items()}
        roles = join_roles([_select(parts[task], kept[task]) for task in named])
        weights, outside = method(None, roles), method.outside(roles)
        shared = self._shared.parameters
        with torch.no_grad(), _teaching():
            if torch.equal(weights, outside):
                found = _vjp(
                    named, kept, weights, [*shared, *self._space.outside.values()], keep=False
                )
            else:
                found = _vjp(named, kept, outside, list(self._space.outside.values()), keep=True)
                found |= _vjp(named, kept, weights, shared, keep=False)
        if any(loss.numel() for loss in named.values()) and found.keys().isdisjoint(shared):
            self._graph(named)  # says so if the losses reach none
        check_finite(found.values())
        accumulate(found)
        return Update(weights, roles, None)


def _vjp(
    losses: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    w: Tensor,
    parameters: Sequence[Tensor],
    keep: bool,
) -> dict[Tensor, Tensor]:
    """Gradients of `Σ w · loss` over the kept samples, by parameter."""
    live = {task: loss for task, loss in losses.items() if loss.numel()}
    parameters = [p for p in parameters if p.requires_grad]
    if not live or not parameters:
        return {}
    pieces = w.split([len(kept[task]) for task in live])
    outputs = [
        loss.new_zeros(len(loss)).index_copy(0, kept[task], piece.to(loss))
        for (task, loss), piece in zip(live.items(), pieces, strict=True)
    ]
    found = torch.autograd.grad(
        list(live.values()), parameters, outputs, retain_graph=keep, allow_unused=True
    )
    return {p: g for p, g in zip(parameters, found, strict=True) if g is not None}


def _roles(task: str, sample: Tensor, kind: Tensor, loss: Tensor, dtype: torch.dtype) -> Roles:
    values = loss.detach().to(torch.float64, copy=True)  # the loss may be written to later
    return Roles(torch.zeros_like(sample), sample, kind, values, (task,), dtype)


def _select(roles: Roles, at: Tensor) -> Roles:
    return Roles(
        roles.task[at], roles.sample[at], roles.kind[at], roles.loss[at], roles.tasks, roles.dtype
    )


@contextmanager
def _teaching() -> Iterator[None]:
    """Say what autograd's errors mean here."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "second time" in text:
            raise RuntimeError(
                "the graph of these losses was used up by an earlier rows or backward; run the forward again (for "
                "several methods on one forward, take the rows once and use rows.gram and rows.combine)."
            ) from error
        if "modified by an inplace operation" in text:
            raise RuntimeError(
                "a parameter or activation was changed in place after the forward (an optimizer step before the "
                "backward?), so the recorded graph no longer fits; take the rows before anything is changed."
            ) from error
        if "donated buffer" in text:
            raise RuntimeError(
                "a compiled region frees its buffers in the first backward, and its rows need one a row; set "
                "torch._functorch.config.donated_buffer = False for the whole run, or leave the region uncompiled."
            ) from error
        if "torch.utils.checkpoint" in text and "reentrant" in text:
            raise RuntimeError(
                "reentrant checkpointing hides the graph below it; use checkpoint(..., use_reentrant=False)."
            ) from error
        raise
