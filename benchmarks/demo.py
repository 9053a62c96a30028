"""Unlearning on real data: forget handwritten digits from a multi-task net, beside never having seen them.

    python -m benchmarks.demo [--seed S] [--out DIR] [--quick]

A shared-backbone net memorises scenes of two overlapping digits (`benchmarks.scenes`: tasks left, right, mask). Then a
forget set F is unlearned, *full-task* (F from every task) and *partial-task* (F from `left` only; (F, right) and
(F, mask) are then data to keep), by OrthoGrad, GradDiff and gradient ascent, and each result is set beside the net
retrained from scratch without that supervision. It prints one table and writes `unlearning.json` and `unlearning.png`.

Every method gets the same care: the same number of (alpha, lr) settings, the same batches, plain SGD on a direction
clipped to one global norm (which keeps orthogonality). A run stops when its mean forget score over the target tasks is
down to the original's score on validation scenes, or at the step limit. The setting that counts is the one with the
lowest UIS on the validation scenes, among those that reached the level; test scenes serve the final table alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mtu_fast as mtu
from benchmarks.data import concat
from benchmarks.measure import interleaved, peak_memory
from benchmarks.plots import plot_unlearning, text_table
from benchmarks.scenes import TASKS, Net, Scenes, make_scenes, scene_losses, scene_scores
from mtu_fast import metrics, reference

REQUESTS: dict[str, tuple[str, ...]] = {"full": TASKS, "partial": ("left",)}
METHODS = {"OrthoGrad": "orthograd", "GradDiff": "graddiff", "Ascent": "ascent"}  # names here, and in the reference
Table = dict[str, dict[str, float]]  # {split: {task: score}}
Grid = tuple[tuple[float, float], ...]  # (alpha, lr)


@dataclass(frozen=True)
class Setting:
    """How much of everything; the search tables hold (alpha, lr), equally many for each method."""

    sizes: dict[str, int] = field(default_factory=lambda: {"train": 400, "validation": 200, "test": 298})
    forget: int = 40  # scenes
    epochs: int = 60
    batch: int = 32  # scenes of a training step, and of the retain side of an unlearning step
    forget_batch: int = 16
    steps: int = 160  # at most
    every: int = 2  # steps between evaluations
    clip: float = 0.1  # global norm of a direction
    width: int = 24  # channels of the net
    rounds: int = 3  # timed
    memory: bool = True  # measured, in processes of their own
    protective: Grid = ((0.5, 0.2), (0.7, 0.4), (0.8, 0.4))  # OrthoGrad and GradDiff
    ascent: Grid = ((0.0, 0.02), (0.0, 0.05), (0.0, 0.1))

    def grid(self, method: str) -> Grid:
        """The (alpha, lr) that are tried for a method."""
        return self.ascent if method == "Ascent" else self.protective


QUICK = Setting(steps=80, rounds=1, memory=False, protective=((0.5, 0.4),), ascent=((0.0, 0.05),))

# ---- training -------------------------------------------------------------------------------------------------------


def train(
    data: Scenes, setting: Setting, seed: int, bar: tqdm[Any], present: Mapping[str, Tensor] | None = None
) -> Net:
    """A net trained on `data` from the initial weights of `seed`; `present` {task: [N] bool}: labels that exist."""
    torch.manual_seed(seed)
    model, generator = Net(setting.width), torch.Generator().manual_seed(seed)
    known = {task: torch.ones(len(data), dtype=torch.bool) for task in TASKS} | dict(present or {})
    optimizer = torch.optim.Adam(model.parameters())
    total = setting.epochs * -(-len(data) // setting.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=total)
    for _ in range(setting.epochs):
        for index in torch.randperm(len(data), generator=generator).split(setting.batch):
            batch = data[index]
            losses = scene_losses(model(batch.image), batch.labels)
            weights = {task: known[task][index] / known[task][index].sum().clamp(min=1) for task in TASKS}
            optimizer.zero_grad()
            torch.stack([losses[task] @ weights[task] for task in TASKS]).sum().backward()
            optimizer.step()
            schedule.step()
        bar.update()
    return model


# ---- unlearning -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One unlearning run: its setting, how it went, its model and the scores that decide."""

    alpha: float
    lr: float
    reached: bool
    steps: int
    history: list[dict[str, Any]]
    model: Net
    uis_validation: float = float("nan")

    def summary(self) -> dict[str, Any]:
        """All but history and model."""
        return {name: value for name, value in vars(self).items() if name not in ("history", "model")}


def draw(
    parts: Mapping[str, Scenes], targets: tuple[str, ...], setting: Setting, generator: torch.Generator
) -> tuple[Scenes, dict[str, Tensor]]:
    """One step's batch, retain scenes first, and its mask {task: [N] bool}: True on (forget scene, target task)."""
    sides = (("retain", setting.batch), ("forget", setting.forget_batch))
    retain, forget = (parts[s][torch.randperm(len(parts[s]), generator=generator)[:n]] for s, n in sides)
    last = torch.arange(len(retain) + len(forget)) >= len(retain)
    return concat(retain, forget), {task: last if task in targets else torch.zeros_like(last) for task in TASKS}


def unlearn(
    original: Net, parts: Mapping[str, Scenes], targets: tuple[str, ...], name: str, alpha: float, lr: float,
    level: float, setting: Setting, seed: int, bar: tqdm[Any],
) -> Run:  # fmt: skip
    """Unlearn parts["forget"] from the target tasks until their mean forget score is at most `level`."""
    model, generator = copy.deepcopy(original), torch.Generator().manual_seed(seed)
    engine, method = mtu.Engine(model), mtu.OrthoGrad(alpha) if name == "OrthoGrad" else mtu.GradDiff(alpha)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)  # no momentum: it moves the weights even where d is zero
    history: list[dict[str, Any]] = []
    for step in range(setting.steps + 1):
        if step % setting.every == 0 or step == setting.steps:
            history.append({"step": step} | {s: scene_scores(model, parts[s]) for s in ("forget", "retain")})
            if step == setting.steps or _mean_of(history[-1]["forget"], targets) <= level:
                break
        batch, mask = draw(parts, targets, setting, generator)
        optimizer.zero_grad()
        engine.backward(scene_losses(model(batch.image), batch.labels), method, forget=mask)
        nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
        optimizer.step()
        bar.update()
    return Run(alpha, lr, _mean_of(history[-1]["forget"], targets) <= level, step, history, model)


def _mean_of(scores: Mapping[str, float], targets: tuple[str, ...]) -> float:
    return sum(scores[task] for task in targets) / len(targets)


def search(
    original: Net, parts: Mapping[str, Scenes], targets: tuple[str, ...], name: str, setting: Setting, seed: int,
    bar: tqdm[Any],
) -> list[Run]:  # fmt: skip
    """Every setting of a method's table, the one that counts first: level reached, then lowest validation UIS."""
    before = {"forget": scene_scores(original, parts["forget"]), "test": scene_scores(original, parts["validation"])}
    level = _mean_of(before["test"], targets)
    runs = []
    for alpha, lr in setting.grid(name):
        bar.set_postfix_str(f"{name} alpha={alpha:g} lr={lr:g}, {len(targets)} task(s)")
        run = unlearn(original, parts, targets, name, alpha, lr, level, setting, seed, bar)
        after = {"forget": run.history[-1]["forget"], "test": scene_scores(run.model, parts["validation"])}
        run.uis_validation = metrics.uis(before, after, targets)
        runs.append(run)
        bar.update(setting.steps - run.steps)
    return sorted(runs, key=lambda run: (not run.reached, run.uis_validation))


# ---- cost -----------------------------------------------------------------------------------------------------------


def step(implementation: str, name: str, request: str, model: Net, data: Mapping[str, Scenes], setting: Setting,
         seed: int) -> Callable[[], None]:  # fmt: skip
    """One whole step of a method on a fixed batch, forward to `.grad`, by the engine ("fast") or the reference."""
    batch, mask = draw(data, REQUESTS[request], setting, torch.Generator().manual_seed(seed))
    engine, parameters = mtu.Engine(model), list(model.parameters())
    alpha = 0.0 if name == "Ascent" else 0.5  # of no influence on the cost
    method = mtu.OrthoGrad(alpha) if name == "OrthoGrad" else mtu.GradDiff(alpha)

    def fast() -> None:
        model.zero_grad()
        engine.backward(scene_losses(model(batch.image), batch.labels), method, forget=mask)

    def slow() -> None:
        model.zero_grad()
        losses = scene_losses(model(batch.image), batch.labels)
        reference.backward(parameters, losses, METHODS[name], forget=mask, alpha=alpha)

    return fast if implementation == "fast" else slow


def memory_step(implementation: str, name: str, request: str, seed: str) -> Callable[[], None]:
    """`step` on a new net, for `peak_memory`; a plain training step first loads the vendor's kernels."""
    setting, model = Setting(), Net(Setting.width)
    data = split(setting, int(seed))
    losses = scene_losses(model(data["retain"].image[:48]), data["retain"][:48].labels)
    torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    return step(implementation, name, request, model, data, setting, int(seed))


def costs(
    request: str, model: Net, data: Mapping[str, Scenes], setting: Setting, seed: int, bar: tqdm[Any]
) -> dict[str, dict[str, Any]]:
    """{method: {ms: {fast, reference}, mib: {fast, reference}}}: medians of interleaved steps; peak above the model."""
    pairs = [(name, how) for name in METHODS for how in ("fast", "reference")]
    bar.set_postfix_str(f"ms a step, {request}")
    times = interleaved({f"{n} {h}": step(h, n, request, model, data, setting, seed) for n, h in pairs}, setting.rounds)
    model.zero_grad()
    bar.update()
    found: dict[str, dict[str, Any]] = {name: {"ms": {}, "mib": {}} for name in METHODS}
    for name, how in pairs:
        bar.set_postfix_str(f"peak memory, {request}, {name} {how}")
        arguments = ("benchmarks.demo:memory_step", how, name, request, str(seed))
        found[name]["ms"][how] = times[f"{name} {how}"].median
        found[name]["mib"][how] = peak_memory(*arguments) if setting.memory else None
        bar.update()
    return found


# ---- the whole ------------------------------------------------------------------------------------------------------


def split(setting: Setting, seed: int) -> dict[str, Scenes]:
    """The splits of `seed`: forget and retain (together the training set), validation, test."""
    scenes = make_scenes(setting.sizes, seed)
    everything = scenes.pop("train")
    return {"forget": everything[: setting.forget], "retain": everything[setting.forget :]} | scenes


def table(model: Net, data: Mapping[str, Scenes]) -> Table:
    """Scores on the three splits that are reported."""
    return {name: scene_scores(model, data[name]) for name in ("forget", "retain", "test")}


def retrain(data: Mapping[str, Scenes], request: str, setting: Setting, seed: int, bar: tqdm[Any]) -> Net:
    """The ideal: trained from the same start without F (full), or without F's labels of the target tasks (partial)."""
    if request == "full":
        return train(data["retain"], setting, seed, bar)
    known = torch.arange(len(data["forget"]) + len(data["retain"])) >= len(data["forget"])
    labelled = dict.fromkeys(REQUESTS[request], known)
    return train(concat(data["forget"], data["retain"]), setting, seed, bar, labelled)


def judge(o: Table, u: Table, r: Table, targets: tuple[str, ...]) -> dict[str, Any]:
    """Every score of `mtu_fast.metrics` that compares the original, an unlearned and the retrained model."""
    tow = metrics.tow(u, r)
    return {
        "uis": metrics.uis(o, u, targets), "mean_gap": metrics.mean_gap(u, r), "gaps": metrics.gaps(u, r),
        "tow": sum(tow.values()) / len(tow), "over_forgotten": metrics.over_forgotten(u, r, targets),
    }  # fmt: skip


def experiment(setting: Setting, seed: int) -> dict[str, Any]:
    """The whole demo as one dictionary, ready for JSON."""
    data = split(setting, seed)
    with tqdm(total=3 * setting.epochs, desc="train", unit="epoch") as bar:
        original = train(concat(data["forget"], data["retain"]), setting, seed, bar)
        ideals = {request: retrain(data, request, setting, seed, bar) for request in REQUESTS}
    before = table(original, data)
    total = sum(len(setting.grid(name)) for name in METHODS) * setting.steps * len(REQUESTS)
    found: dict[str, dict[str, list[Run]]] = {}
    with tqdm(total=total, desc="unlearn", unit="step") as bar:
        for request, targets in REQUESTS.items():
            found[request] = {n: search(original, data, targets, n, setting, seed, bar) for n in METHODS}
    with tqdm(total=(1 + 2 * len(METHODS)) * len(REQUESTS), desc="cost", unit="case") as bar:
        cost = {request: costs(request, original, data, setting, seed, bar) for request in REQUESTS}
    level, requests = scene_scores(original, data["validation"]), {}
    for request, targets in REQUESTS.items():
        ideal = table(ideals[request], data)
        rows = {"original": {"scores": before} | judge(before, before, ideal, targets)}
        rows["retrained"] = {"scores": ideal} | judge(before, ideal, ideal, targets)
        for name, runs in found[request].items():
            best, scores = runs[0], table(runs[0].model, data)
            rows[name] = {"scores": scores} | judge(before, scores, ideal, targets) | cost[request][name] | {
                "chosen": best.summary(), "tried": [run.summary() for run in runs], "history": best.history,
                "parameter_shift": metrics.parameter_shift(original.parameters(), best.model.parameters()),
            }  # fmt: skip
        requests[request] = {"targets": targets, "level": _mean_of(level, targets), "models": rows}
    where = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    return {"seed": seed, "setting": asdict(setting), "versions": where, "requests": requests}


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, run, print the table, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quick", action="store_true", help="one setting a method, no memory")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    result = experiment(QUICK if options.quick else Setting(), options.seed)
    (options.out / "unlearning.json").write_text(json.dumps(result, indent=1) + "\n")
    plot_unlearning(result, options.out / "unlearning.png")
    print(f"{text_table(result)}\n\nwritten: {options.out / 'unlearning.json'}, {options.out / 'unlearning.png'}")


if __name__ == "__main__":
    main()
