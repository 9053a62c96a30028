"""The model inside its wrappers, whose names of parameters are its own."""

from __future__ import annotations

from torch import nn

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def inner(model: nn.Module) -> nn.Module:
    """A model without what stands around all of it: DistributedDataParallel, DataParallel, torch.compile."""
    while (within := _within(model)) is not None:
        model = within
    return model


def _within(model: nn.Module) -> nn.Module | None:
    if isinstance(model, _WRAPPERS):
        return model.module
    # what torch.compile(model) holds; its class is imported by no program that does not compile
    return model._modules.get("_orig_mod")
