"""The export is tried before training, on a copy: nothing of the run depends on it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file

from fmm_distill.config.recipe import parse
from fmm_distill.errors import UserError
from fmm_distill.export.agreement import Agreement
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.write import export_bytes, write_student
from fmm_distill.run import trial
from fmm_distill.run.distill import distill
from fmm_distill.run.marker import check_vacant, mark
from fmm_distill.run.plan import forecast, plan
from fmm_distill.run.trial import keep_trial, try_export
from fmm_distill.teachers.load import load_teacher
from tests.cli.runs import TINY, call, losses, training_only, write_recipe
from tests.conformance.test_prompted import FAMILIES
from tests.conftest import save_teacher
from tests.logs import logged
from tests.processes import on_two_processes
from tests.tiny.diffusion import ldm


@pytest.fixture
def untried(monkeypatch):
    """As in a process that has tried nothing."""
    monkeypatch.setattr(trial, "_PASSED", set())


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """A teacher whose time embedding is narrower than a grid of many steps."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return str(save_teacher(tmp_path_factory.mktemp("flow"), scheduler=scheduler))


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A teacher whose pipeline reads levels that the stock scheduler of its schedule does not have."""
    folder, pipeline = tmp_path_factory.mktemp("wan"), FAMILIES["wan"].build()
    pipeline.scheduler = UniPCMultistepScheduler(prediction_type="v_prediction")
    pipeline.save_pretrained(folder, safe_serialization=True)
    return str(folder)


@pytest.fixture(scope="module")
def mochi(tmp_path_factory):
    """A teacher whose stock pipeline fails at one step."""
    folder = tmp_path_factory.mktemp("mochi")
    FAMILIES["mochi"].build().save_pretrained(folder, safe_serialization=True)
    return str(folder)


def recipe_of(teacher, **changes):
    return parse({"teacher": str(teacher)} | TINY | changes, "here")


def state_of(student):
    config = dict(student.network.config)
    return {name: value.clone() for name, value in student.state_dict().items()}, config


@pytest.mark.parametrize("rank", [0, 2])
def test_a_trial_leaves_student_teacher_and_random_state_alone(teacher_folder, untried, tmp_path, rank):
    targets = ["to_q", "to_v"] if rank else []
    recipe = recipe_of(teacher_folder, student={"lora": {"rank": rank, "targets": targets}})
    job = plan(recipe)
    before, config = state_of(job.student)
    theirs = {name: value.clone() for name, value in job.teacher.network.state_dict().items()}
    random, said = torch.random.get_rng_state(), []
    with logged(said):
        try_export(recipe, job.student, job.teacher, tmp_path / "run")
    assert len(said) == 1
    assert "verified with an untrained student" in said[0]
    assert torch.equal(torch.random.get_rng_state(), random)
    after, after_config = state_of(job.student)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert after_config == config
    assert all(torch.equal(value, theirs[name]) for name, value in job.teacher.network.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_the_jumps_of_the_student_that_is_tried_matter(teacher_folder):
    job = plan(recipe_of(teacher_folder))
    x = torch.randn(2, *job.teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), 0.8, dtype=torch.float64)
    with torch.no_grad():
        own, drawn = (
            student.mean_velocity(x, t, 0 * t) for student in (job.student, trial._with_random_jumps(job.student))
        )
    assert (own - drawn).abs().max() > 1e-2 * own.abs().max()


def test_a_run_is_the_same_to_the_last_bit_and_tries_once(tiny_recipe, untried, tmp_path):
    said = {}
    for name in ("tried", "not tried"):
        said[name] = []
        with training_only(stop_before=2), pytest.raises(KeyboardInterrupt), logged(said[name]):
            distill(tiny_recipe, tmp_path / name)
    assert [any("untrained student" in line for line in lines) for lines in said.values()] == [True, False]
    assert losses(tmp_path / "tried") == losses(tmp_path / "not tried")
    assert (tmp_path / "tried" / "trial.json").read_bytes() == (tmp_path / "not tried" / "trial.json").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_resumed_run_does_not_try_again_unless_the_export_changes(tiny_recipe, untried, tmp_path, monkeypatch):
    tried = []

    def verified(exported):
        tried.append(exported.steps)
        return {"any-1": Agreement(0.0, 1.0)}

    monkeypatch.setattr(trial, "verify", verified)
    more = parse(tiny_recipe.model_dump(mode="json") | {"export": {"steps": [1, 4]}}, "here")
    for recipe in (tiny_recipe, tiny_recipe, more):
        trial._PASSED.clear()
        with training_only(stop_before=1), pytest.raises(KeyboardInterrupt):
            distill(recipe, tmp_path / "run")
    assert tried == [(1, 2), (1, 4)]
    (tmp_path / "run" / "trial.json").write_text("{")
    trial._PASSED.clear()
    with training_only(stop_before=1), pytest.raises(KeyboardInterrupt):
        distill(more, tmp_path / "run")
    assert tried[2:] == [(1, 4)]


@pytest.fixture(scope="module")
def tiny_recipe(teacher_folder):
    return recipe_of(teacher_folder)


def test_an_export_that_fails_ends_the_run_before_it_begins(mochi, wan, flow, untried, tmp_path):
    pipeline = FAMILIES["mochi"].call
    failing = [
        (
            recipe_of(mochi, pipeline=pipeline),
            r"its student can't be exported; .*MochiPipeline does not run with 1 step \(Zero",
        ),
        (
            recipe_of(wan, pipeline=FAMILIES["wan"].call),
            r"its student can't be exported; .*DDIMScheduler' object has no",
        ),
        (
            recipe_of(flow, student={"kind": "embedded"}, export={"steps": [1, 500]}),
            r"its student can't be exported; .*500 different jumps",
        ),
    ]
    (tmp_path / "run").mkdir()
    for recipe, reason in failing:
        # Where it takes a process of its own, one way in is enough.
        for attempt in (distill, forecast) if recipe.teacher == flow else (distill,):
            with pytest.raises(UserError, match=reason) as caught:
                attempt(recipe, tmp_path / "run")
            assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.name != "run"]


def test_numbers_of_steps_with_which_the_stock_pipeline_does_not_run(mochi, wan):
    def exporter(folder, name):
        return exporter_of(load_teacher(folder, prompts=("a cat",), call=dict(FAMILIES[name].call)))

    of_mochi = exporter(mochi, "mochi")
    of_mochi.check_runs((2, 3, 5))
    with pytest.raises(UserError, match=r"export.steps: MochiPipeline does not run with 1 step \(.*without 1$"):
        of_mochi.check_runs((2, 1, 4))
    # A scheduler that does not fit is no matter of the number of steps.
    with pytest.raises(UserError, match="DDIMScheduler' object has no"):
        exporter(wan, "wan").check_runs((1, 4))


def test_a_dry_run_says_what_was_tried_and_what_the_export_takes(teacher_folder, untried, tmp_path):
    status, out, err = call("--recipe", write_recipe(tmp_path / "tiny.yaml", teacher_folder), "--dry-run")
    assert status == 0, err
    assert "MiB of the exported student" in out
    assert "export:  verified with an untrained student in " in out
    status, out, _ = call("inspect", teacher_folder)
    assert "not run; use --dry-run with a recipe" in out


def test_a_disk_without_room_for_the_trial_leaves_the_earlier_run(tiny_recipe, untried, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(tiny_recipe.to_yaml())
    mark(tmp_path / "run")
    before = sorted((tmp_path / "run").iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"trial export: expected .* MiB of free disk space in .*; free some space"):
        distill(tiny_recipe, tmp_path / "run", fresh=True)
    assert sorted((tmp_path / "run").iterdir()) == before


@pytest.mark.parametrize("locked", [True, False])
def test_a_trial_is_in_the_folder_of_its_run(tiny_recipe, untried, tmp_path, monkeypatch, locked):
    seen, job, run = [], plan(tiny_recipe), tmp_path / "run"
    (run / ".student.0.partial").mkdir(parents=True)
    (run / ".student.0.partial" / "left.txt").touch()

    def full(student, teacher, folder, steps, *, lora_rank, linked):
        check_vacant(run)
        assert not list(folder.iterdir())
        (folder / "unet").mkdir()
        seen.append(folder)
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(trial, "write_student", full)
    with pytest.raises(UserError, match=r"its student can't be exported.*No space left") as caught:
        try_export(tiny_recipe, job.student, job.teacher, run, locked=locked)
    assert "\n" not in str(caught.value)
    assert [(path.parent, path.name == ".student.0.partial") for path in seen] == [(run, locked)]
    # Without the lock, another process's is left alone.
    assert [path.name for path in run.iterdir()] == ([] if locked else [".student.0.partial"])


def test_a_refused_trial_leaves_no_folder_of_a_new_run(tiny_recipe, untried, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"expected .* MiB of free disk space in .*new/run, got"):
        distill(tiny_recipe, tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rest", ["{", ""])
def test_what_has_passed_is_written_at_once_or_not(tmp_path, monkeypatch, rest):
    def full(handle):
        raise OSError(28, "No space left on device")

    (tmp_path / "trial.json").write_text(rest)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"trial\.json could not be written .*: make room"):
        keep_trial(tmp_path, "digest")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("trial.json", rest)]


@pytest.mark.parametrize("steps", [(), (1, 2)])
def test_the_room_for_latents_counts_an_autoencoder_in_each_pipeline(tmp_path, steps):
    ldm().save_pretrained(tmp_path / "teacher", safe_serialization=True)
    job = plan(recipe_of(tmp_path / "teacher"))
    (tmp_path / "export").mkdir()
    write_student(job.student, job.teacher, tmp_path / "export", steps)
    decoders = [load_file(path) for path in (tmp_path / "export").rglob("vqvae/*.safetensors")]
    networks = sum(4 * value.numel() for value in job.student.network.parameters()) * (1 + len(steps))
    written = sum(value.nbytes for tensors in decoders for value in tensors.values())
    assert export_bytes(job.student, job.teacher, steps) == networks + written


def test_what_fails_in_the_first_process_ends_all(tmp_path):
    script = Path(__file__).with_name("first_fails.py")
    run = on_two_processes(script, tmp_path)
    assert run.returncode == 0, run.stderr
    ends = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert ends == {
        "0": [None, "UserError: no room", "RuntimeError: a fault"],
        "1": [None, "UserError: no room", "UserError: the first process has failed"],
    }
