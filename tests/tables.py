"""Tables of the documentation that tests write."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["check_table"]

DOCS = Path(__file__).parents[1] / "docs"


def check_table(page: str, rows: str) -> None:
    """Compare the table between the marks of a page with these rows; with ``WRITE_DOCS`` set, write them first."""
    file = DOCS / page
    written = file.read_text(encoding="utf-8")
    before, mark, rest = written.partition("<!-- rows -->\n")
    _, end, after = rest.partition("<!-- end of rows -->")
    assert mark
    assert end
    expected = f"{before}{mark}{rows}{end}{after}"
    if os.environ.get("WRITE_DOCS"):
        file.write_text(expected, encoding="utf-8")
    assert written == expected, "WRITE_DOCS=1 writes the list anew"
