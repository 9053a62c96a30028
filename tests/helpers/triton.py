"""Compiles what launchers launch, for GPUs that need not be there, and reads what ptxas says of it.

`compiled("tests.kernels.test_gram:SPECIMENS")` imports that mapping (name -> a function that calls
launchers on CPU tensors) in a fresh process with a driver that only knows its architecture. Every
launch is compiled, with exactly the specialisations it would have on a GPU, and nothing runs:
results are what memory held. A launch that specimens share is reported under the first.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# bytes of shared memory that a program may have
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
ROOT = Path(__file__).parents[2]
LOADS = r"\b(?:ld\.global|cp\.async\.c[ag])\.[\w.:]*"
PRODUCTS = r"\b(?:w?gmma|mma|tcgen05\.mma)\.[\w.:]+|\bfma\.rn\.f(?:32|64)\b"


@dataclass(frozen=True)
class Build:
    """One kernel as compiled for one architecture.

    Attributes:
        specimen: The name of the specimen that launched it.
        kernel: The function's name.
        arch: The compute capability, 90 for 9.0.
        warps: Warps of a program.
        registers: Registers of a thread.
        spills: Bytes of registers stored to local memory, a thread.
        shared: Bytes of shared memory, a program.
        products: The multiply-add instructions of its PTX.
        loads: Its loads from global memory; `cp.async.cg` are of 16 bytes.
    """

    specimen: str
    kernel: str
    arch: int
    warps: int
    registers: int
    spills: int
    shared: int
    products: tuple[str, ...]
    loads: tuple[str, ...]


def compiled(specimens: str, architectures: Iterable[int] = ARCHITECTURES) -> list[Build]:
    """Compile every launch of `specimens` ("module:mapping") for each architecture, in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.triton", specimens, *map(str, architectures)],
            cwd=ROOT, env={**environment, "TRITON_CACHE_DIR": cache}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(
            f"compiling {specimens} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return [
        Build(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})
        for found in json.loads(done.stdout)
    ]


def table(builds: Iterable[Build]) -> str:
    """The builds as lines of text."""
    lines = [f"{'specimen':<36} {'kernel':<16} arch warps registers spills shared  products"]
    for b in builds:
        numbers = f"{b.arch:>4} {b.warps:>5} {b.registers:>9} {b.spills:>6} {b.shared:>6}"
        lines.append(f"{b.specimen:<36} {b.kernel:<16} {numbers}  {' '.join(b.products)}")
    return "\n".join(lines)


class _Driver:
    """All that compiling asks of a device: its architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def _builds(specimens: Mapping[str, Callable[[], object]], arch: int) -> list[Build]:
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: list[Build] = []
    current = ""

    def launch(function: Any, grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **options: Any) -> None:
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                kernel = function.run(*args, grid=grid, warmup=True, **options)
            if log.getvalue():  # nothing where the same launch was compiled before
                found.append(_read(current, kernel, arch, log.getvalue()))

        return compile_only

    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True  # what comes from the cache brings no log
    driver.set_active(_Driver(arch))
    JITFunction.__getitem__ = launch
    for specimen, call in specimens.items():
        current = specimen
        call()
    return found


def _read(specimen: str, kernel: Any, arch: int, log: str) -> Build:
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores", log)
    assert registers and spills, log
    products, loads = (
        tuple(sorted(set(re.findall(what, kernel.asm["ptx"])))) for what in (PRODUCTS, LOADS)
    )
    numbers = int(registers[1]), int(spills[1]), int(kernel.metadata.shared)
    return Build(
        specimen, kernel.metadata.name, arch, kernel.metadata.num_warps, *numbers, products, loads
    )


def main(specimens: str, *architectures: str) -> None:
    """Print the builds as JSON."""
    module, _, name = specimens.partition(":")
    calls = getattr(import_module(module), name)
    print(
        json.dumps([asdict(build) for arch in architectures for build in _builds(calls, int(arch))])
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
