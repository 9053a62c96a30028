"""What an operation is drawn with: choices, parameters, schedules over the calls and words; the register of operations.

An operation is a function of a `Draw` that returns `run(step, h, ...) -> h`. Tensors are "flat" [N,
F] or "seq" [N, S, F], the samples first.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

CALLS = 4  # of one engine, at most
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Step:
    """One call: its number k and its number of samples n."""

    k: int
    n: int


Run = Callable[..., Tensor]
When = Callable[[Step], bool]
Index = Callable[[Step, int], Tensor]  # (step, size of the axis) -> int64 [size]


class Net(nn.Module):
    """All layers and loose parameters of a program, and the matrices that several operations share."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.loose, self.tied = nn.ModuleList(), nn.ParameterList(), nn.ParameterDict()


class Draw:
    """Draws one operation; the same seed gives the same operation, whatever else the program holds.

    Args:
        seed: of all that is drawn here.
        net: takes up layers and parameters.
        width: F, an even number.
        length: S.
        way: which of the operation's ways.

    Attributes:
        features: names of what the operation has in it, for the table of coverage.
        words: details for the description.
    """

    def __init__(self, seed: str, net: Net, width: int, length: int, way: str = "") -> None:
        self.rng, self.net, self.width, self.length, self.way = (
            random.Random(seed),
            net,
            width,
            length,
            way,
        )
        self.features: set[str] = set()
        self.words: list[str] = []
        self._values = torch.Generator().manual_seed(self.rng.randrange(2**31))

    def pick(self, *options: T) -> T:
        """One of the options."""
        return self.rng.choice(options)

    def say(self, word: str, *features: str) -> None:
        """A detail for the description, with the features that it stands for."""
        self.words.append(word)
        self.features.update(features)

    def choose(self, what: str, *options: str) -> str:
        """One of the options, which is said and counted as a feature "what: option"."""
        found = self.pick(*options)
        self.say(found, f"{what}: {found}")
        return found

    def normal(self, *shape: int) -> Tensor:
        """Numbers that stay the same at every call."""
        return torch.randn(shape, generator=self._values, dtype=torch.float64)

    def layer(self, layer: M) -> M:
        """The layer in float64, its parameters and running statistics away from zeros and ones."""
        layer.double()
        if isinstance(layer, _NORMS):
            layer.eps = 0.1  # positions that are all equal leave rounding where a variance is zero
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(
                    0.5 * self.normal(*p.shape)
                    + (1.0 if isinstance(layer, _NORMS) and p.dim() == 1 else 0.0)
                )
            for name, b in layer.named_buffers():
                if name.startswith("running"):
                    b.copy_(0.5 + 0.3 * self.normal(*b.shape).abs())
        self.net.layers.append(layer)
        return layer

    def linear(self, inputs: int | None = None, outputs: int | None = None) -> nn.Linear:
        """A linear layer, [F → F] by default."""
        return self.layer(
            nn.Linear(
                inputs or self.width, outputs or self.width, bias=self.pick(True, True, False)
            )
        )

    def parameter(self, *shape: int) -> nn.Parameter:
        """A parameter of no layer."""
        p = nn.Parameter(0.5 * self.normal(*shape))
        self.net.loose.append(p)
        return p

    def tied(self) -> nn.Parameter:
        """One of two matrices [F, F] that all operations and tasks share."""
        name = self.pick("u", "v")
        if name not in self.net.tied:
            values = torch.Generator().manual_seed(ord(name))
            w = torch.randn(self.width, self.width, generator=values, dtype=torch.float64)
            self.net.tied[name] = nn.Parameter(0.5 * w)
        self.say(f"weight {name}", "tied weight")
        return self.net.tied[name]

    def when(self) -> When:
        """In which calls something is on: often not in the first."""
        pattern = self.rng.choices(("1111", "0111", "0011", "0101", "1011"), (3, 4, 2, 2, 1))[0]
        self.say(
            f"on in calls {pattern}", *(["off in the first call"] if pattern[0] == "0" else [])
        )
        return lambda step: pattern[step.k] == "1"

    def index(self, repeats: bool = True) -> Index:
        """Where elements along an axis are read: in place while off, elsewhere while on."""
        when = self.when()
        how = self.choose(
            "index", "permutation", *(["repeated", "repeated in part"] if repeats else [])
        )

        def index(step: Step, size: int) -> Tensor:
            found = torch.arange(size)
            if not when(step):
                return found
            if how == "permutation":
                return torch.randperm(size)
            if how == "repeated":
                return torch.randint(size, (size,))
            found[size // 2 :] = (
                found[size // 2 :].flip(0) if size > 3 and step.k % 2 else size // 2
            )
            return found

        return index

    def axis(self, seq: bool) -> int:
        """The axis that an operation works along: samples, features, or positions where there are some."""
        found = self.pick("samples", "samples", "features", *(["positions"] if seq else []))
        self.say(f"over {found}", f"axis: {found}")
        return {"samples": 0, "positions": 1, "features": -1}[found]


_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class Operation:
    """A registered operation.

    Attributes:
        name: what it is called in descriptions and in the table of coverage.
        make: draws it; a second argument says whether tensors are "seq".
        takes: "flat", "seq" or "any".
        gives: "flat", "seq" or "same".
        inputs: how many tensors `run` takes.
        ways: what `Draw.way` may be; each is a feature of its own, and all are drawn equally often.
    """

    name: str
    make: Callable[[Draw, bool], Run]
    takes: str
    gives: str
    inputs: int
    ways: tuple[str, ...] = ("",)


OPERATIONS: dict[str, Operation] = {}


def operation(
    takes: str = "any", gives: str = "same", inputs: int = 1, ways: tuple[str, ...] = ("",)
) -> Callable[[Callable[[Draw, bool], Run]], Callable[[Draw, bool], Run]]:
    """Register an operation under its function's name."""

    def register(make: Callable[[Draw, bool], Run]) -> Callable[[Draw, bool], Run]:
        name = make.__name__.replace("_", " ")
        OPERATIONS[name] = Operation(name, make, takes, gives, inputs, ways)
        return make

    return register


def per_sample(c: Tensor, h: Tensor) -> Tensor:
    """[N] as a factor of h."""
    return c.view(-1, *[1] * (h.dim() - 1))
