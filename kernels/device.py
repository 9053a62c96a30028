"""What a launcher asks of the machine: the architecture that the current device is, and on which device to launch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from triton import knobs
from triton.runtime import driver

FAST_FLOAT64 = (80, 90, 100)  # tensor cores for float64: A100, H100 and H200, B200
EQUAL_FLOAT64 = (80, 90)  # of these, those where they are as fast as float32 without tensor cores


def on(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Launches inside go to the tensor's device (Triton launches on the current one)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def interpreted() -> bool:
    """Whether kernels are run by numpy on CPU tensors."""
    return bool(knobs.runtime.interpret)


def arch() -> int:
    """The current device's compute capability, 90 for 9.0; the interpreter stands for an A100."""
    return 80 if interpreted() else int(driver.active.get_current_target().arch)


def multiprocessors(tensor: torch.Tensor) -> int:
    """How many multiprocessors the tensor's device has; four where there is none."""
    return (
        torch.cuda.get_device_properties(tensor.device).multi_processor_count
        if tensor.is_cuda
        else 4
    )


def float64_dots(arch: int) -> bool:
    """Whether this Triton compiles `tl.dot` of float64 for the architecture (3.6 does not for Blackwell, 3.9 does)."""
    return arch < 100 or _TRITON >= (3, 9)


def float64_of_halves() -> bool:
    """Whether this Triton compiles `tl.dot` of half precision widened to float64 (3.6 does not, 3.9 does)."""
    return _TRITON >= (3, 9)


_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
