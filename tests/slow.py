"""Which parameters of a test run by default."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest


def with_slow(every: Iterable[str], soon: Iterable[str]) -> list:
    """All parameters; those that are not in ``soon`` are marked ``slow``."""
    every, soon = list(every), set(soon)
    # A name that is gone would leave fewer tests, and nobody would see it.
    assert soon
    assert soon <= set(every), sorted(soon - set(every))
    return [one if one in soon else pytest.param(one, marks=pytest.mark.slow) for one in every]


def with_slow_product(*every: Iterable[str]) -> list:
    """All combinations; those that are not needed for every pair of a value with one of the others are ``slow``.

    The last list is the shortest: by default one of its values goes with each combination of the others.
    """
    every = [list(values) for values in every]
    count = len(every[-1])
    assert 1 < count == min(map(len, every))
    return [
        pytest.param(*values, marks=[pytest.mark.slow] * (sum(places) % count > 0))
        for values, places in zip(product(*every), product(*(range(len(values)) for values in every)), strict=True)
    ]
