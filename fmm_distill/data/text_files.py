"""Text that a user's editor wrote: UTF-8 with or without a byte order mark, and the line ends of any system."""

from __future__ import annotations

import codecs
import unicodedata
from typing import TYPE_CHECKING

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["lines_of", "read_text", "trimmed"]

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# Zero-width space, word joiner and byte order mark: no part of a text at its ends. Joiners inside emoji stay.
_ZERO_WIDTH = "\u200b\u2060\ufeff"


def read_text(path: Path, what: str) -> str:
    r"""The text of a UTF-8 file without its byte order mark; each line ends with ``\n``.

    Args:
        what: the setting and the file, for messages.

    Raises:
        UserError: if the file can't be read or is no UTF-8 text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{what}: can't be read ({error.strerror or error}); expected a text file") from error
    for mark, encoding in _OTHER_MARKS:
        if data.startswith(mark):
            raise UserError(f"{what}: it is {encoding} text; expected UTF-8: save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{what}: line {line} has the byte 0x{error.object[error.start]:02x}, which is not UTF-8; expected UTF-8 "
            "text: save the file as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{what}: line {line} has a NUL byte: it is binary, or UTF-16 text; expected UTF-8 text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(text: str) -> list[str]:
    r"""The lines of a text of ``read_text``, without their ends.

    ``str.splitlines`` ends a line at form feeds and at Unicode's separators too, which are part of a text.
    """
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def trimmed(line: str) -> str:
    """A line without white space at its ends; empty where it holds nothing that can be seen."""
    if all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in line):
        return ""
    start, stop = 0, len(line)
    while line[start].isspace() or line[start] in _ZERO_WIDTH:
        start += 1
    while line[stop - 1].isspace() or line[stop - 1] in _ZERO_WIDTH:
        stop -= 1
    return line[start:stop]
