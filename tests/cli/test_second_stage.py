"""A run with a second stage: its progress, its end and its card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread

from fmm_distill.config.recipe import parse
from fmm_distill.run.marker import mark
from fmm_distill.training.early_stopping import evaluation_settings
from tests.cli.runs import TINY, call

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
    found = status_of(write_run(tmp_path / "ended", 23, stop, (0.3, 0.31, 0.32)))
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
