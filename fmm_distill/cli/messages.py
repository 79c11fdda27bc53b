"""The package's log on the command line: one plain line per message on standard output."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["logged_lines"]


class _Echo(logging.Handler):
    """Write each message with ``click.echo``, which looks up the standard output of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record))


@contextmanager
def logged_lines() -> Iterator[None]:
    """Show the messages of this package, from INFO upwards, until the end of the context."""
    package, handler = logging.getLogger("fmm_distill"), _Echo()
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
