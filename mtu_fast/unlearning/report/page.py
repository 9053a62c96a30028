"""The page: one self-contained HTML document from the data of one or several audits."""

from __future__ import annotations

from collections.abc import Sequence

from mtu_fast.unlearning.report import effects, sections
from mtu_fast.unlearning.report.markup import Markup, el, join
from mtu_fast.unlearning.report.style import STYLE
from mtu_fast.unlearning.report.tables import Data

TERMS = (
    ("UIS", "mean over tasks of ½ (relative change of the test score + relative distance of the forget score from the "
            "original's test score), in percent."),
    ("ToW", "product over forget, retain and test of 1 − |score − score of the retrained model|."),
    ("Membership attack", "can forget samples be told from unseen ones by their loss, or by the entropy of the "
                          "prediction? AUC 0.5 is a guess, 1 certainty."),
    ("Drift", "loss after minus loss before, sample by sample."),
    ("Gradient cosine", "how much a step on one sample's loss moves another's, between −1 and 1."),
)  # fmt: skip
PARTIAL = (  # what a partial request adds to the first term
    " In a partial request the second part of a task that is no target is the relative change of its own forget score, "
    "|before − after| / before: the data to forget must not move there."
)
LIMITS = (
    "This report is evidence on the data it was given, not a proof: a stronger attack may find what this one does not, "
    "and copies of the data outside the three sets are not looked for."
)


def page(audits: Sequence[Data], title: str | None = None) -> str:
    """An HTML document, nothing of which comes from elsewhere.

    Args:
        audits: data of at least one audit, as `Audit.data`.
        title: of the page; the first audit's by default.

    Returns:
        The document.
    """
    title = title or str(audits[0]["title"])
    several = len(audits) > 1
    body = el(
        "main", _top(audits, title, several), (_audit(data, i, several) for i, data in enumerate(audits)),
        _explanations(audits), _footer(audits),
    )  # fmt: skip
    head = el(
        "head", el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"), el("title", title), el("style", STYLE),
    )  # fmt: skip
    return "<!DOCTYPE html>\n" + el("html", head, el("body", body), lang="en") + "\n"


def _top(audits: Sequence[Data], title: str, several: bool) -> Markup:
    links = [el("li", el("a", data["title"], href=f"#audit-{i}")) for i, data in enumerate(audits)]
    samples = audits[0]["request"]["samples"]
    sizes = f"{samples['forget']} samples to forget, {samples['retain']} retained, {samples['test']} unseen"
    made = audits[0]["made"][:10]
    return el(
        "header", el("h1", title), el("p", f"{made} · {sizes}", class_="soft"),
        el("nav", el("ul", links), aria_label="Requests") if several else None, class_="top",
    )  # fmt: skip


def _audit(data: Data, index: int, several: bool) -> Markup:
    request = data["request"]
    what = (
        "from every task"
        if request["kind"] == "full"
        else f"from {', '.join(request['targets'])} only"
    )
    asked = f"{'Full' if request['kind'] == 'full' else 'Partial'}-task request: {request['samples']['forget']} " \
            f"samples {what} (tasks: {', '.join(request['tasks'])})."  # fmt: skip
    name = el("div", el("h2", data["title"]) if several else None, el("p", asked, class_="soft"),
              class_="request first" if index == 0 else "request") if several else el("p", asked)  # fmt: skip
    notes = el(
        "section",
        el("h2", "Notes"),
        el("ul", (el("li", note) for note in data["notes"])),
        class_="card",
    )
    parts = (part(data) for part in (sections.verdict, effects.removed, effects.moved, sections.ideal,
                                     sections.conflict, sections.course))  # fmt: skip
    return el("article", name, *parts, notes if data["notes"] else None, id=f"audit-{index}")


def _explanations(audits: Sequence[Data]) -> Markup:
    rules = el("ul", (el("li", rule) for rule in audits[0]["verdict"]["rules"]))
    partial = any(data["request"]["kind"] == "partial" for data in audits)
    more = {"UIS": PARTIAL} if partial else {}
    terms = el("ul", (el("li", el("b", term), ": ", text, more.get(term)) for term, text in TERMS))
    return el("section", el("h2", "How to read this"), el("p", LIMITS), el("h3", "Terms"), terms,
              el("h3", "Rules of the verdict"), rules, class_="card")  # fmt: skip


def _footer(audits: Sequence[Data]) -> Markup:
    first = audits[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    schema = f"{first['schema']} version {first['version']}"
    return el("footer", join([el("p", f"Made {first['made']} with {versions}; seed {first['seed']}. Every number here "
                                      f"is in the audit's JSON too (schema {schema}).")]))  # fmt: skip
