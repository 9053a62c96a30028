"""The page: one self-contained HTML document from the data of one or several audits."""

from __future__ import annotations

from collections.abc import Sequence

from mtu_fast.unlearning.report import effects, sections, summary
from mtu_fast.unlearning.report.levels import of_class
from mtu_fast.unlearning.report.markup import Markup, el
from mtu_fast.unlearning.report.style import STYLE
from mtu_fast.unlearning.report.tables import Data

SECTIONS = (
    summary.verdict,
    effects.removed,
    effects.moved,
    sections.ideal,
    sections.conflict,
    sections.course,
)
TERMS = {
    "UIS": "mean over tasks of ½ (relative change of the test score + relative distance of the forget score from the "
    "original's test score), in percent.",
    "ToW": "product over forget, retain and test of 1 − |score − score of the retrained model|.",
    "Membership attack": "can forget samples be told from unseen ones by their loss, or by the entropy of the "
    "prediction? AUC 0.5 is a guess, 1 certainty.",
    "Drift": "loss after minus loss before, sample by sample.",
    "Gradient cosine": "how much a step on one sample's loss moves another's, between −1 and 1.",
}
PARTIAL = (  # what a partial request adds to the first term
    " In a partial request the second part of a task that is no target is the relative change of its own forget score, "
    "|before − after| / before: the data to forget must not move there."
)
CLASS = (  # what a removed class changes about UIS
    " For a removed class the second part is the forget score itself over the original's test score: it should be zero."
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
    articles = [_audit(data, i, several) for i, data in enumerate(audits)]
    body = el("main", _top(audits, title), articles, _explanations(audits), _footer(audits[0]))
    return "<!DOCTYPE html>\n" + el("html", _head(title), el("body", body), lang="en") + "\n"


def _head(title: str) -> Markup:
    return el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", STYLE),
    )


def _top(audits: Sequence[Data], title: str) -> Markup:
    first = audits[0]
    samples = first["request"]["samples"]
    sizes = f"{samples['forget']} samples to forget, {samples['retain']} retained, {samples['test']} unseen"
    line = el("p", f"{first['made'][:10]} · {sizes}", class_="soft")
    links = []
    for i, data in enumerate(audits):
        links.append(el("li", el("a", data["title"], href=f"#audit-{i}")))
    contents = el("nav", el("ul", links), aria_label="Requests") if len(audits) > 1 else None
    return el("header", el("h1", title), line, contents, class_="top")


def _audit(data: Data, index: int, several: bool) -> Markup:
    name = el("p", _asked(data))
    if several:
        request = [el("h2", data["title"]), el("p", _asked(data), class_="soft")]
        name = el("div", request, class_="request" if index else "request first")
    parts = [section(data) for section in SECTIONS]
    return el("article", name, parts, _notes(data["notes"]), id=f"audit-{index}")


def _asked(data: Data) -> str:
    request = data["request"]
    count, tasks = request["samples"]["forget"], ", ".join(request["tasks"])
    if request["kind"] == "full":
        return f"Full-task request: {count} samples from every task (tasks: {tasks})."
    targets = ", ".join(request["targets"])
    return f"Partial-task request: {count} samples from {targets} only (tasks: {tasks})."


def _notes(notes: Sequence[str]) -> Markup | None:
    if not notes:
        return None
    items = [el("li", note) for note in notes]
    return el("section", el("h2", "Notes"), el("ul", items), class_="card")


def _explanations(audits: Sequence[Data]) -> Markup:
    rules = [el("li", rule) for rule in audits[0]["verdict"]["rules"]]
    terms = []
    for term, text in TERMS.items():
        more = _more_of_uis(audits) if term == "UIS" else []
        terms.append(el("li", el("b", term), ": ", text, more))
    return el(
        "section",
        el("h2", "How to read this"),
        el("p", LIMITS),
        el("h3", "Terms"),
        el("ul", terms),
        el("h3", "Rules of the verdict"),
        el("ul", rules),
        class_="card",
    )


def _more_of_uis(audits: Sequence[Data]) -> list[str]:
    """What the requests on the page add to the first term."""
    found = []
    if any(data["request"]["kind"] == "partial" for data in audits):
        found.append(PARTIAL)
    if any(of_class(data["request"]) for data in audits):
        found.append(CLASS)
    return found


def _footer(first: Data) -> Markup:
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    schema = f"{first['schema']} version {first['version']}"
    made = f"Made {first['made']} with {versions}; seed {first['seed']}."
    return el(
        "footer", el("p", f"{made} Every number here is in the audit's JSON too (schema {schema}).")
    )
