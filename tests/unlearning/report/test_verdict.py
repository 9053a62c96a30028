"""The verdict on numbers whose meaning is plain."""

from __future__ import annotations

from typing import Any

import pytest

from mtu_fast.unlearning.report.verdict import verdict

SPLITS = ("forget", "retain", "test")
ORIGINAL = (1.0, 1.0, 0.8)
RETRAINED = (0.8, 1.0, 0.8)


def numbers(
    unlearned: tuple[float, float, float], retrained: bool = True, auc: float = 0.5, auc_retrained: float = 0.5,
    targets: tuple[str, ...] = ("a", "b"), other: tuple[float, float, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """An audit's data: tasks a and b with these scores on forget, retain and test; b's differ where given."""
    models = {"original": ORIGINAL, "unlearned": unlearned} | (
        {"retrained": RETRAINED} if retrained else {}
    )
    scores = {
        m: {s: {"a": row[i], "b": row[i]} for i, s in enumerate(SPLITS)}
        for m, row in models.items()
    }
    if other is not None:
        for i, split in enumerate(SPLITS):
            scores["unlearned"][split]["b"] = other[i]
    attacks = {"unlearned": auc, "retrained": auc_retrained}
    size = {"error": 0.04, "samples": 104}
    found = {m: {t: {"loss": {"auc": attacks.get(m, 1.0)} | size} for t in "ab"} for m in models}
    drift = {"unlearned": {"retain": {t: {"mean": 0.01, "worst_mean": 0.5} for t in "ab"}}}
    return {
        "models": list(models), "scores": scores, "membership": found, "drift": drift,
        "request": {"kind": "full" if len(targets) == 2 else "partial", "tasks": ["a", "b"], "targets": list(targets),
                    "samples": {"forget": 400, "retain": 100, "test": 100}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "removal", "kept", "attack", "headline"),
    [
        (numbers(RETRAINED), "removed", "kept", "not told apart", "The data are forgotten, and the rest is kept."),
        (numbers(ORIGINAL, auc=0.9), "not removed", "kept", "told apart",
         "The data are not forgotten, but the rest is kept."),
        (numbers((0.88, 0.95, 0.8)), "partly removed", "some damage", "not told apart",
         "The data are partly forgotten, and the rest suffered somewhat."),
        (numbers((0.8, 0.8, 0.5)), "removed", "damaged", "not told apart",
         "The data are forgotten, but the rest was damaged."),
        (numbers(RETRAINED, auc=0.65), "removed", "kept", "told apart",
         "The data are forgotten, and the rest is kept; a trace remains."),
        (numbers((0.3, 1.0, 0.8)), "over-forgotten", "kept", "not told apart",
         "The data are over-forgotten, but the rest is kept."),
        (numbers(RETRAINED, retrained=False), "removed", "kept", "not told apart",
         "The data are forgotten, and the rest is kept."),
    ],
)  # fmt: skip
def test_findings_and_headline(
    data: dict[str, Any], removal: str, kept: str, attack: str, headline: str
) -> None:
    found = verdict(data)
    assert (found["removal"]["word"], found["kept"]["word"], found["attack"]["word"]) == (
        removal,
        kept,
        attack,
    )
    assert found["headline"] == headline


def test_an_attack_that_is_wrong_consistently_is_a_trace() -> None:
    assert verdict(numbers(RETRAINED, auc=0.2))["attack"]["level"] == "poor"


def test_chance_and_the_retrained_model_explain_an_attack() -> None:
    # 2.25 standard errors
    assert verdict(numbers(RETRAINED, auc=0.59))["attack"]["level"] == "good"
    assert verdict(numbers(RETRAINED, auc=0.61))["attack"]["level"] == "fair"
    assert verdict(numbers(RETRAINED, auc=0.65, auc_retrained=0.64))["attack"]["level"] == "good"


@pytest.mark.parametrize(
    ("auc", "error", "word"),
    [(0.8, 0.132, "too few samples to tell"), (0.5, 0.132, "too few samples to tell"), (0.9, 0.132, "told apart"),
     (0.5, 0.061, "too few samples to tell"), (0.5, 0.059, "not told apart"),
     (0.62, 0.055, "too few samples to tell"), (0.39, 0.055, "too few samples to tell"),
     (0.61, 0.042, "told apart"), (0.59, 0.055, "not told apart")],
)  # fmt: skip
@pytest.mark.parametrize("retrained", [False, True])
def test_too_few_samples_show_nothing(auc: float, error: float, word: str, retrained: bool) -> None:
    data = numbers(RETRAINED, auc=auc, retrained=retrained)
    for model in data["models"]:
        for task in "ab":
            data["membership"][model][task]["loss"] |= {"error": error, "samples": 10}
    found = verdict(data)["attack"]
    assert found["word"] == word
    assert (found["level"] == "unknown") == (word == "too few samples to tell")


def test_too_few_samples_are_named_even_of_one_task() -> None:
    data = numbers(RETRAINED)
    data["membership"]["unlearned"]["b"]["loss"] = {
        "auc": 0.8,
        "error": (21 / 1200) ** 0.5,
        "samples": 10,
    }
    said = verdict(data)["text"]
    assert "by the loss of task b the AUC is 0.80 with 10 samples of either kind" in said
    assert "chance alone gives 0.50 ± 0.33." in said
    assert "better than chance" not in said


def test_a_fall_that_retraining_shares_is_no_damage() -> None:
    data = numbers((0.8, 1.0, 0.72))
    assert verdict(data)["kept"]["word"] == "some damage"
    for task in "ab":
        data["scores"]["retrained"]["test"][task] = 0.72
    assert verdict(data)["kept"]["word"] == "kept"


def test_the_slack_of_a_forget_score_is_its_standard_error() -> None:
    """√(0.8 · 0.2 / 400) = 0.02; with 25 samples 0.08."""
    data = numbers((0.75, 1.0, 0.8))
    assert verdict(data)["removal"]["word"] == "over-forgotten"
    assert verdict(data)["over_forgotten"] == ["a", "b"]
    data["request"]["samples"]["forget"] = 25
    assert verdict(data)["removal"]["word"] == "removed"


def test_in_the_partial_case_the_other_tasks_of_the_forget_data_must_stay() -> None:
    kept = numbers(RETRAINED, retrained=False, targets=("a",), other=(1.0, 1.0, 0.8))
    lost = numbers(RETRAINED, retrained=False, targets=("a",), other=(0.7, 1.0, 0.8))
    assert verdict(kept)["kept"]["word"] == "kept"
    assert verdict(lost)["kept"]["word"] == "damaged"
    assert "the forget data's other tasks, task b: from 1.000 to 0.700" in verdict(lost)["text"]
    assert "to forget 400 samples from the task a." in verdict(kept)["text"]


def test_single_samples_are_mentioned_only_where_the_mean_hides_them() -> None:
    data = numbers(RETRAINED)
    drift = data["drift"]["unlearned"]["retain"]
    drift["a"], drift["b"] = {"mean": 2.0, "worst_mean": 2.0}, {"mean": -0.1, "worst_mean": 0.5}
    said = verdict(data)["kept"]["detail"]
    assert said.endswith("the worst 1 % of losses rose by 0.5 (task b), the mean changed by -0.1.")
    for mean, worst in ((0.0, 0.0), (2.0, 2.0), (-1.0, 0.0)):
        drift["a"] = drift["b"] = {"mean": mean, "worst_mean": worst}
        assert "Single retained samples" not in verdict(data)["text"]


def test_a_target_without_labels_is_not_judged() -> None:
    data = numbers(RETRAINED)
    for model in data["models"]:
        data["scores"][model]["forget"]["b"] = None
    assert verdict(data)["removal"]["word"] == "removed" and "b from" not in verdict(data)["text"]
    for model in data["models"]:
        data["scores"][model]["forget"]["a"] = None
    found = verdict(data)
    assert (found["removal"]["level"], found["over_forgotten"]) == ("unknown", [])
    assert (
        found["headline"] == "Whether the data are forgotten cannot be told, but the rest is kept."
    )


def test_scores_that_never_differed_show_nothing() -> None:
    data = numbers(RETRAINED)
    for split in ("original", "unlearned", "retrained"):
        data["scores"][split]["forget"] = {"a": 0.8, "b": 0.8}
    found = verdict(data)
    assert found["removal"]["level"] == "unknown"
    assert found["headline"].startswith("Whether the data are forgotten cannot be told")


# ---- a removed class -----------------------------------------------------------------------------


def of_class(
    unlearned: tuple[float, float, float], retrained: bool = False, share: float | None = 0.1
) -> dict[str, Any]:
    """Numbers of a class removed from task a, one of ten."""
    data = numbers(unlearned, retrained, targets=("a",), auc=0.9, other=(1.0, 1.0, 0.8))
    data["request"] |= {"removal": "class", "chance": {"a": 0.1}, "share": {"a": share}}
    return data


@pytest.mark.parametrize(
    ("forget", "word"), [(0.0, "removed"), (0.1, "removed"), (0.4, "partly removed"), (0.8, "not removed")]
)  # fmt: skip
def test_a_class_is_to_fall_to_chance_not_to_the_score_of_test_data(
    forget: float, word: str
) -> None:
    found = verdict(of_class((forget, 1.0, 0.8)))
    assert found["removal"]["word"] == word
    assert "(reference 0.100)" in found["text"] and found["over_forgotten"] == []
    assert "chance stands for" in found["text"]
    as_instances = of_class((forget, 1.0, 0.8))
    as_instances["request"]["removal"] = "instance"
    assert "(reference 0.800)" in verdict(as_instances)["text"]


def test_a_retrained_model_says_what_becomes_of_a_class() -> None:
    data = of_class((0.0, 1.0, 0.8), retrained=True)
    data["scores"]["retrained"]["forget"]["a"] = 0.0
    data["membership"]["retrained"]["a"]["loss"]["auc"] = 0.95
    found = verdict(data)
    assert "(reference 0.000)" in found["text"]
    assert found["removal"]["word"] == "removed" and found["attack"]["word"] == "not told apart"
    data["membership"]["retrained"]["a"]["loss"]["auc"] = 0.6
    assert verdict(data)["attack"]["word"] == "told apart"


def test_without_one_an_attack_on_a_class_is_not_judged() -> None:
    found = verdict(of_class((0.0, 1.0, 0.8)))["attack"]
    assert (found["level"], found["word"]) == ("unknown", "not judged")


def test_a_target_s_test_score_may_lose_the_class_that_test_data_hold() -> None:
    assert verdict(of_class((0.1, 1.0, 0.71)))["kept"]["word"] == "kept"
    assert verdict(of_class((0.1, 1.0, 0.67)))["kept"]["word"] == "some damage"
    assert verdict(of_class((0.1, 1.0, 0.71), share=0.0))["kept"]["word"] == "some damage"
    assert verdict(of_class((0.1, 1.0, 0.71), share=None))["kept"]["word"] == "some damage"
    other = of_class((0.1, 1.0, 0.8))
    other["scores"]["unlearned"]["test"]["b"] = 0.71  # no target: all of it is to stay
    assert verdict(other)["kept"]["word"] == "some damage"
