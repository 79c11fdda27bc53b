"""A command whose help lists its options in sections."""

from __future__ import annotations

from typing import ClassVar

import click

__all__ = ["Sectioned"]


class Sectioned(click.Command):
    """A command with titled sections of options; the others are in the last one, "Options".

    Attributes:
        sections: each title, with the names of its options in the order of the help.
    """

    sections: ClassVar[dict[str, tuple[str, ...]]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections of options."""
        records = {
            param.name: param.get_help_record(ctx) for param in self.get_params(ctx) if isinstance(param, click.Option)
        }
        for title, names in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([record for name in names if (record := records.pop(name))])
        with formatter.section("Options"):
            formatter.write_dl([record for record in records.values() if record is not None])
