"""The messages that the package logs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import contextmanager


class _Messages(logging.Handler):
    def __init__(self, take: Callable[[str], object]) -> None:
        super().__init__()
        self.take = take

    def emit(self, record: logging.LogRecord) -> None:
        self.take(record.getMessage())


@contextmanager
def logged(lines: list[str], take: Callable[[str], object] | None = None):
    """Add each message of the package, from INFO upwards, to ``lines``, and then call ``take`` with it."""

    def add(line: str) -> None:
        lines.append(line)
        if take is not None:
            take(line)

    package, handler = logging.getLogger("fmm_distill"), _Messages(add)
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
