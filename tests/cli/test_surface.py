"""What users can type is frozen here: a change is a decision."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import fmm_distill
from fmm_distill.cli import command
from fmm_distill.config.mistakes import setting_paths
from fmm_distill.config.recipe import Recipe, load_recipe, parse, recipe_names
from fmm_distill.losses import matching_losses, registered_losses
from tests.cli.runs import call

ROOT = Path(__file__).parents[2]


def test_public_names():
    assert fmm_distill.__all__ == [
        "FlowMap",
        "IpAdapter",
        "LearnedFlowMap",
        "Prompts",
        "Recipe",
        "Student",
        "Teacher",
        "__version__",
        "distill",
        "evaluate",
        "export_pipeline",
        "export_run",
        "load_student",
        "load_teacher",
        "losses",
        "publish",
        "sample",
    ]
    for name in fmm_distill.__all__:
        assert getattr(fmm_distill, name)
    with pytest.raises(AttributeError, match="no attribute 'destill'"):
        fmm_distill.destill  # noqa: B018 the access is the test


def test_verbs_and_options():
    assert sorted(command.commands) == [
        *("env", "evaluate", "export", "inspect", "losses", "publish", "recipes", "sample", "status"),
    ]
    options = [option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)]
    assert options == [
        "--version",
        "--teacher",
        "--recipe",
        "--data",
        "--set",
        "--output",
        "--push-to-hub",
        "--private",
        "--resume",
        "--fresh",
        "--dry-run",
    ]


def test_recipe_fields():
    paths = setting_paths(Recipe)
    assert len(paths) == len(set(paths)) or {"loss.name", "loss.stop_gradient"} <= set(paths)
    for path in (
        "teacher",
        "student.prediction",
        "loss.stop_gradient",
        "time_sampling.prior",
        "training.steps",
        "export.steps",
    ):
        assert path in paths


@pytest.mark.parametrize("code", ["import fmm_distill", "from fmm_distill.cli import command"])
def test_torch_is_not_loaded(code):
    check = f"import sys; {code}; assert not {{'torch', 'diffusers', 'pydantic'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_help_and_version(capsys):
    status, out, _ = call("--help")
    assert status == 0
    assert "--recipe" in out
    assert "YAML file [required]" in " ".join(out.split())
    assert "remove the run's files" in " ".join(out.split())
    assert call("--version")[1].split()[-1] == fmm_distill.__version__
    assert call()[1] == out


def test_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call("--recipe", "digits", "--set", "training.steps=7", "--dry-run")
    assert status == 0
    assert "teacher: builtin:digits (UNet2DModel" in out
    assert "7 of 64 samples" in out
    assert re.search(
        r"memory:  \d+\.\d MiB at peak of the matching: weights \d+\.\d, critic \d+\.\d, gradients .*, "
        r"activations .* \(64 samples at",
        out,
    )
    assert not list(tmp_path.iterdir())


def test_every_recipe_that_ships_is_whole():
    assert recipe_names() == [
        "checkerboard",
        "cifar10",
        "cifar10-fast",
        "digits",
        "edit",
        "image-to-video",
        "imagenet32",
        "text",
    ]
    for name in recipe_names():
        recipe = load_recipe(name)
        import yaml

        assert parse(yaml.safe_load(recipe.to_yaml()), name) == recipe
        assert call("recipes", "show", name)[1] == (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        assert name in call("recipes")[1]


def test_the_losses_are_listed_with_what_each_needs():
    status, out, _ = call("losses")
    assert status == 0
    out, heading, of_matching = out.partition("\nLosses of distribution matching, ")
    assert heading
    assert "matching.loss" in of_matching.splitlines()[0]
    listed = re.split(r"^(?=\S)", of_matching, flags=re.MULTILINE)[2:]
    assert [entry.splitlines()[0] for entry in listed] == list(matching_losses())
    for entry in listed:
        assert "arXiv " in entry
        assert entry.rstrip().endswith("needs: a teacher and a critic, which the run trains; no data")
    entries = dict(zip(registered_losses(), re.split(r"^(?=\S)", out, flags=re.MULTILINE)[1:], strict=True))
    for name, entry in entries.items():
        assert entry.splitlines()[0] == name
        assert "    paper: arXiv " in entry
    assert entries["mean_flow"].rstrip().endswith("needs: data")
    assert entries["flow_matching"].rstrip().endswith("needs: a teacher or data")
    assert (
        entries["lagrangian"]
        .rstrip()
        .endswith("needs: a teacher; or velocity: self with flow_matching as an extra loss")
    )
    for name in ("progressive", "progressive_distillation"):
        needs = "needs: a teacher; and flow_matching as an extra loss unless target: frozen or ode"
        assert entries[name].rstrip().endswith(needs)


@pytest.mark.parametrize("name", list({**registered_losses(), **matching_losses()}))
def test_a_loss_shows_its_settings(name):
    status, out, _ = call("losses", name)
    assert status == 0
    assert out.startswith(f"{name}\n")
    kind = {**registered_losses(), **matching_losses()}[name]
    fields = {key: field for key, field in kind.model_fields.items() if key != "name"}
    shown = dict(re.findall(r"^(\w+): (.+)$", out, flags=re.MULTILINE))
    assert shown.keys() == fields.keys()
    for key, field in fields.items():
        assert field.description
        assert " ".join(field.description.split()) in " ".join(out.split())
        if isinstance(field.default, str):
            assert shown[key] == field.default


def test_an_unknown_loss_is_one_line_with_a_guess():
    status, _, err = call("losses", "langrangian")
    assert status == 2
    assert err.count("\n") == 1
    assert "got langrangian; did you mean lagrangian?" in err


def test_recipes_are_listed_in_columns():
    lines = call("recipes")[1].splitlines()
    assert [line.split("  ")[0] for line in lines] == recipe_names()


def test_overrides_are_yaml_and_typed():
    recipe = load_recipe("digits", ["optimizer.lr=1e-4", "evaluation.steps=[1,3]", "teacher=./here"])
    assert recipe.optimizer.lr == 1e-4
    assert recipe.evaluation.steps == (1, 3)
    assert recipe.teacher == "./here"


def test_the_wheel_holds_recipes_and_the_teacher(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "elsewhere")
    assert (
        tmp_path / "elsewhere/fmm_distill/teachers/builtin/digits/unet/diffusion_pytorch_model.safetensors"
    ).is_file()
    code = (
        "import fmm_distill, fmm_distill.config.recipe as r; "
        "print(fmm_distill.__file__); print(*r.recipe_names()); r.load_recipe('digits')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "elsewhere"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    where, names = run.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert names == "checkerboard cifar10 cifar10-fast digits edit image-to-video imagenet32 text"


def test_the_tree_in_the_readme_is_the_tree_on_disk():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("\nThe code:\n")[1].split("\n## ")[0]
    listed = re.findall(r"^      ([\w.]+)", tree, flags=re.MULTILINE)
    on_disk = {path.name for path in (ROOT / "fmm_distill").iterdir() if not path.name.startswith("__")}
    assert sorted(listed) == sorted(on_disk - {"py.typed"})
    folders = re.findall(r"(?:^    |  )(\w+)/", tree, flags=re.MULTILINE)
    ignored = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()}
    top = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert {*folders} - {*listed} == top - ignored
