"""``fmm-distill losses``: the losses, their papers and their requirements."""

from __future__ import annotations

import textwrap

import click

__all__ = ["losses"]

_NEEDS = {"teacher": "a teacher", "self": "flow_matching as an extra loss", "data": "data"}


@click.command()
def losses() -> None:
    """List the losses with their papers and their requirements."""
    from fmm_distill.losses import registered_losses

    for name, loss in registered_losses().items():
        click.echo(f"{name}\n{textwrap.indent(textwrap.fill(loss.summary, 96), '    ')}")
        click.echo(f"    paper: {loss.paper}")
        term = (
            ", and flow_matching as an extra loss with the default target"
            if loss.model_validate({}).needs_velocity_term
            else ""
        )
        click.echo(f"    needs: {' or '.join(_NEEDS[source] for source in loss.velocities())}{term}")
