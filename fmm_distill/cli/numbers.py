"""Options for numbers that several commands take."""

from __future__ import annotations

import click

__all__ = ["GUIDANCE", "STEPS"]


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
