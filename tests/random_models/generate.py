"""`model(seed)`: a random program of 3 to 10 operations, its one to three tasks, two to four calls on changing data."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# All operations: importing a module registers its own.
from tests.random_models import coupling, functions, layers, parameters, routing  # noqa: F401
from tests.random_models.draw import CALLS, OPERATIONS, Draw, Net, Operation, Run, Step
from tests.random_models.functions import PARAMETER, PARAMETER_LATER, RARE_HOOKS
from tests.random_models.losses import loss

HOOK_EVERY = 40  # models there is one of each kind of hook that may be refused
DEALT = 3  # operations of each model come from a deck, so that all are dealt equally often
SOURCES = (
    "features",
    "tokens",
    "tokens",
    "embedding",
    "embedding",
    "embedding bag",
    "image",
    "offsets",
)


@dataclass(frozen=True)
class Model:
    """A program.

    Attributes:
        seed: what it is made from.
        net: all its parameters.
        step: the losses {task: [N]} of call k.
        calls: how many calls one engine is asked.
        moves: whether parameters move between calls.
        hooked: a parameter with a hook, and the call that sets it.
        features: what is in it.
        lines: the program in words.
        names: of operations and tasks, which `model(seed, without=…)` may leave out.
    """

    seed: int
    net: nn.Module
    step: Callable[[int], dict[str, Tensor]]
    calls: int
    moves: bool
    hooked: tuple[str, int] | None
    features: frozenset[str]
    lines: tuple[str, ...]
    names: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True)
class _Line:
    """`name = operation(inputs)`; seeded by itself, so that the rest stays as it is where it is left out."""

    name: str
    seq: bool
    inputs: tuple[str, ...]
    run: Run
    words: str

    def __str__(self) -> str:
        return f"{self.name} = {self.words}"


class _Program:
    """Lines are added one by one; `pool` tells what there is to read."""

    def __init__(self, seed: int, without: Collection[str]) -> None:
        self.seed, self.without, self.net = seed, without, Net()
        self.rng = random.Random(f"{seed} program")
        self.width, self.length = self.rng.choice((4, 4, 6)), self.rng.choice((2, 2, 3, 3, 4))
        self.features: set[str] = set()
        self.pool: dict[str, bool] = {}
        self.lines: list[_Line] = []
        self.tasks: list[_Line] = []

    def draw(self, name: str, way: str = "") -> Draw:
        return Draw(f"{self.seed} {name}", self.net, self.width, self.length, way)

    def add(self, operation: Operation, way: str, seq: bool, inputs: tuple[str, ...]) -> None:
        """One more line, unless it is to be left out: its first input then stands for it where shapes allow that."""
        name = f"h{len(self.pool)}"
        gives = seq if operation.gives == "same" else operation.gives == "seq"
        self.pool[name] = gives
        if name in self.without and inputs and gives == seq:
            self.lines.append(_Line(name, gives, inputs[:1], lambda step, h, *_: h, inputs[0]))
            return
        d = self.draw(name, way)
        if way:
            d.say(way, f"{operation.name}: {way}")
        run = operation.make(d, seq)
        self.features |= d.features | {operation.name}
        words = f"{operation.name}({', '.join(inputs)})" + (
            f": {', '.join(d.words)}" if d.words else ""
        )
        self.lines.append(_Line(name, gives, inputs, run, words))


def model(seed: int, without: Collection[str] = (), calls: int | None = None) -> Model:
    """The program of this seed.

    Args:
        seed: of everything.
        without: operations (h3) and tasks (b) to leave out, to find which of them matter.
        calls: how many calls; drawn by default.
    """
    program = _Program(seed, without)
    rng = program.rng
    drawn, sizes, moves = _calls(rng)
    _body(program)
    _tasks(program)
    hooked = _parameter_hook(program)
    calls = calls or drawn
    sizes_ = sizes[:calls]
    program.features.update(
        [f"{len(program.tasks)} tasks", "N stays" if len(set(sizes_)) == 1 else "N changes"],
        ["parameters move"] if moves else [],
        ["one sample"] if 1 in sizes_ else [],
        [f"{calls} calls"],
    )
    head = (
        f"seed {seed}: N = {', '.join(map(str, sizes_))}; S = {program.length}, F = {program.width}"
    )
    lines = [
        head + ("; parameters move" if moves else ""),
        *map(str, program.lines),
        *map(str, program.tasks),
    ]
    if hooked is not None:
        lines.append(f"hook on parameter {hooked[0]} from call {hooked[1]} on")

    def step(k: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            return _run(program, Step(k, sizes[k]))

    names = tuple(line.name for line in (*program.lines, *program.tasks))
    return Model(
        seed,
        program.net,
        step,
        calls,
        moves,
        hooked,
        frozenset(program.features),
        tuple(lines),
        names,
    )


def _run(program: _Program, step: Step) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for line in (*program.lines, *program.tasks):
        torch.default_generator.manual_seed(crc32(f"{program.seed} {step.k} {line.name}".encode()))
        values[line.name] = line.run(step, *(values[name] for name in line.inputs))
    return {line.name: values[line.name] for line in program.tasks}


def _calls(rng: random.Random) -> tuple[int, list[int], bool]:
    """How many calls, N of each, and whether parameters move between them."""
    n, other = (rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 5, 6)) for _ in range(2))
    way = rng.choice(("stays", "stays", "stays", "alternates", "once more", "any"))
    sizes = {
        "stays": [n] * CALLS,
        "alternates": [n, other] * 2,
        "once more": [n, n, other, n],
        "any": [rng.choice((1, 2, 3, 4, 5, 6)) for _ in range(CALLS)],
    }
    return rng.choice((2, 2, 2, 2, 2, 3, 3, 4)), sizes[way], rng.random() < 0.4


def _body(program: _Program) -> None:
    """Sources, then operations on what there is, mostly on what came last."""
    rng = program.rng
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        kind = rng.choice(SOURCES)
        seq = kind in ("tokens", "embedding") or (kind == "features" and rng.random() < 0.5)
        _source(program, kind, seq)
    count = min(rng.randint(3, 10) for _ in range(4))
    hook = dict(enumerate(RARE_HOOKS)).get(program.seed % HOOK_EVERY)
    place = rng.randrange(count)
    for i in range(count):
        operation, way = _dealt(program.seed * DEALT + i) if i < DEALT else rng.choice(DECK)
        last = list(program.pool)[-1]
        source = last if rng.random() < 0.8 else rng.choice(list(program.pool))
        source = _fitting(program, operation, source)
        seq = program.pool[source]
        others = [name for name, kind in program.pool.items() if kind == seq]
        program.add(
            operation,
            way,
            seq,
            (source, *(rng.choice(others) for _ in range(operation.inputs - 1))),
        )
        if hook is not None and i == place:
            _follow(program, Operation(hook, RARE_HOOKS[hook], "any", "same", 1))
        if rng.random() < 0.2:
            _follow(program, _ACTIVATION)


DECK = [(operation, way) for operation in OPERATIONS.values() for way in operation.ways]


def _dealt(number: int) -> tuple[Operation, str]:
    """A card of a deck that is shuffled anew whenever it has been dealt."""
    deck, place = divmod(number, len(DECK))
    return _shuffled(deck)[place]


@lru_cache(2)
def _shuffled(deck: int) -> list[tuple[Operation, str]]:
    return random.Random(f"deck {deck}").sample(DECK, len(DECK))


def _fitting(program: _Program, operation: Operation, source: str) -> str:
    """The source, or what pooling or spreading makes of it where the operation takes the other kind."""
    seq = program.pool[source]
    if operation.takes == "any" or (operation.takes == "seq") == seq:
        return source
    change = OPERATIONS["pooled" if seq else "spread"]
    program.add(change, program.rng.choice(change.ways), seq, (source,))
    return list(program.pool)[-1]


def _follow(program: _Program, operation: Operation) -> None:
    """An operation on the last tensor."""
    name, seq = list(program.pool.items())[-1]
    program.add(operation, "", seq, (name,))


def _activation(d: Draw, seq: bool) -> Run:
    functions_: dict[str, Run] = {
        "tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu, "sigmoid": torch.sigmoid, "silu": F.silu, "elu": F.elu,
        "sine": torch.sin,
    }  # fmt: skip
    function = functions_[d.choose("activation", *functions_)]
    return lambda step, h: function(h)


_ACTIVATION = Operation("activation", _activation, "any", "same", 1)


def _source(program: _Program, kind: str, seq: bool) -> None:
    """Data through a first layer."""
    program.add(
        Operation(f"source: {kind}", _SOURCES[kind], "any", "seq" if seq else "flat", 0),
        "",
        seq,
        (),
    )


def _features(d: Draw, seq: bool) -> Run:
    layer, scale = d.linear(3), d.rng.choice((1.0, 1.0, 1.0, 0.0))
    if not scale:
        d.say("zeros in the first call", "zeros first")

    def run(step: Step) -> Tensor:
        x = torch.randn(step.n, *([d.length] if seq else []), 3, dtype=torch.float64)
        return torch.tanh(layer(x * (scale if step.k == 0 else 1.0)))

    return run


def _embedding(d: Draw, seq: bool) -> Run:
    way = d.choose("embedding", "module", "sequence first", "index", "padding")
    table = d.layer(nn.Embedding(5, d.width, padding_idx=0 if way == "padding" else None))

    def run(step: Step) -> Tensor:
        ids = torch.randint(5, (step.n, d.length))
        if way == "sequence first":
            return table(ids.T).transpose(0, 1)
        return table.weight[ids] if way == "index" else table(ids)

    return run


def _bag(d: Draw, seq: bool) -> Run:
    bag = d.layer(nn.EmbeddingBag(5, d.width, mode=d.choose("bag", "sum", "mean", "max")))
    return lambda step: bag(torch.randint(5, (step.n, 3)))


def _offsets(d: Draw, seq: bool) -> Run:
    """Bags of any size, some empty."""
    bag = d.layer(nn.EmbeddingBag(5, d.width, mode=d.choose("bag", "sum", "mean")))

    def run(step: Step) -> Tensor:
        sizes = torch.randint(0, 4, (step.n,))
        return bag(torch.randint(5, (int(sizes.sum()),)), sizes.cumsum(0) - sizes)

    return run


def _image(d: Draw, seq: bool) -> Run:
    groups, norm = (
        d.pick(1, 2),
        d.choose("image", "plain", "group norm", "instance norm", "batch norm"),
    )
    first = d.layer(nn.Conv2d(2, 4, 3, padding=1, groups=groups))
    second = d.layer(nn.Conv2d(4, d.width, 3, stride=2, groups=d.pick(1, 2)))
    norms = {
        "plain": lambda: nn.Identity(),
        "group norm": lambda: nn.GroupNorm(2, 4),
        "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
        "batch norm": lambda: nn.BatchNorm2d(4),
    }
    between, ends = d.layer(norms[norm]()), d.pick("mean", "max")

    def run(step: Step) -> Tensor:
        h = second(between(first(torch.randn(step.n, 2, 5, 5, dtype=torch.float64))).relu_())
        return h.mean((2, 3)) if ends == "mean" else F.adaptive_max_pool2d(h, 1).flatten(1)

    return run


_SOURCES = {
    "features": _features,
    "tokens": _features,
    "embedding": _embedding,
    "embedding bag": _bag,
    "image": _image,
    "offsets": _offsets,
}


def _tasks(program: _Program) -> None:
    """Losses of the last tensor, and of others before it."""
    rng, names = program.rng, list(program.pool)
    leaves = list(program.net.parameters())
    kept = [
        name
        for name in "abc"[: rng.choice((1, 1, 1, 1, 1, 2, 2, 3))]
        if name not in program.without
    ]
    for name in "abc":
        source = names[-1] if name == "a" else rng.choice(names[len(names) // 3 :])
        twin = rng.random() < 0.15
        if name not in kept:
            continue
        d = program.draw(name)
        seq = program.pool[source]
        if twin and program.tasks:
            other = program.tasks[-1]
            program.features.add("loss of two tasks")
            program.tasks.append(
                _Line(
                    name, False, (other.name,), lambda step, found: 2 * found, f"twice {other.name}"
                )
            )
            continue
        run = loss(d, seq, leaves)
        program.features |= d.features
        program.tasks.append(
            _Line(name, False, (source,), run, f"loss of {source}: {', '.join(d.words)}")
        )


def _parameter_hook(program: _Program) -> tuple[str, int] | None:
    first = program.seed % HOOK_EVERY - len(RARE_HOOKS)
    if first not in (0, 1):
        return None
    program.features.add((PARAMETER, PARAMETER_LATER)[first])
    return program.rng.choice([name for name, _ in program.net.named_parameters()]), first
