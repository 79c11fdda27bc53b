"""``fmm-distill evaluate SOURCE``: measure a student and its teacher; ``--compare``: compare two results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import click

from fmm_distill.cli.numbers import GUIDANCE, STEPS, STOCHASTICITY
from fmm_distill.cli.sections import Sectioned

if TYPE_CHECKING:
    from fmm_distill.evaluation.result import Evaluation

__all__ = ["evaluate"]

_PATH = click.Path(path_type=Path)


class _Evaluate(Sectioned):
    sections: ClassVar = {
        "Student": ("steps", "stochasticity", "guidance", "prompts"),
        "Baselines": ("against", "teacher_steps", "also", "also_steps"),
        "Metrics": ("samples", "features", "reference", "clip"),
        "Output": ("output", "report"),
        "Comparison": ("compare", "across_protocols"),
    }


@click.command(cls=_Evaluate, short_help="Measure a student and its teacher, or compare two results.")
@click.argument("source", required=False)
@click.option("--steps", type=STEPS, metavar="N,...", help="Numbers of steps of the student [the recipe's].")
@click.option(
    "--stochasticity",
    type=STOCHASTICITY,
    metavar="S",
    help="Strength of the fresh noise in the student's steps [the recipe's].",
)
@click.option(
    "--against",
    type=click.Choice(["teacher", "none"]),
    help="Baselines of the teacher: its own pipeline and fast solvers at as many network calls, or none [teacher].",
)
@click.option(
    "--teacher-steps",
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="Steps of the teacher's own pipeline [the pipeline's default].",
)
@click.option(
    "--also",
    multiple=True,
    metavar="PIPELINE",
    help="Another pipeline or student, by Hub id or folder; can be repeated.",
)
@click.option(
    "--also-steps", type=STEPS, metavar="N,...", help="Numbers of steps of the --also pipelines [the student's]."
)
@click.option(
    "--features",
    metavar="NAME|FILE",
    help="digits, inception, none, or a TorchScript file (*.pt) [the recipe's].",
)
@click.option("--reference", metavar="DATA", help="Reference images: a dataset, parquet file or folder [the recipe's].")
@click.option("--clip", metavar="MODEL", help="A CLIP model for text-to-image, by Hub id or folder.")
@click.option(
    "--prompts",
    metavar="FILE",
    help="A file of prompts, one per line, for an exported student; a table for one with images [its recipe's].",
)
@click.option("--samples", type=click.IntRange(4, 10**7), metavar="N", help="Images per row [the recipe's].")
@click.option("--output", type=_PATH, metavar="FILE", help="Write the results as JSON to this file.")
@click.option("--report", type=_PATH, metavar="DIR", help="Write pictures and report.html into this folder.")
@click.option(
    "--compare", type=_PATH, nargs=2, metavar="A B", help="Compare two JSON results instead; exit code 1 if B is worse."
)
@click.option("--across-protocols", is_flag=True, help="Compare results of different protocols too.")
@GUIDANCE
def evaluate(
    source: str | None,
    steps: tuple[int, ...] | None,
    stochasticity: float | None,
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
    """Measure a student and its teacher on the same noises.

    SOURCE is a run, an exported folder or a Hub id. The recipe's values are the defaults in brackets.
    """
    changes = {"steps": steps, "stochasticity": stochasticity, "samples": samples, "features": features}
    changes |= {"reference": reference, "clip": clip}
    changes = {key: value for key, value in changes.items() if value is not None}
    if compare is not None:
        others = (source, against, teacher_steps, also, also_steps, prompts, output, report, guidance)
        if changes or any(other for other in others):
            raise click.UsageError(
                "--compare reads two results and takes no other option than --across-protocols; leave out the others"
            )
        _compare(compare, across_protocols)
        return
    if source is None:
        raise click.UsageError("SOURCE is missing; expected a run, an exported folder or a Hub id, or --compare A B")
    _check_idle(
        (across_protocols, "--across-protocols needs --compare"),
        (bool(also_steps) and not also, "--also-steps needs --also"),
        (bool(teacher_steps) and against == "none", "--teacher-steps needs --against teacher"),
    )
    from fmm_distill.cli.outputs import check_output, check_report
    from fmm_distill.run.evaluate import EvaluationRequest, measure_target, open_target

    if output is not None:
        check_output(output)
    if report is not None:
        check_report(report)
    request = EvaluationRequest(against != "none", also, also_steps or (), teacher_steps, guidance, prompts, changes)
    measured = measure_target(open_target(source, request), request, report)
    # Processes other than the first have no results.
    if measured is not None:
        _write(measured, output, report)


def _write(measured: Evaluation, output: Path | None, report: Path | None) -> None:
    import json

    from fmm_distill.evaluation.result import table
    from fmm_distill.io.files import write_text

    click.echo(table(measured))
    if output is not None:
        write_text(output, json.dumps(measured.to_json(), indent=2) + "\n")
    if report is not None:
        click.echo(f"report: {report / 'report.html'}")


def _check_idle(*settings: tuple[bool, str]) -> None:
    for idle, text in settings:
        if idle:
            raise click.UsageError(f"{text}; add that, or leave this out")


def _compare(paths: tuple[Path, Path], across_protocols: bool) -> None:
    import sys

    from fmm_distill.evaluation.compare import compare, format_comparison, read_result

    before, after = (read_result(path) for path in paths)
    comparison = compare(before, after, across_protocols=across_protocols)
    click.echo(format_comparison(comparison))
    if comparison.worse:
        sys.exit(1)
