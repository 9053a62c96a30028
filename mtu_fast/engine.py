"""The engine: from unreduced losses to rows, and from rows to `.grad`. It strings the steps together, no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast._arguments import check_dtype, check_flag, check_one_of, check_whole, names
from mtu_fast._checks.losses import Losses
from mtu_fast._checks.masks import Mask
from mtu_fast._checks.renamed import warn_renamed
from mtu_fast._distributed.crew import crew_of
from mtu_fast._distributed.same import SameTaking
from mtu_fast._distributed.taking import JoinedTaking
from mtu_fast._distributed.wrappers import (
    UNSET,
    Group,
    check_nodes,
    check_wire,
    taking_of,
    unwrapped,
)
from mtu_fast._graph.explain import Explanation
from mtu_fast._graph.own import OwnTaking
from mtu_fast._kept import step
from mtu_fast._ops._library import announce
from mtu_fast._rows.autocast import no_autocast
from mtu_fast._rows.batch import Batch
from mtu_fast._rows.explicit import check_vectors, explicit
from mtu_fast._rows.space import Space
from mtu_fast._rows.task_rows import TaskRows
from mtu_fast._rows.update import Update, check_method
from mtu_fast._rows.written import Written
from mtu_fast._uncollected import uncollected
from mtu_fast.accumulation import Accumulation
from mtu_fast.memory import Memory, check_memory
from mtu_fast.methods import Method
from mtu_fast.rows import Rows
from mtu_fast.subspace import Subspace, check_subspace


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
            model, or the mesh of an FSDP2 or tensor parallel one; None for the rows of this rank
            only.

        wire: torch.bfloat16 halves the bytes of float32 that ranks send for the Gram, which is then
            that of rows rounded to 8 bits: G errs by some 2⁻⁸ |J_r| |J_s|, a constraint by as much
            as `update.residual` says. By default what travels is exact.

    Parameters in the graph that are not the model's (another module, a learned loss weight) are
    left alone: pass one module that holds them all.

    Raises:
        TypeError: `model` is no module, `params` are no tensors or complex ones, `memory_budget` is
            not a whole number, or `group` is no process group.
        ValueError: no parameter requires grad, one of `params` is not the model's, `memory_budget`
            is negative, `precision` is unknown, the wrapper is not supported, or this process is not one
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
        wire: torch.dtype | None = None,
    ) -> None:
        announce()
        check_whole("memory_budget", memory_budget, least=0)
        check_wire(wire)
        model, ranks, units, slicer = unwrapped(model, group)
        self._space = Space(model, params, precision, None if ranks is None else ranks.slices)
        check_names = None if ranks is None else check_nodes
        self._own = OwnTaking(self._space, memory_budget, check_names, units, slicer)
        self._taking: OwnTaking | JoinedTaking | SameTaking = self._own
        if ranks is not None:
            # asked anew each time: parameters may be frozen or freed between steps
            ranks.outside = lambda: list(self._space.outside.values())
            ranks.wire = wire
            self._space.ledger.at_once = True  # ranks wait for one another anyway
            self._taking = taking_of(self._own, ranks, units, slicer)
        self._crew = crew_of(ranks, batches_differ=slicer is None)
        self._accumulation = Accumulation()
        self._written = Written()

    @uncollected
    def backward(
        self,
        losses: Losses,
        method: Method | Tensor,
        *,
        forget: Mask = None,
        present: Mapping[str, Tensor] | None = None,
        subspace: Subspace | None = None,
        memory: Memory | None = None,
    ) -> Update:
        """`.grad += Jᵀ w`, w = method(J Jᵀ): the line that stands for `loss.mean().backward()`.

        Args:
            losses: unreduced, one value per sample: `[N]`, or `{task: [N]}`.
            method: a method, or weights `[R]`.
            forget: the rows to forget: True, a mask `[N]` (full-task), or `{task: [N]}`
                (partial-task); boolean, or kinds as `Levels.left` gives them.
            present: `{task: [N]}`, False where a sample has no label for the task and so gives no
                row.
            subspace: rows kept from earlier steps, which this step's rows join and then fill.
            memory: the same for retain rows kept as further constraints.

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
        check_memory(method, memory)
        if isinstance(method, Tensor):
            return self.rows(losses, forget=forget, present=present).backward(method)
        absent = method.allows_absent and subspace is None and memory is None
        batch = self._batch(losses, forget, present, absent)
        # weights that do not depend on G: one backward of Σ w · loss, no rows
        if not method.needs_gram and subspace is None and memory is None:
            return self._taking.weighted_backward(batch, method)
        # the graph is used up here; from now on there are rows only
        parts = self._taking.rows_for(batch, method)
        rows = Rows(self._space.shared, parts, self._taking.ranks)
        return self._step(rows, method, subspace, memory)

    @uncollected
    def accumulate(
        self,
        losses: Losses,
        method: Method | Tensor,
        *,
        sync: bool,
        forget: Mask = None,
        present: Mapping[str, Tensor] | None = None,
        subspace: Subspace | None = None,
        memory: Memory | None = None,
    ) -> Update | None:
        """`.grad += Jᵀ w`, J the rows of all micro-batches since the last step: `backward` of one large batch.

            for i, batch in enumerate(loader):
                last = (i + 1) % 4 == 0
                engine.accumulate(losses(model, batch), method, forget=batch.forget, sync=last)
                if last:
                    optimizer.step(), optimizer.zero_grad()

        Over ranks: with as many micro-batches on every rank.

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
            memory: likewise.

        Returns:
            The update of the step; None where `sync` is False.

        Raises:
            TypeError: arguments of the wrong kind.
            ValueError: losses or masks that are not as described, a method whose rows are of
                another kind than those held, or ranks of which some step and others do not.
            RuntimeError: as for `backward`, or parameters changed since the first micro-batch.
                `.grad` is then untouched; an error in a step leaves nothing held.
        """
        check_method(method)
        check_subspace(method, subspace)
        check_memory(method, memory)
        check_flag("sync", sync)
        per = "sample" if isinstance(method, Tensor) else method.per
        self._accumulation.check(per, self._space.shared, sync, self._taking.ranks)
        if sync and self._accumulation.is_empty:
            given: dict[str, Any] = {"forget": forget, "present": present}
            return self.backward(losses, method, **given, subspace=subspace, memory=memory)
        try:
            self._hold(self._batch(losses, forget, present), per)
            if not sync:
                return None
            rows = self._accumulation.take()
        finally:
            # from a step on nothing is held, also where it fails
            if sync:
                self.discard()
        if isinstance(method, Tensor):
            return rows.backward(method)
        return self._step(rows, method, subspace, memory)

    def _finish(self, method: Method, subspace: Subspace | None) -> Update | None:
        """The step of the micro-batches held, without one more; None where none is."""
        if self._accumulation.is_empty:
            return None
        return self._step(self._accumulation.take(), method, subspace, None)

    def _hold(self, batch: Callable[[], Batch], per: str) -> None:
        """Take the rows of a micro-batch, and hold them until the step."""
        parts = self._taking.rows(batch, per)
        # asked only now: taking rows follows the model, whose parameters may be others by then
        shared, ranks = self._space.shared, self._taking.ranks
        if per == "sample":
            self._accumulation.add_samples(Rows(shared, parts, ranks), shared)
        else:
            self._accumulation.add_means(parts, shared, ranks)

    @property
    def model(self) -> nn.Module:
        """The module that the engine was made of."""
        return self._space.model

    @property
    def is_joined(self) -> bool:
        """Whether rows are those of all ranks of a process group."""
        return self._taking.ranks is not None

    @property
    def parameters(self) -> dict[str, Tensor]:
        """{name: parameter}, what the method works on."""
        return self._space.shared.named()

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

    def waiting(self) -> AbstractContextManager[None]:
        """A context in which a GPU is waited for, so that what is wrong with a step is raised in the step itself.

            with engine.waiting():
                engine.backward(losses, method, forget=mask)

        On the CPU it always is. Rows taken outside the context are not looked at again.
        """
        return self._space.ledger.waiting()

    def discard(self) -> None:
        """Let go of the micro-batches held, where no step is to follow: the last, incomplete ones of an epoch."""
        self._accumulation.clear()

    @property
    def accumulated_bytes(self) -> int:
        """Bytes that the rows of micro-batches hold until the step."""
        return self._accumulation.nbytes

    @uncollected
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
        check_one_of("rows: per", per, ("sample", "task"))
        parts = self._taking.rows(self._batch(losses, forget, present), per)
        return Rows(self._space.shared, parts, self._taking.ranks)

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
            TypeError: vectors that are no mapping of tensors, a task that can be no name, or a dtype
                that is none of floating numbers.
            ValueError: an unknown name, or a shape that is not [K, *shape of the parameter] with
                one K for all.
        """
        shared = self._space.shared
        names("subspace_rows: task", [task])
        if dtype is not None:
            check_dtype("subspace_rows: dtype", dtype)

        def given() -> TaskRows:
            check_vectors(vectors, shared)
            return explicit(shared, vectors, task, dtype or shared.parameters[0].dtype)

        return Rows(shared, self._taking.explicit(given), self._taking.ranks)

    @property
    def ranks(self) -> int:
        """Processes whose rows are joined, those of `group=`; 1 for this one alone."""
        return self._taking.size

    def explain(self) -> Explanation:
        """How each parameter's rows were obtained in the last call of `rows`: uses, route, cost, and why if slow.

        Raises:
            RuntimeError: no rows were taken yet.
        """
        explanation = self._own.plans.explanation
        if explanation is None:
            raise RuntimeError(
                "explain: found no rows yet, expected a call of engine.rows or engine.backward first."
            )
        return explanation

    def kept(
        self, vectors: Mapping[str, Tensor], task: str, dtype: torch.dtype | None = None
    ) -> Rows:
        """`subspace_rows`; deprecated."""
        warn_renamed("engine", "kept", "subspace_rows")
        return self.subspace_rows(vectors, task, dtype)

    def _batch(
        self,
        losses: Losses,
        forget: Mask,
        present: Mapping[str, Tensor] | None,
        allows_absent: bool = False,
    ) -> Callable[[], Batch]:
        """What makes the batch of a call; what earlier calls are still to raise is raised first."""
        ledger = self._space.ledger
        # what a GPU has found since is raised before new work begins
        ledger.settle()
        flags = ledger.flags(self._space.shared.parameters[0].device)
        return partial(Batch.of, losses, forget, present, flags, allows_absent)

    def _step(
        self, rows: Rows, method: Method, subspace: Subspace | None, memory: Memory | None
    ) -> Update:
        """The update of rows, with a look at what `.grad` held before."""
        shared = self._space.shared.parameters
        # slices of parameters are written by their owners, not here
        seen = () if self._space.shared.owners else shared
        self._written.check(method, seen)
        with no_autocast(shared[0].device):  # of a basis, too
            update = step(rows, method, subspace, memory)
        self._written.note(method, seen)
        return update
