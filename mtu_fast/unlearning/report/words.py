"""Numbers and names as parts of a sentence."""

from __future__ import annotations

from collections.abc import Sequence

Finding = dict[str, str]


def finding(level: str, word: str, detail: str) -> Finding:
    """One finding of the verdict: level "good", "fair", "poor" or "unknown", a word for it, and a sentence."""
    return {"level": level, "word": word, "detail": detail}


def score(value: float) -> str:
    """A score with three decimals."""
    return f"{value:.3f}"


def samples(count: int) -> str:
    """How many samples."""
    if count == 1:
        return "1 sample"
    return f"{count} samples"


def listed(names: Sequence[str]) -> str:
    """Names as people list them: "a, b and c"."""
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} and {names[-1]}"
