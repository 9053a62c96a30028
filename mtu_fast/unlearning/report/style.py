"""The style sheet of the report: light, dark and printed."""

from __future__ import annotations

from mtu_fast.unlearning.report.markup import Markup

_DARK = """
  --page: #0f1418; --card: #171d23; --ink: #e6eaee; --soft: #9aa6b2; --line: #2b343d; --accent: #56b4e9;
  --original: #8b97a3; --unlearned: #56b4e9; --retrained: #e69f00; --with: #f0774a; --against: #56b4e9;
  --good: #4cc38a; --fair: #e8b339; --poor: #f2705f; --unknown: #9aa6b2;
  --s0: #56b4e9; --s1: #e69f00; --s2: #3cc29a; --s3: #d992c0; --s4: #c9c254; color-scheme: dark;"""

STYLE = Markup(
    """
:root { --page: #f4f6f8; --card: #ffffff; --ink: #16202a; --soft: #5a6775; --line: #dde3e9;
  --accent: #0b6aa8; --original: #7b8794; --unlearned: #0072b2; --retrained: #c96a00; --with:
  #d5501e; --against: #0072b2; --good: #18794e; --fair: #946300; --poor: #b42318; --unknown:
  #5a6775; --s0: #0072b2; --s1: #c96a00; --s2: #00805f; --s3: #a8408a; --s4: #7d7500; color-scheme:
  light;
}
@media (prefers-color-scheme: dark) { :root {"""
    + _DARK
    + """ } }
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 64px; }
header.top { margin-bottom: 28px; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 6px; }
h2 { font-size: 1.35rem; letter-spacing: -0.01em; margin: 0 0 4px; }
h3 { font-size: 1rem; margin: 26px 0 6px; }
p { margin: 0 0 12px; max-width: 72ch; }
a { color: var(--accent); }
.soft, figcaption, .lead { color: var(--soft); }
.lead { margin-bottom: 18px; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: 8px; padding: 0; margin: 16px 0 0; }
nav a {
  display: block; padding: 6px 14px; border: 1px solid var(--line); border-radius: 999px; background: var(--card);
  text-decoration: none; font-size: 0.9rem;
}
section.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 26px 28px; margin: 0 0 20px;
}
.request { margin: 44px 0 16px; }
.request h2 { font-size: 1.6rem; }
.verdict { border-left: 6px solid var(--unknown) !important; }
.verdict.good { border-left-color: var(--good) !important; }
.verdict.fair { border-left-color: var(--fair) !important; }
.verdict.poor { border-left-color: var(--poor) !important; }
.verdict .headline { font-size: 1.45rem; line-height: 1.3; font-weight: 650; margin: 0 0 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0 4px; }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.tile dt { font-size: 0.8rem; color: var(--soft); }
.tile dd { margin: 2px 0 0; font-size: 1.25rem; font-weight: 620; font-variant-numeric: tabular-nums; }
.tile dd small { display: block; font-size: 0.78rem; font-weight: 400; color: var(--soft); line-height: 1.4; }
.good { color: var(--good); } .fair { color: var(--fair); } .poor { color: var(--poor); }
.unknown { color: var(--unknown); }
section.verdict { color: var(--ink); }
.scroll { overflow-x: auto; margin: 0 0 10px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: 0 0 6px; font-size: 0.88rem; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
thead th { color: var(--soft); font-size: 0.82rem; }
th[scope=row], td.text { text-align: left; }
tbody tr:last-child > * { border-bottom: 0; }
.flag { font-weight: 650; color: var(--poor); }
.tag {
  font-size: 0.72rem; font-weight: 500; color: var(--soft); border: 1px solid var(--line); border-radius: 6px;
  padding: 1px 6px; margin-left: 6px;
}
figure { margin: 10px 0 14px; }
figcaption { font-size: 0.88rem; margin-top: 4px; max-width: 80ch; }
svg { display: block; max-width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--ink); font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
svg text.soft { fill: var(--soft); } svg text.title { font-weight: 600; font-size: 13px; }
svg .axis { stroke: var(--line); stroke-width: 1; } svg .zero { stroke: var(--soft); stroke-width: 1; }
svg .level { stroke: var(--ink); stroke-width: 1.6; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 14px 22px; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 0.86rem; color: var(--soft); margin: 4px 0 8px; }
.key span { display: inline-flex; align-items: center; gap: 6px; }
.absent { border: 1px dashed var(--line); border-radius: 10px; padding: 12px 16px; color: var(--soft); }
details summary { cursor: pointer; color: var(--accent); }
footer { color: var(--soft); font-size: 0.86rem; margin-top: 32px; }
li { margin-bottom: 4px; max-width: 76ch; }
@media (max-width: 560px) { section.card { padding: 20px 16px; } main { padding: 24px 12px 48px; } }
@media print {
  :root {
    --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; --original: #7b8794; --unlearned: #0072b2;
    --retrained: #c96a00; --with: #d5501e; --against: #0072b2; --good: #18794e; --fair: #946300; --poor: #b42318;
    --s0: #0072b2; --s1: #c96a00; --s2: #00805f; --s3: #a8408a; --s4: #7d7500; color-scheme: light;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11pt; } main { max-width: none; padding: 0; }
  section.card { border: 0; border-top: 1px solid var(--line); border-radius: 0; padding: 14px 0; }
  figure, table, .tiles, .panel { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .request { break-before: page; } .request.first { break-before: auto; } nav { display: none; }
  .scroll { overflow: visible; }
}
"""
)
