from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fmm_distill.config.recipe import recipe_names

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_recipes_and_the_built_in_teacher(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    kept = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fmm_distill" / "teachers" / "builtin").rglob("*")
        if path.is_file()
    }
    assert len(kept) >= 5
    assert kept <= names
    recipes = {f"fmm_distill/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert recipes <= names
    assert {
        "fmm_distill/student/two_time.py",
        "fmm_distill/export/remote/pipeline.py",
        "fmm_distill/export/reload.py",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "recipes/")) or "__pycache__" in name]


def test_the_installed_wheel_lists_the_same_recipes(wheel, tmp_path):
    target = tmp_path / "site"
    install = ["-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    code = (
        "import sys, fmm_distill; print(fmm_distill.__file__)\n"
        "from fmm_distill.cli import main\n"
        "sys.argv = ['fmm-distill', 'recipes', 'list']; main()\n"
        "from fmm_distill.teachers.load import load_teacher\n"
        "print(load_teacher('builtin:digits').event_shape)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, *listed, last = run.stdout.splitlines()
    assert Path(first) == target / "fmm_distill" / "__init__.py"
    assert [line.split()[0] for line in listed] == recipe_names()
    assert last == "(1, 8, 8)"
