"""Losses that look at a frozen model: to stay near it, or to leave it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from mtu_fast._arguments import check_positive, check_tensors
from mtu_fast.losses import _checks
from mtu_fast.losses._chunked import divergences
from mtu_fast.losses.tokens import reduced


def kl_to_frozen(
    logits: Tensor,
    frozen: Tensor,
    *,
    attention_mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`L_n = 1/|C_n| Σ_{s ∈ C_n} Σ_v q_v log(q_v / p_v)`, p = softmax(logits[n, s]), q = softmax(frozen[n, s]).

    A retain loss: the model keeps what the frozen one said. No `[N, S, V]` is held beside the two
    logits and the gradient of the model's.

    Args:
        logits: `[N, S, V]` of the model.
        frozen: `[N, S, V]` of the frozen model, best made under `torch.no_grad()`.
        attention_mask: `[N, S]`, 0 where a position does not count (C_n are the others).
        reduction: "mean" or "sum" over the positions of a sample.

    Returns:
        `[N]`; 0 for a sample of which no position counts.

    Raises:
        TypeError: logits that are not floating.
        ValueError: shapes that do not fit, or an unknown reduction.
    """
    _checks.check_logits("kl_to_frozen", logits)
    _checks.check_logits("kl_to_frozen", frozen)
    _checks.check_reduction("kl_to_frozen", reduction)
    if frozen.shape != logits.shape:
        raise ValueError(
            f"kl_to_frozen: frozen: found shape {tuple(frozen.shape)}, expected {tuple(logits.shape)} as the logits."
        )
    counts = _checks.counted("kl_to_frozen", attention_mask, logits)
    return reduced(divergences(logits, frozen, counts), counts, reduction)


def npo(losses: Tensor, frozen: Tensor, *, beta: float = 0.1) -> Tensor:
    """`2/β log σ(β (L_n − F_n))`, minus the NPO loss: a forget loss, which methods ascend.

    L_n are the model's losses and F_n the frozen model's, both sums over the tokens of a sample
    (`causal_lm(..., reduction="sum")`), so that `F_n − L_n` is the log ratio of the two models'
    probabilities of it. The gradient is `2 (1 − σ(β (L_n − F_n))) ∇L_n`: that of the loss itself at
    first (weight 1), less and less of it as a sample is forgotten.

    Args:
        losses: L `[N]`, with a graph.
        frozen: F `[N]`; no gradient goes to it.
        beta: β > 0, how soon a forgotten sample is let alone; ascent on L as it goes to 0.

    Returns:
        `[N]`, at most 0.

    Raises:
        TypeError: losses that are no floating tensors, or β that is no number.
        ValueError: shapes that differ, or β that is not positive.

    Source: Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to Effective
    Unlearning", arXiv 2404.05868.
    """
    check_tensors(losses=losses, frozen=frozen)
    for name, value in (("losses", losses), ("frozen", frozen)):
        if not value.is_floating_point():
            raise TypeError(f"npo: {name}: found {value.dtype}, expected a floating tensor [N].")
    if losses.shape != frozen.shape or losses.dim() != 1:
        raise ValueError(
            f"npo: found losses {tuple(losses.shape)} and frozen {tuple(frozen.shape)}, expected [N] both: sums over "
            "the tokens of each sample."
        )
    check_positive("npo: beta", beta)
    # not log(sigmoid), which is −∞ for a sample that is not forgotten at all
    return 2.0 / beta * functional.logsigmoid(float(beta) * (losses - frozen.detach()))
