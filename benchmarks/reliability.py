"""What is tried to make the package lose or crash something, and what held: `python -m benchmarks.reliability`.

    python -m benchmarks.reliability [--parts steps kills ...] [--steps 2000] [--kills 6] [--calls 1000]

    steps       many steps of some models: growth of resident memory and of what Python holds
    kills       runs of `mtu.unlearn` killed by SIGKILL and begun again, to the bits of an undisturbed run
    checkpoints checkpoint files cut at every length, with bits flipped, with each key dropped
    calls       op calls of any arguments, on 1 and 4 threads: refused by name, or the reference's numbers
    surface     public functions given arguments of wrong kinds: an error of ours that names them

Rows are written to benchmarks/results/reliability.csv, one a trial and its count; `python -m
benchmarks.tables` makes the page's table of them. Exit status 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import csv
import gc
import hashlib
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch

import mtu_fast as mtu
from mtu_fast.unlearning.loop import sealed
from tests.helpers.zoo import by_name
from tests.unlearning.loop import scene
from tests.unlearning.loop.test_checkpoint import Scene, places

RESULTS = Path(__file__).parent / "results" / "reliability.csv"
ROOT = Path(__file__).resolve().parent.parent
MODELS = ("mlp", "conv2d", "gru", "tied_language_model")
WARM = 200  # steps until allocators and plans are what they will be
ROOM = 4 << 20  # bytes that resident memory may move by itself


@dataclass(frozen=True)
class Row:
    """One kind of trial: how many were made, how many held, and what was seen."""

    part: str
    trial: str
    tried: int
    held: int
    seen: str


# ---- steps ---------------------------------------------------------------------------------------


def steps(count: int) -> Iterator[Row]:
    """Steps of each model: memory and objects after, against those after the first."""
    for name in MODELS:
        after = trained(name, WARM)
        memory, objects = resident(), held_objects()
        after(count - WARM)
        grown, more = resident() - memory, held_objects() - objects
        held = count if grown <= ROOM and more <= 50 else 0
        seen = f"{grown / 2**20:+.1f} MiB resident, {more:+d} objects after step {WARM}"
        yield Row("steps", f"steps of {name}", count, held, seen)


def trained(name: str, warm: int) -> Callable[[int], None]:
    """A function that makes more steps of a model of the zoo, the first `warm` made."""
    model, forward = by_name(name).build(tasks=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    engine = mtu.Engine(model)

    def more(count: int) -> None:
        for _step in range(count):
            losses = forward()
            mask = torch.arange(len(losses["a"])) % 2 == 0
            engine.backward(losses, mtu.OrthoGrad(0.5), forget=mask)
            optimizer.step()
            optimizer.zero_grad()

    more(warm)
    return more


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def held_objects() -> int:
    """What Python's collector knows of, rubbish aside."""
    gc.collect()
    return len(gc.get_objects())


# ---- kills ---------------------------------------------------------------------------------------

CHILD = "import sys; from benchmarks.reliability import child; child(sys.argv[1])"


def child(path: str) -> None:
    """A run with dropout, Adam and shuffling: a line at every forward, and the parameters' hash at the end."""
    torch.set_num_threads(1)

    def losses(model: torch.nn.Module, batch: object) -> object:
        print("forward", flush=True)
        return scene.losses(model, batch)  # type: ignore[arg-type]

    torch.manual_seed(3)
    model = scene.net(seed=5, dropout=0.3)
    mtu.unlearn(
        model,
        torch.optim.Adam(model.parameters(), lr=0.01),
        **scene.sides(shuffle=True, seed=7) | {"losses": losses},
        method=mtu.OrthoGrad(0.5),
        max_steps=12,
        every=3,
        checkpoint=path,
        progress=False,
    )
    print(hashlib.sha256(scene.parameters(model).numpy().tobytes()).hexdigest(), flush=True)


def run(path: Path, kill_at: int | None = None) -> list[str]:
    """The lines of a child, killed after so many of them."""
    command = [sys.executable, "-c", CHILD, str(path)]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            if len(lines) == kill_at:
                process.kill()
                break
    return lines


def kills(count: int) -> Iterator[Row]:
    """Runs that are killed at a forward drawn by chance, twice each, and begun again."""
    draw, held = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        whole = run(Path(folder, "whole.pt"))
        for i in range(count):
            path = Path(folder, f"{i}.pt")
            for _twice in range(2):
                run(path, draw.randrange(1, len(whole) - 1))
            held += run(path)[-1] == whole[-1]
    yield Row("kills", "SIGKILL twice a run, then on", count, held, "the same bits at the end")


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoints() -> Iterator[Row]:
    """A checkpoint after three steps, mutated."""
    with tempfile.TemporaryDirectory() as folder:
        path, mutated = Path(folder, "run.pt"), Path(folder, "mutated.pt")
        Scene(path).run()
        content = path.read_bytes()
        cut = sum(refused(mutated, content[:length]) for length in range(len(content)))
        yield Row("checkpoints", "cut at every length", len(content), cut, "refused by name")
        flips = sum(refused(mutated, flipped(content, seed)) for seed in range(1000))
        yield Row("checkpoints", "one bit flipped", 1000, flips, "refused by name")
        found, dropped = list(places(sealed.read(path))), 0
        for place in found:
            state = sealed.read(path)
            part = state
            for name in place[:-1]:
                part = part[name]
            del part[place[-1]]
            sealed.write(mutated, state)
            dropped += untouched(mutated)
        yield Row("checkpoints", "a key dropped", len(found), dropped, "refused, run untouched")


def flipped(content: bytes, seed: int) -> bytes:
    """One bit of it changed."""
    draw, changed = random.Random(seed), bytearray(content)
    changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def refused(path: Path, content: bytes) -> bool:
    """Whether a file of this content is refused by an error that names it."""
    path.write_bytes(content)
    try:
        sealed.read(path)
    except ValueError as error:
        return str(path) in str(error)
    return False


def untouched(path: Path) -> bool:
    """Whether a run refuses the file and is as it was."""
    tried = Scene(path)
    before = scene.parameters(tried.model)
    try:
        tried.run()
    except ValueError as error:
        same = torch.equal(scene.parameters(tried.model), before)
        return str(path) in str(error) and same and not tried.optimizer.state
    return False


# ---- calls ---------------------------------------------------------------------------------------

FUZZ = """
import sys, torch
from tests.ops import test_hostile as fuzz
torch.set_num_threads(int(sys.argv[2]))
refused, check = [0], fuzz.attempt
def attempt(function, arguments):
    found = check(function, arguments)
    refused[0] += found is None and function.__class__.__name__ == "Op"
    return found
fuzz.attempt = attempt
fuzz.hostile(int(sys.argv[1]))()
print(refused[0])
"""


def calls(count: int) -> Iterator[Row]:
    """Each thread count in a process of its own."""
    for threads in (1, 4):
        command = [sys.executable, "-c", FUZZ, str(count), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        held = count if done.returncode == 0 else 0
        seen = f"{done.stdout.strip()} refused by name, the others right" if held else "failed"
        yield Row("calls", f"op calls on {threads} threads", count, held, seen)


def surface() -> Iterator[Row]:
    """The tests' own walk, and its count."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder, "counts")
        code = (
            "import sys, pytest; from tests.surface import wrong;"
            "status = pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/surface', 'tests/test_surface.py']);"
            "open(sys.argv[1], 'w').write(str(wrong.CALLS[0])); sys.exit(status)"
        )
        command = [sys.executable, "-c", code, str(counts)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        tried = int(counts.read_text())
        held = tried if done.returncode == 0 else 0
        yield Row("surface", "wrong arguments", tried, held, "an error of ours that names it")


def main(argv: Sequence[str] | None = None) -> None:
    """Try, print, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = ("steps", "kills", "checkpoints", "calls", "surface")
    parser.add_argument("--parts", nargs="+", choices=known, default=list(known))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    made = {
        "steps": lambda: steps(given.steps),
        "kills": lambda: kills(given.kills),
        "checkpoints": checkpoints,
        "calls": lambda: calls(given.calls),
        "surface": surface,
    }
    rows = []
    for part in given.parts:
        for row in made[part]():
            print(f"{row.trial}: {row.held} of {row.tried}, {row.seen}", flush=True)
            rows.append(row)
    write(given.out, rows)
    if any(row.held < row.tried for row in rows):
        sys.exit(1)


def write(path: Path, rows: Sequence[Row]) -> None:
    """These rows in place of those of the same parts."""
    kept = []
    if path.is_file():
        with path.open(newline="") as file:
            kept = [r for r in csv.DictReader(file) if r["part"] not in {row.part for row in rows}]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows([*(r.values() for r in kept), *map(astuple, rows)])


if __name__ == "__main__":
    main()
