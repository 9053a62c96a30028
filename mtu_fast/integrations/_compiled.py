"""Models that were compiled before a loop took them."""

from __future__ import annotations

from torch import nn


def trains_compiled(model: nn.Module) -> bool:
    """Whether a module whose parameters train runs by `torch.compile`, wrapped by it or compiled in place."""
    compiled = (module for module in model.modules() if _is_compiled(module))
    return any(p.requires_grad for module in compiled for p in module.parameters())


def _is_compiled(module: nn.Module) -> bool:
    # what torch.compile(module) holds, and what module.compile() leaves
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None
