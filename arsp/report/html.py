"""One self-contained HTML page: pictures are data URIs, nothing is loaded from elsewhere, no script, light and dark."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib.figure import Figure

from arsp.report import plots
from arsp.report.samples import SampleGrid, collect_grids
from arsp.report.tables import (
    SIMULATED,
    Cell,
    MetricTable,
    Record,
    Stack,
    collect,
    format_value,
    metric_table,
    stack_name,
    summary,
)

DEFAULT_TITLE = "arsp report"
ROLE_TITLES = {"teacher": "teacher", "accelerated": "accelerated", "student": "student", "control": "control", "reference": "reference"}

_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c1e21; --soft: #5d646c; --page: #ffffff; --card: #f5f6f8; --line: #d9dce0; --best: #e2f0e6; --warn: #fdf3d8;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a2a9b1; --page: #15181b; --card: #1f2327; --line: #3a4046; --best: #1d3a2a; --warn: #3b3318; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 78rem;
  background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
}
h1 { font-size: 1.75rem; margin: 0 0 .25rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p { max-width: 48rem; margin: .5rem 0; }
.soft, figcaption small, .head small { color: var(--soft); }
.summary { font-size: 1.05rem; }
.notice { background: var(--warn); border-radius: 6px; padding: .6rem 1rem; margin: 1rem 0; }
.notice ul { margin: 0; padding-left: 1.1rem; }
.grids { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); }
figure { margin: 0; }
.grids figure { background: var(--card); border-radius: 8px; padding: .75rem; max-width: 34rem; }
.grids img { width: 100%; height: auto; display: block; border-radius: 3px; }
figcaption { margin-bottom: .5rem; line-height: 1.35; }
figcaption small { display: block; }
.plot img { max-width: 100%; height: auto; display: block; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--soft); font-weight: 600; white-space: normal; }
th small { display: block; font-weight: 400; color: var(--soft); max-width: 11rem; white-space: normal; margin-left: auto; }
td small { display: block; font-weight: 400; color: var(--soft); font-size: .78rem; }
th, td { vertical-align: top; } thead th { vertical-align: bottom; }
tbody th { font-weight: 500; }
sup { line-height: 0; }
tr.first td, tr.first th { border-top: 2px solid var(--line); }
td.best { font-weight: 700; background: var(--best); }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .5rem .9rem; }
summary { cursor: pointer; }
pre {
  background: var(--card); padding: .6rem .8rem; border-radius: 6px; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.notes li { margin: .3rem 0; }
@media print { body { max-width: none; padding: 0; } details { border: 0; } }
"""


@dataclass
class Report:
    """All that the outputs of one report share."""

    title: str
    stacks: list[Stack]
    table: MetricTable
    grids: dict[str, SampleGrid]
    notes: list[str]

    @property
    def records(self) -> list[Record]:
        return [record for stack in self.stacks for record in stack.records]


def build_report(records: Sequence[Record], title: str = DEFAULT_TITLE, warn: Callable[[str], None] = lambda text: None) -> Report:
    """Checked records -> report. Every problem that does not stop it goes to ``warn`` and into the report's notes."""
    notes: list[str] = []

    def note(text: str) -> None:
        if text not in notes:
            notes.append(text)
            warn(text)

    stacks = collect(records)
    for record in records:
        if record.get("status") not in (None, "ok"):
            note(f"{stack_name(record)}: its '{record.get('command')}' run ended as '{record['status']}', so its values may be incomplete.")
    return Report(title, stacks, metric_table(stacks), collect_grids(stacks, note), notes)


def render_png(report: Report) -> bytes:
    """The picture of a report: grids, metric bars, quality over cost, passes of speculative decoding."""
    with plots.theme():
        figure = plots.overview(report.stacks, {label: grid.pixels for label, grid in report.grids.items()}, report.title)
        return plots.to_png(figure)


def render_html(report: Report) -> str:
    """The whole page."""
    sections = [
        _samples(report),
        _metrics(report),
        _plot("Quality over cost", "quality-cost", plots.quality_latency, report),
        _plot("Speculative decoding", "decoding", plots.decoding, report, _DECODING_TEXT),
        _plot("Accuracy by position", "positions", plots.position_maps, report, _POSITION_TEXT),
        _plot("Training curves", "curves", plots.training_curves, report, _curve_text(report)),
        _runs(report),
        _notes(report),
    ]
    body = "\n".join(section for section in sections if section)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(report.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(report.title)}</h1>
<p class="summary">{escape(summary(report.stacks, report.table))}</p>
{_notice(report)}
</header>
<main>
{body}
</main>
</body>
</html>
"""


_POSITION_TEXT = "Share of tokens that equal the target, for each position of the token grid (the first token is at the top left)."


_DECODING_TEXT = (
    "How many tokens a pass of an image commits (a pass with a single token gained nothing), and at each position of the token grid how "
    "many of the drafts that were tested there stood."
)


def _curve_text(report: Report) -> str:
    names = plots.curve_names(report.stacks)
    has_line = any(not stack.curves.get(name) and plots.final_level(stack, name) is not None for name in names for stack in report.stacks)
    return "A dashed line is the final value of a stack that has no such curve." if has_line else ""


def _notice(report: Report) -> str:
    if not report.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f'<div class="notice" role="note"><ul>{items}</ul></div>'


# ---------------------------------------------------------------- sections


def _samples(report: Report) -> str:
    if not report.grids:
        return ""
    stacks = [stack for stack in report.stacks if stack.label in report.grids]
    figures = "\n".join(_sample_figure(stack, report) for stack in stacks)
    how = report.grids[stacks[0].label].how
    same = f'<p class="soft">The same classes in the same order, {escape(how)}.</p>' if _is_matched(report) else ""
    return f'<section id="samples">\n<h2>Samples</h2>\n{same}\n<div class="grids">\n{figures}\n</div>\n</section>'


def _is_matched(report: Report) -> bool:
    return len(report.grids) > 1 and all(grid.matched for grid in report.grids.values())


def _sample_figure(stack: Stack, report: Report) -> str:
    grid = report.grids[stack.label]
    column = plots.quality_column(report.stacks)
    value = stack.value(column) if column else None
    details = [ROLE_TITLES[stack.role]]
    if stack.passes is not None:
        details.append(f"{stack.passes:g} {'pass' if stack.passes == 1 else 'passes'} an image")
    if column is not None and value is not None:
        details.append(f"{column.title} {format_value(column.name, value)}")
    if not _is_matched(report):
        details.append(grid.how)
    caption = f"<figcaption><strong>{_named(stack, report)}</strong><small>{escape(' · '.join(details))}</small></figcaption>"
    height, width = grid.pixels.shape[:2]
    image = f'<img src="{_data_uri(grid.png, "image/png")}" width="{width}" height="{height}" alt="{escape(f"Samples of {stack.label}")}">'
    return f"<figure>{caption}{image}</figure>"


def _named(stack: Stack, report: Report) -> str:
    """The stack's name behind a dot in the colour that the plots give it."""
    color, _ = plots.looks(report.stacks)[stack.label]
    return f'<span class="dot" style="background:{color}"></span>{escape(stack.label)}{SIMULATED if stack.simulated else ""}'


def _metrics(report: Report) -> str:
    table = report.table
    if not table.headings:
        return ""
    head = "".join(_column_head(title, details) for title, details in table.headings)
    rows = []
    for index, (stack, cells) in enumerate(zip(table.stacks, table.rows, strict=True)):
        starts_group = index > 0 and stack.role != table.stacks[index - 1].role
        values = "".join(map(_table_cell, cells))
        rows.append(f"<tr{' class=first' if starts_group else ''}><th scope='row'>{_named(stack, report)}</th>{values}</tr>")
    legend = "Best value of each column in bold; ↑ higher is better, ↓ lower is better." if any(c.arrow for c in table.columns) else ""
    if table.shared_details:
        legend = f"All metrics: {', '.join(table.shared_details)}. {legend}"
    body = "\n".join(rows)
    return f"""<section id="metrics">
<h2>Metrics</h2>
<div class="scroll"><table>
<thead><tr><th scope="col">Stack</th>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
<p class="soft">{escape(legend)}</p>
</section>"""


def _column_head(title: str, details: Sequence[str]) -> str:
    title = title.replace(" ↑", "\u00a0↑").replace(" ↓", "\u00a0↓").replace("-", "\u2011")  # lines break between words only
    return f"<th scope='col'>{escape(title)}{''.join(f'<small>{escape(text)}</small>' for text in details)}</th>"


def _table_cell(cell: Cell) -> str:
    interval = f"<small>{escape(cell.interval)}</small>" if cell.interval else ""
    return f"<td{' class=best' if cell.best else ''}>{escape(cell.text)}{_marks(cell.marks)}{interval}</td>"


def _marks(marks: str) -> str:
    return f'<sup><a href="#notes" style="color:inherit;text-decoration:none">{escape(marks)}</a></sup>' if marks else ""


def _plot(title: str, anchor: str, draw: Callable[[Sequence[Stack]], Figure | None], report: Report, text: str = "") -> str:
    """A figure drawn twice, for light and dark pages; nothing when it has nothing to draw."""
    images = []
    for dark in (False, True):
        with plots.theme(dark):
            figure = draw(report.stacks)
            if figure is None:
                return ""
            images.append(_data_uri(plots.to_svg(figure), "image/svg+xml"))
    light, dark_image = images
    note = f'<p class="soft">{escape(text)}</p>' if text else ""
    return f"""<section id="{anchor}">
<h2>{escape(title)}</h2>
{note}
<figure class="plot"><picture>
<source media="(prefers-color-scheme: dark)" srcset="{dark_image}">
<img src="{light}" alt="{escape(f"{title} of {len(report.stacks)} stacks; the numbers are in the table of metrics.")}">
</picture></figure>
</section>"""


def _runs(report: Report) -> str:
    listed = [(stack, record) for stack in report.stacks for record in stack.records if "part_of" not in record]
    blocks = "\n".join(_run_details(stack, record) for stack, record in listed)
    return f'<section id="runs">\n<h2>Runs</h2>\n{blocks}\n</section>'


def _run_details(stack: Stack, record: Record) -> str:
    facts = {key: record.get(key) for key in ("id", "status", "started", "finished", "seed", "config_sha256", "run_dir")}
    facts |= {f"environment: {key}": value for key, value in (record.get("environment") or {}).items()}
    known = {key: _plain_text(value) for key, value in facts.items() if value not in (None, "", {}, [])}
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in known.items())
    argv = record.get("argv")
    command = f"<pre>{escape(shlex.join(map(str, argv)))}</pre>" if isinstance(argv, list) and argv else ""
    config = record.get("config") or {}
    settings = f"<pre>{escape(json.dumps(config, indent=2, ensure_ascii=False, default=str))}</pre>" if config else ""
    head = f"{escape(str(record.get('command') or 'run'))}: {escape(stack.label)}"
    return f"<details><summary>{head}</summary>{command}<dl>{rows}</dl>{settings}</details>"


def _plain_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _notes(report: Report) -> str:
    notes = report.table.footnotes
    if not notes:
        return ""
    items = "".join(f"<li>{escape(f'{mark} {text}'.strip())}</li>" for mark, text in notes)
    return f'<section id="notes" class="notes">\n<h2>Notes</h2>\n<ul>{items}</ul>\n</section>'


def _data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
