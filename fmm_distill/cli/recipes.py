"""``fmm-distill recipes``: list the recipes, or show one."""

from __future__ import annotations

import click

__all__ = ["recipes"]


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List the recipes that ship with the package."""
    if context.invoked_subcommand is None:
        context.invoke(list_)


@recipes.command("list")
def list_() -> None:
    """List the recipes with their purposes."""
    from fmm_distill.config.recipe import find_recipe, recipe_names

    names = recipe_names()
    width = max(map(len, names)) + 2
    for name in names:
        first = find_recipe(name).read_text(encoding="utf-8").splitlines()[0]
        click.echo(f"{name:<{width}}{first.removeprefix('#').strip().removeprefix('Purpose').strip()}")


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a recipe's file, to copy and edit."""
    from fmm_distill.config.plain_yaml import read_file_text
    from fmm_distill.config.recipe import find_recipe

    click.echo(read_file_text(find_recipe(name).read_bytes(), f"recipe {name}"), nl=False)
