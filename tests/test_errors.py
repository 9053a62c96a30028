"""Bad input: each a clear error or a defined result, `.grad` as it was to the bit, nothing left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._checks.values import all_finite
from mtu_fast._rows.grad import check_finite
from tests.helpers.checks import assert_rows, grads, same_grads, trained, truth_of

N = 4
MASK = torch.tensor([True, False, False, True])
Losses = dict[str, Tensor]


class Probe(nn.Module):
    """Backbone and head; every activation of a forward is remembered weakly."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid())
        self.heads = nn.ModuleDict({task: nn.Linear(5, 2) for task in ("a", "b")})
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Losses:
        self.seen = []
        for layer in self.backbone:
            x = layer(x)
            self.seen.append(weakref.ref(x))
        return {task: head(x).square().mean(1) for task, head in self.heads.items()}


class Bench:
    """A model with gradients in place, its engine, and a forward."""

    def __init__(self, n: int = N) -> None:
        self.model = Probe().double()
        self.engine = mtu.Engine(self.model, params=self.model.backbone.parameters())
        self.x = torch.randn(n, 3, dtype=torch.float64)
        for p in self.model.parameters():
            p.grad = torch.randn_like(p)

    def losses(self) -> Losses:
        return self.model(self.x)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """`.grad` is the same object with the same bits, and the activations of the last forward are freed."""
        params = list(self.model.parameters())
        before, objects = grads(params), [p.grad for p in params]
        yield
        assert same_grads(before, params)
        assert all(p.grad is g for p, g in zip(params, objects, strict=True))
        gc.collect()
        assert [ref() for ref in self.model.seen if ref() is not None] == []


pytestmark = pytest.mark.usefixtures("only_new_objects")


@pytest.fixture
def bench() -> Bench:
    return Bench()


def refused(
    bench: Bench, error: type[Exception], match: str, call: Callable[[Losses], Any]
) -> None:
    """`call` on fresh losses raises, leaves `.grad`, frees the graph, and the engine works on."""
    with bench.untouched():
        with pytest.raises(error, match=match) as caught:
            call(bench.losses())
        caught.value.__traceback__ = None
        del caught
    losses, params = bench.losses(), trained(bench.model.backbone)
    J = truth_of(losses, params)
    assert_rows(bench.engine.rows(losses), J, params, 1e-12)


# ---- losses --------------------------------------------------------------------------------------

BAD_LOSSES: list[tuple[str, Callable[[Losses], Any], type[Exception], str]] = [
    (
        "mean",
        lambda l: l["a"].mean(),
        ValueError,
        r"losses\['loss'\].*one number.*labels=.*reduction='none'",
    ),
    (
        "one mean",
        lambda l: {**l, "b": l["b"].mean()},
        ValueError,
        r"losses\['b'\].*found shape \(\).*reduction='none'",
    ),
    (
        "pixels",
        lambda l: l["a"][:, None].expand(4, 9),
        ValueError,
        r"\(4, 9\).*more than one value per sample.*flatten\(1\)",
    ),
    ("a column", lambda l: l["a"][:, None], ValueError, r"\(4, 1\).*loss\.squeeze\(1\)"),
    (
        "unequal",
        lambda l: {"a": l["a"], "b": l["b"][:3]},
        ValueError,
        r"lengths \{'a': 4, 'b': 3\}.*present=",
    ),
    (
        "reduced to [1]",
        lambda l: {"a": l["a"], "b": l["b"].mean()[None]},
        ValueError,
        r"lengths \{'a': 4, 'b': 1\}",
    ),
    (
        "a parameter",
        lambda _: nn.Parameter(torch.ones(4)),
        ValueError,
        r"found a parameter itself.*clone",
    ),
    ("detached", lambda l: l["a"].detach(), ValueError, r"no graph \(grad_fn is None\).*no_grad"),
    (
        "one detached",
        lambda l: {"a": l["a"], "b": l["b"].detach()},
        ValueError,
        r"losses\['b'\].*no graph",
    ),
    (
        "nan",
        lambda l: l["a"] * torch.tensor([1, torch.nan, 1, 1]),
        ValueError,
        r"non-finite.*samples \[1\].*0/0",
    ),
    (
        "inf",
        lambda l: {**l, "b": l["b"] / torch.tensor([1.0, 1, 0, 0])},
        ValueError,
        r"losses\['b'\].*samples \[2, 3\]",
    ),
    ("none", lambda l: {}, ValueError, r"found no task"),
    (
        "complex",
        lambda l: torch.complex(l["a"], l["b"]),
        TypeError,
        r"losses\['loss'\]: found torch.complex128.*real",
    ),
    ("a list", lambda l: list(l.values()), TypeError, r"found list, expected a tensor \[N\]"),
    ("a float", lambda l: {"a": 1.0}, TypeError, r"losses\['a'\]: found float"),
    ("nothing", lambda l: None, TypeError, r"found NoneType"),
]


@pytest.mark.parametrize(
    ("bad", "error", "match"), [c[1:] for c in BAD_LOSSES], ids=[c[0] for c in BAD_LOSSES]
)
@pytest.mark.parametrize("way", ["orthograd", "graddiff", "pcgrad", "rows"])
def test_bad_losses(
    bench: Bench, bad: Callable[[Losses], Any], error: type[Exception], match: str, way: str
) -> None:
    methods = {"orthograd": mtu.OrthoGrad(), "graddiff": mtu.GradDiff(), "pcgrad": mtu.PCGrad()}

    def call(losses: Losses) -> None:
        if way == "rows":
            bench.engine.rows(bad(losses))
        else:
            bench.engine.backward(bad(losses), methods[way], forget=True)

    refused(bench, error, match, call)


def test_losses_made_without_grad(bench: Bench) -> None:
    def call(_: Losses) -> None:
        with torch.no_grad():
            losses = bench.losses()
        bench.engine.backward(losses, mtu.OrthoGrad())

    refused(bench, ValueError, "no_grad", call)


def test_losses_on_two_devices(bench: Bench) -> None:
    refused(bench, ValueError, r"different devices \{'a': 'cpu', 'b': 'meta'\}.*one",
            lambda l: bench.engine.rows({"a": l["a"], "b": l["b"].to("meta")}))  # fmt: skip


def test_a_loss_that_reaches_no_parameter(bench: Bench) -> None:
    x = torch.randn(N, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="none of the engine's parameters"):
        bench.engine.rows(x.square().sum(1))


# ---- masks ---------------------------------------------------------------------------------------

BAD_MASKS: list[tuple[str, Any, type[Exception], str]] = [
    ("short", MASK[:3], ValueError, r"forget: found shape \(3,\), expected \[4\]"),
    (
        "long",
        torch.ones(5, dtype=torch.bool),
        ValueError,
        r"forget: found shape \(5,\), expected \[4\]",
    ),
    ("column", MASK[:, None], ValueError, r"forget: found shape \(4, 1\), expected \[4\]"),
    ("a task's", {"b": MASK[:2]}, ValueError, r"forget\['b'\]: found shape \(2,\), expected \[4\]"),
    ("integers", MASK.long(), TypeError, r"forget: found torch.int64, expected a boolean"),
    (
        "indices",
        torch.tensor([0, 3]),
        TypeError,
        r"for indices, mask = torch.zeros\(4, dtype=torch.bool\)",
    ),
    ("floats", {"a": MASK.double()}, TypeError, r"forget\['a'\]: found torch.float64"),
    ("a list", MASK.tolist(), TypeError, r"forget: found list"),
    (
        "unknown task",
        {"depth": MASK},
        ValueError,
        r"unknown tasks \['depth'\], expected some of \['a', 'b'\]",
    ),
    ("unknown, True", {"a": True, "seg": True}, ValueError, r"unknown tasks \['seg'\]"),
]


@pytest.mark.parametrize(
    ("mask", "error", "match"), [c[1:] for c in BAD_MASKS], ids=[c[0] for c in BAD_MASKS]
)
@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.GradDiff(), mtu.PCGrad()])
def test_bad_forget_masks(
    bench: Bench, mask: Any, error: type[Exception], match: str, method: mtu.Method
) -> None:
    refused(bench, error, match, lambda l: bench.engine.backward(l, method, forget=mask))


@pytest.mark.parametrize(
    ("present", "error", "match"),
    [
        ({"b": MASK[:2]}, ValueError, r"present\['b'\]: found shape \(2,\)"),
        ({"b": MASK.int()}, TypeError, r"present\['b'\]: found torch.int32"),
        ({"z": MASK}, ValueError, r"present: found unknown tasks \['z'\]"),
        (MASK, TypeError, r"present: found Tensor, expected \{task"),
    ],
)
def test_bad_present(bench: Bench, present: Any, error: type[Exception], match: str) -> None:
    refused(bench, error, match, lambda l: bench.engine.rows(l, present=present))


@pytest.mark.parametrize(
    "method", [mtu.OrthoGrad(0.3), mtu.GradDiff(0.3), mtu.PCGrad(), mtu.Mean()]
)
@pytest.mark.parametrize("all_of", [True, False])
@pytest.mark.parametrize("how", ["bool", "mask", "per task"])
def test_all_or_nothing_to_forget(bench: Bench, method: mtu.Method, all_of: bool, how: str) -> None:
    """Defined results: plain ascent with weight 1 - α, or plain descent with weight α."""
    mask: Any = {
        "bool": all_of,
        "mask": torch.full((N,), all_of),
        "per task": dict.fromkeys("ab", all_of),
    }[how]
    params = trained(bench.model)
    factor = {"OrthoGrad": (0.3, -0.7), "GradDiff": (0.3, -0.7), "Mean": (1.0, 1.0)}.get(
        type(method).__name__
    )
    losses = bench.losses()
    plain = torch.autograd.grad(
        sum(loss.mean() for loss in losses.values()), params, retain_graph=True
    )
    before = [p.grad.clone() for p in params]
    update = bench.engine.backward(losses, method, forget=mask)
    assert (update.roles.kind == int(all_of)).all()
    inside = len(trained(bench.model.backbone))
    for j, (p, g, old) in enumerate(zip(params, plain, before, strict=True)):
        if factor is not None:
            assert torch.allclose(p.grad - old, factor[all_of] * g, rtol=1e-9, atol=1e-12)
        elif j >= inside:  # PCGrad: forget rows are ascended; the two tasks' heads see no surgery
            assert torch.allclose(p.grad - old, -g if all_of else g, rtol=1e-9, atol=1e-12)


# ---- order of calls ------------------------------------------------------------------------------


def test_backward_twice(bench: Bench) -> None:
    rows = bench.engine.rows(bench.losses(), forget=MASK)
    rows.backward(mtu.OrthoGrad())
    with bench.untouched():
        for call in (lambda: rows.backward(mtu.OrthoGrad()), rows.gram, lambda: rows.vjp(torch.ones(2 * N)),
                     lambda: mtu.cat(rows)):  # fmt: skip
            with pytest.raises(
                RuntimeError, match=r"backward was called before.*call engine\.rows again"
            ):
                call()


def test_backward_twice_through_cat(bench: Bench) -> None:
    one, two = bench.engine.rows(bench.losses()), bench.engine.rows(bench.losses(), forget=True)
    mtu.cat(one, two).backward(mtu.OrthoGrad())
    with bench.untouched(), pytest.raises(RuntimeError, match="backward was called before"):
        one.backward(mtu.OrthoGrad())


@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.GradDiff(), mtu.PCGrad()])
@pytest.mark.parametrize("earlier", [0, 1])
def test_a_graph_twice(bench: Bench, method: mtu.Method, earlier: int) -> None:
    """The same answer on the first call of an engine, which keeps the graph for discovery, as on later ones."""
    for _call in range(earlier):
        bench.engine.rows(bench.losses())

    def call(losses: Losses) -> None:
        bench.engine.rows(losses)
        bench.engine.backward(losses, method)

    refused(
        bench, RuntimeError, r"used up by an earlier rows or backward; run the forward again", call
    )


def test_after_an_ordinary_backward(bench: Bench) -> None:
    losses = bench.losses()
    torch.autograd.grad(sum(loss.sum() for loss in losses.values()), trained(bench.model))
    with bench.untouched():
        with pytest.raises(RuntimeError, match="used up by an earlier rows or backward") as caught:
            bench.engine.rows(losses)
        caught.value.__traceback__ = None
        del losses, caught


@pytest.mark.parametrize("earlier", [0, 1])
def test_parameters_changed_after_the_forward(bench: Bench, earlier: int) -> None:
    for _call in range(earlier):
        bench.engine.rows(bench.losses())

    def call(losses: Losses) -> None:
        with torch.no_grad():
            bench.model.backbone[2].weight.mul_(1.5)
        bench.engine.backward(losses, mtu.OrthoGrad(), forget=MASK)

    refused(
        bench, RuntimeError, r"changed in place after the forward.*before anything is changed", call
    )


@pytest.mark.parametrize("earlier", [0, 1])
def test_an_activation_changed_after_the_forward(bench: Bench, earlier: int) -> None:
    layer = nn.Linear(3, 4).double()
    engine = mtu.Engine(layer)
    for _call in range(earlier):
        engine.rows(torch.sigmoid(layer(bench.x)).sum(1))
    h = torch.sigmoid(layer(bench.x))
    loss = h.sum(1)
    h.detach().mul_(2)
    with pytest.raises(RuntimeError, match="changed in place after the forward"):
        engine.rows(loss)


def step(bench: Bench) -> None:
    torch.optim.SGD(bench.model.parameters(), lr=1e-3).step()


def test_parameters_changed_between_rows_and_backward(bench: Bench) -> None:
    rows = bench.engine.rows(bench.losses())
    step(bench)
    with bench.untouched():
        for call in (
            lambda: rows.backward(mtu.OrthoGrad()),
            lambda: rows.backward(torch.ones(2 * N)),
            rows.gram,
        ):
            with pytest.raises(
                RuntimeError, match=r"parameters changed in place since these rows.*step only after"
            ):
                call()
        rows._parts.clear()


def test_parameters_changed_between_two_rows_of_one_cat(bench: Bench) -> None:
    early = bench.engine.rows(bench.losses())
    step(bench)
    late = bench.engine.rows(bench.losses(), forget=True)
    with pytest.raises(RuntimeError, match="parameters changed in place since these rows"):
        mtu.cat(early, late)


def test_parameters_changed_between_two_forwards(bench: Bench) -> None:
    """Both forwards, then a step in between, then rows of both: the older graph is out of date."""
    early = bench.losses()
    step(bench)
    bench.engine.rows(bench.losses())
    with pytest.raises(RuntimeError, match="changed in place after the forward"):
        bench.engine.rows(early)


@pytest.mark.parametrize("name", ["bias", "weight"])
def test_a_parameter_that_no_gradient_depends_on_changed_after_the_forward(name: str) -> None:
    """The first layer is in no saved tensor, so autograd does not see it move: rows are of the forward's point."""
    layer = nn.Linear(3, 4).double()
    engine, x = mtu.Engine(layer), torch.randn(N, 3, dtype=torch.float64)
    loss = layer(x).square().sum(1)
    J = truth_of({"a": loss}, trained(layer))
    with torch.no_grad():
        layer.get_parameter(name).add_(1)
    assert_rows(engine.rows(loss), J, trained(layer), 1e-12)


# ---- gradients that are not finite ---------------------------------------------------------------


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize(
    "way", ["orthograd", "orthograd per layer", "pcgrad", "graddiff", "mean", "weights"]
)
def test_finite_losses_with_infinite_gradients(earlier: int, way: str) -> None:
    """The square root of zero."""
    bench = Bench()
    head = bench.model.heads["a"]

    def losses(at_zero: bool) -> Losses:
        found = bench.losses()
        shift = found["a"].detach() * torch.tensor([0.0, 1.0 if at_zero else 0.0, 0.0, 0.0])
        return {**found, "a": (found["a"] - shift).clamp(min=0).sqrt()}

    assert head is not None
    for _call in range(earlier):
        bench.engine.rows(losses(False))
    methods: dict[str, Any] = {
        "orthograd": mtu.OrthoGrad(), "orthograd per layer": mtu.OrthoGrad(granularity="layer"), "pcgrad": mtu.PCGrad(),
        "graddiff": mtu.GradDiff(), "mean": mtu.Mean(), "weights": torch.ones(2 * N),
    }  # fmt: skip

    def call(_: Losses) -> None:
        bench.engine.backward(losses(True), methods[way], forget=MASK)

    refused(bench, RuntimeError, r"not finite", call)


def test_the_row_that_is_not_finite_is_named(bench: Bench) -> None:
    found = bench.losses()
    scale = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    rows = bench.engine.rows({"a": found["a"], "b": (found["b"] * scale).sqrt()})
    with pytest.raises(
        RuntimeError, match=r"\[\('b', 2\)\] is not finite although its loss is.*present"
    ):
        rows.gram()


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize("which", ["bias", "weight"])
def test_an_infinite_gradient_that_all_rows_share(earlier: int, which: str) -> None:
    bench = Bench()
    parameter = next(p for name, p in bench.model.named_parameters() if name.endswith(which))

    def losses(power: float) -> Losses:
        found = bench.losses()
        return {**found, "b": found["b"] * (1 + (parameter.sum() * 0).pow(power))}

    for _call in range(earlier):
        bench.engine.rows(losses(2.0))

    def call(_: Losses) -> None:
        bench.engine.backward(losses(0.5), mtu.OrthoGrad(), forget=MASK)

    refused(
        bench,
        RuntimeError,
        r"\('b', 0\), .* is not finite although its loss is .*\.grad is untouched",
        call,
    )


class Restless(torch.autograd.Function):
    """Its backward hides the last row at every other call."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        Restless.calls += 1
        hidden = N - 1 if Restless.calls % 2 else -1
        return grads[0] * (torch.arange(N) != hidden)


def test_rows_that_move_between_two_passes(bench: Bench) -> None:
    Restless.calls = 0
    found = bench.losses()
    with (
        pytest.warns(RuntimeWarning, match="one backward each"),
        pytest.raises(
            RuntimeError,
            match=r"arrives at \w+ differs from one backward to the next.*\.grad is untouched",
        ),
    ):
        bench.engine.rows({"b": found["b"], "a": Restless.apply(found["a"])})


def test_weights_that_are_not_finite(bench: Bench) -> None:
    rows = bench.engine.rows(bench.losses())
    with (
        bench.untouched(),
        pytest.raises(RuntimeError, match=r"not finite; \.grad is untouched.*weights"),
    ):
        rows.backward(torch.full((2 * N,), torch.inf, dtype=torch.float64))
    rows._parts.clear()


# ---- weights and methods -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (9,), (), (8, 1), (3, 8), (1, 1, 8)])
def test_weights_of_the_wrong_shape(bench: Bench, shape: tuple[int, ...]) -> None:
    rows = bench.engine.rows(bench.losses())
    message = r"weights: found shape .*, expected \[8\], one per row, or \[2, 8\] per layer, \[4, 8\] per tensor"
    with bench.untouched():
        for call in (
            lambda: rows.vjp(torch.ones(shape)),
            lambda: rows.backward(torch.ones(shape)),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        rows._parts.clear()


def test_weights_that_are_not_finite_are_called_so(bench: Bench) -> None:
    rows = bench.engine.rows(bench.losses())
    with bench.untouched(), pytest.raises(RuntimeError, match="weights that are not finite"):
        rows.backward(torch.full((8,), torch.nan))


def test_uneven_weights_say_nothing_of_the_heads(bench: Bench) -> None:
    rows = bench.engine.rows(bench.losses())
    with bench.untouched():
        with pytest.raises(
            ValueError, match=r"weights differ between rows of one kind and task.*outside"
        ):
            rows.backward(torch.arange(2.0 * N))
        with pytest.raises(ValueError, match=r"per layer say nothing of parameters outside"):
            rows.backward(torch.ones(2, 2 * N))
        rows._parts.clear()


def test_a_class_for_a_method(bench: Bench) -> None:
    message = r"found the class OrthoGrad, expected an instance of a method, such as mtu\.OrthoGrad\(alpha=0\.5\): call"
    refused(bench, TypeError, message, lambda l: bench.engine.backward(l, mtu.OrthoGrad))


@pytest.mark.parametrize("method", [None, 0.5, "orthograd", lambda G: G.sum(0)])
def test_a_method_of_the_wrong_type(bench: Bench, method: Any) -> None:
    rows = bench.engine.rows(bench.losses())
    message = (
        r"found .*, expected an mtu\.Method such as mtu\.OrthoGrad\(.*\), or weights \[R\]"
        r".*weighting\(rows\.gram\(\)\)"
    )
    with bench.untouched():
        with pytest.raises(TypeError, match=message):
            rows.backward(method)
        rows._parts.clear()
    refused(bench, TypeError, message, lambda l: bench.engine.backward(l, method))


def test_an_unknown_kind_of_rows(bench: Bench) -> None:
    refused(
        bench,
        ValueError,
        "per: found 'batch', expected one of 'sample', 'task'",
        lambda l: bench.engine.rows(l, per="batch"),
    )
    rows = bench.engine.rows(bench.losses())
    with pytest.raises(
        ValueError, match="per: found 'module', expected one of 'total', 'layer', 'tensor'"
    ):
        rows.gram(per="module")


def test_explain_before_any_rows(bench: Bench) -> None:
    with pytest.raises(RuntimeError, match=r"no rows yet.*engine\.rows"):
        bench.engine.explain()


# ---- cat -----------------------------------------------------------------------------------------


def test_cat_of_nothing() -> None:
    with pytest.raises(ValueError, match="found no rows"):
        mtu.cat()


def test_cat_of_something_else(bench: Bench) -> None:
    with pytest.raises(TypeError, match=r"found Tensor, expected Rows"):
        mtu.cat(bench.engine.rows(bench.losses()), torch.ones(3))
    with pytest.raises(TypeError, match=r"found list, expected Rows"):
        mtu.cat([bench.engine.rows(bench.losses())])


def test_cat_of_two_engines(bench: Bench) -> None:
    other = mtu.Engine(bench.model)
    with pytest.raises(ValueError, match="rows of different engines"):
        mtu.cat(bench.engine.rows(bench.losses()), other.rows(bench.losses()))


# ---- the engine's own arguments ------------------------------------------------------------------


def test_an_engine_of_parameters() -> None:
    model: Any = list(nn.Linear(3, 4).parameters())
    with pytest.raises(TypeError, match=r"model: found list, expected a torch.nn.Module; `params`"):
        mtu.Engine(model)


def test_an_engine_without_parameters() -> None:
    frozen = nn.Linear(3, 4).requires_grad_(False)
    given: tuple[Any, ...] = (None, frozen.parameters(), [])
    for params in given:
        with pytest.raises(ValueError, match="no parameter that requires grad"):
            mtu.Engine(frozen, params=params)


def test_parameters_of_another_model() -> None:
    with pytest.raises(
        ValueError,
        match=r"shapes \[\(4, 3\), \(4,\)\] that are not parameters of the model.*backbone",
    ):
        mtu.Engine(nn.Linear(5, 6), params=nn.Linear(3, 4).parameters())


def test_reentrant_checkpointing_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    net, last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    model = nn.ModuleList([net, last])
    x = torch.randn(N, 3, dtype=torch.float64, requires_grad=True)
    loss = last(checkpoint(net, x, use_reentrant=True)).square().sum(1)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        mtu.Engine(model).rows(loss)
    assert all(p.grad is None for p in model.parameters())


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.GradDiff(), mtu.PCGrad(), mtu.Mean()])
def test_an_empty_batch_is_no_step(method: mtu.Method) -> None:
    bench = Bench(n=0)
    with bench.untouched():
        update = bench.engine.backward(
            bench.losses(), method, forget=torch.zeros(0, dtype=torch.bool)
        )
        assert len(update.roles) == 0 and update.weights.shape == (0,)
    rows = bench.engine.rows(bench.losses())
    assert rows.gram().shape == (0, 0) and rows.gram(per="layer").shape == (2, 0, 0)
    assert rows.vjp(torch.zeros(0)) == {}


def test_an_empty_batch_adds_nothing_to_others(bench: Bench) -> None:
    losses = bench.losses()
    J = truth_of(losses, trained(bench.model.backbone))
    nothing = bench.engine.rows(bench.model(bench.x[:0]), forget=True)
    rows = mtu.cat(nothing, bench.engine.rows(losses), nothing)
    assert_rows(rows, J, trained(bench.model.backbone), 1e-12)
    update = rows.backward(mtu.OrthoGrad(alpha=0.3))
    assert (update.weights == 0.3 / N).all()


@pytest.mark.parametrize("forget", [True, False])
@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.3), mtu.GradDiff(0.3), mtu.PCGrad()])
def test_one_sample(forget: bool, method: mtu.Method) -> None:
    bench = Bench(n=1)
    losses = bench.losses()
    params = trained(bench.model.backbone)
    J = truth_of(losses, params)
    assert_rows(bench.engine.rows(losses), J, params, 1e-12)
    update = bench.engine.backward(bench.losses(), method, forget=forget)
    assert len(update.weights) == 2 and torch.isfinite(update.weights).all()


# ---- complex numbers -----------------------------------------------------------------------------


class Rotated(nn.Module):
    """A linear layer, each feature times a complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5).double()
        self.turn = nn.Parameter(torch.randn(5, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) * self.turn).real.square().sum(1)


def test_complex_parameters_are_refused_by_name() -> None:
    model = Rotated()
    with pytest.raises(
        TypeError,
        match=r"params: turn is torch.complex128.*shape \(5, 2\).*view_as_complex\(turn\)",
    ):
        mtu.Engine(model)


def test_a_complex_parameter_outside_gets_its_gradient() -> None:
    model, x = Rotated(), torch.randn(N, 3, dtype=torch.float64)
    params = trained(model.inner)
    engine = mtu.Engine(model, params=params)
    losses = model(x)
    J = truth_of({"loss": losses}, params)
    rows = engine.rows(losses)
    assert_rows(rows, J, params, 1e-12)
    rows.backward(mtu.Mean())
    found = model.turn.grad
    model.turn.grad = None
    model(x).mean().backward()
    assert torch.allclose(found, model.turn.grad, rtol=1e-12)


def test_a_complex_update_whose_imaginary_part_is_not_finite() -> None:
    with pytest.raises(RuntimeError, match="not finite"):
        check_finite([torch.complex(torch.zeros(2), torch.tensor([0.0, torch.nan]))])


# ---- precisions ----------------------------------------------------------------------------------


def test_tasks_in_unequal_precision(bench: Bench) -> None:
    """A float32 loss beside a float64 one: exact to float32, and rows say so."""
    losses = bench.losses()
    mixed = {"a": losses["a"], "b": losses["b"].float()}
    params = trained(bench.model.backbone)
    J = truth_of(mixed, params)
    rows = bench.engine.rows(mixed)
    assert rows.roles.dtype == torch.float32
    assert_rows(rows, J, params, 1e-6)
    rows.backward(mtu.OrthoGrad())


def test_parameters_in_unequal_precision() -> None:
    model = nn.Sequential(nn.Linear(3, 6).double(), nn.Tanh(), nn.Linear(6, 4))
    engine, params = mtu.Engine(model), trained(model)
    x = torch.randn(N, 3, dtype=torch.float64)
    loss = model[2](model[1](model[0](x)).float()).square().sum(1)
    J = truth_of({"a": loss}, params)
    rows = engine.rows(loss, forget=MASK)
    assert_rows(rows, J, params, 1e-6)
    rows.backward(mtu.OrthoGrad())
    assert [p.grad.dtype for p in params] == [p.dtype for p in params]


def test_cat_of_unequal_precision(bench: Bench) -> None:
    """One forward in float64, one under autocast: both kinds of rows meet in float64 Grams."""
    losses = bench.losses()
    model = bench.model
    with torch.autocast("cpu", torch.bfloat16):
        low = {task: loss.double() for task, loss in model(bench.x).items()}
    params = trained(model.backbone)
    J, K = truth_of(losses, params), truth_of(low, params)
    rows = mtu.cat(bench.engine.rows(losses), bench.engine.rows(low))
    assert rows.roles.dtype in (torch.float64, torch.bfloat16)
    assert_rows(
        rows, {j: torch.cat([J[j], K[j]]) for j in J}, params, 4 * torch.finfo(torch.bfloat16).eps
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)
    engine, params = mtu.Engine(model), trained(model)
    loss = model(torch.randn(N, 3).to(dtype)).square().sum(1)
    J = truth_of({"a": loss}, params)
    rows = engine.rows(loss, forget=MASK)
    assert rows.roles.dtype == dtype
    assert_rows(rows, J, params, 8 * torch.finfo(dtype).eps)
    update = rows.backward(mtu.OrthoGrad())
    assert torch.isfinite(update.weights).all()
    assert all(p.grad.dtype == dtype for p in params)


@pytest.mark.filterwarnings("ignore:backward. .grad still holds:UserWarning")  # on purpose
@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.GradDiff(), mtu.PCGrad()])
def test_overflow_in_half_precision_is_an_error(earlier: int, method: mtu.Method) -> None:
    """Losses of 0 whose gradients are 500 · 500, beyond float16."""
    model = nn.Linear(3, 4, bias=False).half()
    torch.nn.init.zeros_(model.weight)
    engine, sizes = mtu.Engine(model), [3.0] * earlier + [500.0]
    for size in sizes:
        before = grads(model.parameters())
        loss = (model(torch.full((N, 3), size, dtype=torch.float16)) * size).sum(1)
        if size == 3.0:
            engine.backward(loss, method)
            continue
        with pytest.raises(RuntimeError, match="not finite"):
            engine.backward(loss, method)
        assert same_grads(before, list(model.parameters()))


@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.GradDiff(), mtu.PCGrad()])
def test_overflow_in_single_precision_is_an_error(method: mtu.Method) -> None:
    """Rows of 1e40, whose Gram in float64 is finite."""
    model = nn.Linear(3, 4, bias=False)
    torch.nn.init.constant_(model.weight, 1e-3)
    loss = model(torch.full((N, 3), 1e4))[:, 0] * 1e36
    with pytest.raises(RuntimeError, match="not finite"):
        mtu.Engine(model).backward(loss, method, forget=MASK)
    assert model.weight.grad is None


@pytest.mark.parametrize(
    "method", [mtu.OrthoGrad(1.0), mtu.GradDiff(1.0), mtu.PCGrad(), mtu.Mean()]
)
def test_a_sum_over_tasks_beyond_half_precision(method: mtu.Method) -> None:
    """Three gradients of 30000 each are finite in float16; their sum is not."""
    model = nn.ParameterList([torch.ones(3, dtype=torch.float16)])
    model[0].grad = torch.full((3,), 7.0, dtype=torch.float16)
    params = trained(model)
    before, x = grads(params), torch.full((1, 3), 3e4, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"not finite; \.grad is untouched"):
        mtu.Engine(model).backward(dict.fromkeys("abc", (x * model[0])[:, 0]), method)
    assert same_grads(before, params)


@pytest.mark.parametrize(
    "method", [mtu.OrthoGrad(1.0), mtu.GradDiff(1.0), mtu.PCGrad(), mtu.Mean()]
)
def test_no_false_alarm_in_half_precision(method: mtu.Method) -> None:
    """80000 gradients of one: finite each, though their float16 sum is not."""
    model = nn.Linear(200, 400).half()
    loss = model(torch.ones(2, 200).half()).float().sum(1)
    mtu.Engine(model).backward(loss, method)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def gram_of(rows: mtu.Rows) -> Any:
    return rows.gram()


USES: dict[str, Callable[[mtu.Rows], Any]] = {
    "gram": gram_of,
    "combine": lambda rows: rows.vjp(torch.ones(len(rows))),
    "backward": lambda rows: rows.backward(mtu.OrthoGrad()),
    "cat": lambda rows: mtu.cat(rows),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_an_input_buffer_that_is_filled_again(kind: str, use: str) -> None:
    """Rows hold the input they were made from, not a copy."""
    layer: nn.Module = nn.Linear(40, 50) if kind == "linear" else nn.Embedding(9, 40)
    buffer = torch.randn(N, 40) if kind == "linear" else torch.arange(8).view(N, 2)
    engine, params = mtu.Engine(layer), trained(layer)
    rows = engine.rows(layer(buffer).square().flatten(1).sum(1))
    for p in params:
        p.grad = torch.randn_like(p)
    before = grads(params)
    buffer.copy_(buffer.flip(0))
    with pytest.raises(
        RuntimeError, match=r"activation or input .* changed in place.*fresh tensor per batch"
    ):
        USES[use](rows)
    assert same_grads(before, params)


def test_a_hook_that_changes_a_gradient() -> None:
    """What the hook makes of each row is not known; it is refused by name whenever it was set."""
    layer = nn.Linear(3, 1)
    engine = mtu.Engine(layer)
    for _step in range(2):
        engine.rows(layer(torch.randn(2, 3)).squeeze(1))
    handle = layer.weight.register_hook(lambda g: 0.5 * g)
    with pytest.raises(
        RuntimeError,
        match=r"weight has a hook on its gradient.*\.grad is untouched.*per='task' obeys",
    ):
        engine.rows(layer(torch.randn(2, 3)).squeeze(1))
    handle.remove()
    engine.rows(layer(torch.randn(2, 3)).squeeze(1))


class Doubled(torch.autograd.Function):
    """x, with a backward that may write to the gradient it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, writes: bool) -> Tensor:
        ctx.writes = writes
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return (grads[0].mul_(2) if ctx.writes else grads[0]), None


class Shifted(nn.Module):
    """A layer whose output meets a shift; the gradient that both are given is one tensor."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(3, 5), nn.Parameter(torch.randn(5))
        self.hooked, self.writes = hooked, False

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.hooked:
            h.register_hook(lambda g: g.mul_(2) if self.writes else None)
        else:
            h = Doubled.apply(h, self.writes)
        return (h + self.shift).square().sum(1)


def test_a_backward_that_writes_to_the_gradient_it_is_given() -> None:
    """On a graph that is known already, so that no control pass sees it."""
    model = Shifted(hooked=False)
    engine, params = mtu.Engine(model), trained(model)
    for model.writes in (False, True):
        before = grads(params)
        loss = model(torch.randn(N, 3))
        if model.writes:
            with pytest.raises(
                RuntimeError, match=r"a gradient was written to .*return a new tensor"
            ):
                engine.backward(loss, mtu.OrthoGrad())
            assert same_grads(before, params)
        else:
            engine.backward(loss, mtu.OrthoGrad())


def test_a_hook_that_writes_to_the_gradient_it_is_given() -> None:
    """Each row is what a backward of its own gives, shift included."""
    model = Shifted(hooked=True).double()
    engine, params = mtu.Engine(model), trained(model)
    engine.rows(model(torch.randn(N, 3, dtype=torch.float64)))
    model.writes = True
    losses = {"a": model(torch.randn(N, 3, dtype=torch.float64))}
    truth = truth_of(losses, params)
    with pytest.warns(RuntimeWarning, match="a hook sees the gradient at AddmmBackward0"):
        assert_rows(engine.rows(losses), truth, params, 1e-12)


@pytest.mark.filterwarnings("ignore:rows. a hook sees:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:backward. .grad still holds:UserWarning")  # on purpose
@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.PCGrad(), mtu.GradDiff()])
def test_a_hook_that_halves_an_activation_gradient(method: mtu.Method) -> None:
    """Each row is halved, as autograd would; the pass that frees the graph has no gradient to give to the hook."""
    layer, x = nn.Linear(3, 5).double(), torch.randn(N, 3, dtype=torch.float64)
    forward = mtu.Engine(layer)
    for step in range(2):
        losses = {}
        for task in ("a", "b"):
            h = layer(x)
            h.register_hook(lambda g: g * 0.5)
            losses[task] = h.square().sum(1)
        truth = truth_of(losses, layer.parameters())
        if method.needs_gram and method.per == "sample":
            assert_rows(forward.rows(losses), truth, trained(layer), 1e-12, seed=step)
        else:
            forward.backward(losses, method, forget=MASK)


@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.GradDiff(), mtu.PCGrad()])
def test_losses_of_another_model(method: mtu.Method) -> None:
    model = nn.Linear(3, 2)
    other = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match=r"none of the engine's parameters \(weight, bias.*another model.*frozen"
    ):
        mtu.Engine(model).backward(other(torch.randn(N, 3)).square().sum(1), method, forget=MASK)
    assert model.weight.grad is None and other.weight.grad is None


@pytest.mark.parametrize("per", ["sample", "task"])
def test_parameters_that_were_frozen_since(per: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    engine = mtu.Engine(model, params=model[0].parameters())
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of the engine's parameters \(0.weight, 0.bias"):
        engine.rows(model(torch.randn(N, 3)).square().sum(1), per=per)
    with pytest.raises(ValueError, match=r"none of the engine's parameters \(0.weight, 0.bias"):
        engine.backward(model(torch.randn(N, 3)).square().sum(1), mtu.GradDiff(), forget=MASK)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("view", [lambda w: w.t(), lambda w: w[:, :], lambda w: w.view(9)])
def test_a_task_without_labels_where_a_weight_is_used_twice(
    view: Callable[[Tensor], Tensor],
) -> None:
    layer = nn.Linear(3, 3, bias=False).double()
    x = torch.randn(N, 3, dtype=torch.float64)
    h = layer(x)
    losses = {"a": h.square().sum(1), "b": ((h @ view(layer.weight).view(3, 3)) ** 2).sum(1)}
    truth = truth_of({"a": losses["a"]}, layer.parameters())
    rows = mtu.Engine(layer).rows(losses, present={"b": torch.zeros(N, dtype=torch.bool)})
    assert_rows(rows, truth, trained(layer), 1e-12)


def test_losses_that_are_written_to_after_their_rows_were_taken() -> None:
    model = nn.Linear(3, 2).double()
    loss = model(torch.randn(N, 3, dtype=torch.float64)).square().sum(1)
    rows, before = mtu.Engine(model).rows(loss), loss.detach().clone()
    loss.detach().zero_()
    assert torch.equal(rows.roles.loss, before)


@pytest.mark.parametrize(
    "values", [[3e38, 3e38], [3e38, torch.inf], [torch.inf, -torch.inf], [torch.nan, 0.0]]
)
def test_a_sum_that_overflows_is_no_verdict(values: list[float]) -> None:
    assert all_finite([torch.ones(2), torch.tensor(values)]) == all(map(isfinite, values))


class Equal(mtu.Method):
    """All rows weigh the same: the least that a method must have."""

    def __call__(self, G: Tensor, roles: mtu.Roles) -> Tensor:
        return torch.ones_like(roles.loss)

    def outside(self, roles: mtu.Roles) -> Tensor:
        return torch.ones_like(roles.loss)


class Counting(Equal):
    """A method with a state, which asks for no Gram."""

    needs_gram = False

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, G: Tensor | None, roles: mtu.Roles) -> Tensor:
        self.calls += 1
        return torch.ones_like(roles.loss)


def test_rows_that_are_used_up_do_not_reach_a_method(bench: Bench) -> None:
    rows, method = bench.engine.rows(bench.losses()), Counting()
    rows.backward(method)
    with pytest.raises(RuntimeError, match="used these rows up"):
        rows.backward(method)
    assert method.calls == 1


class NoMethod:
    """All that a method has, but for the base class."""

    per, granularity, needs_gram, needs_subspace = "sample", "global", True, False

    def __call__(self, G: Tensor, roles: mtu.Roles) -> Tensor:
        return torch.ones_like(roles.loss)


def test_a_method_of_ones_own(bench: Bench) -> None:
    method: Any = Equal()
    params = trained(bench.model)
    losses = bench.losses()
    plain = torch.autograd.grad(
        sum(loss.sum() for loss in losses.values()), params, retain_graph=True
    )
    before = [p.grad.clone() for p in params]
    bench.engine.backward(losses, method)
    for p, g, old in zip(params, plain, before, strict=True):
        assert torch.allclose(p.grad - old, g, rtol=1e-9, atol=1e-12)


def test_a_method_that_does_not_derive_from_the_base_class(bench: Bench) -> None:
    method: Any = NoMethod()
    said = r"(?s)found NoMethod, expected an mtu\.Method.*class Mine\(mtu\.Method\)"
    refused(bench, TypeError, said, lambda l: bench.engine.backward(l, method))
    rows = bench.engine.rows(bench.losses())
    with bench.untouched():
        with pytest.raises(TypeError, match=said):
            rows.backward(method)
        rows._parts.clear()


@pytest.mark.parametrize(("name", "value"), [("per", "samples"), ("granularity", "layers")])
def test_a_method_whose_flag_is_no_known_word(bench: Bench, name: str, value: str) -> None:
    method = type("Misspelt", (Equal,), {name: value})()
    refused(
        bench, TypeError, rf"Misspelt: {name} is '{value}', expected one of '",
        lambda l: bench.engine.backward(l, method),
    )  # fmt: skip


def test_weights_that_are_no_tensor(bench: Bench) -> None:
    weights: Any = [1.0, 2.0]
    rows = bench.engine.rows(bench.losses())
    with pytest.raises(TypeError, match=r"weights: found list, expected a real tensor \[8\]"):
        rows.vjp(weights)


@pytest.mark.parametrize(
    ("budget", "error"),
    [(-5, ValueError), ("1G", TypeError), (1e9, TypeError), (True, TypeError), (None, TypeError)],
)
def test_a_memory_budget_that_is_none(budget: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"memory_budget: found .*, expected"):
        mtu.Engine(nn.Linear(2, 2), memory_budget=budget)


@pytest.mark.parametrize("wrong", [nn.Linear(3, 4), list(nn.Linear(3, 4).named_parameters())])
def test_params_that_are_no_parameters(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"params: found (Linear|tuple), expected parameters; pass"):
        mtu.Engine(nn.Linear(3, 4), params=wrong)
