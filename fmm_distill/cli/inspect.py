"""``fmm-distill inspect TEACHER``: a teacher's properties, before anything is trained."""

from __future__ import annotations

import click

__all__ = ["inspect"]


@click.command(short_help="Show what a teacher is and what a student of it needs.")
@click.argument("teacher")
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit on the Hub.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a recipe setting, e.g. pipeline.height=512.",
)
def inspect(teacher: str, revision: str | None, overrides: tuple[str, ...]) -> None:
    """Load a teacher and show its network, schedule and conditioning, the memory of a training step, and its exports.

    TEACHER is a Hub id, a pipeline folder or builtin:digits.
    """
    from fmm_distill.config.recipe import override, parse
    from fmm_distill.run.inspect import describe_teacher
    from fmm_distill.run.plan import open_teacher

    given = {"teacher": f"the teacher {teacher}"} | ({} if revision is None else {"revision": "--revision"})
    settings = override({"teacher": teacher, "revision": revision}, overrides, given)
    recipe = parse(settings, "inspect")
    click.echo(describe_teacher(open_teacher(recipe), recipe))
