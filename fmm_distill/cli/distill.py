"""``fmm-distill --teacher ID --recipe NAME``: the main job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fmm_distill import __version__
from fmm_distill.cli.messages import logged_lines

if TYPE_CHECKING:
    from fmm_distill.config.recipe import Recipe

__all__ = ["distill"]

# Only the first process of a launcher talks to the Hub.
_FIRST = os.environ.get("RANK", "0") == "0"


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fmm-distill")
@click.option("--teacher", metavar="ID|FOLDER", help="Hub id, pipeline folder, or builtin:digits [the recipe's].")
@click.option("--recipe", metavar="NAME|FILE", help="A recipe of `fmm-distill recipes`, or a YAML file [required].")
@click.option(
    "--data",
    metavar="SOURCE",
    help="Hub dataset, parquet file or folder, image folder, teacher, or none [the recipe's].",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe setting, e.g. training.steps=200."
)
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Run folder [runs/<recipe>].")
@click.option(
    "--push-to-hub", "repo", metavar="OWNER/NAME", help="Publish the student to this Hub repository at the end."
)
@click.option("--private", is_flag=True, help="Create that repository as a private one.")
@click.option(
    "--resume/--fresh",
    default=True,
    show_default=True,
    help="Continue the run in the folder, or remove the run's files and start again.",
)
@click.option("--dry-run", is_flag=True, help="Print the complete recipe and its cost, test the export, and stop.")
@click.pass_context
def distill(
    context: click.Context,
    teacher: str | None,
    recipe: str | None,
    data: str | None,
    overrides: tuple[str, ...],
    output: Path | None,
    repo: str | None,
    private: bool,
    resume: bool,
    dry_run: bool,
) -> None:
    """Distill a pretrained diffusers model into a few-step generator.

    \b
    Examples:
      fmm-distill --recipe digits
      fmm-distill --teacher google/ddpm-cifar10-32 --recipe cifar10
      accelerate launch -m fmm_distill --teacher ID --recipe cifar10

    After an interruption the same command resumes.
    """  # noqa: D301 click reads the backspace that Python makes of the escape
    from fmm_distill.training.variables import check_variables

    # accelerate reads some variables at import, and fails there on a bad value.
    check_variables()
    context.with_resource(logged_lines())
    given = [teacher, recipe, data, output, repo, *overrides]
    if context.invoked_subcommand is not None:
        if any(value is not None for value in given) or dry_run or private or not resume:
            raise click.UsageError(
                f"options before {context.invoked_subcommand} are those of the bare command; put the options of "
                f"{context.invoked_subcommand} after it"
            )
        return
    if recipe is None:
        if any(value is not None for value in given):
            raise click.UsageError("--recipe is missing; `fmm-distill recipes` lists the recipes")
        click.echo(context.get_help())
        return
    _check_repo(repo, private)
    from fmm_distill.config.recipe import load_recipe

    resolved = load_recipe(recipe, overrides, teacher=teacher, data=data)
    folder = output or Path("runs") / Path(recipe).stem
    _check_recipe(recipe, folder)
    if dry_run:
        from fmm_distill.run.plan import forecast

        click.echo(forecast(resolved, folder))
        return
    from fmm_distill.run.distill import distill

    publishes = repo is not None and _FIRST
    if publishes:
        _check_target(str(repo), resolved)
    distill(resolved, folder, fresh=not resume)
    if publishes:
        _publish(folder, str(repo), private)


def _check_recipe(recipe: str, folder: Path) -> None:
    """Refuse a recipe in the run folder: an edited copy would be compared with itself, or overwritten."""
    from fmm_distill.errors import UserError
    from fmm_distill.run.marker import is_run

    file = Path(recipe)
    if is_run(folder) and file.is_file() and folder.resolve() in file.resolve().parents:
        raise UserError(
            f"--recipe {recipe}: expected a file outside of --output {folder}, which holds the record of a run; "
            "copy it to another folder and pass the copy"
        )


def _check_repo(repo: str | None, private: bool) -> None:
    """Refuse --private without --push-to-hub, and an invalid repository name."""
    if repo is not None:
        from fmm_distill.run.publish import check_name

        check_name(repo)
    elif private:
        raise click.UsageError("--private needs --push-to-hub; add that, or leave this out")


def _check_target(repo: str, recipe: Recipe) -> None:
    """Find a missing right to write before hours of training."""
    from fmm_distill.run.inputs import with_paths
    from fmm_distill.run.publish import check_target

    check_target(repo, with_paths(recipe).teacher)


def _publish(folder: Path, repo: str, private: bool) -> None:
    from fmm_distill.errors import UserError
    from fmm_distill.run.publish import pack, publish

    try:
        publish(pack(folder, repo), repo, private=private)
    except UserError as error:
        raise UserError(
            f"{error}; the run is complete: try again with `fmm-distill publish {folder} {repo}`"
        ) from error
