"""``fmm-distill sample RUN``: a grid of generated images."""

from __future__ import annotations

from pathlib import Path

import click

from fmm_distill.cli.numbers import GUIDANCE, STEPS, STOCHASTICITY

__all__ = ["sample"]


@click.command(short_help="Generate a grid of images with the student of a run.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--steps", type=STEPS, default="4", show_default=True, metavar="N,...", help="Numbers of steps, one row each."
)
@click.option(
    "--count",
    type=click.IntRange(1, 64),
    default=12,
    show_default=True,
    metavar="N",
    help="Images per row, at most 64.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, metavar="N", help="Seed of the noise."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    default=Path("samples.png"),
    show_default=True,
    help="The picture.",
)
@click.option(
    "--stochasticity",
    type=STOCHASTICITY,
    default=0.0,
    show_default=True,
    metavar="S",
    help="Strength of the fresh noise in each step.",
)
@GUIDANCE
def sample(
    run: Path,
    steps: tuple[int, ...],
    count: int,
    seed: int,
    output: Path,
    stochasticity: float,
    guidance: float | None,
) -> None:
    """Generate a grid of images with the student of a run.

    The first row is the teacher's ODE, below the images of the prompts if there are any. Each column starts from one noise.
    """
    from fmm_distill.cli.outputs import PICTURES, check_output

    check_output(output, PICTURES)
    from fmm_distill.run.reopen import draw_run

    draw_run(run, steps, count, seed, output, guidance, stochasticity)
    click.echo(f"{output}: {count} images per row, {', '.join(map(str, steps))} steps")
