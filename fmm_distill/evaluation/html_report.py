"""``report.html``: numbers, pictures and protocol in one file that needs no network."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

from fmm_distill.evaluation.pictures import PLOTTED, measured_columns, plot_steps, styles_of
from fmm_distill.evaluation.result import COLUMNS
from fmm_distill.io.files import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from fmm_distill.evaluation.result import Column, Evaluation, Row

__all__ = ["write_report"]

_PICTURES = {
    "samples.png": "Each column starts from one noise. First row{given}: the solution of the ODE; others: the student.",
    "interpolation.png": "The same for noises between two noises.",
}
_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figcaption { color: #444; } figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; border: 1px solid #ccc; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e5e5e5; }
thead th { background: #f2f2f2; } small { color: #555; }
th:first-child, td:first-child { position: sticky; left: 0; text-align: left; background: #fff;
  white-space: normal; min-width: 8rem; border-right: 1px solid #ccc; }
thead th:first-child { background: #f2f2f2; }
.wide img { min-width: 40rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.mark { display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem; border: 1px solid #333; }
dl { font-size: .875rem; } dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0; color: #333; }
"""


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write ``report.html`` into a folder, with the pictures of the folder embedded.

    Raises:
        UserError: if the file can't be written.
    """
    student = escape(str(evaluation.protocol.get("student") or "a student").rstrip("/").rpartition("/")[2])
    parts = [
        f"<h1>Evaluation of {student}</h1>",
        _lead(evaluation),
        f"<h2>Numbers</h2>{_table(evaluation)}",
        "<p>Values with standard errors (±). Arrows show the better direction. Ratios are relative to the teacher's "
        "own sampler.</p>",
        f"<h2>Quality against network calls</h2>{_curves(evaluation)}",
        f"<h2>Samples</h2>{_figures(evaluation, folder)}",
        _consistency(evaluation),
        f"<h2>Protocol</h2>{_protocol(evaluation)}",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation of {student}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    write_text(folder / "report.html", page)


def _curves(evaluation: Evaluation) -> str:
    """Return one plot per quantity: on a narrow screen, each has the full width."""
    pictures = []
    for column in measured_columns(evaluation, PLOTTED):
        plot = BytesIO()
        plot_steps(evaluation, plot, (column.key,))
        pictures.append(f'<img src="{_inline(plot.getvalue())}" alt="{escape(column.title)} against network calls">')
    return f'<div class="curves">{"".join(pictures)}</div><p>Error bars show two standard errors to each side.</p>'


def _figures(evaluation: Evaluation, folder: Path) -> str:
    # Rows with the images of the conditions are above those of the samples.
    given = " below the given images" if evaluation.protocol.get("images") else ""
    captions = {name: text.replace("{given}", given) for name, text in _PICTURES.items()}
    return "".join(
        f'<figure><div class="wide"><img src="{_inline((folder / name).read_bytes())}" alt="{escape(text)}"></div>'
        f"<figcaption>{escape(text)}</figcaption></figure>"
        for name, text in captions.items()
        if (folder / name).is_file()
    )


def _inline(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _lead(evaluation: Evaluation) -> str:
    """Return the summary: the student against the teacher's own sampler."""
    base = next((row for row in evaluation.rows if row.sampler == "teacher"), None)
    if base is None:
        return "<p>The teacher's own sampler was not evaluated, so there are no ratios.</p>"
    lines = [
        f"<li>{row.steps} {'step' if row.steps == 1 else 'steps'}: {1 / row.seconds_ratio:.3g} times as fast"
        f"{_quality(row, base)}</li>"
        for row in evaluation.rows
        if row.sampler == "student" and row.seconds_ratio
    ]
    about = escape(str(evaluation.protocol.get("reference_sampler")))
    return f"<p>Compared with the teacher's own sampler ({about}), the student is:</p><ul>{''.join(lines)}</ul>"


def _quality(row: Row, base: Row) -> str:
    if row.frechet is None or base.frechet is None:
        return ""
    return f", with Fréchet distance {row.frechet:.3f} (teacher: {base.frechet:.3f})"


def _table(evaluation: Evaluation) -> str:
    shown = [column for column in COLUMNS if any(getattr(row, column.key) is not None for row in evaluation.rows)]
    styles = styles_of(evaluation)
    titles = "".join(f"<th>{escape(c.title)} {'↓' if c.better == 'lower' else '↑'}</th>" for c in shown)
    lines = []
    for row in evaluation.rows:
        color, _, name = styles[row.sampler]
        mark = f'<span class="mark" style="background:{color}"></span>'
        cells = "".join(_cell(row, column) for column in shown)
        label = f'<td title="{escape(name)}">{mark}{escape(name)}</td>'
        lines.append(f"<tr>{label}<td>{row.steps}</td><td>{row.calls}</td>{cells}</tr>")
    head = f"<thead><tr><th>sampler</th><th>steps</th><th>calls</th>{titles}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _cell(row: Row, column: Column) -> str:
    value, error = getattr(row, column.key), row.errors.get(column.key)
    if value is None:
        return "<td>-</td>"
    suffix = "" if error is None else f" <small>±{error:{column.form}}</small>"
    return f"<td>{value:{column.form}}{suffix}</td>"


def _consistency(evaluation: Evaluation) -> str:
    if not evaluation.consistency:
        return ""
    lines = [
        f"<li>{escape(name)}: " + "; ".join(f"{pair.replace(',', ' and ')} steps: {d:.4f}" for pair, d in pairs.items())
        for name, pairs in evaluation.consistency.items()
    ]
    about = escape(str(evaluation.protocol.get("consistency", "")))
    return f"<h2>Consistency between numbers of steps</h2><p>{about}</p><ul>{''.join(lines)}</ul>"


def _protocol(evaluation: Evaluation) -> str:
    entries = {key.replace("_", " "): value for key, value in evaluation.protocol.items() if value is not None}
    items = (f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in entries.items())
    return f"<dl>{''.join(items)}</dl>"
