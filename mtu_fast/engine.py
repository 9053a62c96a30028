"""The engine: from unreduced losses to rows, and from rows to `.grad`. It strings the steps together, no more."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast._arguments import check_whole
from mtu_fast._checks.losses import Losses
from mtu_fast._checks.masks import Mask
from mtu_fast._distributed.alike import check_alike, check_dense
from mtu_fast._distributed.joining import in_order_of, joined, own_rows
from mtu_fast._distributed.means import Role, summed_means, totals
from mtu_fast._distributed.ranks import Ranks, attempt, ranks_of
from mtu_fast._distributed.sums import summed
from mtu_fast._distributed.wrappers import UNSET, Group, check_nodes, unwrapped
from mtu_fast._graph.autograd_errors import translated
from mtu_fast._graph.explain import Explanation
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.plans import Plans
from mtu_fast._graph.statistics import used_up
from mtu_fast._graph.taking import (
    Counts,
    mean_rows,
    no_gradients,
    no_rows,
    sample_roles,
    sample_rows,
    weighted_gradients,
)
from mtu_fast._ops._library import announce
from mtu_fast._rows.batch import Batch
from mtu_fast._rows.grad import accumulate, check_finite
from mtu_fast._rows.space import Space
from mtu_fast._rows.task_rows import TaskRows, all_roles, join_roles
from mtu_fast._rows.update import Update, check_method
from mtu_fast._rows.written import Written
from mtu_fast.accumulation import Accumulation
from mtu_fast.methods import Method
from mtu_fast.rows import Rows, explicit
from mtu_fast.subspace import Subspace, check_subspace

COMPILED = "CompiledFunction"  # the name of the node that torch.compile makes


class Engine:
    """Interference-free gradients of one model: nothing on the model is touched, all is read from the recorded graph.

    Args:
        model: any torch module.
        params: the shared parameters that the method works on; every parameter that requires grad
            by default. All others get the weighted gradient of the losses (see `Method.outside`).
        memory_budget: bytes (at least 0) of row gradients that a call of `rows` may keep beyond the
            smaller of rows and factors of each layer, where that costs less than a Gram of factors
            and a second weight gradient in `vjp`.
        precision: how exact the products under a Gram's float64 sums must be, in the words of
            `torch.set_float32_matmul_precision`: "highest", "high" (TF32×3) or "medium" (TF32). A
            GPU may make use of it; on the CPU products of rows are float64 throughout.
        group: the process group whose ranks hold a copy of the model each: rows are those of all
            ranks, and `.grad` is the sum over them. By default that of a `DistributedDataParallel`
            model; None for the rows of this rank only.

    Parameters in the graph that are not the model's (another module, a learned loss weight) are
    left alone: pass one module that holds them all.

    Raises:
        TypeError: `model` is no module, `params` are no tensors or complex ones, `memory_budget` is
            not a whole number, or `group` is no process group.
        ValueError: no parameter requires grad, one of `params` is not the model's, `memory_budget`
            is negative, `precision` is unknown, the model is sharded, or this process is not one
            of the group.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Tensor] | None = None,
        *,
        memory_budget: int = 0,
        precision: str = "highest",
        group: Group = UNSET,
    ) -> None:
        announce()
        check_whole("memory_budget", memory_budget, least=0)
        model, processes = unwrapped(model, group)
        self._space = Space(model, params, precision)
        self._ranks: Ranks | None = None
        self._alike = False
        if processes is not None:
            self._ranks = ranks_of(processes, self._space)
        self._budget = memory_budget
        self._plans = Plans(self._space.shared, memory_budget)
        self._accumulation = Accumulation()
        self._written = Written()
        self._is_said = False

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
            losses: unreduced, one value per sample: `[N]`, or `{task: [N]}`.
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
        if not method.needs_gram:
            batch = partial(Batch.of, losses, forget, present)
            if self._ranks is None:
                return self._weighted_backward(batch(), method)
            return self._joined_weighted_backward(self._ranks, batch, method)
        rows = self.rows(losses, forget=forget, per=method.per, present=present)
        return self._step(rows, method, subspace)

    def accumulate(
        self,
        losses: Losses,
        method: Method | Tensor,
        *,
        sync: bool,
        forget: Mask = None,
        present: Mapping[str, Tensor] | None = None,
        subspace: Subspace | None = None,
    ) -> Update | None:
        """`.grad += Jᵀ w`, J the rows of all micro-batches since the last step: `backward` of one large batch.

            for i, batch in enumerate(loader):
                last = (i + 1) % 4 == 0
                engine.accumulate(losses(model, batch), method, forget=batch.forget, sync=last)
                if last:
                    optimizer.step(), optimizer.zero_grad()

        Memory: rows per sample are held until the step, which is what `Rows.nbytes` says for each
        micro-batch: the smaller of rows and factors (a layer's inputs and output gradients), so
        about the activations of one large batch without what only its forward needs. Rows per task
        take one gradient a (task, role) in all. The graph of each micro-batch is freed at once.

        Args:
            losses: of this micro-batch, as for `backward`.
            method: a method, the same for all micro-batches of a step; or, at the step, weights of
                all rows `[R]`, micro-batch after micro-batch.
            sync: whether this micro-batch is the last of the step.
            forget: as for `backward`.
            present: as for `backward`.
            subspace: as for `backward`; looked at in the step only.

        Returns:
            The update of the step; None where `sync` is False.

        Raises:
            TypeError: arguments of the wrong kind.
            ValueError: losses or masks that are not as described, or a method whose rows are of
                another kind than those held.
            RuntimeError: as for `backward`, or parameters changed since the first micro-batch.
                `.grad` is then untouched; an error in a step leaves nothing held.
        """
        check_method(method)
        check_subspace(method, subspace)
        if self._ranks is not None:
            raise RuntimeError(
                "accumulate: found an engine with group=, expected one of a single process; join rows of micro-batches "
                "by mtu.cat(*rows)."
            )
        per = "sample" if isinstance(method, Tensor) else method.per
        self._accumulation.check(per, self._space.shared)
        batch = Batch.of(losses, forget, present)
        parts = self._take(batch, per)
        self._accumulation.add(batch, parts, per, self._space.shared)
        if not sync:
            return None
        rows = self._accumulation.take()
        if isinstance(method, Tensor):
            return rows.backward(method)
        return self._step(rows, method, subspace)

    @property
    def model(self) -> nn.Module:
        """The module that the engine was made of."""
        return self._space.model

    @property
    def parameters(self) -> dict[str, Tensor]:
        """{name: parameter}, what the method works on."""
        shared = self._space.shared
        return dict(zip(shared.names, shared.parameters, strict=True))

    @staticmethod
    def eager() -> AbstractContextManager[Any]:
        """A context in which compiled modules run as they are written, so that the graph of their forward can be read.

            with engine.eager():
                losses = loss(model(x), y)
            engine.backward(losses, method, forget=mask)

        What `torch.compile` made is one node to autograd: rows through it are exact, but each takes a
        backward of the whole. In this context the same module's forward is recorded op by op, and
        nothing is compiled anew; outside it, in evaluation say, what was compiled is used as before.
        """
        return torch.compiler.set_stance("force_eager")

    def discard(self) -> None:
        """Let go of the micro-batches held, where no step is to follow: the last, incomplete ones of an epoch."""
        self._accumulation.clear()

    @property
    def accumulated_bytes(self) -> int:
        """Bytes that the rows of micro-batches hold until the step."""
        return self._accumulation.nbytes

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
            losses: unreduced, one value per sample: `[N]`, or `{task: [N]}`.
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
        if per not in ("sample", "task"):
            raise ValueError(f"rows: per is {per!r}, expected 'sample' or 'task'.")
        batch = partial(Batch.of, losses, forget, present)
        if self._ranks is None:
            parts = self._take(batch(), per)
        elif per == "task":
            parts = self._take_means(self._ranks, batch)
        else:
            parts = self._take_samples(self._ranks, batch)
        return Rows(self._space.shared, parts, self._ranks)

    def subspace_rows(
        self, vectors: Mapping[str, Tensor], task: str, dtype: torch.dtype | None = None
    ) -> Rows:
        """K explicit vectors, such as a basis from elsewhere, as rows of kind SUBSPACE: `mtu.cat` joins them to others.

        Args:
            vectors: {name of a parameter: `[K, *shape]`}; zero where a parameter is left out.
            task: the task they are said to be of.
            dtype: the precision in which they were computed; that of the parameters by default.

        With `group=`, each rank gives vectors of its own, as many as it has.

        Raises:
            ValueError: an unknown name, or a shape that is not [K, *shape of the parameter] with
                one K for all.
        """
        if self._ranks is None:
            return self._given_rows(vectors, task, dtype)
        given = attempt(lambda: self._given_rows(vectors, task, dtype)._parts)
        parts = joined(self._ranks, given, self._space, "engine.subspace_rows")
        return Rows(self._space.shared, parts, self._ranks)

    @property
    def ranks(self) -> int:
        """Processes whose rows are joined, those of `group=`; 1 for this one alone."""
        return 1 if self._ranks is None else self._ranks.size

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

    def kept(
        self, vectors: Mapping[str, Tensor], task: str, dtype: torch.dtype | None = None
    ) -> Rows:
        """`subspace_rows`; deprecated."""
        warnings.warn(
            "engine.kept is called engine.subspace_rows now; the old name goes in the next version.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.subspace_rows(vectors, task, dtype)

    # ---- inside ----------------------------------------------------------------------------------

    def _step(self, rows: Rows, method: Method, subspace: Subspace | None) -> Update:
        """The update of rows, with a look at what `.grad` held before."""
        shared = self._space.shared.parameters
        self._written.check(method, shared)
        with torch.autocast(shared[0].device.type, enabled=False):  # of a basis, too
            update = rows.backward(method) if subspace is None else subspace.step(rows, method)
        self._written.note(method, shared)
        return update

    def _take(self, batch: Batch, per: str, counts: Counts | None = None) -> list[TaskRows]:
        """The rows of a batch; its graph is used up."""
        if batch.is_empty:
            return no_rows(batch, self._space.shared)
        with torch.no_grad(), torch.autocast(batch.device.type, enabled=False), translated():
            graph = self._graph(batch)
            if self._ranks is not None:
                check_nodes(graph.names)
            with used_up(graph, self._space.model):
                if per == "task":
                    return mean_rows(batch, graph, self._space, counts)
                self._look_for_compiled(graph)
                return sample_rows(batch, graph, self._plans, self._space)

    def _given_rows(
        self, vectors: Mapping[str, Tensor], task: str, dtype: torch.dtype | None
    ) -> Rows:
        shared = self._space.shared
        _check_vectors(vectors, dict(zip(shared.names, shared.parameters, strict=True)))
        return explicit(shared, vectors, task, dtype or shared.parameters[0].dtype)

    def _weighted_backward(self, batch: Batch, method: Method) -> Update:
        """A method that needs no Gram: one ordinary backward of the weighted losses."""
        self._follow_all()
        at = batch.labels()
        roles = join_roles(sample_roles(batch, at))
        weights, outside = method(None, roles), method.outside(roles)
        found = self._weighted(batch, at, weights, outside)
        check_finite(found.values())
        accumulate(found)
        return Update(weights, roles, None)

    def _weighted(
        self, batch: Batch, at: Mapping[str, Tensor], weights: Tensor, outside: Tensor
    ) -> dict[Tensor, Tensor]:
        """The gradients of the weighted losses."""
        with torch.no_grad(), translated():
            found = weighted_gradients(batch, at, weights, outside, self._space)
        if not batch.is_empty and found.keys().isdisjoint(self._space.shared.parameters):
            self._graph(batch)  # raises if the losses reach none of them
        return found

    # ---- with other ranks ------------------------------------------------------------------------

    def _check_alike(self, ranks: Ranks) -> None:
        """Before the first step, all ranks hold the same numbers."""
        if not self._alike:
            check_alike(ranks, self._space.model.parameters())
            self._alike = True

    def _take_samples(self, ranks: Ranks, batch: Callable[[], Batch]) -> list[TaskRows]:
        """This rank's part of the sample rows of all ranks' batches."""

        def take() -> list[TaskRows]:
            self._follow_all()
            found = self._take(batch(), "sample")
            check_dense(found, self._space.shared)
            return found

        self._check_alike(ranks)
        return joined(ranks, attempt(take), self._space)

    def _take_means(self, ranks: Ranks, batch: Callable[[], Batch]) -> list[TaskRows]:
        """The mean rows of all ranks' batches together."""
        batches: list[Batch] = []

        def count() -> dict[Role, int]:
            self._follow_all()
            batches.append(batch())
            return batches[0].counts()

        self._check_alike(ranks)
        counts = totals(ranks, attempt(count), self._space)
        if not counts:
            nothing = attempt(lambda: no_rows(batches[0], self._space.shared))
            return joined(ranks, nothing, self._space)
        taken = attempt(lambda: self._take(batches[0], "task", counts))
        return summed_means(ranks, taken, list(counts), self._space)

    def _joined_weighted_backward(
        self, ranks: Ranks, batch: Callable[[], Batch], method: Method
    ) -> Update:
        """A method that needs no Gram: one backward of this rank's losses under weights of all ranks' rows."""
        batches: list[Batch] = []

        def look() -> list[TaskRows]:
            self._follow_all()
            batches.append(batch())
            return no_gradients(batches[0], self._space.shared)

        self._check_alike(ranks)
        parts = joined(ranks, attempt(look), self._space)
        roles, rows = all_roles(parts), own_rows(parts, ranks)
        weights, outside = method(None, roles), method.outside(roles)

        def own() -> dict[Tensor, Tensor]:
            (batch,) = batches
            at = batch.labels()
            mine = [in_order_of(batch.losses, parts, w[rows]) for w in (weights, outside)]
            found = self._weighted(batch, at, *mine)
            check_finite(found.values())
            return found

        parameters = [*self._space.shared.parameters, *ranks.outside()]
        found = summed(ranks, "engine.backward", own, parameters)
        check_finite(found.values())
        accumulate(found)
        return Update(weights, roles, None)

    def _graph(self, batch: Batch) -> Graph:
        """The graph of the losses, which reaches a parameter.

        Raises:
            ValueError: it does not.
        """
        losses = list(batch.losses.values())
        graph = Graph(losses, self._space.shared.parameters)
        if self._follow(graph.leaves):
            graph = Graph(losses, self._space.shared.parameters)
        if not graph.leaf:
            some = ", ".join(self._space.shared.names[:3])
            raise ValueError(
                f"losses: found none of the engine's parameters ({some}, ...) in their graph, expected at least one. "
                "Are they of another model than the engine's (a copy made since?), or were the parameters frozen after "
                "the engine was made?"
            )
        return graph

    def _follow_all(self) -> bool:
        return self._follow(p for p in self._space.model.parameters() if p.requires_grad)

    def _look_for_compiled(self, graph: Graph) -> None:
        """Say once that a compiled module is slow to take rows of."""
        if self._is_said or not any(name.startswith(COMPILED) for name in graph.names):
            return
        self._is_said = True
        warnings.warn(
            "losses: found a module run by torch.compile in their graph, one node to autograd: rows are exact, but "
            "each takes a backward of the whole. Run the forward under `with engine.eager():`, which records what "
            "the same module does op by op. This is said once an engine.",
            UserWarning,
            stacklevel=5,
        )

    def _follow(self, leaves: Iterable[Tensor]) -> bool:
        """Whether the model has other parameters than before; plans are then made anew."""
        moved = self._space.follow(leaves)
        if moved:
            self._plans = Plans(self._space.shared, self._budget)
        return moved


def _check_vectors(vectors: Any, parameters: Mapping[str, Tensor]) -> None:
    if not isinstance(vectors, Mapping):
        found = type(vectors).__name__
        raise TypeError(
            f"subspace_rows: vectors: found {found}, expected {{name: tensor [K, *shape]}}."
        )
    counts = set()
    for name, v in vectors.items():
        if not isinstance(v, Tensor):
            found = type(v).__name__
            raise TypeError(f"subspace_rows: vectors[{name!r}] is {found}, expected a tensor.")
        shape = None
        if name in parameters:
            shape = parameters[name].shape
        counts.add(len(v) if v.dim() else -1)
        if v.dim() == 0 or v.shape[1:] != shape or len(counts) > 1:
            expected = "a shared parameter"
            if shape is not None:
                expected = f"[K, *{tuple(shape)}], one K for all"
            raise ValueError(
                f"subspace_rows: vectors[{name!r}] has shape {tuple(v.shape)}, expected {expected}."
            )
