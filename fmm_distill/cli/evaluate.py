"""``fmm-distill evaluate SOURCE``: measure a student beside its teacher; ``--compare``: two such measurements."""

from __future__ import annotations

from pathlib import Path

import click

from fmm_distill.cli.numbers import GUIDANCE, STEPS

__all__ = ["evaluate"]

_PATH = click.Path(path_type=Path)


@click.command(short_help="Measure a student next to its teacher, or compare results.")
@click.argument("source", required=False)
@click.option("--steps", type=STEPS, metavar="N,...", help="Numbers of student steps [the recipe's].")
@click.option(
    "--against",
    type=click.Choice(["teacher", "none"]),
    help="Rows of the teacher: its own pipeline as the reference, and fast solvers at as many network calls [teacher].",
)
@click.option(
    "--teacher-steps", type=click.IntRange(1, 100_000), help="Steps of the reference [its pipeline's own number]."
)
@click.option("--also", multiple=True, metavar="PIPELINE", help="Another pipeline or student, by Hub id or folder.")
@click.option("--also-steps", type=STEPS, metavar="N,...", help="Its numbers of steps [the student's].")
@click.option("--features", help="digits, inception, none, or a TorchScript file (*.pt) [the recipe's].")
@click.option("--reference", metavar="DATA", help="Images to compare with: dataset, parquet or folder [the recipe's].")
@click.option("--clip", metavar="MODEL", help="A CLIP model, by Hub id or folder, for a teacher of prompts.")
@click.option("--prompts", metavar="FILE", help="Prompts of an exported student, one a line [its recipe's].")
@click.option("--samples", type=click.IntRange(4, 10**7), help="Images for the distances [the recipe's].")
@click.option("--output", type=_PATH, help="Write the numbers as JSON to this file.")
@click.option("--report", type=_PATH, metavar="DIR", help="Write pictures and report.html into this folder.")
@click.option(
    "--compare", type=_PATH, nargs=2, metavar="A B", help="Compare two JSON files instead; exit 1 if B is worse."
)
@click.option("--across-protocols", is_flag=True, help="Compare them although they were measured in different ways.")
@GUIDANCE
def evaluate(
    source: str | None,
    steps: tuple[int, ...] | None,
    against: str | None,
    teacher_steps: int | None,
    also: tuple[str, ...],
    also_steps: tuple[int, ...] | None,
    features: str | None,
    reference: str | None,
    clip: str | None,
    prompts: str | None,
    samples: int | None,
    output: Path | None,
    report: Path | None,
    compare: tuple[Path, Path] | None,
    across_protocols: bool,
    guidance: float | None,
) -> None:
    """Measure the student of a run, an exported folder or a Hub id beside its teacher, on the same noises."""
    changes = {"steps": steps, "samples": samples, "features": features, "reference": reference, "clip": clip}
    changes = {key: value for key, value in changes.items() if value is not None}
    if compare is not None:
        others = (source, against, teacher_steps, also, also_steps, prompts, output, report, guidance)
        if changes or any(other for other in others):
            raise click.UsageError("--compare measures nothing; leave out all but --across-protocols")
        _compare(compare, across_protocols)
        return
    if source is None:
        raise click.UsageError("SOURCE is missing; wanted a run, an exported folder or a Hub id, or --compare A B")
    _check_idle(
        (across_protocols, "--across-protocols acts with --compare"),
        (bool(also_steps) and not also, "--also-steps acts with --also"),
        (bool(teacher_steps) and against == "none", "--teacher-steps acts with --against teacher"),
    )
    import json

    from fmm_distill.cli.outputs import check_output, check_report
    from fmm_distill.evaluation.result import table
    from fmm_distill.io.files import write_text
    from fmm_distill.run.evaluate import Asked, measure_subject, open_subject

    if output is not None:
        check_output(output)
    if report is not None:
        check_report(report)
    asked = Asked(against != "none", also, also_steps or (), teacher_steps, guidance, prompts, changes)
    measured = measure_subject(open_subject(source, asked), asked, report)
    # Of several processes the first has the numbers.
    if measured is None:
        return
    click.echo(table(measured))
    if output is not None:
        write_text(output, json.dumps(measured.to_json(), indent=2) + "\n")
    if report is not None:
        click.echo(f"report: {report / 'report.html'}")


def _check_idle(*settings: tuple[bool, str]) -> None:
    for idle, text in settings:
        if idle:
            raise click.UsageError(f"{text}; leave it out")


def _compare(paths: tuple[Path, Path], across_protocols: bool) -> None:
    import sys

    from fmm_distill.evaluation.compare import compare, read_result, report

    before, after = (read_result(path) for path in paths)
    comparison = compare(before, after, across_protocols=across_protocols)
    click.echo(report(comparison))
    if comparison.worse:
        sys.exit(1)
