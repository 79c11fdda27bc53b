"""Families of generators that are no single velocity field, with the reason: a table that is maintained by hand."""

from __future__ import annotations

__all__ = ["OUTSIDE"]

# Family, reason, and what would have to exist.
OUTSIDE: tuple[tuple[str, str, str], ...] = ()
