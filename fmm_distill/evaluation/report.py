"""``report.html``: numbers, pictures and protocol in one file that opens offline, on a phone too."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

from fmm_distill.checkpoint import write_text
from fmm_distill.evaluation.pictures import styles_of
from fmm_distill.evaluation.result import COLUMNS

if TYPE_CHECKING:
    from pathlib import Path

    from fmm_distill.evaluation.result import Column, Evaluation, Row

__all__ = ["write_report"]

_PICTURES = {
    "samples.png": "The same noise down each column: the teacher's ODE, then the student.",
    "steps.png": "Against network calls. Bars are two standard errors to each side.",
    "interpolation.png": "Noises on the way from one to another.",
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
  max-width: 9.5rem; overflow: hidden; text-overflow: ellipsis; border-right: 1px solid #ccc; }
thead th:first-child { background: #f2f2f2; }
.mark { display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem; border: 1px solid #333; }
dl { font-size: .875rem; } dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0; color: #333; }
"""


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write ``report.html`` into a folder, with the pictures that stand there inside it.

    Raises:
        UserError: if the disk does not take it.
    """
    subject = escape(str(evaluation.protocol.get("of", "a student")))
    figures = "".join(
        f'<figure><img src="{_inline(folder / name)}" alt="{escape(text)}">'
        f"<figcaption>{escape(text)}</figcaption></figure>"
        for name, text in _PICTURES.items()
        if (folder / name).is_file()
    )
    parts = [
        f"<h1>What {subject} loses and gains</h1>",
        _lead(evaluation),
        f"<h2>Numbers</h2>{_table(evaluation)}",
        "<p>Small numbers are standard errors. Ratios are to the teacher's own sampler. Arrows: which way is better.</p>",
        f"<h2>Pictures</h2>{figures}",
        _consistency(evaluation),
        f"<h2>How it was measured</h2>{_protocol(evaluation)}",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation of {subject}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    write_text(folder / "report.html", page)


def _inline(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def _lead(evaluation: Evaluation) -> str:
    """The one sentence that most people read."""
    timed = [row for row in evaluation.rows if row.sampler == "student" and row.seconds_ratio]
    if not timed:
        return "<p>No row of the teacher's own sampler, so there is nothing to be faster than.</p>"
    best = max(timed, key=lambda row: row.steps)
    (base,) = [row for row in evaluation.rows if row.sampler == "teacher"]
    text = f"At {best.steps} steps an image takes {_times(best)} less time than by the teacher's own sampler"
    if best.frechet is not None and base.frechet is not None:
        text += f"; the Fréchet distance is {best.frechet:.3f} instead of {base.frechet:.3f}"
    return f"<p>{text}.</p>"


def _times(row: Row) -> str:
    return f"{1 / row.seconds_ratio:.3g} times" if row.seconds_ratio else ""


def _table(evaluation: Evaluation) -> str:
    shown = [column for column in COLUMNS if any(getattr(row, column.key) is not None for row in evaluation.rows)]
    styles = styles_of(evaluation)
    titles = "".join(f"<th>{escape(c.title)} {'↓' if c.better == 'lower' else '↑'}</th>" for c in shown)
    lines = []
    for row in evaluation.rows:
        colour, _, name = styles[row.sampler]
        mark = f'<span class="mark" style="background:{colour}"></span>'
        cells = "".join(_cell(row, column) for column in shown)
        label = f'<td title="{escape(name)}">{mark}{escape(name)}</td>'
        lines.append(f"<tr>{label}<td>{row.steps}</td><td>{row.calls}</td>{cells}</tr>")
    head = f"<thead><tr><th>sampler</th><th>steps</th><th>calls</th>{titles}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _cell(row: Row, column: Column) -> str:
    value, error = getattr(row, column.key), row.errors.get(column.key)
    if value is None:
        return "<td>-</td>"
    told = "" if error is None else f" <small>±{error:{column.form}}</small>"
    return f"<td>{value:{column.form}}{told}</td>"


def _consistency(evaluation: Evaluation) -> str:
    if not evaluation.consistency:
        return ""
    lines = [
        f"<li>{escape(name)}: " + "; ".join(f"{pair.replace(',', ' and ')} steps {d:.4f}" for pair, d in pairs.items())
        for name, pairs in evaluation.consistency.items()
    ]
    about = escape(str(evaluation.protocol.get("consistency", "")))
    return f"<h2>Do all numbers of steps give the same image?</h2><p>{about}</p><ul>{''.join(lines)}</ul>"


def _protocol(evaluation: Evaluation) -> str:
    told = {key: value for key, value in evaluation.protocol.items() if value is not None}
    return (
        "<dl>"
        + "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in told.items())
        + "</dl>"
    )
