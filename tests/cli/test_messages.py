"""Where the package's log goes: to standard output on the command line, to the caller's handlers from Python."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from accelerate import Accelerator, PartialState

from fmm_distill.cli import command
from fmm_distill.training.process import first_process_logs
from tests.cli.runs import call
from tests.logs import logged

PACKAGE = logging.getLogger("fmm_distill")
MESSAGE = """
import logging, sys
if len(sys.argv) > 1:
    logging.basicConfig(level="INFO")
import fmm_distill
logger = logging.getLogger("fmm_distill.some.module")
logger.info("progress")
logger.warning("a fallback")
"""


@pytest.fixture
def verb(monkeypatch):
    """A verb that logs, and fails if it is asked to."""
    import click

    @click.command("speak")
    @click.option("--fail", is_flag=True)
    def speak(fail: bool) -> None:
        logger = logging.getLogger("fmm_distill.some.module")
        logger.debug("a detail")
        logger.info("100 % of an é")
        logger.warning("a fallback")
        if fail:
            raise click.UsageError("it fails")

    monkeypatch.setitem(command.commands, "speak", speak)


@pytest.mark.parametrize("arguments", [("speak",), ("speak", "--fail")])
def test_messages_are_plain_lines_of_standard_output(verb, caplog, arguments):
    before = PACKAGE.level, list(PACKAGE.handlers)
    status, out, err = call(*arguments)
    assert out == "100 % of an é\na fallback\n"
    assert (status, err.count("\n")) == ((2, 1) if "--fail" in arguments else (0, 0))
    # Nothing of it is left in the process, and handlers of the caller's get each message once.
    assert (PACKAGE.level, PACKAGE.handlers) == before
    assert caplog.messages == out.splitlines()
    assert call(*arguments)[1] == out


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ([], ["a fallback"]),
        (["configured"], ["INFO:fmm_distill.some.module:progress", "WARNING:fmm_distill.some.module:a fallback"]),
    ],
)
def test_from_python_warnings_are_shown_and_the_rest_is_up_to_the_caller(arguments, lines):
    done = subprocess.run([sys.executable, "-c", MESSAGE, *arguments], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr.splitlines()) == ("", lines)


@pytest.mark.parametrize(("process", "lines"), [(0, ["here"]), (1, [])])
def test_processes_other_than_the_first_log_nothing(monkeypatch, process, lines):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "process_index", process)
    found: list[str] = []
    with logged(found):
        with first_process_logs(accelerator):
            logging.getLogger("fmm_distill.some.module").warning("here")
        assert found == lines
        logging.getLogger("fmm_distill.some.module").info("afterwards")
    assert found == [*lines, "afterwards"]
