"""``fmm-distill inspect TEACHER``: what would be distilled."""

from __future__ import annotations

import click

__all__ = ["inspect"]


@click.command(short_help="Show what a teacher is and what it can become.")
@click.argument("teacher")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="E.g. pipeline.height=512.")
def inspect(teacher: str, revision: str | None, overrides: tuple[str, ...]) -> None:
    """Open a teacher and say what was found, and what its students can become."""
    from fmm_distill.config.recipe import override, parse
    from fmm_distill.run.inspect import describe_teacher
    from fmm_distill.run.plan import open_teacher

    given = {"teacher": f"the teacher {teacher}"} | ({} if revision is None else {"revision": "--revision"})
    settings = override({"teacher": teacher, "revision": revision}, overrides, given)
    recipe = parse(settings, "inspect")
    click.echo(describe_teacher(open_teacher(recipe), recipe))
