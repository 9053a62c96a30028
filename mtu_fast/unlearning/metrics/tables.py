"""Scores of unlearning from score tables: what was removed, and what else moved.

A score table is `{split: {task: score}}`, every score higher better, with the splits `forget`,
`retain` and `test`.
Notation: a_S(m), the score of model m on split S; o original, u unlearned, r retrained from
scratch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsFloat

from torch import Tensor

from mtu_fast._arguments import check_one_of, check_tensors, shown
from mtu_fast._checks.masks import targeted

Scores = Mapping[str, Mapping[str, float]]

REMOVALS = ("instance", "class")


def uis(
    original: Scores,
    unlearned: Scores,
    targets: Iterable[str] | None = None,
    removal: str = "instance",
) -> float:
    """UIS = 100/T Σ_t ½ (|a_T(o) - a_T(u)| + |a_T(o) - a_F(u)|) / a_T(o), lower is better, 0 is ideal.

    First term: the test score must not move. Second term: the forget score must fall to the
    *original's test* score, the level of data never seen; for `removal="class"` it is |a_F(u)| /
    a_T(o), since a removed class must score zero. In the partial case (`targets` a subset of the
    tasks) the second term of a task that is not a target is
    |a_F(o) - a_F(u)| / a_F(o): forgotten instances must not move there. The two terms for one task follow the
    published code of single-task UIS; the mean over tasks, and the term of a non-target task, are our reading.

    It is relative to the original's scores, so these must be positive: shares such as accuracy, not
    minus a loss.

    Args:
        original: {split: {task: score}} with splits `forget` and `test`.
        unlearned: the same splits and tasks.
        targets: tasks from which F was forgotten; None: all (full-task).
        removal: `"instance"` or `"class"`.

    Returns:
        UIS in percent, >= 0; it can exceed 100.

    Raises:
        TypeError: targets are one string, or no score tables.
        ValueError: unknown targets or removal, a split or task is missing, a score is not finite,
            or one of the original's that divides is not positive.
    """
    check_removal(removal)
    _check_same(("forget", "test"), original=original, unlearned=unlearned)
    tasks = tuple(original["test"])
    chosen = targeted(targets, tasks)
    total = 0.0
    for task in tasks:
        kind = removal if task in chosen else "none"
        total += 0.5 * (_moved(original, unlearned, task) + _left(original, unlearned, task, kind))
    return 100 * total / len(tasks)


def _moved(original: Scores, unlearned: Scores, task: str) -> float:
    """The first term of UIS: how far the test score moved."""
    before, after = original["test"][task], unlearned["test"][task]
    return _ratio(abs(before - after), before, f"test score of task {task!r}")


def _left(original: Scores, unlearned: Scores, task: str, removal: str) -> float:
    """The second term of UIS: how far the forget score is from where it should be."""
    unseen, before = original["test"][task], original["forget"][task]
    after = unlearned["forget"][task]
    if removal == "none":
        return _ratio(abs(before - after), before, f"forget score of task {task!r}")
    # a removed class is to score 0, and not as unseen data do
    if removal == "class":
        return abs(after) / unseen
    return abs(unseen - after) / unseen


def check_removal(removal: str) -> None:
    """The kind of removal is one that UIS knows.

    Raises:
        ValueError: it is not.
    """
    check_one_of("removal", removal, REMOVALS)


def gaps(unlearned: Scores, retrained: Scores) -> dict[str, dict[str, float]]:
    """|a_S(u) - a_S(r)| for every split S and task, 0 is ideal.

    Args:
        unlearned: {split: {task: score}}.
        retrained: the same splits and tasks.

    Returns:
        {split: {task: gap}}.

    Raises:
        TypeError: no score tables.
        ValueError: no split, splits or tasks differ, or a score is not finite.
    """
    _check_same(unlearned=unlearned, retrained=retrained)
    found: dict[str, dict[str, float]] = {}
    for split, row in unlearned.items():
        found[split] = {}
        for task, score in row.items():
            found[split][task] = abs(score - retrained[split][task])
    return found


def mean_gap(unlearned: Scores, retrained: Scores) -> float:
    """Mean of |a_S(u) - a_S(r)| over all splits and tasks, 0 is ideal.

    Args:
        unlearned: {split: {task: score}}.
        retrained: the same splits and tasks.

    Returns:
        The mean gap, in the scores' unit.

    Raises:
        TypeError: no score tables.
        ValueError: no split, splits or tasks differ, or a score is not finite.
    """
    values: list[float] = []
    for row in gaps(unlearned, retrained).values():
        values += row.values()
    return sum(values) / len(values)


def tow(unlearned: Scores, retrained: Scores) -> dict[str, float]:
    """ToW_t = Π_S (1 - |a_S(u) - a_S(r)|) per task ("tug of war"), 1 is ideal; scores must lie in 0..1.

    Args:
        unlearned: {split: {task: score}}, usually splits `forget`, `retain`, `test`.
        retrained: the same splits and tasks.

    Returns:
        {task: ToW}, each in 0..1.

    Raises:
        TypeError: no score tables.
        ValueError: no split, splits or tasks differ, or a score is not finite or outside 0..1.
    """
    _check_same(unlearned=unlearned, retrained=retrained)
    _check_shares("unlearned", unlearned)
    _check_shares("retrained", retrained)
    distance = gaps(unlearned, retrained)
    found: dict[str, float] = {}
    for row in distance.values():
        for task, gap in row.items():
            found[task] = found.get(task, 1) * (1 - gap)
    return found


def _check_shares(name: str, table: Scores) -> None:
    wide = []
    for split, row in table.items():
        for task, score in row.items():
            if not 0 <= score <= 1:
                wide.append(f"{split}/{task} = {score}")
    if wide:
        raise ValueError(
            f"ToW needs scores in 0..1 (fractions, not percent); {name} has {', '.join(wide)}"
        )


def over_forgotten(
    unlearned: Scores, retrained: Scores, targets: Iterable[str] | None = None
) -> tuple[str, ...]:
    """Target tasks with a_F(u) < a_F(r): forgotten below the level of a model that never saw the data, itself a trace.

    Args:
        unlearned: {split: {task: score}} with split `forget`.
        retrained: the same.
        targets: tasks from which F was forgotten; None: all.

    Returns:
        The names of those tasks, in the order of the table.

    Raises:
        TypeError: targets are one string, or no score tables.
        ValueError: unknown targets, the split is missing, tasks differ, or a score is not finite.
    """
    _check_same(("forget",), unlearned=unlearned, retrained=retrained)
    chosen = targeted(targets, unlearned["forget"])
    return tuple(task for task in chosen if unlearned["forget"][task] < retrained["forget"][task])


def parameter_shift(original: Iterable[Tensor], unlearned: Iterable[Tensor]) -> float:
    """‖θ_u - θ_o‖ / ‖θ_o‖ over all parameters together, in float64.

    (One source uses the letters UIS for such a shift; here `uis` is the score above and this is
    not.)

    Args:
        original: the parameters of the original model, for example `model.parameters()`.
        unlearned: those of the unlearned model, same order and shapes. Of sharded ones (DTensor),
            all ranks call this together.

    Returns:
        The relative shift, >= 0.

    Raises:
        TypeError: they are no tensors.
        ValueError: the parameters do not match one to one, or all original ones are zero.
    """
    before, after = _tensors("original", original), _tensors("unlearned", unlearned)
    if [p.shape for p in before] != [p.shape for p in after]:
        raise ValueError(
            f"parameter_shift: original and unlearned must match one to one; got {len(before)} and {len(after)} "
            "tensors, or other shapes or another order"
        )
    moved, size = 0.0, 0.0
    for p, q in zip(before, after, strict=True):
        old, new = _whole(p).double(), _whole(q).double()
        moved += (new - old).square().sum().item()
        size += old.square().sum().item()
    if size == 0:
        raise ValueError(
            "the original parameters are all 0, and the shift is relative to their norm"
        )
    return math.sqrt(moved / size)


def _whole(p: Any) -> Tensor:
    """A parameter, which ranks may hold in slices; one at a time is whole."""
    found: Tensor = p.detach()
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def _tensors(name: str, given: Any) -> list[Tensor]:
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise TypeError(
            f"parameter_shift: {name}: found {shown(given)}, expected the parameters, model.parameters()."
        )
    found = list(given)
    for p in found:
        check_tensors(**{f"parameter_shift: {name}": p})
    return found


def _ratio(part: float, whole: float, name: str) -> float:
    if whole <= 0:
        raise ValueError(
            f"the original model's {name} is {whole:g}, and UIS is relative to it: scores must be positive and higher "
            "better, such as accuracy or another share, not minus a loss"
        )
    return part / whole


def _check_same(splits: Sequence[str] | None = None, **tables: Scores) -> None:
    """All tables hold these splits (by default those of any), each the same tasks, and every score is finite."""
    for name, table in tables.items():
        _check_table(name, table)
    tasks: set[str] = set()
    for split in _splits(tables) if splits is None else splits:
        for name, table in tables.items():
            if split not in table:
                raise ValueError(
                    f"{' and '.join(tables)}: split {split!r} is missing: the table {name} has {list(table)}"
                )
            # the first row says which tasks all others have: each is compared with that one
            tasks = tasks or set(table[split])
            _check_row(name, split, table[split], tasks)


def _splits(tables: Mapping[str, Scores]) -> list[str]:
    """The splits of any table, in the order in which they come."""
    found = list(dict.fromkeys(split for table in tables.values() for split in table))
    if not found:
        raise ValueError(
            f"{' and '.join(tables)}: the score tables are empty, expected {{split: {{task: score}}}}"
        )
    return found


def _check_table(name: str, table: Scores) -> None:
    if isinstance(table, Mapping) and all(isinstance(row, Mapping) for row in table.values()):
        return
    raise TypeError(
        f"{name}: score table: found {type(table).__name__} {shown(table)}, expected {{split: {{task: score}}}}."
    )


def _check_row(name: str, split: str, row: Mapping[str, float], tasks: set[str]) -> None:
    if set(row) != tasks or not tasks:
        raise ValueError(
            f"{name}: split {split!r} has tasks {list(row)}, another has {sorted(map(str, tasks))}"
        )
    bad = [task for task, score in row.items() if not math.isfinite(_number(name, task, score))]
    if bad:
        raise ValueError(f"{name}: split {split!r} has a score that is not finite for {bad}")


def _number(name: str, task: str, score: Any) -> float:
    """A score as a number: a Python or numpy one, or a tensor of one element."""
    try:
        if isinstance(score, SupportsFloat):
            return float(score)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass  # of several elements, or too large
    raise TypeError(
        f"{name}: score of task {task!r}: found {type(score).__name__} {shown(score)}, expected a number."
    )
