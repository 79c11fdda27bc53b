"""What others rely on: verbs, options, recipe fields, a run's files. A change here is a change of version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from fmm_distill.cli import command
from fmm_distill.config.recipe import Recipe
from fmm_distill.losses.eulerian import Eulerian
from fmm_distill.training import checkpoint
from tests.cli.runs import call

OPTIONS = {
    "": [
        *("--data", "--dry-run", "--fresh", "--output", "--private", "--push-to-hub", "--recipe", "--resume"),
        *("--set", "--teacher", "--version"),
    ],
    "env": [],
    "evaluate": [
        *("--across-protocols", "--against", "--also", "--also-steps", "--clip", "--compare", "--features"),
        *("--guidance", "--output", "--prompts", "--reference", "--report", "--samples", "--steps"),
        *("--stochasticity", "--teacher-steps", "source"),
    ],
    "export": ["--guidance", "--steps", "folder", "run"],
    "inspect": ["--revision", "--set", "teacher"],
    "losses": ["name"],
    "publish": ["--branch", "--dry-run", "--force", "--private", "--steps", "repo", "source"],
    "recipes": [],
    "recipes list": [],
    "recipes show": ["name"],
    "sample": ["--count", "--guidance", "--output", "--seed", "--steps", "--stochasticity", "run"],
    "status": ["--output", "run"],
}
FIELDS = [
    "teacher",
    "revision",
    "variant",
    "timesteps",
    "prompts.file",
    "prompts.dataset",
    "prompts.column",
    "prompts.image_size",
    "ip_adapter.source",
    "ip_adapter.revision",
    "ip_adapter.subfolder",
    "ip_adapter.weight_name",
    "ip_adapter.image_encoder_folder",
    "ip_adapter.scale",
    "guidance.scale",
    "guidance.range",
    "guidance.interval",
    "guidance.image_scale",
    "guidance.weaker",
    "guidance.weaker_revision",
    "data.source",
    "data.config",
    "data.split",
    "data.image",
    "data.condition",
    "data.fit",
    "data.background",
    "data.flip",
    "data.max_corrupt",
    "data.on_policy",
    "data.trajectories.count",
    "data.trajectories.points",
    "data.trajectories.solver_steps",
    "student.kind",
    "student.prediction",
    "student.regression_steps",
    "student.lora.rank",
    "student.lora.targets",
    "student.init",
    "student.init_revision",
    "loss.name",
    "loss.velocity",
    "loss.derivative",
    "loss.stop_gradient",
    "extra_losses",
    "stages",
    "distance.kind",
    "distance.constant",
    "weight.kind",
    "weight.power",
    "weight.constant",
    "time_sampling.prior",
    "time_sampling.data",
    "time_sampling.diagonal",
    "time_sampling.dyadic",
    "time_sampling.grid",
    "time_sampling.band_steps",
    "time_sampling.groups",
    "time_sampling.spacing",
    "time_sampling.distribution",
    "time_sampling.logit_mean",
    "time_sampling.logit_std",
    "matching",
    "optimizer.name",
    "optimizer.lr",
    "optimizer.betas",
    "optimizer.weight_decay",
    "training.steps",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.warmup_steps",
    "training.lr_schedule",
    "training.max_grad_norm",
    "training.ema",
    "training.max_non_finite_steps",
    "training.target_update_every",
    "training.precision",
    "training.gradient_checkpointing",
    "training.compile",
    "training.seed",
    "training.checkpoint_every",
    "training.checkpoints_total_limit",
    "evaluation.every",
    "evaluation.steps",
    "evaluation.stochasticity",
    "evaluation.ddim_steps",
    "evaluation.dpmsolver_steps",
    "evaluation.unipc_steps",
    "evaluation.heun_steps",
    "evaluation.samples",
    "evaluation.endpoint_samples",
    "evaluation.endpoint_solver_steps",
    "evaluation.features",
    "evaluation.reference",
    "evaluation.clip",
    "evaluation.batch_size",
    "export.steps",
    "export.lora_rank",
    "logging.trackers",
]


def options(group, name=""):
    found = {name: sorted(o for p in group.params for o in [*p.opts, *p.secondary_opts] if o not in ("-h", "--help"))}
    for verb, below in getattr(group, "commands", {}).items():
        found |= options(below, f"{name} {verb}".strip())
    return found


def flat(settings, prefix=""):
    return [
        path
        for key, value in settings.items()
        for path in (flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key])
    ]


def test_verbs_and_options():
    assert options(command) == OPTIONS


def test_recipe_fields():
    assert flat(Recipe().model_dump()) == FIELDS


def test_fields_of_the_eulerian_loss():
    assert sorted(Eulerian.model_fields) == [
        "clamp_tangent",
        "derivative",
        "name",
        "normalize_tangent",
        "solver",
        "step",
        "stop_gradient",
        "tangent_scale",
        "tangent_warmup_steps",
        "velocity",
    ]


def modules_after(code: str, **environment: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('MODULES', *sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    return set(run.stdout.rsplit("MODULES", 1)[1].split())


def test_help_loads_no_torch():
    code = "import sys\nfrom fmm_distill.cli import main\n"
    for arguments in ("'--help'", "'-h'", "", "'evaluate', '--help'", "'recipes', '--help'", "'--version'"):
        code += f"sys.argv = ['fmm-distill', {arguments}]\nmain()\n"
    loaded = modules_after(code)
    assert "fmm_distill.cli" in loaded
    assert not loaded & {"torch", "diffusers", "numpy"}


def test_a_dry_run_prints_the_recipe_and_writes_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call("--recipe", tiny, "--dry-run", "--set", "training.steps=7")
    assert (status, err) == (0, "")
    assert list(tmp_path.iterdir()) == []
    # A line about the verified export comes first, unless this process has verified it before.
    first, _, rest = out.partition("\n")
    rest = rest if first.startswith("export:  verified with an untrained student") else out
    recipe, _ = rest.split("\n\nteacher: " if "\n\nteacher: " in rest else "\nteacher: ", 1)
    printed = yaml.safe_load(recipe)
    assert flat(printed) == FIELDS
    assert printed["training"]["steps"] == 7
    assert "steps:   7 of 8 samples, loss lagrangian" in out
    assert f"output:  {Path('runs') / 'tiny'}" in out


def test_a_dry_run_leaves_a_finished_run_alone(tiny, finished):
    before = sorted(finished[0].rglob("*"))
    assert call("--recipe", tiny, "--dry-run", "--fresh", "--output", finished[0])[0] == 0
    assert sorted(finished[0].rglob("*")) == before


def test_the_verbs_run_on_a_finished_run(finished, tmp_path):
    folder, printed = finished
    # By default the teacher's own pipeline has as many steps as its scheduler: 1000.
    few = ("--steps", "1,3", "--teacher-steps", "2")
    status, out, err = call("evaluate", folder, *few, "--output", tmp_path / "numbers.json")
    assert status == 0, err
    rows = [
        row for row in yaml.safe_load((tmp_path / "numbers.json").read_text())["rows"] if row["sampler"] == "student"
    ]
    assert [(row["steps"], row["calls"]) for row in rows] == [(1, 1), (3, 3)]
    # The same student as at the run's end.
    assert f"{'student':<20}{1:>6}{1:>7}{rows[0]['endpoint_error']:>16.4f}" in printed
    status, out, err = call("sample", folder, "--steps", "1", "--count", "2", "--output", tmp_path / "x.png")
    assert status == 0, err
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    status, out, err = call("inspect", yaml.safe_load((folder / "recipe.yaml").read_text())["teacher"])
    assert status == 0, err
    assert "v_prediction" in out
    assert "1 x 8 x 8" in out


def test_weights_of_another_network_are_one_line(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    kept = checkpoint.load(checkpoint.newest(folder / "checkpoints"))
    own = kept.tensors["ema-0.999"]
    ema = {key.replace("network.", ""): value for key, value in own.items()}
    assert ema.keys() != own.keys()
    other = checkpoint.Checkpoint(kept.step + 1, kept.tensors | {"ema-0.999": ema}, kept.state)
    checkpoint.save(folder / "checkpoints", other, 2)
    status, _, err = call("evaluate", folder)
    assert status == 2
    assert "got those of another network" in err.splitlines()[-1]


def test_the_run_folder_explains_itself(finished):
    folder, printed = finished
    assert {path.name for path in folder.iterdir()} == {
        ".fmm_distill-run.json",
        "checkpoints",
        "environment.json",
        "evaluation.json",
        "inputs.json",
        "recipe.yaml",
        "samples.png",
        "steps.jsonl",
        "steps.png",
        "student",
        "teacher.json",
        "trial.json",
    }
    assert not list(folder.rglob("*.bin"))
    assert not list(folder.rglob("*.pt"))
    assert "load it with diffusers alone" in printed
