"""``fmm-distill status RUN``: where a run stands, and its curves."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["status"]


@click.command(short_help="Show the progress of a run and draw its curves.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), metavar="PNG", help="The curves [RUN/curves.png].")
def status(run: Path, output: Path | None) -> None:
    """Say where a run stands and draw its curves; it may be at work, killed or finished."""
    from fmm_distill.cli.outputs import check_output
    from fmm_distill.run.status import describe, draw, read_run

    if output is not None:
        check_output(output, (".png",))
    found = read_run(run)
    click.echo(describe(found))
    if found.records:
        picture = output or run / "curves.png"
        draw(found, picture)
        click.echo(f"{'curves':<12}{picture}")
