"""Every score and every loss, each argument of the wrong kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mtu_fast import losses
from mtu_fast.unlearning import metrics
from tests.surface.wrong import WRONG, parameters_of, refused, walk

N = 4
torch.manual_seed(0)
DEPTH, NORMAL = torch.rand(N, 1, 2, 2) + 0.1, torch.rand(N, 3, 2, 2) + 0.1
LOGITS, CLASSES = torch.randn(N, 3, 2, 2), torch.randint(3, (N, 2, 2))
FLAT, TARGET = torch.randn(N, 3), torch.randint(3, (N,))
VALUES = torch.randn(8)
TABLE = {split: {"a": 0.5, "b": 0.6} for split in ("forget", "retain", "test")}
TOKENS, LABELS = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (2, 5))
MASK = torch.ones(2, 5)
NET = nn.Linear(3, 1)

Call = tuple[Callable[..., Any], dict[str, tuple[Any, str]]]
PAIR = {"depth": (DEPTH, "tensor"), "target": (DEPTH, "tensor")}
NORMALS = {"normal": (NORMAL, "tensor"), "target": (NORMAL, "tensor")}
TABLES = {"unlearned": (TABLE, "table"), "retrained": (TABLE, "table")}
TASKS = {"targets": (["a"], "names")}
IGNORE = {"ignore": (-1, "index")}
OF_TOKENS: dict[str, tuple[Any, str]] = {
    "logits": (TOKENS, "tensor"),
    "labels": (LABELS, "tensor"),
    "ignore_index": (-100, "index"),
    "reduction": ("mean", "word"),
}
ATTENTION = {"attention_mask": (MASK, "tensor or None")}

# {function: {argument: (a right value, the kind of which it is given wrong ones)}}
CALLS: dict[str, Call] = {
    "depth_loss": (metrics.depth_loss, PAIR),
    "depth_scores": (metrics.depth_scores, PAIR),
    "normal_loss": (metrics.normal_loss, NORMALS),
    "normal_scores": (metrics.normal_scores, NORMALS),
    "segmentation_loss": (
        metrics.segmentation_loss,
        {"logits": (LOGITS, "tensor"), "target": (CLASSES, "tensor"), **IGNORE},
    ),
    "pixel_accuracy": (
        metrics.pixel_accuracy,
        {"predicted": (CLASSES, "tensor"), "target": (CLASSES, "tensor"), **IGNORE},
    ),
    "mean_iou": (
        metrics.mean_iou,
        {
            "predicted": (CLASSES, "tensor"),
            "target": (CLASSES, "tensor"),
            "classes": (3, "count above 0"),
            **IGNORE,
        },
    ),
    "present": (metrics.present, {"labels": ({"a": TARGET}, "mapping"), **IGNORE}),
    "valid_pixels": (metrics.valid_pixels, {"target": (DEPTH, "tensor")}),
    "kl_divergence": (
        metrics.kl_divergence,
        {"reference": (FLAT, "tensor"), "logits": (FLAT, "tensor")},
    ),
    "logit_distance": (
        metrics.logit_distance,
        {"reference": (FLAT, "tensor"), "logits": (FLAT, "tensor")},
    ),
    "entropy": (metrics.entropy, {"logits": (FLAT, "tensor")}),
    "top1": (metrics.top1, {"logits": (FLAT, "tensor"), "target": (TARGET, "tensor")}),
    "drift": (
        metrics.drift,
        {
            "before": (FLAT[:, 0], "tensor"),
            "after": (FLAT[:, 1], "tensor"),
            "labels": (TARGET, "function"),  # a list of anything hashable, or a tensor
            "worst": (2, "count"),
        },
    ),
    "membership": (
        metrics.membership,
        {
            "forget": (VALUES, "tensor"),
            "test": (VALUES, "tensor"),
            "splits": (2, "count above 0"),
            "seed": (0, "index"),
        },
    ),
    "gaps": (metrics.gaps, TABLES),
    "mean_gap": (metrics.mean_gap, TABLES),
    "tow": (metrics.tow, TABLES),
    "over_forgotten": (metrics.over_forgotten, TABLES | TASKS),
    "uis": (
        metrics.uis,
        {"original": (TABLE, "table"), "unlearned": (TABLE, "table"), **TASKS}
        | {"removal": ("instance", "word")},
    ),
    "parameter_shift": (
        metrics.parameter_shift,
        {"original": ([VALUES], "tensors"), "unlearned": ([VALUES], "tensors")},
    ),
    "relearn_steps": (
        metrics.relearn_steps,
        {
            "model": (NET, "module"),
            "forget": ([FLAT], "loader"),
            "losses": (lambda model, batch: model(batch).square().sum(1), "function"),
            "score": (lambda model: 0.0, "function"),
            "level": (1.0, "number"),
            "optimizer": (lambda p: torch.optim.SGD(p, lr=0.01), "function"),
            "limit": (2, "count above 0"),
            "every": (1, "count above 0"),
        },
    ),
    "causal_lm": (losses.causal_lm, OF_TOKENS | ATTENTION),
    "seq2seq": (losses.seq2seq, OF_TOKENS),
    "token_classification": (losses.token_classification, OF_TOKENS),
    "kl_to_frozen": (
        losses.kl_to_frozen,
        {"logits": (TOKENS, "tensor"), "frozen": (TOKENS.detach(), "tensor"), **ATTENTION}
        | {"reduction": ("mean", "word")},
    ),
    "truth_ratio": (
        metrics.truth_ratio,
        {"true": (VALUES, "tensor"), "wrong": (VALUES[:, None], "tensor")},
    ),
    "rouge_l": (metrics.rouge_l, {"said": ("a b", "text"), "reference": ("b c", "text")}),
    "npo": (
        losses.npo,
        {"losses": (VALUES, "tensor"), "frozen": (VALUES, "tensor"), "beta": (0.1, "positive")},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_named(name: str) -> None:
    function, arguments = CALLS[name]
    assert set(arguments) == parameters_of(function)
    given = {argument: value for argument, (value, _) in arguments.items()}
    walk(function, given, {argument: kind for argument, (_, kind) in arguments.items()})


def test_every_score_and_loss_is_walked() -> None:
    public = {name for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name))}
    public |= {name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))}
    assert public == set(CALLS)


def test_what_the_functions_of_relearning_give() -> None:
    _, arguments = CALLS["relearn_steps"]
    given = {argument: value for argument, (value, _) in arguments.items()}
    for argument, kind in (("optimizer", "optimizer"), ("score", "number"), ("losses", "roles")):
        for value in WRONG[kind]:
            if not isinstance(value, torch.Tensor):
                refused(
                    lambda a=argument, v=value: metrics.relearn_steps(  # type: ignore[misc]
                        **{**given, a: lambda *_: v}
                    ),
                    argument,
                )
