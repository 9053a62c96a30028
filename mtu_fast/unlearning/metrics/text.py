"""Scores of language models: how likely wrong answers are beside the true one, and how much of a text was said."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast._arguments import check_tensors, check_text


def truth_ratio(true: Tensor, wrong: Tensor) -> Tensor:
    """`R_n = 1/K Σ_k exp(−wrong_nk) / exp(−true_n)`: how likely wrong answers are beside the true one.

    Near 0 where a model knows the answer, near 1 where it does not. That of data to forget is best
    compared with the retrained model's.

    Args:
        true: `[N]` losses of the true answers, the mean over their tokens (`mtu_fast.losses.causal_lm`).
        wrong: `[N, K]` those of K wrong answers of the same form.

    Returns:
        `[N]` float64, at least 0.

    Raises:
        TypeError: no tensors.
        ValueError: other shapes, or a loss that is not finite.

    Source: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", arXiv 2401.06121.
    """
    check_tensors(true=true, wrong=wrong)
    if true.dim() != 1 or wrong.dim() != 2 or len(wrong) != len(true) or wrong.shape[1] == 0:
        raise ValueError(
            f"truth_ratio: found shapes {tuple(true.shape)} and {tuple(wrong.shape)}, expected [N] and [N, K], K at "
            "least 1."
        )
    if not bool(torch.isfinite(true).all() and torch.isfinite(wrong).all()):
        raise ValueError("truth_ratio: found losses that are not finite, expected finite ones.")
    # one exponent of the difference: the likelihoods alone may underflow
    gap = true.detach().double()[:, None] - wrong.detach().double()
    return gap.exp().mean(1)


def rouge_l(said: str, reference: str) -> float:
    """`F = 2 P R / (P + R)`, P and R the longest common subsequence over the words of `said` and of `reference`.

    Words are what stands between spaces; case counts.

    Args:
        said: what the model said.
        reference: what it should have said, or should not.

    Returns:
        0..1; 0 where either is empty.

    Raises:
        TypeError: no strings.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.
    """
    check_text(said=said, reference=reference)
    ours, theirs = said.split(), reference.split()
    common = _common(ours, theirs)
    if common == 0:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    # two rows of the table of lengths are all that is needed of it
    above = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for j, other in enumerate(b):
            longest = above[j] + 1 if word == other else max(above[j + 1], row[j])
            row.append(longest)
        above = row
    return above[-1]
