"""Formulas as MathML, converted when the site is built: a page needs no script for them, and no network."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

from latex2mathml.converter import convert

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

# What pymdownx.arithmatex makes of \( inline \) and \[ display \] formulas.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(markup: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page with its formulas in MathML.

    Raises:
        ValueError: if a formula can't be converted.
    """

    def as_mathml(found: re.Match[str]) -> str:
        try:
            return convert(html.unescape(found[3]).strip(), display="block" if found[2] == "[" else "inline")
        except Exception as error:  # the library has no common class of errors
            raise ValueError(f"{page.file.src_uri}: formula {found[3].strip()}: {error}") from error

    return _FORMULA.sub(as_mathml, markup)
