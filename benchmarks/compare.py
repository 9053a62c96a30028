"""What changed since another revision: the steps of `benchmarks.step_cost`, this tree against that one, interleaved.

    python -m benchmarks.compare BASE [--models mlp transformer resnet] [--tasks 1 3] [--repeats K]
    [--quick]

BASE is anything git knows: HEAD, main, a hash. Its files are checked out in a temporary folder,
with `mtu_fast._C` copied where `csrc` is the same and built where it is not. Each tree runs in a
process of its own; in every round both run every step once, in turns as to who begins. A ratio is
the median over rounds of this tree's time over the base's, with half the distance between the
quartiles: below 1 is faster. What lies within the spread of 1 is no change.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.measure import KEEPING, ROOT, Times
from benchmarks.models import MODELS


@contextmanager
def checkout(base: str) -> Iterator[Path]:
    """A folder with the files of a revision and a `_C` that belongs to them.

    Yields:
        The folder, which is there until the context ends.

    Raises:
        ValueError: git does not know it, or its extension does not build.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        _run(["git", "worktree", "add", "--detach", str(tree), base], ROOT)
        try:
            if _same(ROOT / "csrc", tree / "csrc"):
                for built in (ROOT / "mtu_fast").glob("_C.*.so"):
                    shutil.copy2(built, tree / "mtu_fast")
            else:
                _run([sys.executable, "setup.py", "build_ext", "--inplace"], tree)
            yield tree
        finally:
            _run(["git", "worktree", "remove", "--force", str(tree)], ROOT)


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        )


def _same(a: Path, b: Path) -> bool:
    found = filecmp.dircmp(a, b)
    alike = not (found.left_only or found.right_only or found.diff_files or found.funny_files)
    return alike and all(_same(a / name, b / name) for name in found.common_dirs)


class Server:
    """A process that times the steps of the tree in `folder` on one model."""

    def __init__(self, folder: Path, model: str, tasks: int, quick: bool) -> None:
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / "serve.py"),
            model,
            str(tasks),
            str(quick),
        ]
        # both trees with one allocator, whatever theirs would be
        environment = os.environ | KEEPING | {"PYTHONPATH": str(folder)}
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.steps = self._line().split()

    def time(self, step: str) -> float:
        """Milliseconds of one step."""
        assert self._process.stdin is not None
        self._process.stdin.write(step + "\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(
                f"a tree's process ended with {self._process.returncode}; its error is above."
            )
        return line


def measure(
    trees: tuple[Path, Path], model: str, tasks: int, repeats: int, quick: bool
) -> dict[str, tuple[Times, Times]]:
    """{step that both have: times of this tree, of the base}, round by round."""
    with ExitStack() as stack:
        servers = [Server(tree, model, tasks, quick) for tree in trees]
        for server in servers:
            stack.callback(server.close)
        mine, theirs = servers
        rounds: dict[str, tuple[list[float], list[float]]] = {
            s: ([], []) for s in mine.steps if s in theirs.steps
        }
        for turn in range(repeats):
            for step, (ours, base) in rounds.items():
                for server, times in ((mine, ours), (theirs, base))[:: 1 if turn % 2 else -1]:
                    times.append(server.time(step))
    return {step: (Times(tuple(ours)), Times(tuple(base))) for step, (ours, base) in rounds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a line a step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", help="a git revision")
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=["mlp", "transformer", "resnet"]
    )
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--quick", action="store_true", help="tiny models: does it run, not how fast"
    )
    args = parser.parse_args(argv)
    if min(*args.tasks, args.repeats) < 1:
        parser.error("--tasks and --repeats take numbers from 1")
    with ExitStack() as stack:
        try:
            tree = stack.enter_context(checkout(args.base))
        except ValueError as error:
            parser.error(str(error))
        print(
            f"{'this tree over ' + args.base[:24]:44}{'ratio':>8}{'±':>7}{'ms':>10}{'base ms':>10}"
        )
        for model in args.models:
            for tasks in args.tasks:
                for step, (ours, base) in measure(
                    (ROOT, tree), model, tasks, args.repeats, args.quick
                ).items():
                    ratio, spread = ours.ratio(base)
                    name = f"{model}, {tasks} task(s), {step}"
                    print(
                        f"{name:44}{ratio:8.3f}{spread:7.3f}{ours.median:10.2f}{base.median:10.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
