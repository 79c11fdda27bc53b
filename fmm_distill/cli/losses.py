"""``fmm-distill losses``: the losses, their papers and their requirements."""

from __future__ import annotations

import textwrap

import click

__all__ = ["losses"]


@click.command()
def losses() -> None:
    """List the losses with their papers and their requirements."""
    from fmm_distill.losses import SETTINGS

    for name, settings in SETTINGS.items():
        choices = settings.model_fields["velocity"].annotation.__args__  # type: ignore[union-attr]
        needs = {"teacher": "a teacher", "self": "flow_matching as an extra loss", "data": "data"}
        click.echo(f"{name}\n{textwrap.indent(textwrap.fill(settings.summary, 96), '    ')}")
        click.echo(f"    paper: {settings.paper}")
        beside = ", and flow_matching as an extra loss with the default target" if settings().sees_no_teacher else ""
        click.echo(f"    needs: {' or '.join(needs[choice] for choice in choices)}{beside}")
