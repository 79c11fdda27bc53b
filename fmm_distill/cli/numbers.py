"""Options for numbers that several commands take."""

from __future__ import annotations

import math

import click

__all__ = ["GUIDANCE", "STEPS", "STOCHASTICITY"]


class _Strength(click.ParamType[float]):
    name = "strength"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """``"0.5"`` as a finite number of at least 0."""
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if not 0 <= found < math.inf:
            self.fail(f"{value!r}: expected a finite number of at least 0, such as 0.5", param, ctx)
        return found


class _Steps(click.ParamType[tuple[int, ...]]):
    name = "steps"

    def convert(
        self, value: str | tuple[int, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """``"1,2,4"`` as positive integers."""
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: expected integers separated by commas, such as 1,2,4", param, ctx)
        if min(found) < 1:
            self.fail(f"{value!r}: expected numbers of at least 1", param, ctx)
        if max(found) > 100_000:
            self.fail(f"{value!r}: expected numbers of at most 100,000", param, ctx)
        if len(set(found)) < len(found):
            self.fail(f"{value!r}: expected each number once", param, ctx)
        return found


STEPS = _Steps()
GUIDANCE = click.option(
    "--guidance", type=float, metavar="SCALE", help="A scale in the run's guidance.range [the recipe's]."
)
STOCHASTICITY = _Strength()
