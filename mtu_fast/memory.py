"""Memory: retain rows kept from earlier steps, which an update must not move along."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mtu_fast._arguments import (
    check_flag,
    check_function,
    check_mapping,
    check_one_of,
    check_whole,
    held_in,
    names,
)
from mtu_fast._checks.states import check_counts
from mtu_fast._keepable import Kept
from mtu_fast._kept import Form, best, orthonormal, step
from mtu_fast._rows.block import Block, chosen
from mtu_fast._rows.update import Update
from mtu_fast.methods import FORGET, RETAIN, Method, mean_weights
from mtu_fast.rows import Rows, cat

Keep = Literal["newest", "conflicting"]
TIMES = 4  # rows held for each retain row of a step, by default


@dataclass(frozen=True)
class Held:
    """What a memory holds between two steps; made anew by a step that succeeds, never changed in place.

    Attributes:
        size: rows to hold; None until the first step says it.
        age: steps since a batch was taken in.
        block: the rows, oldest first.
        rows: they as rows of kind MEMORY, or the basis that stands for them.
        smallest: whether they are held in the form of the fewest bytes, whatever their products cost.
    """

    size: int | None
    age: int = 0
    block: Kept | None = None
    rows: Rows | None = None
    smallest: bool = False

    def __len__(self) -> int:
        return 0 if self.block is None else len(self.block)


class Memory:
    """M = {g_1 … g_K}: per-sample gradients of retained samples, kept from earlier steps as rows of kind MEMORY.

    `engine.backward(losses, method, forget=mask, memory=memory)` joins them to the step's rows, as
    constraints of a method that `takes_memory`, and keeps the step's own retain rows for later.
    They are gradients of the point where they were taken, of each parameter in the form that takes
    fewer bytes and no more time: explicit, or as the activations and output gradients whose products
    they are. Of a linear layer A x B at S positions a row takes 4 min(A B, S (A + B)) bytes in
    float32, and a product of two of them A B multiply-adds, or A + B of one position. Explicit are
    parameters of up to 8192 numbers, those used behind views of them, and where
    products of factors would cost more. A step makes (R + T) K products more, R its own retain rows
    and T the tasks to be forgotten, of the parameters that both rows reach: those of kept rows with
    one another are known from the steps that took them in.

    Args:
        size: rows to hold, K; by default four times the retain rows of the first step.
        every: a step's rows are taken in at every so many steps.
        tasks: the tasks whose rows are kept; by default all.
        keep: which rows stay where there are more than `size`: the "newest", or those that
            forgetting would harm most, of largest ⟨g_i, f⟩ / |g_i| with f the mean forget gradient
            of the step ("conflicting").
        per_task: whether `size` is divided evenly among the tasks that have rows.
        budget: bytes that the rows may take as they are held, those of all ranks together. Where K
            rows would take more, they are held in the form of the fewest bytes, whatever a step with
            them takes, and K is lower where that is not enough.
        basis: hold an orthonormal basis Q of the rows too, made anew whenever rows are taken in,
            and let its vectors be the constraints.
        rank: the most dimensions of the basis.
        energy: share of Σσ² of the rows that the basis must hold.
        dtype: of what is held; by default that of the parameters, and of the step's activations.
            torch.bfloat16 takes half the memory of float32; the step's own rows stay exact
            constraints.

    Attributes:
        held: what is held, a value; a loop of your own that undoes steps assigns the one from
            before them.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: one out of range, or rank or energy without `basis`.
    """

    def __init__(
        self,
        size: int | None = None,
        *,
        every: int = 2,
        tasks: Iterable[str] | None = None,
        keep: Keep = "newest",
        per_task: bool = False,
        budget: int | None = None,
        basis: bool = False,
        rank: int | None = None,
        energy: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._tasks = None if tasks is None else names("Memory: tasks", tasks)
        self._form = Form("Memory", size, every, basis, rank, energy, dtype)
        check_one_of("Memory: keep", keep, get_args(Keep))
        check_flag("Memory: per_task", per_task)
        if budget is not None:
            check_whole("Memory: budget", budget, least=1)
        if keep == "conflicting" and basis:
            raise ValueError(
                "Memory: found keep='conflicting' with basis=True, expected keep='newest': what rows feel of a step is "
                "not known where a basis stands for them."
            )
        self._keep, self._per_task, self._budget = keep, per_task, budget
        self.held = Held(size)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments, as plain values: what a checkpoint compares."""
        chosen = {"tasks": self._tasks, "keep": self._keep, "per_task": self._per_task}
        form = asdict(self._form) | {"dtype": str(self._form.dtype)}
        return form | chosen | {"budget": self._budget}

    def __len__(self) -> int:
        """Rows held, whether or not a basis stands for them."""
        return len(self.held)

    def __bool__(self) -> bool:
        return True  # an empty one is one, too

    def __repr__(self) -> str:
        return f"Memory({len(self)} of {self.size or '?'} rows, {self.memory / 2**20:.1f} MiB)"

    @property
    def size(self) -> int | None:
        """Rows to hold; None until the first step says it."""
        return self.held.size

    @property
    def memory(self) -> int:
        """Bytes held."""
        held = self.held
        if held.block is None or held.rows is None:
            return 0
        return held.rows.nbytes + (held.block.nbytes if self._form.basis else 0)

    def join(self, rows: Rows) -> Rows:
        """The rows of a step with those held behind them.

        Raises:
            ValueError: rows of another engine.
        """
        return rows if self.held.rows is None else cat(rows, self.held.rows)

    def step(self, rows: Rows, method: Method) -> Update:
        """`join(rows).backward(method)`, then retain rows of the step are kept; on an error, of both, nothing is."""
        return step(rows, method, self)

    def look(self, rows: Rows) -> Callable[[Update], Held]:
        """Take the step's retain rows, if it is time; what is to be held once its update is known.

        Raises:
            TypeError: something else than rows.
            ValueError: rows per task, a basis of rows of several ranks, unknown names in `tasks`, or a budget
                below the bytes of one row.
            RuntimeError: the rows are used up.
        """
        if not isinstance(rows, Rows):
            raise TypeError(
                f"Memory: found {type(rows).__name__}, expected Rows as engine.rows returns them."
            )
        held = replace(self.held, age=self.held.age + 1)
        if held.block is not None and held.age < self._form.every:
            return lambda update: held
        self._check_place(rows)
        # rows that are taken travel on all ranks or on none
        at = rows.asked("Memory", self.options, lambda: self._retained(rows))
        if not len(at):
            return lambda update: held
        # before the step, which uses the rows up
        if held.block is None:
            held, new = self._first(held, rows, at)
        else:
            new = rows.taken(at, held.block, self._form.dtype, held.smallest)
        return lambda update: self._after(held, rows, at, new, update)

    def state_dict(self) -> dict[str, Any]:
        """What is held, as plain values and tensors."""
        held = self.held
        block = None
        if held.block is not None and held.rows is not None:
            block = held.rows.state_of(held.block)
        return {
            "size": held.size,
            "age": held.age,
            "smallest": held.smallest,
            "block": block,
        }

    def load_state_dict(self, state: Mapping[str, Any], kept: Callable[..., Rows]) -> None:
        """Go on from what `state_dict` gave.

        Args:
            state: what it gave.
            kept: `engine.subspace_rows` of an engine of the same parameters, which refuses others.

        Raises:
            TypeError: a state or a part of it of another kind, or `kept` is no function.
            ValueError: a part is missing, or not of the same rows as the others; or a basis of rows of
                several ranks.
        """
        held_in("Memory: state", state, "size", "age", "smallest", "block")
        check_function("Memory: kept", kept, "vectors, task, dtype")
        check_counts("Memory: state", state)
        check_flag("Memory: state: smallest", state["smallest"])
        held = Held(state["size"], state["age"], smallest=state["smallest"])
        if state["block"] is not None:
            plain = check_mapping("Memory: state: block", state["block"])
            like = kept({}, "memory")  # no rows: what knows their space
            self._check_place(like)
            block = like.block_of(plain)
            held = replace(held, block=block, rows=self._standing(like, block))
        self.held = held

    # ---- what enters and what leaves -------------------------------------------------------------

    def _check_place(self, rows: Rows) -> None:
        """A basis is one of rows that this process has all of.

        Raises:
            ValueError: it is not.
        """
        if self._form.basis and rows.of_ranks:
            raise ValueError(
                "Memory: found basis=True with rows of several ranks, expected basis=False: a basis needs all rows in "
                "one place, while each rank keeps its own."
            )

    def _retained(self, rows: Rows) -> Tensor:
        """Indices of the rows to take."""
        roles = rows.roles
        if rows.has_means:
            raise ValueError(
                "Memory: found mean rows (per='task'), expected a row per sample (per='sample')."
            )
        wanted = roles.tasks if self._tasks is None else self._tasks
        unknown = [task for task in wanted if task not in roles.tasks]
        if unknown:
            raise ValueError(f"Memory: tasks names {unknown}, the rows have {list(roles.tasks)}.")
        # `[T]`, looked up by each row's task
        flags = torch.tensor([task in wanted for task in roles.tasks], device=roles.task.device)
        return ((roles.kind == RETAIN) & flags[roles.task]).nonzero().flatten()

    def _first(self, held: Held, rows: Rows, at: Tensor) -> tuple[Held, Kept]:
        """The first rows: how many are to be held, and in which form."""
        new = rows.taken(at, None, self._form.dtype)
        wanted = self._form.size or TIMES * len(new)
        if self._budget is not None and wanted * new.row_nbytes > self._budget:
            smaller = rows.taken(at, None, self._form.dtype, smallest=True)
            if smaller.row_nbytes < new.row_nbytes:
                held, new = replace(held, smallest=True), smaller
        return replace(held, size=self._most(new, wanted)), new

    def _after(self, held: Held, rows: Rows, at: Tensor, new: Any, update: Update) -> Held:
        """The rows taken in, and those dropped that are too many.

        Args:
            held: what is held before.
            rows: the step's, used up.
            at: which of them are taken.
            new: they.
            update: what the step did.
        """
        update.check()  # what is kept outlives the step
        assert held.size is not None
        both, place = new, at
        if held.block is not None:
            both = held.block.before(new)
            # the held rows came last in the step, behind its own
            first = len(update.roles) - len(held.block)
            place = torch.cat([torch.arange(first, len(update.roles), device=at.device), at])
        most = self._most(both, held.size)
        stay = best(self._scores(update, place), both.roles, most, self._per_task)
        block = both.select(stay)
        if isinstance(block, Block) and self._knows_products(update):
            block = replace(block, grams=rows.grams_in(update, place[stay]))
        standing = self._standing(rows, block)
        return Held(held.size, 0, block, standing, held.smallest)

    def _most(self, block: Kept, size: int) -> int:
        """How many of so many rows the budget has room for, of rows as large as these."""
        if self._budget is None:
            return size
        each = block.row_nbytes
        if self._budget < each:
            raise ValueError(
                f"Memory: budget is {self._budget} bytes, expected at least {each}, those of one row."
            )
        return min(size, self._budget // each)

    def _scores(self, update: Update, place: Tensor) -> Tensor:
        """`[K]`: those of the largest stay."""
        if self._keep == "newest":
            return torch.arange(len(place), device=place.device)
        if update.gram is None or update.seen is None:
            raise ValueError(
                "Memory: found keep='conflicting' with a method that needs no Gram matrix, expected keep='newest': "
                "what rows feel of a step is read off G."
            )
        R = len(update.seen)
        # per layer or tensor: inner products add up over the parameters
        G = update.gram.reshape(-1, R, R).sum(0)
        # ⟨g_i, f⟩ for every row, f = Jᵀ m the mean forget gradient
        felt = G @ mean_weights(update.seen, FORGET)
        # / |g_i|; a zero row gives 0/0, which is no conflict
        scores = felt / G.diagonal().clamp(min=0.0).sqrt()
        return scores[update.places(place)].nan_to_num()

    def _knows_products(self, update: Update) -> bool:
        """Whether the Gram of an update is that of the rows as they are held."""
        return update.gram is not None and self._form.dtype is None and not self._form.basis

    def _standing(self, rows: Rows, block: Kept) -> Rows:
        """The rows of a block, or the basis that stands for them, in the space of other rows."""
        kept = rows.remembered(block)
        if not self._form.basis:
            return kept
        form = self._form
        vectors, count = orthonormal([kept], form.rank, form.energy, form.dtype)
        roles = chosen(block.roles, torch.arange(count))
        return rows.remembered(rows.block_of_vectors(vectors, roles))


def check_memory(method: Method | Tensor, memory: object) -> None:
    """A method that needs a memory has one, and no other than one that takes it is given one.

    Raises:
        TypeError: something else than a Memory.
        ValueError: it is missing, or would not be looked at.
    """
    name = type(method).__name__
    if memory is not None and not isinstance(memory, Memory):
        raise TypeError(f"memory: found {type(memory).__name__}, expected an mtu.Memory.")
    takes = isinstance(method, Method) and method.takes_memory
    if isinstance(method, Method) and method.needs_memory and memory is None:
        raise ValueError(
            f"memory: {name} moves across retain rows kept from earlier steps, found None, expected an mtu.Memory; "
            "make one before the loop, memory = mtu.Memory(), and pass memory=memory. It fills in the first steps."
        )
    if memory is not None and not takes:
        raise ValueError(
            f"memory: {name} does not use one, expected memory=None; a method of your own that does says so by "
            "takes_memory = True."
        )
