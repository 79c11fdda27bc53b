"""Which parameters of a test run by default."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def with_slow(every: Iterable[str], soon: Iterable[str]) -> list:
    """All parameters; those that are not in ``soon`` are marked ``slow``."""
    every, soon = list(every), set(soon)
    # A name that is gone would leave fewer tests, and nobody would see it.
    assert soon
    assert soon <= set(every), sorted(soon - set(every))
    return [one if one in soon else pytest.param(one, marks=pytest.mark.slow) for one in every]
