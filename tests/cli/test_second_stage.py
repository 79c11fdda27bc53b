"""A run with a second stage: its progress, its end and its card."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from matplotlib.image import imread
from safetensors.torch import load_file

from fmm_distill.config.recipe import parse
from fmm_distill.export.manifest import read_manifest
from fmm_distill.run.marker import mark
from fmm_distill.run.reopen import open_run
from fmm_distill.run.status import _plotted, read_run
from fmm_distill.training.early_stopping import evaluation_settings
from tests.cli.runs import TINY, call, checkpoints, training_only

MATCHING = {"steps": 10, "critic": {"warmup_steps": 5}, "evaluate_every": 2}


def status_of(folder: Path) -> dict[str, str]:
    status, out, err = call("status", folder)
    assert status == 0, err
    return {line[:12].strip(): line[12:] for line in out.splitlines()}


def write_run(folder: Path, done: int, stop: dict | None = None, errors: tuple[float, ...] = ()) -> Path:
    """The folder of a run of 12 steps of the map, 5 of the critic and up to 10 of the student, by its logs.

    Args:
        errors: endpoint errors of the evaluations of the second stage.
    """
    folder.mkdir()
    mark(folder)
    recipe = parse(TINY | {"matching": MATCHING | {"stop": stop}}, "recipe")
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    records = []
    for step in range(done):
        plain = {"step": step, "loss": 1.0, "gradient_norm": 1.0, "learning_rate": 1e-3, "images_per_second": 8.0}
        own: dict = {"phase": "lagrangian"}
        if step >= 12:
            own = {"phase": "critic", "loss": 0.7, "teacher_loss": 0.6, "images_per_second": 16.0}
        if step >= 17:
            own = {"phase": "distribution_matching", "loss": 50.0, "critic_loss": 0.5, "teacher_loss": 0.6}
        records.append(plain | own)
    (folder / "steps.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [
        {
            "step": 12 if not i else 17 + 2 * i,
            "rows": [{"sampler": "student", "steps": 1, "calls": 1, "endpoint_error": error, "frechet": None}],
            "settings": evaluation_settings(recipe),
        }
        for i, error in enumerate(errors)
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_status_of_the_critic_alone(tmp_path):
    found = status_of(write_run(tmp_path / "run", 15))
    assert found["losses"] == "lagrangian, then distribution_matching"
    assert found["step"].startswith("15 of 27 (55.6 %")
    assert found["phase"] == "critic, 3 of 5 (its warm-up; the student waits)"
    # Of this phase alone, as the others have another scale and another rate.
    assert found["loss"] == "0.7 (mean of the last 3 steps)"
    assert found["rate"] == "16.0 images per second, 0.5 s per step"
    assert found["critic"] == (
        "behind the teacher: its gradient is not to be trusted yet (error 0.7 on samples, of the teacher 0.6; mean of "
        "3 steps)"
    )
    assert "best" not in found


def test_status_of_the_matching(tmp_path):
    stop = {"metric": "endpoint_error", "calls": 1, "patience": 2}
    found = status_of(write_run(tmp_path / "run", 22, stop, (0.3, 0.2, 0.25)))
    assert found["phase"] == "distribution_matching, 5 of 10"
    assert found["loss"] == "50 (mean of the last 5 steps)"
    assert found["critic"] == "ready (error 0.5 on samples, of the teacher 0.6; mean of 5 steps)"
    assert found["best"] == "endpoint error at 1 call 0.2 after step 2 of the student; 1 evaluation since"
    assert imread(found["curves"]).shape[0] > 1500
    assert "time left" in found
    found = status_of(write_run(tmp_path / "ended", 21, stop, (0.3, 0.31, 0.32)))
    assert found["step"] == "21 of 27 (77.8 %)"
    assert "time left" not in found
    assert found["best"] == (
        "endpoint error at 1 call 0.3 after its map; ended after step 4: the endpoint error at 1 call had not improved "
        "for 2 evaluations"
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("critic", {}, "matching.critic: warmup_steps is missing"),
        ("stop", {"metric": "recall"}, "matching.stop: calls is missing"),
    ],
)
def test_a_damaged_recipe_is_one_line(tmp_path, key, value, message):
    folder = write_run(tmp_path / "run", 15)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["matching"][key] = value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    status, out, err = call("status", folder)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


STOP = {"metric": "endpoint_error", "calls": 1, "patience": 2}
# Endpoint errors after so many steps of the run: best at 19, two evaluations without an improvement at 23.
VALUES = {12: 0.5, 19: 0.4, 21: 0.45, 23: 0.41, 25: 0.1, 27: 0.1}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, teacher_folder) -> Path:
    """The file of a recipe of 12 steps of the map, 5 of the critic and at most 10 of the student."""
    matching = MATCHING | {"stop": STOP, "rollout": {"steps": [1, 2]}}
    settings = {"teacher": str(teacher_folder)} | TINY | {"matching": matching}
    settings["training"] = TINY["training"] | {"checkpoints_total_limit": 1}
    file = tmp_path_factory.mktemp("recipe") / "staged.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@contextlib.contextmanager
def measuring(values: dict[int, float]):
    """Evaluations whose judgment reads these values, by their steps."""
    with patch("fmm_distill.training.early_stopping.value_of", lambda line, metric, calls: values[line["step"]]):
        yield


@pytest.fixture(scope="module")
def ended(tmp_path_factory, recipe) -> tuple[Path, str]:
    """The folder of a run that early stopping ended, and what it printed; read it only."""
    folder = tmp_path_factory.mktemp("runs") / "ended"
    with measuring(VALUES):
        status, out, err = call("--recipe", recipe, "--output", folder)
    assert status == 0, err
    return folder, out


def average_at(folder: Path, step: int) -> dict:
    average = load_file(folder / "checkpoints" / f"step-{step:08d}" / "ema-0.999.safetensors")
    return {name: value for name, value in average.items() if name != "n_averaged"}


def evaluated_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_the_stage_ends_and_its_best_average_is_exported(ended):
    folder, printed = ended
    assert evaluated_steps(folder) == [12, 19, 21, 23]
    assert len((folder / "steps.jsonl").read_text().splitlines()) == 23
    # The best is older than the only one that the limit would leave.
    assert checkpoints(folder) == ["step-00000019", "step-00000023"]
    sentence = (
        "ended after 6 of its 10 steps: the endpoint error at 1 call had not improved for 2 evaluations (early "
        "stopping); exported is the average after 2 steps, with the best endpoint error at 1 call"
    )
    assert f"the second stage {sentence}" in printed
    protocol = json.loads((folder / "evaluation.json").read_text())["protocol"]
    assert (protocol["exported_step"], protocol["second_stage"]) == (19, sentence)
    # The final evaluation is of the same weights as the one during training.
    final = json.loads((folder / "evaluation.json").read_text())["rows"]
    during = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    errors = {line["step"]: line["rows"][0]["endpoint_error"] for line in during}
    assert final[0]["endpoint_error"] == pytest.approx(errors[19], rel=1e-6)
    assert len(set(errors.values())) == 4


def test_a_finished_run_is_opened_at_the_exported_step(ended):
    folder, _ = ended
    job = open_run(folder)
    state = job.student.state_dict()
    best, last = average_at(folder, 19), average_at(folder, 23)
    assert all(torch.equal(state[name], value) for name, value in best.items())
    assert any(not torch.equal(state[name], value) for name, value in last.items())
    assert json.loads((folder / "student" / "student.json").read_text())["training"]["steps"] == 19
    found = status_of(folder)
    assert found["step"] == "23 of 27 (85.2 %)"
    assert "time left" not in found


def test_a_resumed_run_ends_at_the_same_step_with_the_same_average(tmp_path, recipe, ended):
    command = ("--recipe", recipe, "--output", tmp_path / "run")
    with measuring(VALUES):
        # In the warm-up of the critic, and between two evaluations.
        for before in (15, 22):
            with training_only(stop_before=before):
                assert call(*command)[0] == 130
            assert len((tmp_path / "run" / "steps.jsonl").read_text().splitlines()) == before
        with training_only():
            assert call(*command)[0] == 0
    assert evaluated_steps(tmp_path / "run") == [12, 19, 21, 23]
    for step in (19, 23):
        ours, theirs = average_at(tmp_path / "run", step), average_at(ended[0], step)
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_another_rule_continues_an_ended_run(tmp_path, recipe, ended):
    shutil.copytree(ended[0], tmp_path / "run")
    with measuring(VALUES):
        status, out, err = call(
            "--recipe", recipe, "--output", tmp_path / "run", "--set", "matching.stop.patience=null"
        )
    assert status == 0, err
    assert "changed  matching.stop.patience: 2 until step 23, None from there" in out
    assert evaluated_steps(tmp_path / "run") == [12, 19, 21, 23, 25, 27]
    assert "the second stage had all its 10 steps; exported is the average after 8 steps" in out
    protocol = json.loads((tmp_path / "run" / "evaluation.json").read_text())["protocol"]
    assert protocol["exported_step"] == 25


def test_a_lost_checkpoint_is_one_line(tmp_path, recipe, ended):
    shutil.copytree(ended[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000019")
    (tmp_path / "run" / "evaluation.json").unlink()
    with measuring(VALUES):
        status, _, err = call("--recipe", recipe, "--output", tmp_path / "run")
    assert status == 2
    assert "expected the checkpoint of step 19, which the evaluations chose" in err.splitlines()[-1]


def test_a_stage_from_the_first_step_on(tmp_path, recipe, ended):
    # The map is an earlier student, and no step of the run is its own.
    init = ("--set", f"student.init={ended[0]}", "--set", "training.steps=0")
    values = {0: 0.5, 7: 0.6, 9: 0.7}
    with measuring(values):
        status, out, err = call("--recipe", recipe, "--output", tmp_path / "run", *init)
    assert status == 0, err
    assert "ended after 4 of its 10 steps" in out
    assert "exported is the map before it" in out
    assert checkpoints(tmp_path / "run") == ["step-00000000", "step-00000009"]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["protocol"]["exported_step"] == 0


def test_the_card_describes_both_stages(ended):
    folder, _ = ended
    manifest = json.loads((folder / "student" / "student.json").read_text())
    assert manifest["second_stage"]["steps"] == 2
    assert manifest["training"]["loss"] == "lagrangian, then distribution_matching"
    assert "it may end at another sample than its teacher's ODE" in manifest["limits"]
    card = " ".join((folder / "student" / "README.md").read_text().split())
    assert "A second stage of the training (distribution_matching) moved the distribution" in card
    assert "The second stage ended after 6 of its 10 steps" in card
    assert "DMD arXiv 2311.18828" in card.partition("## Citation")[2]
    assert len(manifest["second_stage"]["before"]) == 2
    assert "| steps | endpoint error | |---|---| | 1 |" in card
    assert read_manifest(folder / "student").second_stage == manifest["second_stage"]


def test_the_final_evaluation_is_the_last_point_unless_early_stopping_had_it(tmp_path):
    run = read_run(write_run(tmp_path / "run", 27, None, (0.3, 0.2)))
    row = {"sampler": "student", "steps": 1, "endpoint_error": 0.1, "precision": 0.5, "recall": 0.5}
    run.final = {"rows": [row], "protocol": {"precision_recall": "neighbor 3, 9999 samples and as many images"}}
    assert _plotted(run)[-1] == {"step": 27, "rows": [row]}
    # Fractions of another number of samples are not on one line with the others.
    run.evaluations[0]["protocol"] = {"precision_recall": "neighbor 3, 1024 samples and as many images"}
    (last,) = _plotted(run)[-1]["rows"]
    assert (last["precision"], last["recall"], last["endpoint_error"]) == (None, None, 0.1)
    stopped = read_run(write_run(tmp_path / "stopped", 27, STOP, (0.3, 0.2)))
    stopped.final = run.final
    assert _plotted(stopped) == stopped.evaluations
