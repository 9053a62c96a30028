"""The page is well-formed, needs nothing from elsewhere, escapes what it is given, and says what is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader, TensorDataset

import mtu_fast as mtu
from mtu_fast.unlearning.report import charts, write_html
from mtu_fast.unlearning.report.markup import Markup, el, number, signed
from mtu_fast.unlearning.report.page import page
from tests.unlearning.report.document import Document
from tests.unlearning.report.setting import audit, nets, whole

pytestmark = pytest.mark.usefixtures("one_thread")

HISTORY = SimpleNamespace(
    records=[{"step": s, "forget": {"class": 1 - s / 10, "depth": 0.5}} for s in range(3)]
)
EVIL = '<script>alert("&")</script>'


@pytest.fixture(scope="module")
def full() -> mtu.Audit:
    return audit(title=EVIL, history=HISTORY, cost={"ms": {"fast": 1.0}, EVIL: 2})


@pytest.fixture(scope="module")
def text(full: mtu.Audit, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "audit.html"
    full.to_html(path)
    return path.read_text(encoding="utf-8")


def test_well_formed(text: str) -> None:
    document = Document(text)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    ids = [attributes["id"] for _, attributes in document.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(document.all("h1")) == 1 and {"charset": "utf-8"} in document.all("meta")
    assert all({"scope"} <= set(attributes) for attributes in document.all("th"))


def test_self_contained(text: str) -> None:
    document = Document(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in document.elements}
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    assert not [
        a for _, a in document.elements if "src" in a or any(name.startswith("on") for name in a)
    ]


def test_names_are_escaped(text: str) -> None:
    assert "<script" not in text and "&lt;script&gt;alert(&quot;&amp;&quot;)&lt;/script&gt;" in text


def test_every_picture_is_described_or_decoration(text: str) -> None:
    pictures = Document(text).all("svg")
    assert len(pictures) > 10
    assert all(p.get("role") == "img" or p.get("aria-hidden") == "true" for p in pictures)
    assert len(re.findall(r"<svg[^>]*role=\"img\"[^>]*><title>[^<]{10,}</title>", text)) == sum(
        p.get("role") == "img" for p in pictures
    )


def test_light_dark_and_print(text: str) -> None:
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    used, defined = set(re.findall(r"var\((--\w+)\)", text)), set(re.findall(r"(--\w+):", text))
    assert used <= defined


def test_the_numbers_and_the_verdict_are_there(full: mtu.Audit, text: str) -> None:
    assert full.data["verdict"]["headline"] in text
    for model in full.data["models"]:
        for row in full.data["scores"][model].values():
            assert all(number(value) in text for value in row.values())
    for one in full.data["drift"]["unlearned"]["retain"].values():
        assert signed(one["worst_mean"]) in text and f"#{one['worst'][0]['index']}: " in text
    assert (
        number(full.data["mean_gap"]) in text and number(full.data["uis"]["unlearned"], 1) in text
    )


def test_what_is_missing_is_said_in_its_place() -> None:
    data = audit(*nets()[:2], outputs=None, cosine_samples=0).data
    text = page([data])
    Document(text)
    for said in (
        "No retrained model was given. Training",
        "cosines were not asked for",
        "No history",
        "No cost",
    ):
        assert said in text
    assert "retrained</th>" not in text


def test_several_requests_on_one_page(full: mtu.Audit, tmp_path: Path) -> None:
    partial = audit(targets=["depth"], title="Second", cosine_samples=0)
    write_html(tmp_path / "both.html", [full, partial], "Both")
    document = Document((tmp_path / "both.html").read_text(encoding="utf-8"))
    targets = {f"#{a['id']}" for a in document.all("article")}
    assert {a["href"] for a in document.all("a")} == targets and len(targets) == 2
    with pytest.raises(ValueError, match="no audit"):
        write_html(tmp_path / "none.html", [])


def test_uis_is_explained_as_it_was_made(full: mtu.Audit) -> None:
    partial = audit(targets=["depth"], cosine_samples=0)
    said = (
        "the second part of a task that is no target is the relative change of its own forget score"
    )
    assert said in page([partial.data]) and said in page([full.data, partial.data])
    assert said not in page([full.data])


def test_a_place_in_the_loader_is_promised_only_where_it_is_shown() -> None:
    shuffled = DataLoader(TensorDataset(*whole("retain")), 8, shuffle=True)
    text = page([audit(retain=shuffled, cosine_samples=0).data])
    assert "loss on retain.</caption>" in text
    assert "loss on test (# is its place in the loader).</caption>" in text


def test_cosines_name_the_batches_they_are_of() -> None:
    found = audit(cosine_samples=16)  # batches of 8
    assert "8 forget and 8 retain samples, of the first batch of either loader" in page([
        found.data
    ])


@pytest.mark.parametrize(
    "write", [mtu.Audit.to_html, mtu.Audit.to_json, lambda a, path: write_html(path, [a])]
)
def test_a_folder_that_is_not_there_is_named(
    full: mtu.Audit, write: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"path: there is no folder .*nodir for x.out; make it first, Path\(",
    ):
        write(full, tmp_path / "nodir" / "x.out")
    assert not (tmp_path / "nodir").exists()


def test_elements() -> None:
    assert el("p", "a < b", None, [1, Markup("<b>")], class_="x", font_size=0, hidden=None) == (
        '<p class="x" font-size="0">a &lt; b1<b></p>'
    )
    assert el("meta", name='"') == '<meta name="&quot;">'


@pytest.mark.parametrize(
    ("value", "plain", "with_sign"),
    [(None, "–", "–"), (0.0, "0.000", "0.000"), (0.25, "0.250", "+0.250"), (-0.25, "−0.250", "−0.250"),
     (-1e-5, "0.000", "0.000"), (1e-5, "0.000", "0.000"), (1234.56, "1234.6", "+1234.6"), (2e7, "2.0e+07", "+2.0e+07"),
     (1200, "1,200", "+1,200")],
)  # fmt: skip
def test_numbers_for_people(value: float | None, plain: str, with_sign: str) -> None:
    assert (number(value), signed(value)) == (plain, with_sign)


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert charts.ticks(-3.1, 7.4, 4) == [0.0, 5.0]
    assert charts.ticks(-30.0, 70.0, 4) == [-25.0, 0.0, 25.0, 50.0]
    assert charts.ticks(2.0, 2.0) == [2.0]


def test_a_heat_map_has_a_cell_for_every_layer_and_pair() -> None:
    found = {
        "layers": ["", "conv"],
        "pairs": [["a", "a"], ["a", "b"]],
        "mean": [[0.5, -0.25], [None, 1.0]],
    }
    text = charts.heat_map(found, "a description")
    Document(text)
    for cell in ("(the model itself): forget a, retain a: +0.50", "(the model itself): forget a, retain b: −0.25",
                 "conv: forget a, retain a: –", "conv: forget a, retain b: +1.00"):  # fmt: skip
        assert cell in text


def test_a_histogram_of_equal_changes_and_a_flat_line_are_drawn() -> None:
    counts = [0] * 40 + [5]
    found = {
        "edges": [i / 41 - 0.5 for i in range(42)],
        "counts": {"unlearned": counts, "retrained": counts},
    }
    Document(charts.histogram(found, "t", "d"))
    Document(charts.lines({"a": [(0, 1.0)], "b": [(0, 1.0)]}, "t", "d"))


# ---- levels in charts ----------------------------------------------------------------------------


def titles(text: str) -> list[str]:
    return re.findall(r"<title>([^<]*)</title>", text)


def test_the_level_to_reach_is_drawn_in_every_chart_of_what_is_forgotten() -> None:
    course = SimpleNamespace(
        records=[
            {"step": s, "forget": {"class": 1 - s / 10}, "forget_loss": {"class": 0.1 + s}}
            for s in range(3)
        ]
    )
    found = audit(history=course)
    text = page([found.data])
    drawn = [said for said in titles(text) if "level to reach" in said]
    score = found.data["scores"]["retrained"]["forget"]["class"]
    loss = found.data["loss_levels"]["class"]
    rise = loss - found.data["mean_losses"]["class"]
    # dots of scores, and the run's course, which ends there
    assert drawn.count(f"class, level to reach: {number(score)}") == 2
    assert drawn.count(f"class, level to reach: {number(loss)}") == 1
    assert drawn.count(f"class, level to reach: {number(rise)}") == 1
    for by in ("loss", "entropy"):
        auc = found.data["membership"]["retrained"]["class"][by]["auc"]
        assert f"class, {by}, level to reach: {number(auc)}" in drawn


def test_a_score_that_is_a_loss_turned_over_is_drawn_once() -> None:
    def records(sign: float) -> SimpleNamespace:
        return SimpleNamespace(
            records=[
                {"step": s, "forget": {"class": sign * s}, "forget_loss": {"class": float(s)}}
                for s in range(3)
            ]
        )

    mirrored, own = (page([audit(history=records(sign)).data]) for sign in (-1.0, -0.5))
    assert "forget loss over steps" in mirrored and "forget over steps" not in mirrored
    assert "forget loss over steps" in own and "forget over steps" in own


def test_short_layer_names_leave_room_for_the_heads() -> None:
    found = {"pairs": [["a", "b"]], "layers": ["0"], "mean": [[0.5]]}
    picture = charts.heat_map(found, "short")
    for word in ("forget", "retain"):
        at = float(re.search(rf'<text x="([\d.]+)"[^>]*>{word}<', picture)[1])
        assert at >= 6.2 * len(word)  # it ends there


def test_the_page_says_what_a_removed_class_changes() -> None:
    original, unlearned, _ = nets()
    text = page([audit(original, unlearned, removal="class", targets=["class"]).data])
    assert "chance is the level to reach for a removed class" in text
    assert "For a removed class the second part is the forget score itself" in text
    assert "For a removed class" not in page([audit(original, unlearned).data])
