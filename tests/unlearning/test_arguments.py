"""Arguments of the wrong kind are named, with what was found and what was expected."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from mtu_fast.unlearning import metrics
from mtu_fast.unlearning.report import write_html
from mtu_fast.unlearning.report.markup import el
from mtu_fast.unlearning.report.page import page
from tests.unlearning.loop import scene
from tests.unlearning.report import setting
from tests.unlearning.report.document import Document
from tests.unlearning.report.setting import audit, nets

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.zeros(2, 3)
ODD: Any = {"a": [1]}  # neither tensors nor rows of a table
TEXT: Any = {"a": {"t": "1"}}
IMAGE = torch.ones(1, 3, 2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.top1([1], [2]), "logits: found list, expected a tensor"),
        (lambda: metrics.top1(X, [2, 1]), "target: found list"),
        (lambda: metrics.mean_iou(X, 5, 3), "target: found int"),
        (lambda: metrics.entropy(None), "logits: found NoneType"),
        (lambda: metrics.kl_divergence(X, 5), "logits: found int"),
        (lambda: metrics.logit_distance("a", X), "reference: found str"),
        (lambda: metrics.valid_pixels(5), "target: found int"),
        (lambda: metrics.present([1]), r"labels: found list, expected \{task: ...\}"),
        (lambda: metrics.present(ODD), "labels: found list, expected a tensor"),
        (lambda: metrics.segmentation_loss(IMAGE, 5), "target: found int"),
        (lambda: metrics.depth_loss(5, IMAGE), "depth: found int"),
        (lambda: metrics.normal_loss(IMAGE, None), "target: found NoneType"),
        (lambda: metrics.pixel_accuracy([1], [1]), "predicted: found list"),
        (lambda: metrics.depth_scores(IMAGE, "x"), "target: found str"),
        (lambda: metrics.normal_scores([], IMAGE), "normal: found list"),
        (lambda: metrics.drift([1.0], [2.0]), "before: found list"),
        (lambda: metrics.drift(X[0], X[0], [[1], [2], [3]]), "labels: .*unhashable"),
        (lambda: metrics.parameter_shift([1.0], [2.0]), "original: found float"),
        (lambda: metrics.uis(5, 5), r"score table: found int 5, expected \{split: \{task: score"),
        (lambda: metrics.gaps(ODD, ODD), "score table: found dict"),
        (lambda: metrics.tow(5, 5), "score table: found int"),
        (lambda: metrics.mean_gap([], []), "score table: found list"),
        (lambda: metrics.gaps(TEXT, TEXT), "score of task 't': found str"),
        (lambda: mtu.shuffled_targets(5), "shuffled_targets: found int, expected a tensor"),
    ],
)
def test_scores(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_entropy_of_what_is_no_distribution(value: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = value
    with pytest.raises(ValueError, match=r"entropy: the logits of samples \[1\] are NaN"):
        metrics.entropy(logits)


def test_entropy_of_impossible_classes() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf]])
    expected = torch.tensor([2.0, 1.0], dtype=torch.float64).log()
    assert torch.allclose(metrics.entropy(logits), expected, atol=1e-12)
    with pytest.raises(ValueError, match=r"samples \[0\]"):
        metrics.entropy(torch.full((1, 3), -torch.inf))


# ---- the audit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": 5}, r"losses: found int, expected a function of \(model, batch\)"),
        ({"score": "a"}, r"score: found str, expected a function of \(model, loader\)"),
        ({"outputs": 5}, "outputs: found int"),
        ({"labels": [1]}, r"labels: found list, expected a function of \(batch\)"),
        ({"present": True}, "present: found bool"),
        ({"cosine_samples": 1.5}, "cosine_samples: found 1.5"),
        ({"forget": 5}, "forget: found int, expected batches"),
        ({"labels": lambda b: [1, 2]}, r"labels: found list, expected \{task: ...\}"),
        ({"labels": lambda b: {"class": 5}}, r"labels\['class'\]: found int, expected the class"),
        ({"labels": lambda b: {"class": b[0]}}, r"labels\['class'\]: found shape \(8, 4\)"),
        ({"outputs": lambda m, b: m(b[0])["class"]}, "outputs: found Tensor"),
        ({"outputs": lambda m, b: {"class": [1]}}, "outputs: found list, expected a tensor"),
    ],
)
def test_functions_of_an_audit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        audit(**change)


def test_models_of_an_audit() -> None:
    original, unlearned, _ = nets()
    with pytest.raises(TypeError, match=r"retrained: found int, expected a torch.nn.Module"):
        audit(original, unlearned, 5)


def test_tasks_have_strings_for_names() -> None:
    def numbered(model: Any, batch: Any) -> dict[Any, Tensor]:
        return {0: setting.losses(model, batch)["class"]}

    def score(model: Any, batches: Any) -> dict[Any, float]:
        return {0: 1.0}

    with pytest.raises(TypeError, match=r"losses: found tasks named \[0\], expected strings"):
        audit(losses=numbered, score=score, outputs=None, labels=None)


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "list": Tensor.tolist,
    "int8": lambda y: y.to(torch.int8),
    "uint16": lambda y: y.to(torch.uint16),
    "numpy": lambda y: y.numpy(),
    "tensors": list,
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_labels_of_any_kind_give_the_same_report(kind: str) -> None:
    def labels(batch: setting.Batch) -> dict[str, Any]:
        return {"class": KINDS[kind](batch[1])}

    expected = audit(cosine_samples=0).data["drift"]
    assert audit(labels=labels, cosine_samples=0).data["drift"] == expected


class Nameless:
    def __repr__(self) -> str:
        raise RuntimeError("no name")


class Unequal:
    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")


NAMELESS: list[Any] = [Nameless() for _ in range(3)]
LOCKS: list[Any] = [threading.Lock() for _ in range(3)]
NAMED: dict[str, Callable[[int], Any]] = {
    "names": ("cat", "dog", "b<b>d").__getitem__,
    "pairs": lambda i: (i, "x"),
    "nothing": lambda i: None if i == 1 else i,
    "booleans": bool,
    "floats": lambda i: i + 0.5,
    "beyond all floats": lambda i: 10**400 + i,
    "infinite": lambda i: float("inf") if i else -float("inf"),
    "complex": lambda i: i * 1j,
    "types": (int, str, float).__getitem__,
    "bytes": lambda i: bytes([i]),
    "without a name": lambda i: NAMELESS[i],
    "that cannot be copied": lambda i: LOCKS[i],
}


@pytest.mark.parametrize("kind", list(NAMED))
def test_classes_may_be_anything(kind: str, tmp_path: Path) -> None:
    def labels(batch: setting.Batch) -> dict[str, Any]:
        return {"class": [NAMED[kind](int(i)) for i in batch[1]]}

    found = audit(labels=labels, cosine_samples=0)
    worst = found.data["drift"]["unlearned"]["retain"]["class"]["worst_class"][0]
    possible = [NAMED[kind](i) for i in range(3)]
    if kind == "without a name":
        assert worst == "a Nameless"
    else:
        assert worst in possible or worst in map(str, possible)
    found.to_json(tmp_path / "a.json")
    assert mtu.Audit.from_json(tmp_path / "a.json") == found
    Document(page([found.data]))


def test_a_class_for_every_sample() -> None:
    with pytest.raises(ValueError, match=r"labels\['class'\]: found 3 classes, expected 8"):
        audit(labels=lambda batch: {"class": [1, 2, 3]})
    with pytest.raises(ValueError, match="drift: found 2 labels, expected 3"):
        metrics.drift(X[0], X[0], ["a", "b"])
    assert metrics.drift(X[0], torch.arange(3.0), ["a", "b", "b"]).worst_class == ("b", 1.5)
    assert metrics.drift(X[0], torch.arange(3.0), np.array([4, 7, 7])).worst_class == (7, 1.5)


NO_CLASSES: dict[str, Callable[[Tensor], Any]] = {
    "sparse": Tensor.to_sparse,
    "on meta": lambda y: y.to("meta"),
    "complex": lambda y: y.to(torch.complex64),
    "numbers": lambda y: y.to(torch.bfloat16),
    "two columns": lambda y: np.zeros((len(y), 2)),
    "sets": lambda y: [{1}] * len(y),
    "unequal": lambda y: [Unequal() for _ in y],
}


@pytest.mark.parametrize("kind", NO_CLASSES)
def test_what_are_no_classes(kind: str) -> None:
    with pytest.raises((TypeError, ValueError), match="labels"):
        audit(labels=lambda batch: {"class": NO_CLASSES[kind](batch[1])}, cosine_samples=0)


# ---- files and names -----------------------------------------------------------------------------


def test_paths(tmp_path: Path) -> None:
    found = audit(cosine_samples=0)
    for write in (found.to_html, found.to_json, lambda path: write_html(path, [found])):
        with pytest.raises(TypeError, match=r"path: found 5, expected the path of a file"):
            write(5)
    history = mtu.History(("a",), ("a",))
    for write in (history.to_json, history.plot):
        with pytest.raises(TypeError, match=r"path: found 5, expected the path of a file"):
            write(5)
    with pytest.raises(TypeError, match=r"path: found 5"):
        mtu.Audit.from_json(5)
    for wrong in (5, [5], found):
        with pytest.raises(TypeError, match=r"write_html: found .*expected a list of audits"):
            write_html(tmp_path / "a.html", wrong)
    with pytest.raises(ValueError, match=r"path: found 'a.x00b', expected a name without NUL"):
        mtu.Audit.from_json("a\0b")
    for write in (found.to_html, found.to_json, lambda path: write_html(path, [found])):
        with pytest.raises(ValueError, match=r"path: found 'a.x00b', expected a name without NUL"):
            write("a\0b")
        with pytest.raises(ValueError, match=r"path: .* is a folder, expected a file"):
            write(tmp_path)
    part = '{"schema": "mtu_fast.audit", "version": 1}'
    for text, says in (
        ("{", "is no JSON of an audit"),
        ("[]", "found list, expected the JSON"),
        (part, "is incomplete: it holds no title, models"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=f"a.json: {says}"):
            mtu.Audit.from_json(tmp_path / "a.json")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


UNSEEN = "\0\x1b\x7f\x85\u061c\u200e\u202e\u2067\ud800\ufffe"


def test_characters_that_nobody_sees_are_written_as_codes() -> None:
    text = el("p", UNSEEN, title=UNSEEN)
    codes = "".join(f"\\u{ord(one):04x}" for one in UNSEEN)
    assert text == f'<p title="{codes}">{codes}</p>'
    kept = "tab\tline\nLöß 日本語 עברית 🙂 fi"
    assert el("p", kept) == f"<p>{kept}</p>"


def test_a_page_with_odd_names(tmp_path: Path) -> None:
    name = f"a{UNSEEN}b"

    def losses(model: Any, batch: Any) -> dict[str, Tensor]:
        return {name: setting.losses(model, batch)["class"]}

    def score(model: Any, batches: Any) -> dict[str, float]:
        return {name: setting.score(model, batches)["class"]}

    found = audit(losses=losses, score=score, outputs=None, labels=None, title=name)
    found.to_html(tmp_path / "a.html")
    text = (tmp_path / "a.html").read_bytes().decode()
    Document(text)
    assert not set(UNSEEN) & set(text) and "a\\u0000" in text


class Unread:
    """A loader whose iterator is none."""

    def __iter__(self) -> Any:
        return 5


@pytest.mark.parametrize("length", [-1, "x", 10**30, 2**63 - 1])
@pytest.mark.parametrize("side", ["retain", "forget"])
def test_a_length_that_is_none(length: Any, side: str) -> None:
    """The loader is read as one that does not know its length."""

    class Lying(list[Any]):
        def __len__(self) -> Any:
            return length

    found = []
    for make in (list, Lying):
        model, given = scene.net(), scene.sides()
        given[side] = make(given[side])
        mtu.unlearn(
            model, scene.sgd(model), **given, method=mtu.GradDiff(), max_steps=5, progress=False
        )
        found.append(scene.parameters(model))
    assert torch.equal(*found)


def test_a_checkpoint_with_a_name_that_no_file_has() -> None:
    model = scene.net()
    with pytest.raises(ValueError, match=r"checkpoint: found 'a.x00.pt', expected a name without"):
        mtu.unlearn(
            model, scene.sgd(model), **scene.sides(), method=mtu.GradDiff(), max_steps=1,
            progress=False, checkpoint="a\0.pt",
        )  # fmt: skip


# ---- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adam"}, "optimizer: found str, expected a torch.optim.Optimizer"),
        ({"losses": 5}, r"losses: found int, expected a function of \(model, batch\)"),
        ({"forget_losses": 5}, "forget_losses: found int"),
        ({"score": 5}, r"score: found int, expected a function of \(model, loader\)"),
        ({"checkpoint": 5}, "checkpoint: found 5, expected the path of a file"),
        ({"retain": Unread()}, "retain: found Unread, expected a loader that gives an iterator"),
        ({"forget": Unread()}, "forget: found Unread, expected a loader that gives an iterator"),
        ({"losses": lambda m, b: {0: scene.losses(m, b)[0]["a"]}}, r"tasks named \[0\]"),
    ],
)
def test_arguments_of_the_loop(change: dict[str, Any], message: str) -> None:
    model = scene.net()
    given: dict[str, Any] = {
        **scene.sides(),
        "optimizer": scene.sgd(model),
        "method": mtu.GradDiff(),
        "max_steps": 1,
        "progress": False,
        **change,
    }
    before = scene.parameters(model)
    with pytest.raises(TypeError, match=message):
        mtu.unlearn(model, **given)
    assert torch.equal(scene.parameters(model), before)
    with pytest.raises(TypeError, match=r"model: found int, expected a torch.nn.Module"):
        mtu.unlearn(5, **given)
