"""The registry of ops is torch's dispatcher: one schema an op, to which reference, fake and kernels attach.

An op file turns a plain-torch reference, which serves every device, into an op by giving it a
schema, and attaches a fake that knows the shapes of the result. Kernels of `mtu_fast._C` attach
themselves to the same name when the extension is loaded; Triton's are attached by the op file and
imported when first called.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, update_wrapper, wraps
from importlib import import_module, resources, util
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from mtu_fast._build import outdated

NAMESPACE = "mtu_fast"
DEVICES = ("CPU", "CUDA")
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_OPS: dict[str, Op[..., Any]] = {}

P = ParamSpec("P")
T = TypeVar("T")


class Op(Generic[P, T]):
    """An op of the namespace `mtu_fast`; calling it goes through torch's dispatcher.

    Attributes:
        name: The op's name without namespace.
        reference: The plain-torch function, called directly (the truth that a kernel is measured
            against).
        check: Refuses wrong arguments by name; called first, whatever serves, and by the
            dispatcher's entry before the reference, the fake and Triton's launcher. Kernels of
            `mtu_fast._C` check the same themselves.
        triton_file: The file of `mtu_fast.kernels` that serves CUDA tensors; "" where none does.
    """

    def __init__(
        self, schema: str, reference: Callable[P, T], check: Callable[P, None] | None
    ) -> None:
        self.name = schema.partition("(")[0]
        self.reference = reference
        self.check = check
        self.triton_file = ""
        update_wrapper(self, reference)
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self._checked(reference), "CompositeExplicitAutograd")
        _OPS[self.name] = self

    def _checked(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function, its arguments checked first."""

        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> T:
            if self.check is not None:
                self.check(*args, **kwargs)
            return function(*args, **kwargs)

        return checked

    @cached_property
    def overload(self) -> Any:
        """The dispatcher's entry, `torch.ops.mtu_fast.<name>.default` (what `opcheck` takes)."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the op's kernel for the device of its arguments, or the reference where there is none."""
        if self.check is not None:
            self.check(*args, **kwargs)
        result: T = self.overload(*args, **kwargs)
        return result

    def unchecked(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The same without the first look at the arguments: whatever serves looks at them itself."""
        result: T = self.overload(*args, **kwargs)
        return result

    def fake(self, function: Callable[..., T]) -> Callable[..., T]:
        """Attach `function` as the shape rule used by tracing: empty results, no data read."""
        name, checked = f"{NAMESPACE}::{self.name}", self._checked(function)
        torch.library.register_fake(name, checked, lib=_LIBRARY)
        return function

    def triton(self, file: str) -> None:
        """Let the launcher of this op's name in `mtu_fast.kernels.<file>` serve CUDA tensors where Triton is installed.

        What the launcher returns `NotImplemented` for goes to the reference.
        """
        if util.find_spec("triton") is not None:
            self.triton_file = file
            _LIBRARY.impl(self.name, self._checked(self.launch), "CUDA")

    def launch(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the dispatcher calls for CUDA tensors: Triton's launcher, or the reference."""
        result = NotImplemented
        if not why_no_triton():
            result = getattr(import_module(f"mtu_fast.kernels.{self.triton_file}"), self.name)(
                *args, **kwargs
            )
        return self.reference(*args, **kwargs) if result is NotImplemented else result

    def has_kernel(self, device: str) -> bool:
        """Whether the dispatcher holds a kernel of ours for `device` (`"CPU"` or `"CUDA"`)."""
        return _has_kernel(self.name, device)

    def why_no_kernel(self, device: str) -> str:
        """Why the reference serves `device`; "" where a kernel does."""
        if device == "CUDA" and not torch.cuda.is_available():
            return "no CUDA device, or torch is built without CUDA"
        if device == "CUDA" and self.triton_file:
            return why_no_triton()
        if self.has_kernel(device):
            return ""
        return MISSING or f"this version has no {device} kernel for {self.name}"


@cache
def _has_kernel(name: str, device: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", device))


@dataclass(frozen=True)
class Implementation:
    """Which implementation of an op serves a device, and why no kernel does if it is the reference."""

    op: str
    device: str
    serves: str
    why: str


def define(
    schema: str, check: Callable[..., None] | None = None
) -> Callable[[Callable[P, T]], Op[P, T]]:
    """Make the decorated plain-torch function the reference of a new op `mtu_fast::<schema>`.

    Args:
        schema: The dispatcher's signature, `name(Tensor a, ...) -> Tensor`; the op must be
            functional.
        check: Called with the op's arguments before each call, to refuse what no implementation is
            for.

    Returns:
        A decorator that turns the reference, which serves every device without a kernel, into the
        op.
    """
    return lambda reference: Op(schema, reference, check)


def ops() -> dict[str, Op[..., Any]]:
    """Every op by name, all files of `mtu_fast._ops` imported."""
    package = import_module("mtu_fast._ops")
    for module in iter_modules(package.__path__):
        import_module(f"{package.__name__}.{module.name}")
    return dict(_OPS)


def implementations() -> list[Implementation]:
    """What serves each op on each device, as the dispatcher sees it."""
    return [_implementation(op, device) for op in ops().values() for device in DEVICES]


def _implementation(op: Op[..., Any], device: str) -> Implementation:
    why = op.why_no_kernel(device)
    kernel = "Triton" if device == "CUDA" and op.triton_file else "mtu_fast._C"
    return Implementation(
        op.name, device, "reference (plain torch)" if why else f"kernel ({kernel})", why
    )


@cache
def why_no_triton() -> str:
    """Why Triton's kernels cannot serve this machine's CUDA device, found by running a small one; "" if they can."""
    try:
        import_module("mtu_fast.kernels.probe").probe()
    except Exception as error:  # the import, the C compiler, the driver: each fails in its own way
        why = f"Triton does not work here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        warnings.warn(f"mtu_fast: {why}; plain torch serves.", RuntimeWarning, stacklevel=2)
        return why
    return ""


def _load_extension() -> tuple[ModuleType | None, str]:
    """The extension and "", or None and why it is absent: the note its build left, else the error of the import."""
    found = util.find_spec("mtu_fast._C")
    # before the import, which registers its kernels under whatever schemas there are now
    if found is not None and found.origin and (why := outdated(Path(found.origin))):
        return None, why
    try:
        return import_module("mtu_fast._C"), ""
    except ImportError as error:
        note = resources.files("mtu_fast") / "_C.missing"
        reason = note.read_text().strip() if note.is_file() else str(error)
        return None, f"mtu_fast._C is absent: {reason}"


EXTENSION, MISSING = _load_extension()


@cache
def announce() -> None:
    """Warn, once a process, where there are no compiled kernels, and say how to get them."""
    if EXTENSION is None:
        warnings.warn(
            f"{MISSING}. Plain torch serves: exact, but slower. `python -m mtu_fast build` compiles the kernels here.",
            RuntimeWarning,
            stacklevel=3,  # where the engine is made
        )
