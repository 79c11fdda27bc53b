"""``fmm-distill inspect TEACHER``: what would be distilled."""

from __future__ import annotations

import click

__all__ = ["inspect"]


@click.command()
@click.argument("teacher")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
def inspect(teacher: str, revision: str | None) -> None:
    """Open a teacher and say what it is: adapter, prediction, shape, range of time."""
    from fmm_distill.teachers.load import load_teacher

    found = load_teacher(teacher, revision=revision)
    parameters = sum(p.numel() for p in found.network.parameters())
    click.echo(f"source      {found.source}{f' at {found.revision}' if found.revision else ''}")
    click.echo(f"adapter     {found.adapter}")
    click.echo(f"prediction  {found.prediction}")
    click.echo(f"shape       {' x '.join(map(str, found.event_shape))} (channels x height x width)")
    click.echo(f"parameters  {parameters:,}")
    click.echo(
        f"timesteps   {found.schedule.num_timesteps}, t from {found.schedule.t_min:.5f} to {found.schedule.t_max:.5f}"
    )
    click.echo(f"licence     {found.licence or 'not stated'}")
