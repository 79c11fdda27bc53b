"""The commands in the README and the documentation are ones that the program accepts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from fmm_distill.cli import command as program
from fmm_distill.config.recipe import load_recipe
from fmm_distill.losses.registry import reload_losses
from tests.conformance.test_add_a_loss import install

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A line of a shell block, directly or under a launcher.
COMMAND = re.compile(r"^ *(fmm-distill|.* -m fmm_distill) ")


def commands(page: Path) -> list[list[str]]:
    """The arguments of each command of a page."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = []
    for block in re.findall(r"```(?:bash|shell)?\n(.*?)```|((?:^    .*\n)+)", text, re.DOTALL | re.MULTILINE):
        for line in "".join(block).splitlines():
            if COMMAND.match(line):
                words = shlex.split(line, comments=True)
                start = words.index("-m") + 2 if "-m" in words else 1
                end = words.index(">") if ">" in words else len(words)
                found.append(words[start:end])
    return found


FOUND = [(page.relative_to(ROOT), words) for page in PAGES for words in commands(page)]


@pytest.fixture(scope="module", autouse=True)
def own_loss(tmp_path_factory):
    """The loss of docs/add-a-loss.md, installed: a command of that page names it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(install(tmp_path_factory.mktemp("installed") / "own"))
        reload_losses()
        yield
    reload_losses()


def test_every_page_with_a_command_is_read():
    line = re.compile(r"^(    )?fmm-distill ", re.MULTILINE)
    pages = {page.relative_to(ROOT) for page in PAGES if line.search(page.read_text(encoding="utf-8"))}
    assert pages <= {page for page, _ in FOUND}
    # Most pages have several.
    assert len(FOUND) > 2 * len(pages) > 0


@pytest.mark.parametrize(("page", "words"), FOUND, ids=[f"{page.name}: {' '.join(words)}" for page, words in FOUND])
def test_a_documented_command_parses(page, words):
    command, words = program, list(words)
    while isinstance(command, click.Group) and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    # As in a call of the program: click stores the option of the first context in the command.
    names = program.context_settings["help_option_names"]
    with command.make_context("fmm-distill", list(words), help_option_names=names) as context:
        given = context.params
    if command is program:
        # The bare command takes options only: a rest is a verb that does not exist.
        assert words[0].startswith("-"), words[0]
        assert given["recipe"] is not None
        load_recipe(given["recipe"], given["overrides"], teacher=given["teacher"], data=given["data"])
