"""Cross entropies of positions, a mean or a sum a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast.losses import _checks
from mtu_fast.losses._chunked import token_losses

IGNORED = -100


def causal_lm(
    logits: Tensor,
    labels: Tensor,
    *,
    attention_mask: Tensor | None = None,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
) -> Tensor:
    """`L_n = −1/|C_n| Σ_{s ∈ C_n} log softmax(logits[n, s])[labels[n, s+1]]`, C_n where the next token counts.

    For a language model that says at each position what comes next. Logits are not shifted, widened
    or copied as a whole: beside them the graph holds a number a position, and the backward their one
    gradient.

    Args:
        logits: `[N, S, V]`, of any floating dtype; computed in float32 at least.
        labels: `[N, S]` int64, the tokens themselves, `ignore_index` where one does not count
            (padding, the question of an answer).
        attention_mask: `[N, S]`, 0 where a token is padding and does not count either.
        ignore_index: the label of tokens that do not count.
        reduction: "mean" or "sum" over the tokens of a sample.

    Returns:
        `[N]`; 0 for a sample of which no token counts.

    Raises:
        TypeError: logits that are not floating, or labels that are not int64.
        ValueError: shapes that do not fit, labels beyond the vocabulary, or an unknown reduction.
    """
    counts = _counts("causal_lm", logits, labels, attention_mask, ignore_index, reduction)
    # labels are moved and not logits, which are V times as large
    last = torch.zeros_like(counts[:, :1])  # after the last position comes nothing
    following = torch.cat([labels[:, 1:], labels[:, :1]], 1)
    return _reduced(logits, following, torch.cat([counts[:, 1:], last], 1), reduction)


def token_classification(
    logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORED, reduction: str = "mean"
) -> Tensor:
    """`L_n = −1/|C_n| Σ_{s ∈ C_n} log softmax(logits[n, s])[labels[n, s]]`, C_n the tokens that have a label.

    For taggers, for masked language models, and by its other name `seq2seq` for decoders whose
    inputs are already shifted, as those of encoder-decoder models are.

    Args:
        logits: `[N, S, classes]`, of any floating dtype; computed in float32 at least.
        labels: `[N, S]` int64, `ignore_index` where a token has none.
        ignore_index: the label of tokens that do not count.
        reduction: "mean" or "sum" over the tokens of a sample.

    Returns:
        `[N]`; 0 for a sample of which no token counts.

    Raises:
        TypeError: logits that are not floating, or labels that are not int64.
        ValueError: shapes that do not fit, labels beyond the classes, or an unknown reduction.
    """
    counts = _counts("token_classification", logits, labels, None, ignore_index, reduction)
    return _reduced(logits, labels, counts, reduction)


seq2seq = token_classification


def _counts(
    name: str,
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    _checks.check_logits(name, logits)
    _checks.check_reduction(name, reduction)
    counts = _checks.check_labels(name, logits, labels, ignore_index)
    return counts & _checks.counted(name, mask, logits)


def _reduced(logits: Tensor, target: Tensor, counts: Tensor, reduction: str) -> Tensor:
    return reduced(token_losses(logits, target, counts), counts, reduction)


def reduced(values: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """Values `[N, S]` of positions, 0 where one does not count, as their mean or sum `[N]`."""
    total = values.sum(1)
    # a sample without a position has a sum of 0, and 0 over 1 is its mean
    return total if reduction == "sum" else total / counts.sum(1).clamp(min=1)
