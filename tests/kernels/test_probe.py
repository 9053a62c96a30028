"""The probe runs where Triton's interpreter does, and fails where the device does not do what it is told."""

from __future__ import annotations

import pytest
import torch

kernels = pytest.importorskip("mtu_fast.kernels.probe", reason="needs Triton")


def test_the_probe_passes_in_the_interpreter() -> None:
    kernels.probe("cuda" if torch.cuda.is_available() else "cpu")
