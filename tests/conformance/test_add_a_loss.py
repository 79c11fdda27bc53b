"""The loss of docs/add-a-loss.md as a package of its own: registered, trained, exported, reloaded, tested."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline

from fmm_distill.config.recipe import Recipe
from fmm_distill.losses import registered_losses
from fmm_distill.run.distill import distill
from tests.cli.runs import TINY

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-a-loss.md").read_text(encoding="utf-8")
MODULE, SCRIPT = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
GROUP, LINE = re.search(r'```toml\n\[project\.entry-points\."(.*?)"\]\n(.*?)\n```', PAGE).groups()
FILE = re.search(r"^`(\w+\.py)`:$", PAGE, re.MULTILINE)[1]


def install(folder: Path, entry: str = LINE, name: str = "brightness", module: str = MODULE) -> Path:
    """A folder as ``pip install --target`` leaves it: the page's module, and metadata with its entry point."""
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(module, encoding="utf-8")
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\n{entry.replace(chr(34), '')}\n", encoding="utf-8")
    return folder


def run(*arguments: object, installed: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), *([str(installed)] if installed else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return install(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def trained(package, teacher_folder, tmp_path_factory):
    """A run of two steps by the command line; its folder."""
    folder = tmp_path_factory.mktemp("run")
    training = TINY["training"] | {"steps": 2}
    extra = [{"loss": {"name": "brightness", "factor": 0.5}, "fraction": 0.5}]
    settings = TINY | {"loss": {"name": "brightness", "factor": 2.0}, "training": training, "extra_losses": extra}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"teacher": str(teacher_folder)} | settings), encoding="utf-8")
    command = ("-m", "fmm_distill", "--recipe", folder / "recipe.yaml", "--output", folder / "out")
    done = run(*command, installed=package)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def test_it_is_listed(package):
    done = run("-m", "fmm_distill", "losses", installed=package)
    assert done.returncode == 0
    assert "brightness\n    the Lagrangian loss with a further term" in done.stdout
    assert done.stderr == ""
    assert "brightness" not in run("-m", "fmm_distill", "losses").stdout


def test_it_trains_and_its_export_opens_with_stock_diffusers(trained):
    lines = [json.loads(line) for line in (trained / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["phase"] for line in lines] == ["brightness"] * 2
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["loss"] == {"name": "brightness", "velocity": "teacher", "derivative": "auto", "factor": 2.0}
    pipeline = DiffusionPipeline.from_pretrained(str(trained / "student" / "steps-2"))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np", batch_size=2
    ).images
    assert images.shape == (2, 8, 8, 1)


def test_a_run_is_reopened_with_the_package_and_refused_by_one_line_without(trained, package):
    reopen = "from fmm_distill.run.folder import stored_recipe; from pathlib import Path; import sys\n"
    reopen += "print(stored_recipe(Path(sys.argv[1])).loss.factor)"
    assert run("-c", reopen, trained, installed=package).stdout == "2.0\n"
    done = run("-m", "fmm_distill", "evaluate", trained)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "loss.name: expected a loss of fmm-distill losses, got 'brightness'" in done.stderr
    assert "fmm_distill.losses" in done.stderr


def test_every_test_over_the_losses_runs_on_it(package):
    files = (
        "tests/unit/test_losses.py",
        "tests/unit/test_loss_settings.py",
        "tests/conformance/test_losses_at_truth.py",
    )
    # What is about another loss alone is left out.
    others = " or ".join(name for name in registered_losses() if name != "brightness")
    chosen = ("-k", f"brightness or not ({others})")
    done = run("-m", "pytest", "-rA", "-q", "-n0", "-p", "no:cacheprovider", *chosen, *files, installed=package)
    assert done.returncode == 0, done.stdout[-3000:]
    own = [line for line in done.stdout.splitlines() if line.startswith("PASSED") and "brightness" in line]
    assert {line.split("::")[0].removeprefix("PASSED ") for line in own} == set(files)
    assert len(own) > 30


def test_an_instance_needs_no_registration(package, teacher_folder, tmp_path, monkeypatch):
    # Without the metadata that registers it.
    (package / "module").mkdir()
    (package / "module" / FILE).write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(package / "module")
    loss = importlib.import_module(FILE.removesuffix(".py")).Brightness(factor=2)
    recipe = Recipe(loss=loss)
    assert recipe.loss is loss
    assert Recipe.model_validate(recipe.model_dump() | {"loss": loss}).loss is loss
    assert "brightness" not in registered_losses()
    # As the page calls it, and again: the run that is stored reads its own recipe.
    assert "loss=Brightness(factor=2))" in SCRIPT
    settings = {"teacher": str(teacher_folder)} | TINY
    with patch("fmm_distill.run.distill.finish"):
        for steps in (1, 2):
            recipe = Recipe.model_validate(settings | {"training": TINY["training"] | {"steps": steps}})
            distill(recipe, tmp_path / "run", loss=loss)
    assert len((tmp_path / "run" / "steps.jsonl").read_text(encoding="utf-8").splitlines()) == 2
