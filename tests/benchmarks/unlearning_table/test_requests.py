"""Requests to forget: their names, whose samples are gone, levels of a class."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks import unlearning_jobs
from benchmarks.requests import Request, arrange, level, parse
from benchmarks.unlearning_records import Attempt, Mode
from tests.benchmarks.unlearning_table.tiny import PROBLEM, SIZES, TINY, sources, split


@pytest.mark.parametrize(
    "request_", [Request(), Request("class", keep="64"), Request("partial", 30, "tenth", 3)]
)
def test_a_request_is_known_by_its_name(request_: Request) -> None:
    assert parse(request_.name) == request_


@pytest.mark.parametrize(
    "name", ["", "half", "full+60%", "full+0%", "class+10%", "class+x2", "full+keep-7", "full+x0"]
)
def test_requests_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected full, partial or class"):
        parse(name)


def test_requests_one_after_another_forget_different_samples() -> None:
    rounds = arrange(split(1), Request("full", 20, "tenth", 3), PROBLEM, 1)
    gone: set[int] = set()
    for turn, parts in enumerate(rounds):
        assert len(parts["forget"]) == 12
        assert not sources(parts["forget"]) & gone
        gone |= sources(parts["forget"])
        assert sources(parts["gone"]) == gone
        assert not sources(parts["retain"]) & gone
        assert len(parts["retain"]) == 60 - 12 * (turn + 1)
        assert len(parts["available"]) == round(0.1 * len(parts["retain"]))
        assert sources(parts["available"]) <= sources(parts["retain"])


@pytest.mark.parametrize("seed", [1, 5])
def test_a_class_is_forgotten_whole_and_judged_without_it(seed: int) -> None:
    whole = split(seed)
    (parts,) = arrange(whole, Request("class"), PROBLEM, seed)
    left = {name: part[:].labels["left"] for name, part in parts.items()}
    assert (left["forget"] == seed).all() and (left["held_out"] == seed).all()
    for name in ("retain", "validation", "test"):
        assert (left[name] != seed).all()
    assert len(parts["test"]) + len(parts["held_out"]) == SIZES["test"]
    assert len(parts["forget"]) == int((whole["train"][:].labels["left"] == seed).sum()) > 0
    assert sources(parts["forget"]) | sources(parts["retain"]) == sources(whole["train"])
    assert torch.equal(parts["train"][: len(parts["forget"])].source, parts["forget"][:].source)
    assert level(PROBLEM, Request("class"), {"left": 0.9}) == {"left": 0.1}


def test_a_class_of_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="are not one class a sample"):
        arrange(split(1), Request("class"), replace(PROBLEM, partial=("mask",)), 1)


def test_levels_of_a_class_are_those_of_a_guess() -> None:
    attempt = Attempt(Request("class"), "OrthoGrad", Mode.LEVELS, 1)
    parts = arrange(split(1), attempt.request, PROBLEM, 1)[0]
    torch.manual_seed(0)
    found = unlearning_jobs.levels(TINY, PROBLEM.net(), parts, attempt)
    assert found.score["left"] == 0.1
    assert found.tau["left"] == pytest.approx(math.log(10))
    assert found.tau["right"] != pytest.approx(math.log(10))
