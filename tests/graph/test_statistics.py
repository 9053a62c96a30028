"""Running statistics under checkpointing: after a step they are what a plain step would have left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mtu_fast as mtu


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4, affine=False),
    ]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("per", ["sample", "task"])
@pytest.mark.parametrize("parts", [1, 2])
def test_as_many_updates_as_by_a_plain_step(parts: int, per: str) -> None:
    """One in the forward, and one as each part is recomputed."""
    plain, mine = net(), net()
    engine = mtu.Engine(mine)

    def losses(model: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
        for part in (model[:], model[:0]) if parts == 1 else (model[:2], model[2:]):
            x = checkpoint(part, x, use_reentrant=False) if len(part) else x
        return {"a": x.square().sum(1), "b": x.abs().sum(1)}

    for _step in range(3):
        x = torch.randn(5, 3, dtype=torch.float64)
        sum(loss.mean() for loss in losses(plain, x).values()).backward()
        engine.rows(losses(mine, x), forget=torch.arange(5) < 2, per=per)
        for (name, ours), theirs in zip(mine.named_buffers(), plain.buffers(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12), name


def test_an_error_leaves_them_as_they_were() -> None:
    model = net()
    out = checkpoint(model, torch.randn(5, 3, dtype=torch.float64), use_reentrant=False)
    before = [buffer.clone() for buffer in model.buffers()]

    def fail(_: Tensor) -> Tensor:
        raise ValueError("of the hook's own")

    out.register_hook(fail)
    with pytest.raises(ValueError, match="of the hook's own"):
        mtu.Engine(model).rows(out.square().sum(1))
    assert all(torch.equal(now, then) for now, then in zip(model.buffers(), before, strict=True))


def test_a_norm_outside_of_the_checkpoint_is_no_change() -> None:
    """Buffers are put back as they were, and the graph that saved them is still released."""
    model = net()
    engine = mtu.Engine(model)
    for _step in range(3):
        inner = model[:2](torch.randn(5, 3, dtype=torch.float64))
        out = torch.tanh(model[4](inner)) + checkpoint(model[3], inner, use_reentrant=False)
        rows = engine.rows(out.square().sum(1))
        assert bool(rows.gram().isfinite().all())
