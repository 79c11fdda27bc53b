"""``fmm-distill publish RUN me/student``: an exported student to the Hub."""

from __future__ import annotations

from pathlib import Path

import click

from fmm_distill.cli.numbers import STEPS

__all__ = ["publish"]


@click.command(short_help="Upload a student to the Hub with its model card.")
@click.argument("source", metavar="RUN|FOLDER", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Create a new repository as a private one.")
@click.option("--branch", metavar="NAME", help="Branch to publish to, created if it is missing [main].")
@click.option("--steps", type=STEPS, metavar="N,...", help="Fixed-step pipelines to upload [all].")
@click.option("--force", is_flag=True, help="Overwrite a repository that has other content.")
@click.option("--dry-run", is_flag=True, help="List the files and show the card; upload nothing.")
def publish(
    source: Path,
    repo: str,
    private: bool,
    branch: str | None,
    steps: tuple[int, ...] | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Upload the student of a run, or an exported folder, to the Hub in one commit, with its model card.

    Only the files that the export wrote are uploaded; other files in the folder are listed and left out. After an
    interruption the same command resumes, and uploads nothing twice.
    """
    from fmm_distill.run.publish import pack
    from fmm_distill.run.publish import publish as send

    upload = pack(source, repo, branch, steps)
    if dry_run:
        click.echo(upload.describe())
        click.echo("nothing was uploaded (--dry-run)")
        return
    send(upload, repo, branch, private=private, force=force)
    click.echo(upload.how_to_load)
