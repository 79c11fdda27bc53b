"""``fmm-distill export RUN FOLDER``: diffusers pipelines of a run's newest checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from fmm_distill.cli.numbers import GUIDANCE, STEPS

__all__ = ["export"]


@click.command(short_help="Save the student of a run as diffusers pipelines.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--steps", type=STEPS, metavar="N,...", help="Numbers of steps to export as stock pipelines [the recipe's]."
)
@GUIDANCE
def export(run: Path, folder: Path, steps: tuple[int, ...] | None, guidance: float | None) -> None:
    """Save the student of a run as diffusers pipelines, and verify them.

    The any-step pipeline carries its own code; each number in --steps gets a pipeline that stock diffusers opens
    alone. All of them are loaded again in a clean process and compared with the student.


    A second export replaces the first, unless files in FOLDER were added or edited.
    """
    from fmm_distill.export.verify import summary
    from fmm_distill.run.reopen import export_run

    agreements = export_run(run, folder, steps, guidance)
    click.echo(f"exported to {folder}; reloaded with stock diffusers: {summary(agreements)}")
