"""What `explain` says of each parameter: where, how, what is held, and why it is slow."""

from __future__ import annotations

import torch
from torch import nn

import mtu_fast as mtu
from mtu_fast._graph.explain import Line
from tests.helpers.zoo import by_name

N = 4


def lines_of(name: str, tasks: int = 1) -> dict[str, Line]:
    model, forward = by_name(name).build(tasks, N)
    engine = mtu.Engine(model)
    engine.rows(forward())
    return {line.name: line for line in engine.explain().lines}


def test_every_parameter_has_a_line() -> None:
    for name in ("mlp", "frozen_parameters", "tied_language_model", "gru"):
        model, forward = by_name(name).build(1, N)
        engine = mtu.Engine(model)
        engine.rows(forward())
        expected = [(n, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad]
        assert [(line.name, line.shape) for line in engine.explain().lines] == expected


def test_the_table() -> None:
    model, forward = by_name("mlp").build(1, N)
    engine = mtu.Engine(model)
    engine.rows(forward())
    table = str(engine.explain()).splitlines()
    assert table[0].split() == ["parameter", "shape", "kept", "route", "MiB", "uses"]
    assert len(table) == 1 + len(list(model.parameters()))
    assert (
        table[1].startswith("backbone.0.weight")
        and "6×3" in table[1]
        and table[1].endswith("AddmmBackward0: rule")
    )
    assert "SLOW" not in str(engine.explain())


def test_uses_of_one_parameter_are_counted() -> None:
    lines = lines_of("reused_in_a_loop")
    assert lines["backbone.inside.weight"].sites == ("AddmmBackward0: rule",) * 5
    model, forward = by_name("reused_in_a_loop").build(1, N)
    engine = mtu.Engine(model)
    engine.rows(forward())
    assert "5 × AddmmBackward0: rule" in str(engine.explain())


def test_a_tied_matrix_names_both_places() -> None:
    sites = lines_of("tied_language_model")["backbone.embedding.weight"].sites
    assert {site.partition(":")[0] for site in sites} == {
        "EmbeddingBackward0",
        "MmBackward0",
    } or len(set(sites)) == 2


def test_slow_ones_say_why() -> None:
    norm = lines_of("weight_norm")["backbone.0.parametrizations.weight.original0"]
    assert norm.slow and any("pulled through" in site for site in norm.sites)
    custom = lines_of("custom_function")["backbone.beta"]
    assert custom.slow and any("one local vjp per row" in site for site in custom.sites)


def test_an_unused_parameter_is_reached_by_no_row() -> None:
    line = lines_of("frozen_parameters")["backbone.unused"]
    assert (line.kept, line.route, line.bytes, line.slow, line.sites) == (
        "-",
        "no row reaches it",
        0,
        False,
        (),
    )


def test_bytes_are_those_held_over_all_tasks() -> None:
    """Three tasks hold three times the rows of a bias."""
    one, three = (lines_of("mlp", tasks)["backbone.0.bias"].bytes for tasks in (1, 3))
    assert one == N * 6 * 8 and three == 3 * one


def test_checkpointing_is_named() -> None:
    sites = lines_of("checkpointed")["backbone.first.0.weight"].sites
    assert sites == ("ConvolutionBackward0: rule, tensors recomputed (checkpointing)",)


def test_explain_is_of_the_last_call() -> None:
    net = nn.Linear(3, 4).double()
    engine = mtu.Engine(net)
    engine.rows(net(torch.randn(N, 3, dtype=torch.float64)).sum(1))
    first = engine.explain()
    engine.rows(net(torch.randn(N, 9, 3, dtype=torch.float64)).sum((1, 2)))
    assert first != engine.explain()
    assert first.lines[0].kept == "factors" and engine.explain().lines[0].kept == "rows"
