"""Numbers on a device that runs behind the host, read once they have arrived there: nothing waits for them."""

from __future__ import annotations

from ctypes import c_bool

import torch
from torch import Tensor

BEHIND = {"cuda"}  # types of devices that run behind the host


def runs_behind(device: torch.device) -> bool:
    """Whether a look at a number on the device waits for all that it still has to do."""
    return device.type in BEHIND


def is_host(device: torch.device) -> bool:
    """Whether a look at a number on the device waits for nothing."""
    return device.type == "cpu" and not runs_behind(device)


class Later:
    """A flag on its way to the host.

    Args:
        flag: bool `[]`.
    """

    def __init__(self, flag: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = flag
        if flag.is_cuda:
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._host.copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def is_there(self) -> bool:
        """Whether it has arrived."""
        return self._event is None or self._event.query()

    @property
    def value(self) -> bool:
        """What has arrived; read from the host's memory, by no op."""
        return c_bool.from_address(self._host.data_ptr()).value
