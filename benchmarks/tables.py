"""Tables of README.md and docs/, made from the committed results.

    python -m benchmarks.tables [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; this rewrites what is between them.
`--check` writes nothing and exits with 1 where a table is not what the results say.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import unlearning_tables
from benchmarks.peers.table import table as peers_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = Mapping[str, str]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows)) + "\n"


def read_csv(name: str) -> list[Row]:
    """The rows of a committed results file."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def read_json(name: str) -> Any:
    """A committed results file."""
    return json.loads((RESULTS / name).read_text())


def digits(value: float) -> str:
    """Three significant digits below ten, else whole."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.0f}"


# ---- whole steps ---------------------------------------------------------------------------------

NETS = {
    "mlp": "MLP, 3 layers of 1024, N = 64",
    "transformer": "transformer, d = 256, 4 layers, 64 tokens, N = 16",
    "resnet": "ResNet-18 with GroupNorm, 64×64, N = 16",
}


def step_cost() -> str:
    """Time and memory of a whole step over the plain training step."""
    measures = ["time, mtu_fast", "time, vmap", "memory, mtu_fast", "memory, vmap"]
    head = ["over the plain step", "tasks", "rows", *measures]
    rows = []
    for name in ("step_cost_1_task.json", "step_cost_3_tasks.json"):
        for case in read_json(name)["cases"]:
            ours, vmap = case["steps"]["orthograd"], case["steps"]["vmap"]
            rows.append([
                NETS[case["model"]],
                str(case["tasks"]),
                str(case["rows"]),
                f"**{digits(ours['ratio'])}**",
                digits(vmap["ratio"]),
                f"**{digits(ours['peak_ratio'])}**",
                digits(vmap["peak_ratio"]),
            ])
    return markdown(head, rows)


def peers() -> str:
    """Time and memory of the same step by every other way."""
    return peers_table(read_csv("peers.csv")) + "\n"


def fit() -> str:
    """The largest N whose step stays within the memory given."""
    found = read_csv("fit.csv")
    ways = list(dict.fromkeys(row["way"] for row in found))
    models = list(dict.fromkeys(row["model"] for row in found))
    samples = {(row["model"], row["way"]): row for row in found}
    rows = [[model, *[_largest(samples.get((model, way))) for way in ways]] for model in models]
    return markdown(["largest N", *ways], rows)


def _largest(row: Row | None) -> str:
    if row is None:
        return "-"
    room = float(row["memory"]) - float(row["mib"])
    more = "at least " if room > float(row["memory"]) / 10 else ""
    return f"{more}{row['samples']} ({digits(float(row['mib']))} MiB)"


def scaling() -> str:
    """Time and peak memory of a transformer's step as N, T, S or the width grows."""
    found = read_csv("scaling.csv")
    keys = ("samples", "tasks", "positions", "width")
    ways = [way for way in dict.fromkeys(row["way"] for row in found) if way != "plain"]
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in found:
        cases.setdefault(tuple(row[key] for key in keys), {})[row["way"]] = row
    rows = [[*case, *[_time_and_memory(of.get(way)) for way in ways]] for case, of in cases.items()]
    return markdown(["N", "T", "S", "d", *ways], rows, left=0)


def _time_and_memory(row: Row | None) -> str:
    if row is None or not row["ratio"]:
        return "-"
    memory = f", {digits(float(row['mib']))} MiB" if row["mib"] else ""
    return digits(float(row["ratio"])) + memory


# ---- ops -----------------------------------------------------------------------------------------


def ops() -> str:
    """The newest measurement of every case of every op: the kernel over everything else."""
    newest: dict[tuple[str, str], dict[str, Row]] = {}
    for row in read_csv("ops.csv"):
        newest.setdefault((row["op"], row["case"]), {})[row["implementation"]] = row
    rows = []
    for (op, case), of in newest.items():
        kernel = of.pop("kernel", None)
        if kernel is None or not kernel["seconds"]:
            continue
        seconds = float(kernel["seconds"])
        rivals = [_rival(name, row, seconds) for name, row in of.items() if row["seconds"]]
        rows.append([
            f"`{op}`",
            case,
            f"{1e3 * seconds:.3g}",
            kernel["fraction_of_floor"] and f"{float(kernel['fraction_of_floor']):.2f}",
            "; ".join(rivals),
        ])
    return markdown(
        ["op", "case", "kernel, ms", "floor / time", "others' time over the kernel's"], rows, left=2
    )


def _rival(name: str, row: Row, seconds: float) -> str:
    return f"{name} {digits(float(row['seconds']) / seconds)}"


# ---- unlearning ----------------------------------------------------------------------------------

RUNS = [(data, request) for data in ("rooms", "digits") for request in ("full", "partial")]


def unlearning() -> str:
    """UIS of every method in 100 steps over the seeds, and a step's time."""
    results = {data: read_json(f"unlearning_{data}_100.json") for data in ("rooms", "digits")}
    times = results["rooms"]["times"]["full"]
    methods = dict.fromkeys(row["method"] for row in results["rooms"]["rows"])
    rows = []
    for method in methods:
        cells = [_uis(results[data]["rows"], request, method) for data, request in RUNS]
        time = times.get(method, {})
        ratio = f"{digits(time['ratio'])}×" if "ratio" in time else ""
        rows.append([method, *cells, f"{time['fast']:.0f}" if time else "", ratio])
    head = [f"{data}, {request}" for data, request in RUNS]
    return markdown(["UIS", *head, "ms per step, rooms", "reference"], rows)


def _uis(rows: Sequence[Mapping[str, Any]], request: str, method: str) -> str:
    chosen = [row for row in rows if row["request"] == request and row["method"] == method]
    values = [row["uis"] for row in chosen]
    if not values:
        return "-"
    star = "" if all(row.get("reached", True) for row in chosen) else "*"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}{star}"


LANGUAGE = {
    "gap": ("gap to retrained", 100, 1),
    "em_forget": ("exact, F", 100, 0),
    "em_retain": ("exact, R", 100, 0),
    "em_general": ("exact, G", 100, 0),
    "rouge_forget": ("ROUGE-L, F", 100, 0),
    "truth_forget": ("truth ratio, F", 100, 0),
    "auc": ("MIA", 100, 0),
    "category_forget": ("category, F", 100, 0),
    "ppl_retain": ("perplexity, R", 1, 2),
    "steps": ("steps", 1, 0),
}


def language(request: str) -> str:
    """What a small Llama still knows after it was to forget people, or their birthplaces: means over seeds."""
    found: dict[tuple[str, str], list[Any]] = {}
    for row in read_json("language.json")["rows"]:
        if row["request"] == request:
            found.setdefault((row["mode"], row["method"]), []).append(row)
    rows = []
    for (mode, method), of in found.items():
        star = "" if all(row.get("reached", True) for row in of) else "*"
        rows.append([f"{method}{', LoRA' if mode == 'lora' else ''}{star}", *_language_cells(of)])
    return markdown([request, *[heading for heading, _, _ in LANGUAGE.values()]], rows)


def _language_cells(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for column, (_, factor, decimals) in LANGUAGE.items():
        if column not in rows[0]:
            found.append("")
            continue
        mean = statistics.fmean(row[column] for row in rows)
        found.append(f"{factor * mean:.{decimals}f}")
    return found


# ---- reliability ---------------------------------------------------------------------------------


def reliability() -> str:
    """What was tried, how often, and how often it held."""
    rows = []
    for row in read_csv("reliability.csv"):
        rows.append([row["trial"], row["seen"], f"{int(row['tried']):,}", f"{int(row['held']):,}"])
    return markdown(["trial", "seen", "tried", "held"], rows, left=2)


# ---- where they stand ----------------------------------------------------------------------------


def measured(name: str) -> list[str]:
    """When, on what and with which torch a results file was made (its newest row)."""
    facts: Any = read_json(name) if name.endswith(".json") else read_csv(name)[-1]
    facts = facts.get("environment", facts)
    return [facts["date"][:10], facts["device"], str(facts["threads"]), facts["torch"]]


def conditions() -> str:
    """The conditions of every results file the tables are made from."""
    names = [
        "step_cost_1_task.json", "step_cost_3_tasks.json", "peers.csv", "scaling.csv", "fit.csv", "ops.csv",
        "unlearning_rooms_100.json", "unlearning_digits_100.json",
    ]  # fmt: skip
    names += ["language.json"]
    names += [f"unlearning_{data}.json" for data in unlearning_tables.results()]
    rows = [[f"[{name}](../benchmarks/results/{name})", *measured(name)] for name in names]
    return markdown(["results", "measured", "processor", "threads", "torch"], rows, left=5)


TABLES: dict[str, Callable[[], str]] = {
    "step-cost": step_cost,
    "peers": peers,
    "fit": fit,
    "scaling": scaling,
    "ops": ops,
    "unlearning": unlearning_tables.every,
    "unlearning-short": unlearning_tables.short,
    "unlearning-leaders": unlearning_tables.leaders,
    "unlearning-differences": unlearning_tables.differences,
    "unlearning-goals": unlearning_tables.reached,
    "unlearning-binds": unlearning_tables.binding,
    "unlearning-requests": unlearning_tables.requests,
    "unlearning-missing": unlearning_tables.lacking,
    "unlearning-100": unlearning,
    "language-people": partial(language, "people"),
    "language-birthplace": partial(language, "birthplace"),
    "conditions": conditions,
    "reliability": reliability,
}


def filled(text: str) -> str:
    """The text with every table as the results have it."""
    return PLACE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the tables, or check them; the process's exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(argv).check
    stale = []
    for page in PAGES:
        text = page.read_text()
        if filled(text) != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(filled(text))
    for name in stale:
        print(f"{name}: {'not as the results have it' if check else 'rewritten'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
