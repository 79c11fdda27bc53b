"""``fmm-distill status RUN``: the progress of a run, and its curves."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["status"]


@click.command(short_help="Show the progress of a run and plot its curves.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), metavar="PNG", help="File for the curves [RUN/curves.png].")
def status(run: Path, output: Path | None) -> None:
    """Show the progress of a run and plot its curves.

    The run may be active, interrupted or finished; nothing of it is changed.
    """
    from fmm_distill.cli.outputs import check_output
    from fmm_distill.run.status import describe, plot, read_run

    if output is not None:
        check_output(output, (".png",))
    found = read_run(run)
    click.echo(describe(found))
    if found.records:
        picture = output or run / "curves.png"
        plot(found, picture)
        click.echo(f"{'curves':<12}{picture}")
