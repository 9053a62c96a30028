"""Which methods change during a run, and by which hooks."""

from __future__ import annotations

from mtu_fast.methods import Method, Scheduled

__all__ = ["Scheduled", "check_schedule"]


def check_schedule(method: Method) -> None:
    """A method with the hooks of a schedule is one that the loop calls.

    Raises:
        TypeError: it has them, and does not derive from `Scheduled`.
    """
    if isinstance(method, Scheduled):
        return
    hooks = [name for name in ("prepare", "start_epoch") if hasattr(method, name)]
    if hooks:
        raise TypeError(
            f"method: {type(method).__name__} has {' and '.join(hooks)}, which nothing would call; derive it from "
            "mtu.methods.Scheduled in place of mtu.Method, or rename them."
        )
