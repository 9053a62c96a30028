"""The fuzzer of op calls under AddressSanitizer and UBSan, on 1 and on 4 threads: `make test-sanitized`.

    python -m tools.sanitized [--calls 1000] [--threads 1 4]

The extension is compiled once with both sanitizers, in a copy of the tree in out/sanitized; a call
that reads or writes beyond a block, or overflows, ends the process and fails the command. Where the
compiler has no sanitizers the reason is printed, and nothing is run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("csrc", "mtu_fast", "kernels", "tests")
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")
FLAGS = (
    "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
)
MARK = b"__asan_init"  # what a library compiled so asks for
BUILD = "from pathlib import Path; import sys, mtu_fast._build as b; b.build(Path(sys.argv[1]))"
RUN = """
import sys, time, torch
from mtu_fast._ops import _library
calls, threads = map(int, sys.argv[1:])
assert _library.EXTENSION is not None, _library.MISSING
torch.set_num_threads(threads)
from tests.ops.test_hostile import hostile
start = time.perf_counter()
hostile(calls)()
print(f"{calls} calls on {threads} threads in {time.perf_counter() - start:.0f} s: nothing found")
"""


def runtimes() -> list[str]:
    """The sanitizers' libraries, to be loaded before Python's own; none where the compiler lacks one."""
    compiler = os.environ.get("CXX") or "c++"
    found = []
    for name in RUNTIMES:
        command = [compiler, f"-print-file-name={name}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return []
        path = done.stdout.strip()
        if not os.path.isabs(path) or not Path(path).exists():
            return []
        found.append(path)
    return found


def build(folder: Path) -> None:
    """Compile the extension in a copy of the tree, unless that of the same sources is there."""
    target = folder / "mtu_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    current = target.is_file() and target.stat().st_mtime > newest
    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, dirs_exist_ok=True)
    if current:
        return
    print("compiling with AddressSanitizer and UBSan, some minutes", flush=True)
    environment = os.environ | {"CXXFLAGS": FLAGS, "MTU_FAST_CUDA": "0", "PYTHONPATH": str(folder)}
    subprocess.run(
        [sys.executable, "-c", BUILD, str(target)], env=environment, check=True, cwd=folder
    )
    if MARK not in target.read_bytes():
        raise SystemExit(f"{target} was not compiled with AddressSanitizer")


def fuzz(folder: Path, calls: int, threads: int, preload: list[str]) -> int:
    """Run the fuzzer; its exit status."""
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": " ".join(preload),
        # Python and torch keep memory until the end; what is refused here is refused by us
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, "-c", RUN, str(calls), str(threads)]
    return subprocess.run(command, env=environment, cwd=folder, check=False).returncode


def main() -> None:
    """Build and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4])
    given = parser.parse_args()
    preload = runtimes()
    if not preload:
        print(f"skipped: the C++ compiler here has not all of {', '.join(RUNTIMES)}")
        return
    folder = ROOT / "out" / "sanitized"
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)
    failed = [n for n in given.threads if fuzz(folder, given.calls, n, preload)]
    if failed:
        sys.exit(f"found something on {failed} threads; see above")


if __name__ == "__main__":
    main()
