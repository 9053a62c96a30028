"""Unlearning on real data: forget handwritten digits from a multi-task net, beside never having seen them.

    python -m benchmarks.demo [--seed S] [--out DIR] [--quick]

A shared-backbone net memorises scenes of two overlapping digits (`benchmarks.scenes`: tasks left,
right, mask). Then a forget set F is unlearned, *full-task* (F from every task) and *partial-task*
(F from `left` only; (F, right) and (F, mask) are then data to keep), by OrthoGrad, GradDiff and
gradient ascent, and each result is set beside the net retrained from scratch without that
supervision. It prints one table and writes `unlearning.json` and `unlearning.png`, and an audit of
OrthoGrad's run, `unlearning.html`, with its numbers in `audit_full.json` and `audit_partial.json`.
`benchmarks.protocol` gives every method the same care; `benchmarks.unlearning` tries all of them,
on more data.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import mtu_fast as mtu
from benchmarks.data import Samples
from benchmarks.demo_report import audit_run, write_report
from benchmarks.measure import interleaved, peak_memory
from benchmarks.plots import plot_unlearning, text_table
from benchmarks.protocol import (
    Entry,
    Grid,
    Problem,
    Protocol,
    Run,
    draw,
    judge,
    mean_of,
    search,
    table,
)
from benchmarks.scenes import TASKS, Net, make_scenes, scene_losses, scene_scores
from benchmarks.training import divide, retrain, train
from mtu_fast import reference
from mtu_fast.unlearning import metrics

ENTRIES = {
    "OrthoGrad": Entry("OrthoGrad", mtu.OrthoGrad, "orthograd"),
    "GradDiff": Entry("GradDiff", mtu.GradDiff, "graddiff"),
    "Ascent": Entry("Ascent", mtu.GradDiff, "ascent", family="ascent"),
}


def problem(width: int = 24) -> Problem:
    """Scenes of two digits, and the net of `width` channels that reads them."""
    return Problem(
        "digits", TASKS, ("left",), lambda: Net(width), scene_losses, scene_scores, {"left": 10, "right": 10}
    )  # fmt: skip


REQUESTS = problem().requests
GRIDS: dict[str, Grid] = {
    "protective": ((0.5, 0.2), (0.7, 0.4), (0.8, 0.4)),
    "ascent": ((0.0, 0.02), (0.0, 0.05), (0.0, 0.1)),
}


@dataclass(frozen=True)
class Setting:
    """How much of everything."""

    protocol: Protocol = field(default_factory=lambda: Protocol(grids=GRIDS))
    sizes: dict[str, int] = field(
        default_factory=lambda: {"train": 400, "validation": 200, "test": 298}
    )
    forget: int = 40  # scenes
    width: int = 24  # channels of the net
    rounds: int = 3  # timed
    memory: bool = True  # measured, in processes of their own


QUICK = Setting(
    Protocol(steps=80, grids={"protective": ((0.5, 0.4),), "ascent": ((0.0, 0.05),)}),
    rounds=1,
    memory=False,
)

# ---- cost ----------------------------------------------------------------------------------------


def step(implementation: str, name: str, request: str, model: torch.nn.Module, data: Mapping[str, Samples],
         setting: Setting, seed: int) -> Callable[[], None]:  # fmt: skip
    """One whole step of a method on a fixed batch, forward to `.grad`, by the engine ("fast") or the reference."""
    generator = torch.Generator().manual_seed(seed)
    batch, mask = draw(problem(), data, REQUESTS[request], setting.protocol, generator)
    engine, parameters = mtu.Engine(model), list(model.parameters())
    alpha = 0.0 if name == "Ascent" else 0.5  # of no influence on the cost
    method, known = ENTRIES[name].make(alpha), str(ENTRIES[name].reference)

    def fast() -> None:
        model.zero_grad()
        engine.backward(scene_losses(model(batch.image), batch.labels), method, forget=mask)

    def slow() -> None:
        model.zero_grad()
        losses = scene_losses(model(batch.image), batch.labels)
        reference.backward(parameters, losses, known, forget=mask, alpha=alpha)

    return fast if implementation == "fast" else slow


def memory_step(implementation: str, name: str, request: str, seed: str) -> Callable[[], None]:
    """`step` on a new net, for `peak_memory`; a plain training step first loads the vendor's kernels."""
    setting, model = Setting(), Net(Setting.width)
    data = split(setting, int(seed))
    losses = scene_losses(model(data["retain"].image[:48]), data["retain"][:48].labels)
    torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    return step(implementation, name, request, model, data, setting, int(seed))


def costs(
    request: str,
    model: torch.nn.Module,
    data: Mapping[str, Samples],
    setting: Setting,
    seed: int,
    bar: tqdm[Any],
) -> dict[str, dict[str, Any]]:
    """{method: {ms: {fast, reference}, mib: {fast, reference}}}: medians of interleaved steps; peak above the model."""
    pairs = [(name, how) for name in ENTRIES for how in ("fast", "reference")]
    bar.set_postfix_str(f"ms a step, {request}")
    times = interleaved(
        {f"{n} {h}": step(h, n, request, model, data, setting, seed) for n, h in pairs},
        setting.rounds,
    )
    model.zero_grad()
    bar.update()
    found: dict[str, dict[str, Any]] = {name: {"ms": {}, "mib": {}} for name in ENTRIES}
    for name, how in pairs:
        bar.set_postfix_str(f"peak memory, {request}, {name} {how}")
        arguments = ("benchmarks.demo:memory_step", how, name, request, str(seed))
        found[name]["ms"][how] = times[f"{name} {how}"].median
        found[name]["mib"][how] = peak_memory(*arguments) if setting.memory else None
        bar.update()
    return found


# ---- the whole -----------------------------------------------------------------------------------


def split(setting: Setting, seed: int) -> dict[str, Samples]:
    """The splits of `seed`: train, its parts forget and retain, validation, test."""
    scenes = make_scenes(setting.sizes, seed)
    return divide(scenes.pop("train"), setting.forget) | scenes


def experiment(setting: Setting, seed: int) -> tuple[dict[str, Any], dict[str, mtu.Audit]]:
    """The whole demo as one dictionary, ready for JSON, and the audit of OrthoGrad's run for each request."""
    data, digits, protocol = split(setting, seed), problem(setting.width), setting.protocol
    with tqdm(total=3 * protocol.epochs, desc="train", unit="epoch") as bar:
        original = train(digits, data["train"], protocol, seed, bar.update)
        ideals = {
            request: retrain(digits, data, request, protocol, seed, bar.update)
            for request in REQUESTS
        }
    before = table(digits, original, data)
    total = (
        sum(len(protocol.grids[entry.family]) for entry in ENTRIES.values())
        * protocol.steps
        * len(REQUESTS)
    )
    found: dict[str, dict[str, list[Run]]] = {}
    with tqdm(total=total, desc="unlearn", unit="step") as bar:
        for request, targets in REQUESTS.items():
            found[request] = {}
            for name, entry in ENTRIES.items():
                bar.set_postfix_str(f"{name}, {request}")
                found[request][name] = search(
                    digits, original, data, targets, entry, protocol, seed, bar.update
                )
    with tqdm(total=(1 + 2 * len(ENTRIES)) * len(REQUESTS), desc="cost", unit="case") as bar:
        cost = {request: costs(request, original, data, setting, seed, bar) for request in REQUESTS}
    level, requests, audits = scene_scores(original, data["validation"]), {}, {}
    for request, targets in REQUESTS.items():
        ideal = table(digits, ideals[request], data)
        rows = {"original": {"scores": before} | judge(before, before, ideal, targets)}
        rows["retrained"] = {"scores": ideal} | judge(before, ideal, ideal, targets)
        for name, runs in found[request].items():
            best, scores = runs[0], table(digits, runs[0].model, data)
            rows[name] = {"scores": scores} | judge(before, scores, ideal, targets) | cost[request][name] | {
                "chosen": best.summary(), "tried": [run.summary() for run in runs], "history": best.history,
                "parameter_shift": metrics.parameter_shift(original.parameters(), best.model.parameters()),
            }  # fmt: skip
        chosen, title = (
            found[request]["OrthoGrad"][0],
            f"OrthoGrad, {request}-task: forget {', '.join(targets)}",
        )
        audits[request] = audit_run(original, chosen.model, ideals[request], data, targets, chosen.history,
                                    cost[request]["OrthoGrad"], title, seed)  # fmt: skip
        requests[request] = {"targets": targets, "level": mean_of(level, targets), "models": rows}
    where = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    return {
        "seed": seed,
        "setting": asdict(setting),
        "versions": where,
        "requests": requests,
    }, audits


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, run, print the table, write JSON and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quick", action="store_true", help="one setting a method, no memory")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    result, audits = experiment(QUICK if options.quick else Setting(), options.seed)
    (options.out / "unlearning.json").write_text(json.dumps(result, indent=1) + "\n")
    plot_unlearning(result, options.out / "unlearning.png")
    written = [
        options.out / "unlearning.json",
        options.out / "unlearning.png",
        *write_report(audits, options.out),
    ]
    print(f"{text_table(result)}\n\nwritten: {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()
