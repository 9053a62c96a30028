"""The language benchmark in small: its facts, its texts, its scores, its runs, and what it writes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import mtu_fast as mtu
from benchmarks.data import Samples
from benchmarks.language import case as cases
from benchmarks.language import facts, model, run, scores
from benchmarks.language.case import Case
from benchmarks.language.methods import METHODS, Preference
from benchmarks.language.texts import END, IGNORED
from benchmarks.protocol import Situation
from mtu_fast.losses import npo
from tests.integrations.marks import marks

pytestmark = marks("ignore::UserWarning")


@pytest.fixture(scope="module")
def case() -> Case:
    return cases.load(0, True)


@pytest.fixture(scope="module")
def net(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.problem.net()


# ---- facts and texts -----------------------------------------------------------------------------


def test_no_name_is_used_twice_and_nothing_follows_from_it() -> None:
    people = facts.people(random.Random(0), 100)
    assert len({person[0].subject for person in people}) == 100
    again = facts.people(random.Random(1), 100)
    values = {fact.subject: fact.value for person in people for fact in person[:1]}
    other = {fact.subject: fact.value for person in again for fact in person[:1]}
    both = values.keys() & other.keys()
    assert sum(values[name] == other[name] for name in both) < len(both) / 2
    with pytest.raises(ValueError, match="at most 144"):
        facts.people(random.Random(0), 145)


def test_texts_are_read_back_and_only_what_is_said_counts(case: Case) -> None:
    told = case.told["people"]["forget"]
    batch = case.texts.samples(told)
    for n, fact in enumerate(told):
        for side, (given, said) in enumerate([
            (fact.question, fact.answer),
            (fact.before, fact.after),
        ]):
            assert case.texts.text(batch.image[n, side].tolist()[1:]) == f"{given} {said}"
            labels = batch.labels[("answer", "next")[side]][n]
            counted = labels[labels != IGNORED].tolist()
            assert case.texts.text(counted) == said and counted[-1] == END


def test_the_category_is_read_where_the_question_ends(case: Case, net: nn.Module) -> None:
    batch = case.parts["people"]["retain"][:5]
    out = net(batch.image)["category"]
    for n, end in enumerate(batch.source[:, 1].tolist()):
        changed = batch.image[n : n + 1].clone()
        changed[0, 0, end + 1 :] = 5  # what follows the question is not seen
        torch.testing.assert_close(net(changed)["category"], out[n : n + 1])


def test_requests(case: Case) -> None:
    people, one = case.told["people"], case.told["birthplace"]
    gone = {fact.subject for fact in people["forget"]}
    assert not gone & {fact.subject for fact in people["retain"]}
    assert {fact.kind.name for fact in one["forget"]} == {"birthplace"}
    assert {fact.subject for fact in one["forget"]} == gone
    assert {f.kind.name for f in one["retain"] if f.subject in gone} == {
        "craft",
        "instrument",
        "animal",
    }
    assert cases.targets("birthplace") == ("answer", "next")


# ---- scores --------------------------------------------------------------------------------------


class Told(nn.Module):
    """Says what it was told, whatever is asked: logits that pick the labels, or the token after them."""

    def __init__(self, labels: dict[str, Tensor], vocabulary: int, off: int = 0) -> None:
        super().__init__()
        self.labels, self.vocabulary, self.off = labels, vocabulary, off

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        found = {}
        for task in ("answer", "next"):
            following = self.labels[task].roll(-1, 1).clamp(min=0) + self.off
            found[task] = 20.0 * nn.functional.one_hot(following % self.vocabulary, self.vocabulary)
        groups = (self.labels["category"] + self.off) % facts.GROUPS
        found["category"] = 20.0 * nn.functional.one_hot(groups, facts.GROUPS)
        return found


def test_who_knows_all_scores_one_and_who_knows_nothing_zero(case: Case) -> None:
    data = case.parts["people"]["forget"]
    for off, expected in ((0, 1.0), (1, 0.0)):
        told = Told(data.labels, len(case.texts), off)
        assert cases.exact(told, data) == dict.fromkeys(model.TASKS, expected)
        for score in cases.likelihood(told, data).values():
            assert score == pytest.approx(expected, abs=1e-3)
    assert scores.perplexity(Told(data.labels, len(case.texts)), data) == pytest.approx(1, abs=1e-3)


def test_an_untrained_model_does_not_know(case: Case, net: nn.Module) -> None:
    told = case.told["people"]["forget"]
    ratios = scores.truth(case.texts, net, told)
    assert ratios.shape == (len(told),) and 0.5 < float(ratios.median()) < 2
    assert 0 <= scores.rouge(case.texts, net, told) < 0.9


def test_generated_answers_are_those_of_the_likeliest_tokens(case: Case) -> None:
    """A model that learned four facts by heart says them."""
    told = case.told["people"]["forget"][:4]
    data = case.texts.samples(told)
    torch.manual_seed(0)
    net = case.problem.net()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss: Any = sum(each.mean() for each in model.losses(net(data.image), data.labels).values())
        loss.backward()
        optimizer.step()
    assert cases.exact(net, data)["answer"] == 1
    assert scores.rouge(case.texts, net, told) == 1
    assert (scores.truth(case.texts, net, told) < 0.2).all()


# ---- methods -------------------------------------------------------------------------------------


def test_npo_is_that_of_sums_beside_the_frozen_original(case: Case, net: nn.Module) -> None:
    parts = case.parts["people"]
    engine = mtu.Engine(net)
    situation = Situation(
        case.problem,
        case.protocol("full"),
        engine,
        net,
        mtu.GradDiff(0.5),
        cast(Any, parts),
        model.TASKS,
        torch.Generator(),
    )
    preference = Preference()
    preference.begin(situation)
    batch: Samples = parts["train"][:6]
    mask = dict.fromkeys(model.TASKS, torch.arange(6) < 3)
    preference.prepare(batch, mask, torch.Generator())
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    losses = model.losses(net(batch.image), batch.labels)
    found = preference._preferred(losses, mask)
    sums = model.losses(net(batch.image), batch.labels, "sum")
    held = model.losses(preference.frozen(batch.image), batch.labels, "sum")
    for task in model.TASKS:
        torch.testing.assert_close(found[task][:3], npo(sums[task], held[task])[:3])
        torch.testing.assert_close(found[task][3:], losses[task][3:])


# ---- the whole -----------------------------------------------------------------------------------


def test_a_run_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--seeds", "1", "--workers", "1", "--out", str(tmp_path)]
    result = run.main([*options, "--methods", "NPO,OrthoGrad"])
    rows = result["rows"]
    assert len(rows) == 2 * (2 + 2 * 2)
    assert {row["mode"] for row in rows if row["method"] == "NPO"} == {"full", "lora"}
    for row in rows:
        assert 0 <= row["gap"] < 1 and 0 <= row["auc"] <= 1 and row["ppl_retain"] > 1
        if row["method"] == "retrained":
            assert row["gap"] == 0 and row["quality"] == 1
    assert json.loads((tmp_path / "language.json").read_text())["rows"] == rows
    assert (tmp_path / "language.png").stat().st_size > 10_000
    assert len((tmp_path / "language.csv").read_text().splitlines()) == 1 + len(rows)
    shown = capsys.readouterr().out
    assert "OrthoGrad, LoRA" in shown and "forget birthplaces" in shown


def test_a_job_does_not_depend_on_those_before_it(case: Case, net: nn.Module) -> None:
    """A process that did something else before draws the same adapters."""
    state, found = net.state_dict(), []
    for before in range(2):
        torch.manual_seed(100 + before)
        row = run.unlearn_job(0, True, "lora", cases.REQUESTS[0], "GradDiff", state, state)
        found.append({name: row[name] for name in ("gap", "auc", "steps", "alpha", "lr")})
    assert found[0] == found[1]


def test_adapters_alone_are_trained(case: Case) -> None:
    net = cases.adapted(case.problem.net(), 4)
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_every_method_is_one_of_the_engine() -> None:
    assert {"Ascent", "GradDiff", "NPO", "OrthoGrad"} <= METHODS.keys()
    for entry in METHODS.values():
        assert isinstance(entry.make(0.5), mtu.Method)
