"""``fmm-distill evaluate RUN``: measure the student of a run again, at other steps or counts."""

from __future__ import annotations

from pathlib import Path

import click

from fmm_distill.cli.numbers import GUIDANCE, STEPS

__all__ = ["evaluate"]


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--steps", type=STEPS, metavar="N,...", help="Numbers of student steps [the recipe's].")
@click.option("--samples", type=click.IntRange(2), help="Images for the Fréchet distance [the recipe's].")
@click.option("--output", type=click.Path(path_type=Path), help="Write the numbers as JSON to this file.")
@GUIDANCE
def evaluate(
    run: Path, steps: tuple[int, ...] | None, samples: int | None, output: Path | None, guidance: float | None
) -> None:
    """Measure the student of a run folder against its teacher, with its newest checkpoint."""
    import json

    from fmm_distill.checkpoint import write_text
    from fmm_distill.evaluation.result import table
    from fmm_distill.run import evaluate_run

    measured = evaluate_run(run, steps, samples, guidance)
    click.echo(table(measured))
    if output is not None:
        write_text(output, json.dumps(measured.to_json(), indent=2) + "\n")
