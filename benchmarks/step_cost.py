"""What an interference-free step costs, beside the plain training step on the same samples.

    benchmarks/step_cost.py [--json PATH] [--models mlp transformer resnet] [--tasks 1 3] [--repeats
                            K] [--quick] [--device cuda]

Four steps, interleaved, on one model and batch; none updates the parameters:

    plain       zero_grad, forward, sum of the tasks' mean losses, backward
    gram        forward, engine.rows(losses).gram()
    orthograd   zero_grad, forward, engine.backward(losses, OrthoGrad(0.5), forget): a quarter of the samples forgotten
    vmap        zero_grad, the same update with the Jacobian J kept: J by torch.func, J Jᵀ, the weights, Jᵀ w

The vmap step is the cheapest plain form we found: with one task `vmap(grad)`; with several, one
vmapped forward over expanded parameters and one ordinary backward a task (chunks, `jacrev`, `vjp`
under vmap and a `vmap(grad)` a task were slower or equal). Its Gram is one float32 product per
parameter tensor and pair of tasks, summed in float64. Both whole steps must leave the same `.grad`
on the model with SiLU for ReLU (see `models`), or nothing is reported.

With one task the rows are over all parameters, with several over the backbone. Times are medians of
rounds with half the distance between the quartiles, after nine calls of the engine, so that hardly a
step in which it checks itself is among them; a ratio is the median over rounds of the ratio in one
round. Memory is the peak of one ordinary step (the fourth, in which the engine does not
check itself) above the loaded model and batch, `measure.peak_memory`, with the libraries' code
loaded beforehand; on a GPU, where models and batches are larger (`models`) and TF32 is off, what
torch's allocator handed out at the peak.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: the packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.environment import environment
from benchmarks.measure import BEFORE, SETTLED, Times, interleaved, peak_memory
from benchmarks.models import MODELS, Case, build
from benchmarks.peers import ways

TOLERANCE = 1e-3  # relative distance of the two .grad in float32, on the model without kinks
# and on the timed model, where rounding may open a ReLU in one of the two forwards only
KINKS = 0.1
STEPS = ("plain", "gram", "orthograd", "vmap")

# ---- the steps -----------------------------------------------------------------------------------


def steps(case: Case) -> dict[str, Callable[[], object]]:
    """{name: the step on this case}; see the module's docstring."""
    mine, vmap = ways.ours(case), ways.vmapped(case)
    assert mine.gram is not None
    calls = (ways.plain(case).step, mine.gram, mine.step, vmap.step)
    return dict(zip(STEPS, calls, strict=True))


# ---- measuring -----------------------------------------------------------------------------------


def disagreement(case: Case, of: dict[str, Callable[[], object]]) -> float:
    """Relative distance ‖d - d'‖ / ‖d'‖ of the `.grad` that the engine and the vmap step leave."""
    found = []
    for name in ("orthograd", "vmap"):
        of[name]()
        found.append(
            torch.cat([
                p.grad.flatten() for p in case.model.parameters() if p.grad is not None
            ]).double()
        )
    case.model.zero_grad()
    ours, truth = found
    return float((ours - truth).norm() / truth.norm()) if len(ours) == len(truth) else float("inf")


def _checked(case: Case, tolerance: float, model: str) -> float:
    error = disagreement(case, steps(case))
    if not error <= tolerance:
        raise RuntimeError(
            f"{model}, {len(case.labels)} task(s): .grad of the engine and of the vmap step differ by {error:.1e} of "
            f"its norm, expected at most {tolerance:.0e}; times of a wrong step are not reported."
        )
    return error


def prepare(model: str, tasks: str, step: str, quick: str) -> Callable[[], object]:
    """The step whose memory is measured; see `peak_memory`.

    First the same step on the tiny model and a plain step on this one, so that the pages of code
    they bring in (some 40 MiB: float64 products, decompositions) are not taken for the step's
    memory. No gradients are left.
    """
    steps(build(model, int(tasks), quick=True))[step]()
    case = build(model, int(tasks), quick == "True")
    of = steps(case)
    of["plain"]()
    case.model.zero_grad()
    return of[step]


def peak_on_gpu(case: Case, step: Callable[[], object]) -> float:
    """MiB that torch's allocator hands out at the peak of an ordinary step, above model and batch (`peak_memory`)."""
    case.model.zero_grad()
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    for _ in range(BEFORE):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    case.model.zero_grad()
    return peak / 2**20


def _peaks(
    case: Case, of: dict[str, Callable[[], object]], model: str, quick: bool, device: str
) -> dict[str, float]:
    if device == "cuda":
        return {name: peak_on_gpu(case, step) for name, step in of.items()}
    tasks = str(len(case.labels))
    return {
        name: peak_memory("benchmarks.step_cost:prepare", model, tasks, name, str(quick))
        for name in of
    }


def measure(
    model: str, tasks: int, repeats: int, quick: bool, memory: bool, device: str = "cpu"
) -> dict[str, Any]:
    """Times and memory of every step on one case, each also as a ratio to the plain step.

    Raises:
        RuntimeError: the two whole steps leave different gradients.
    """
    error = _checked(build(model, tasks, quick, smooth=True, device=device), TOLERANCE, model)
    case = build(model, tasks, quick, device=device)
    with_kinks = _checked(case, KINKS, model)
    of = steps(case)
    for _ in range(SETTLED):
        of["gram"]()
    times = interleaved(of, repeats, device=device)
    peaks = _peaks(case, of, model, quick, device) if memory else {}
    size = sum(p.numel() for p in case.params.values())
    rows = tasks * len(case.inputs)
    of_steps = {
        name: _result(times[name], times["plain"], peaks.get(name), peaks.get("plain"))
        for name in of
    }
    found = {"model": model, "tasks": tasks, "rows": rows, "parameters": size}
    return found | {"grad_error": error, "grad_error_timed": with_kinks, "steps": of_steps}


def _result(
    time: Times, plain: Times, peak: float | None, base: float | None
) -> dict[str, float | None]:
    ratio, spread = time.ratio(plain)
    share = peak / base if peak is not None and base else None
    values = {"ms": time.median, "ms_spread": time.spread, "ratio": ratio, "ratio_spread": spread}
    return values | {"peak_mib": peak, "peak_ratio": share}


# ---- reporting -----------------------------------------------------------------------------------


def table(cases: Sequence[dict[str, Any]]) -> str:
    """The results as an aligned Markdown table, one line a step."""
    head = ["model", "tasks", "step", "ms", "±", "× plain", "±", "MiB", "× plain"]
    lines = [head]
    for case in cases:
        for name, s in case["steps"].items():
            memory = (
                ["-", "-"]
                if s["peak_mib"] is None
                else [f"{s['peak_mib']:.0f}", f"{s['peak_ratio'] or 0:.2f}"]
            )
            times = [
                f"{s['ms']:.1f}",
                f"{s['ms_spread']:.1f}",
                f"{s['ratio']:.2f}",
                f"{s['ratio_spread']:.2f}",
            ]
            lines.append([case["model"], str(case["tasks"]), name, *times, *memory])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    texts = (0, 2)  # to the left, figures to the right
    lines.insert(1, ["-" * w if i in texts else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    formats = [f"{{:{'<' if i in texts else '>'}{w}}}" for i, w in enumerate(widths)]
    return "\n".join(("| " + " | ".join(formats) + " |").format(*line) for line in lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=["mlp", "transformer", "resnet"]
    )
    parser.add_argument(
        "--tasks", nargs="+", type=int, default=[1, 3], help="rows per sample, a head each"
    )
    parser.add_argument("--repeats", type=int, help="rounds; 9 by default, 3 with --quick")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models: does it run, not how fast"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: with models of a GPU's size"
    )
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="times only: no child processes"
    )
    found = parser.parse_args(argv)
    found.repeats = (3 if found.quick else 9) if found.repeats is None else found.repeats
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    if found.repeats < 1 or min(found.tasks) < 1:
        parser.error(f"--repeats {found.repeats} and --tasks {found.tasks} must be at least 1")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the arguments ask for, print the table, write the JSON file.

    Raises:
        SystemExit: wrong arguments, or two steps that should agree do not.
    """
    args = _arguments(argv)
    # products already are float32 by default; convolutions are not
    torch.backends.cudnn.allow_tf32 = False
    found = environment(args.device) | {"quick": args.quick, "repeats": args.repeats, "cases": []}
    for model in args.models:
        for tasks in args.tasks:
            try:
                case = measure(model, tasks, args.repeats, args.quick, args.memory, args.device)
            except RuntimeError as error:
                raise SystemExit(f"step_cost: {error}") from error
            errors = f"{case['grad_error']:.1e} (with kinks {case['grad_error_timed']:.1e})"
            print(
                f"{model}, {tasks} task(s), {case['rows']} rows: same .grad to {errors}", flush=True
            )
            found["cases"].append(case)
            if args.json is not None:  # what is measured is kept, whatever comes next
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(found, indent=2) + "\n")
    commit = found["commit"][:10] or "unknown"
    print(
        f"\ntorch {found['torch']}, {found['threads']} threads, {found['device']}, commit {commit}\n"
    )
    print(table(found["cases"]))


if __name__ == "__main__":
    main()
