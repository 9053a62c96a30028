"""Scores of unlearning from score tables: what was removed, and what else moved.

A score table is `{split: {task: score}}`, every score higher better, with the splits `forget`,
`retain` and `test`.
Notation: a_S(m), the score of model m on split S; o original, u unlearned, r retrained from
scratch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

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
        TypeError: targets are one string.
        ValueError: unknown targets or removal, a split or task is missing, a score is not finite,
            or one of the original's that divides is not positive.
    """
    check_removal(removal)
    _check_same(original, unlearned, ("forget", "test"))
    tasks = tuple(original["test"])
    chosen = targeted(targets, tasks)
    total = 0.0
    for task in tasks:
        test_o, test_u = original["test"][task], unlearned["test"][task]
        forget_o, forget_u = original["forget"][task], unlearned["forget"][task]
        utility = _ratio(abs(test_o - test_u), test_o, f"test score of task {task!r}")
        if task not in chosen:
            removal_term = _ratio(
                abs(forget_o - forget_u), forget_o, f"forget score of task {task!r}"
            )
        elif removal == "class":
            removal_term = abs(forget_u) / test_o
        else:
            removal_term = abs(test_o - forget_u) / test_o
        total += 0.5 * (utility + removal_term)
    return 100 * total / len(tasks)


def check_removal(removal: str) -> None:
    """The kind of removal is one that UIS knows.

    Raises:
        ValueError: it is not.
    """
    if removal not in REMOVALS:
        raise ValueError(f"removal: found {removal!r}, expected one of {REMOVALS}.")


def gaps(unlearned: Scores, retrained: Scores) -> dict[str, dict[str, float]]:
    """|a_S(u) - a_S(r)| for every split S and task, 0 is ideal.

    Args:
        unlearned: {split: {task: score}}.
        retrained: the same splits and tasks.

    Returns:
        {split: {task: gap}}.

    Raises:
        ValueError: no split, splits or tasks differ, or a score is not finite.
    """
    _check_same(unlearned, retrained, tuple(dict.fromkeys((*unlearned, *retrained))))
    return {
        s: {t: abs(a - retrained[s][t]) for t, a in row.items()} for s, row in unlearned.items()
    }


def mean_gap(unlearned: Scores, retrained: Scores) -> float:
    """Mean of |a_S(u) - a_S(r)| over all splits and tasks, 0 is ideal.

    Args:
        unlearned: {split: {task: score}}.
        retrained: the same splits and tasks.

    Returns:
        The mean gap, in the scores' unit.

    Raises:
        ValueError: no split, splits or tasks differ, or a score is not finite.
    """
    values = [gap for row in gaps(unlearned, retrained).values() for gap in row.values()]
    return sum(values) / len(values)


def tow(unlearned: Scores, retrained: Scores) -> dict[str, float]:
    """ToW_t = Π_S (1 - |a_S(u) - a_S(r)|) per task ("tug of war"), 1 is ideal; scores must lie in 0..1.

    Args:
        unlearned: {split: {task: score}}, usually splits `forget`, `retain`, `test`.
        retrained: the same splits and tasks.

    Returns:
        {task: ToW}, each in 0..1.

    Raises:
        ValueError: no split, splits or tasks differ, or a score is not finite or outside 0..1.
    """
    for name, table in (("unlearned", unlearned), ("retrained", retrained)):
        wide = [
            f"{s}/{t} = {a}" for s, row in table.items() for t, a in row.items() if not 0 <= a <= 1
        ]
        if wide:
            raise ValueError(
                f"ToW needs scores in 0..1 (fractions, not percent); {name} has {', '.join(wide)}"
            )
    distance = gaps(unlearned, retrained)
    tasks = next(iter(distance.values()))
    return {task: math.prod(1 - row[task] for row in distance.values()) for task in tasks}


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
        TypeError: targets are one string.
        ValueError: unknown targets, the split is missing, tasks differ, or a score is not finite.
    """
    _check_same(unlearned, retrained, ("forget",))
    chosen = targeted(targets, unlearned["forget"])
    return tuple(task for task in chosen if unlearned["forget"][task] < retrained["forget"][task])


def parameter_shift(original: Iterable[Tensor], unlearned: Iterable[Tensor]) -> float:
    """‖θ_u - θ_o‖ / ‖θ_o‖ over all parameters together, in float64.

    (One source uses the letters UIS for such a shift; here `uis` is the score above and this is
    not.)

    Args:
        original: the parameters of the original model, say `model.parameters()`.
        unlearned: those of the unlearned model, same order and shapes.

    Returns:
        The relative shift, >= 0.

    Raises:
        ValueError: the parameters do not match one to one, or all original ones are zero.
    """
    before, after = list(original), list(unlearned)
    if [p.shape for p in before] != [p.shape for p in after]:
        raise ValueError(
            f"the two models' parameters must match one to one; got {len(before)} and {len(after)} tensors, "
            "or other shapes or another order"
        )
    old, new = ([p.detach().double() for p in parameters] for parameters in (before, after))
    moved = sum((a - b).square().sum().item() for a, b in zip(new, old, strict=True))
    size = sum(b.square().sum().item() for b in old)
    if size == 0:
        raise ValueError(
            "the original parameters are all 0, and the shift is relative to their norm"
        )
    return math.sqrt(moved / size)


def _ratio(part: float, whole: float, name: str) -> float:
    if whole <= 0:
        raise ValueError(
            f"the original model's {name} is {whole:g}, and UIS is relative to it: scores must be positive and higher "
            "better, such as accuracy or another share, not minus a loss"
        )
    return part / whole


def _check_same(a: Scores, b: Scores, splits: Sequence[str]) -> None:
    """Both tables hold these splits, at least one, every split the same tasks, and every score is finite."""
    if not splits:
        raise ValueError("the score tables are empty, expected {split: {task: score}}")
    tasks: set[str] | None = None
    for split in splits:
        for table in (a, b):
            if split not in table:
                raise ValueError(f"split {split!r} is missing: the table has {sorted(table)}")
            tasks = tasks or set(table[split])
            if set(table[split]) != tasks or not tasks:
                raise ValueError(
                    f"split {split!r} has tasks {sorted(table[split])}, another has {sorted(tasks)}"
                )
            bad = [t for t, score in table[split].items() if not math.isfinite(score)]
            if bad:
                raise ValueError(f"split {split!r} has a score that is not finite for {bad}")
