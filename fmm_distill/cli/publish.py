"""``fmm-distill publish RUN me/student``: an exported student to the Hub."""

from __future__ import annotations

from pathlib import Path

import click

from fmm_distill.cli.numbers import STEPS

__all__ = ["publish"]


@click.command(short_help="Put a student on the Hub, with its card.")
@click.argument("source", metavar="RUN|FOLDER", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--branch", metavar="NAME", help="Publish to a branch, made if it is not there [main].")
@click.option("--steps", type=STEPS, metavar="N,...", help="Folded pipelines to send [all].")
@click.option("--force", is_flag=True, help="Write over a repository that holds something else.")
@click.option("--dry-run", is_flag=True, help="List the files and show the card; send nothing.")
def publish(
    source: Path,
    repo: str,
    private: bool,
    branch: str | None,
    steps: tuple[int, ...] | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Put the student of a run, or an exported folder, on the Hub in one commit, with its card.

    Only the files that the export wrote are sent; others in the folder are named and left out. After an interruption
    the same command resumes, and sends nothing that is there already.
    """
    from fmm_distill.run.publish import pack
    from fmm_distill.run.publish import publish as send

    parcel = pack(source, repo, branch, steps)
    if dry_run:
        click.echo(parcel.describe())
        click.echo("nothing was sent (--dry-run)")
        return
    send(parcel, repo, branch, private=private, force=force)
    click.echo(parcel.how_to_load)
