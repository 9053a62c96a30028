"""Membership inference: can the samples to forget be told from samples never seen, by one number each?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtu_fast._arguments import check_tensors, check_whole

FEWEST = 4  # samples per class: below, a split says nothing


@dataclass(frozen=True)
class Membership:
    """What the attack achieved; 0.5 is a guess, and ideal.

    Attributes:
        accuracy: mean over the splits, on held-out samples.
        auc: area under the ROC curve, likewise.
        error: standard error of an AUC of 0.5 with so few samples, `√((2n + 1) / (12 n²))`: what
            chance explains.
        samples: n of each class.
        splits: number of splits.
    """

    accuracy: float
    auc: float
    error: float
    samples: int
    splits: int


def membership(forget: Tensor, test: Tensor, *, splits: int = 10, seed: int = 0) -> Membership:
    """Held-out accuracy and AUC of logistic regression `P(forget) = σ(a x + b)` on one number x per sample.

    x is the sample's loss, its softmax entropy (`entropy`), or any other: the mean error over an
    image's pixels serves for dense regression. The classes are balanced by drawing from the larger
    one; the splits are stratified folds, so every sample is held out once, fewer of them where a
    class has fewer samples than `splits`. A result depends on the values and on `seed`, not on the
    samples' order. Folds instead of independent draws are our reading of the "10 stratified splits"
    in the literature; with few samples they vary less.

    Args:
        forget: [N] values of the samples to forget.
        test: [M] values of samples never seen.
        splits: number of folds, at least 2.
        seed: of the draw and of the folds.

    Returns:
        Accuracy and AUC, means over the splits.

    Raises:
        ImportError: scikit-learn is missing.
        TypeError: no real tensors, or splits or seed that are not whole numbers.
        ValueError: not vectors, a value that is not finite, fewer than 4 samples on a side, or
            fewer than 2 splits.
    """
    sides = [np.sort(_vector("forget", forget)), np.sort(_vector("test", test))]
    n = min(map(len, sides))
    if n < FEWEST:
        raise ValueError(
            f"membership: found {len(sides[0])} forget and {len(sides[1])} test samples, expected at least {FEWEST} of "
            "each (10 or more to mean something)."
        )
    check_whole("membership: splits", splits, 2)
    check_whole("membership: seed", seed, 0, 2**32 - 1)
    draw = np.random.default_rng(seed)
    # as many of each side, so that a guess is right half the time; sorted, so that the result does
    # not depend on the order of the samples
    drawn = [np.sort(draw.choice(side, n, replace=False)) for side in sides]
    x = np.concatenate(drawn)
    label = np.repeat([1, 0], n)
    folds = min(splits, n)
    accuracy, auc = _attack(x[:, None], label, folds, seed)
    # the variance of Mann-Whitney's U over n⁴, where both sides are alike
    error = ((2 * n + 1) / (12 * n * n)) ** 0.5
    return Membership(accuracy, auc, error, n, folds)


def entropy(logits: Tensor) -> Tensor:
    """H = -Σ_c p_c ln p_c of p = softmax(logits), per sample, the mean over its pixels.

    Args:
        logits: [N, C, ...], at least two classes; -∞ where a class is impossible.

    Returns:
        [N] float64, in nats, 0..ln C; N = 0 is allowed.

    Raises:
        TypeError: no tensor.
        ValueError: no class dimension of at least two, or logits that no probability can be made
            of.
    """
    check_tensors(logits=logits)
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"entropy: found shape {tuple(logits.shape)}, expected logits [N, C, ...] with C at least 2."
        )
    log_p = logits.detach().double().log_softmax(1)
    bad = log_p.isnan().flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"entropy: the logits of samples {bad[:8]} are NaN, +∞ or all -∞, expected finite ones."
        )
    possible = log_p > -torch.inf  # 0 ln 0 = 0
    terms = (log_p.exp() * log_p).where(possible, 0.0)
    return -terms.sum(1).unsqueeze(-1).flatten(1).mean(1)


def _attack(x: np.ndarray, label: np.ndarray, splits: int, seed: int) -> tuple[float, float]:
    try:
        from sklearn import config_context
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise ImportError("membership needs scikit-learn: pip install 'mtu_fast[demo]'") from error
    folds = StratifiedKFold(splits, shuffle=True, random_state=seed)
    found = []
    # checks take half the time
    with config_context(assume_finite=True, skip_parameter_validation=True):
        for fit, held in folds.split(x, label):
            # of the fitted part alone: the held-out samples must not leak into it
            center, scale = x[fit].mean(), x[fit].std() or 1.0
            attack = LogisticRegression().fit((x[fit] - center) / scale, label[fit])
            score = attack.decision_function((x[held] - center) / scale)
            member = label[held] == 1
            right = ((score > 0) == member).mean()
            found.append((right, _auc(score[member], score[~member])))
    accuracy, auc = np.mean(found, axis=0)
    return float(accuracy), float(auc)


def _auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """P(positive > negative) + ½ P(positive = negative)."""
    ranked = np.sort(negative)
    below = np.searchsorted(ranked, positive, "left") + np.searchsorted(ranked, positive, "right")
    return float(below.mean() / (2 * len(negative)))


def _vector(name: str, x: Tensor) -> np.ndarray:
    check_tensors(**{f"membership: {name}": x})
    if x.dim() != 1:
        raise ValueError(
            f"membership: {name} has shape {tuple(x.shape)}, expected [N], one number per sample."
        )
    bad = (~torch.isfinite(x)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"membership: {name} is not finite for samples {bad[:8]}; leave these samples out, and say so, or look for "
            "the overflow: an attack on what is left of them would mislead."
        )
    return x.detach().double().cpu().numpy()
