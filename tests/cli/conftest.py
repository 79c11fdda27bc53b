from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.runs import call, training_only, write_recipe


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """The file of a recipe of twelve steps."""
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", teacher_folder)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> tuple[Path, str]:
    """The folder of a whole run that was never stopped, and what it printed. Read it only."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    status, out, err = call("--recipe", tiny, "--output", folder)
    assert status == 0, err
    return folder, out


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """The folder of a run that was interrupted in its eighth step, with checkpoints of 3 and 6. Copy it."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with training_only(stop_before=7):
        status, _, err = call("--recipe", tiny, "--output", folder)
    assert status == 130
    assert err.splitlines()[-1] == "stopped; run the same command to resume"
    return folder
