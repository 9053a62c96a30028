"""Everything to be known of this source tree on a machine with a CUDA GPU, in nine minutes, in one folder.

    python -m benchmarks.gpu_check [--out FOLDER] [--dry-run] [--commit NAME]

    environment   GPU, driver, versions, nvcc
    build         mtu_fast._C, with nvcc where there is one, in a copy of the tree; what serves each op
    tests         pytest -m gpu, and beside it the ordinary tests of ops and kernels
    sanitizer     compute-sanitizer: memcheck, and beside it racecheck, over our kernels in every op at small sizes
    ops           microbenchmarks: rows of ops.csv
    capture       a step in a CUDA graph against the ordinary step
    step cost     whole steps of the ResNet and the transformer: step_cost.json
    tune          block sizes of the Triton kernels: tuned.py, in the place of kernels/tuned.py if they are to stay

Nothing is installed or downloaded; the tree itself is not written to. Each stage has its time, plus
what those before it left over; one that fails or takes longer is reported and the next one goes on.
Exit status 1 if any failed. The dry run walks through the same stages on the CPU with tiny sizes:
does the check itself work.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from benchmarks.environment import stamp

ROOT = Path(__file__).resolve().parent.parent
CUDA_TESTS = ("tests/ops", "tests/kernels", "tests/graph/rules", "tests/test_gpu.py")
COPIED = ("benchmarks", "csrc", "kernels", "mtu_fast", "tests")
BUILT = ("_C.*", "build", "__pycache__", ".benchmarks")
LOG_OF_A_STAGE = 1 << 20  # bytes kept of what a command printed: its end
GRACE = 5.0  # seconds for pytest to write its report when time is up
NO_TESTS = 5  # pytest's exit status
FACTS = """
import platform, sys, torch
print('python', sys.version)
print('torch', torch.__version__, 'cuda', torch.version.cuda, 'threads', torch.get_num_threads())
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
for name in ('triton', 'numpy', 'pytest', 'pytest_benchmark', 'hypothesis', 'torchjd', 'sklearn', 'ninja'):
    try:
        print(name, getattr(__import__(name), '__version__', 'there'))
    except Exception as error:
        print(name, 'absent:', error)
"""
COMPLETE = "import sys; from mtu_fast._ops import _library; sys.exit(_library.MISSING or 0)"


@dataclass(frozen=True)
class Stage:
    """Commands that run side by side, and the seconds they may take."""

    name: str
    seconds: float
    commands: tuple[tuple[str, ...], ...]
    skipped: str = ""  # why there is nothing to run


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "passed", "FAILED", "TOO LONG" or "SKIPPED"."""

    stage: str
    status: str
    seconds: float
    note: str = ""


# ---- the stages ----------------------------------------------------------------------------------


def stages(out: Path, dry: bool) -> list[Stage]:
    """What is run, in order; 530 seconds in all."""
    python = (sys.executable,)
    device = "cpu" if dry else "cuda"
    pytest = (
        *python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    )
    on_gpu, ordinary = out / "tests_gpu.xml", out / "tests_ops.xml"
    tests: tuple[tuple[str, ...], ...] = (
        (*pytest, f"--junitxml={on_gpu}", "-m", "gpu", *CUDA_TESTS),
        (*pytest, f"--junitxml={ordinary}", "-m", "not gpu", "tests/ops", "tests/kernels"),
    )
    if dry:
        few = (
            "tests/ops/test_gram_schmidt.py",
            "tests/kernels/test_probe.py",
            "-k",
            "literal or probe",
        )
        tests = (
            (*tests[0][: -len(CUDA_TESTS)], "tests/kernels/test_probe.py"),
            (*tests[1][:-2], *few),
        )
    ops = (
        *python,
        "-m",
        "benchmarks.ops",
        "--device",
        device,
        "--tested-by",
        str(on_gpu),
        str(ordinary),
    )
    some = ("--ops", "gram_schmidt") if dry else ()
    timed = (
        "--csv",
        str(out / "ops.csv"),
        "--budget",
        "0.01" if dry else "0.7",
        *(("--quick",) if dry else ()),
    )
    steps = (
        *python,
        "-m",
        "benchmarks.step_cost",
        "--device",
        device,
        "--json",
        str(out / "step_cost.json"),
    )
    models = (
        ("--models", "mlp", "--quick", "--no-memory")
        if dry
        else ("--models", "resnet", "transformer")
    )
    repeats = "1" if dry else "5"
    return [
        Stage(
            "environment",
            25,
            ((*python, "-c", FACTS), *([("nvidia-smi",)] if not dry else []), *_nvcc()),
        ),
        Stage("build", 115, (("bash", "-c", _build(dry)),)),
        Stage("tests", 140, tests),
        _sanitizer((*ops, "--check", "--quick", *some), dry),
        Stage("ops", 70, ((*ops, *timed, *some),)),
        Stage("capture", 20, (_capture(device, dry),)),
        Stage("step cost", 60, ((*steps, *models, "--tasks", "1", "--repeats", repeats),)),
        Stage("tune", 40, (_tune(out, dry),)),
    ]


def _tune(out: Path, dry: bool) -> tuple[str, ...]:
    """Block sizes of our kernels; the dry run tries those of one."""
    tune = (sys.executable, "-m", "benchmarks.tune", "--out", str(out / "tuned.py"))
    if dry:
        return ("env", "TRITON_INTERPRET=1", *tune, "--quick", "--kernels", "row", "--seconds", "5")
    return (*tune, "--seconds", "35")


def _capture(device: str, dry: bool) -> tuple[str, ...]:
    """A step in a CUDA graph; on the CPU, that steps are the same ops."""
    sizes = ("--quick", "--models", "mlp", "--tasks", "1") if dry else ("--models", "mlp", "resnet")
    return (sys.executable, "-m", "benchmarks.capture", "--device", device, *sizes)


def _sanitizer(command: tuple[str, ...], dry: bool) -> Stage:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if dry:
        return Stage("sanitizer", 60, (command,))
    # What vendors' kernels do, and calls that torch tries and takes back, are no faults of ours.
    ours = [argument for name in kernel_names() for argument in ("--kernel-name", f"kns={name}")]
    common = (*ours, "--error-exitcode", "1", *command)
    memcheck = (str(tool), "--tool", "memcheck", "--report-api-errors", "no", *common)
    commands = (memcheck, (str(tool), "--tool", "racecheck", *common))
    return Stage(
        "sanitizer",
        60,
        commands if tool else (),
        "" if tool else "compute-sanitizer is not installed here",
    )


def kernel_names() -> list[str]:
    """Parts of the (mangled) names of every kernel of ours: the namespace of those in CUDA, Triton's one by one."""
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    return ["mtu_fast", *sorted(set(re.findall(r"^ *(_\w+)\[.*\]\(", sources, re.MULTILINE)))]


def _build(dry: bool) -> str:
    """A shell line: build in the copy, say what serves each op, fail without the extension."""
    python = shlex.quote(sys.executable)
    # A dry run takes over what is built: torch's build command compiles all anew.
    what = (
        "--version"
        if dry and any((ROOT / "mtu_fast").glob("_C.*.so"))
        else "build_ext --build-lib ."
    )
    return (
        f"{python} setup.py {what} && {python} -m mtu_fast && {python} -c {shlex.quote(COMPLETE)}"
    )


def _nvcc() -> list[tuple[str, ...]]:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return [(nvcc, "--version")] if nvcc else []


# ---- running -------------------------------------------------------------------------------------


def copy_of_the_tree(folder: Path, commit: str, built: bool) -> Path:
    """The sources in `folder`, `mtu_fast.kernels` where an installation has it; what was built too if `built`."""
    ignored = BUILT[2:] if built else BUILT
    tree = folder / "tree"
    tree.mkdir()
    for path in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy2(path, tree)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*ignored))
    if not (tree / "mtu_fast" / "kernels").exists():
        (tree / "mtu_fast" / "kernels").symlink_to(Path("..") / "kernels")
    if name := commit or stamp():
        (tree / "COMMIT").write_text(name + "\n")
    return tree


def run(
    stage: Stage, tree: Path, until: float, log: IO[bytes], none_is_fine: bool = False
) -> Outcome:
    """Run a stage's commands side by side until the clock (`time.monotonic`) says `until`; their output to the log."""
    start = time.monotonic()
    if stage.skipped:
        return Outcome(stage.name, "SKIPPED", 0.0, stage.skipped)
    paths = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths}
    # into the copy: every process after the first starts sooner
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if stage.name == "sanitizer":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or memcheck sees one large allocation
    running: list[tuple[tuple[str, ...], subprocess.Popen[bytes] | None, IO[bytes]]] = []
    for command in stage.commands:
        output = tempfile.TemporaryFile()  # noqa: SIM115  closed below
        try:
            child = subprocess.Popen(
                command,
                cwd=tree,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            output.write(str(error).encode())
            running.append((command, None, output))
            continue
        running.append((command, child, output))
    statuses = [_status(child, until) for _, child, _ in running]
    for (command, _, printed), status in zip(running, statuses, strict=True):
        log.write(f"\n$ {' '.join(command)[:2000]}\n".encode())
        size = printed.seek(0, os.SEEK_END)
        printed.seek(max(0, size - LOG_OF_A_STAGE))
        log.write(printed.read())
        log.write(f"\nexit status {status}\n".encode())
        printed.close()
    log.flush()
    fine = {0, NO_TESTS} if none_is_fine else {0}
    bad = [(i, status) for i, status in enumerate(statuses) if status not in fine]
    late = any(status is None for _, status in bad)
    note = ", ".join(
        f"command {i + 1}: {'stopped' if s is None else f'exit status {s}'}" for i, s in bad
    )
    return Outcome(
        stage.name,
        "TOO LONG" if late else "FAILED" if bad else "passed",
        time.monotonic() - start,
        note,
    )


def _status(child: subprocess.Popen[bytes] | None, until: float) -> int | None:
    """Exit status, None if time was up (then interrupted, so that reports are written, and ended), 127 if not begun."""
    if child is None:
        return 127
    try:
        return child.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    for way in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(child.pid, way)
            child.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    return None


def check(todo: Sequence[Stage], out: Path, commit: str = "", dry: bool = False) -> list[Outcome]:
    """Run the stages in a copy of the tree; log and summary to `out`."""
    outcomes, until = [], time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="gpu_check_") as folder,
        (out / "gpu_check.log").open("wb") as log,
    ):
        tree = copy_of_the_tree(Path(folder), commit, built=dry)
        for stage in todo:
            until += stage.seconds
            print(f"{stage.name} ...", flush=True)
            log.write(f"\n==== {stage.name} ====\n".encode())
            outcomes.append(run(stage, tree, until, log, none_is_fine=dry))
            (out / "summary.json").write_text(
                json.dumps([asdict(each) for each in outcomes], indent=2) + "\n"
            )
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """Check this machine; returns the exit status."""
    parser = argparse.ArgumentParser(
        "benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "gpu_check", help="folder for the files left"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="the same stages on the CPU, tiny sizes"
    )
    parser.add_argument("--commit", default="", help="recorded where there is no git")
    args = parser.parse_args(argv)
    if why := _why_not(args.dry_run):
        print(f"gpu_check: {why}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    outcomes = check(stages(out, args.dry_run), out, args.commit, args.dry_run)
    print()
    for each in outcomes:
        print(f"{each.stage:14}{each.status:10}{each.seconds:7.1f} s  {each.note}")
    print(f"\n{out}: {' '.join(sorted(path.name for path in out.iterdir()))}")
    return int(any(each.status in {"FAILED", "TOO LONG"} for each in outcomes))


def _why_not(dry: bool) -> str:
    """What is lacking, and the way out; "" where nothing is."""
    try:
        import torch
    except ImportError as error:
        return (
            f"torch cannot be imported by {sys.executable}: {error}. Name the Python that has it, such as "
            "`make gpu-check PYTHON=.venv/bin/python`"
        )
    if dry or torch.cuda.is_available():
        return ""
    found = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    return f"no CUDA GPU that {found} can use; `--dry-run` tries the check itself on the CPU"


if __name__ == "__main__":
    sys.exit(main())
