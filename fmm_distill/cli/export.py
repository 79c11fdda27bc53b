"""``fmm-distill export RUN``: the pipelines of a run's newest checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from fmm_distill.cli.numbers import GUIDANCE, STEPS

__all__ = ["export"]


@click.command(short_help="Write the student of a run as diffusers pipelines.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--steps", type=STEPS, metavar="N,...", help="Numbers of steps to fold [the recipe's].")
@GUIDANCE
def export(run: Path, folder: Path, steps: tuple[int, ...] | None, guidance: float | None) -> None:
    """Write the student of a run folder as pipelines and open them again with stock diffusers.

    A second export into a folder replaces the first. It is refused if the folder has files that were added or edited.
    """
    from fmm_distill.export.verify import summary
    from fmm_distill.run.reopen import export_run

    agreements = export_run(run, folder, steps, guidance)
    click.echo(f"{folder}: reloaded with stock diffusers, {summary(agreements)}")
