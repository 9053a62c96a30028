"""An engine that took steps can be copied and pickled, as the modules that hold one are by trainers."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch

import mtu_fast as mtu
from benchmarks.waits import behind
from tests.helpers.checks import trained, vector


@pytest.mark.parametrize("waits", [True, False], ids=["host waits", "host runs ahead"])
@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.3), mtu.PCGrad()], ids=["rows", "means"])
def test_a_copy_goes_on_as_the_original(method: mtu.Method, waits: bool) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    engine, mask = mtu.Engine(net), torch.arange(5) < 2

    def step(engine: mtu.Engine, x: torch.Tensor) -> torch.Tensor:
        engine.model.zero_grad()
        engine.backward(engine.model(x).square().sum(1), method, forget=mask)
        params = trained(engine.model)
        return vector([p.grad for p in params], params)

    with nullcontext() if waits else behind("cpu"):
        for _ in range(3):
            step(engine, torch.randn(5, 3))
            x = torch.randn(5, 3)
            copies = [pickle.loads(pickle.dumps(engine)), copy.deepcopy(engine)]
            found = [step(other, x) for other in copies]
            assert all(other.model is not net for other in copies)
            assert all(torch.equal(one, step(engine, x)) for one in found)
