"""Recipes that a student whose weights change with the length of the jump can't have: one line, exit 2, no files."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DDPMScheduler

from fmm_distill import distill
from fmm_distill.config.recipe import Recipe, parse
from fmm_distill.core.flow_map import LearnedFlowMap
from fmm_distill.core.schedules import FlowMatching
from fmm_distill.errors import UserError
from fmm_distill.run.plan import plan
from fmm_distill.training.process import check_training
from tests.cli.runs import TINY, call, write_recipe
from tests.conftest import save_teacher, tiny_unet
from tests.tiny.diffusion import PIPELINES

SCALED = ("student.kind=scaled",)
EXTRA = "extra_losses=[{{loss: {{name: {}}}, fraction: {}, time_sampling: {}}}]"
MISTAKES = {
    "flow matching alone": (
        ("loss={name: flow_matching}",),
        ["loss flow_matching trains jumps of length 0 alone", "student of kind scaled is its teacher", "leave it out"],
    ),
    "flow matching in addition": (
        (EXTRA.format("flow_matching", 0.5, "{prior: 0, data: 1}"),),
        ["loss flow_matching trains jumps of length 0 alone"],
    ),
    "flow matching first": (
        ("stages=[{loss: {name: flow_matching}, fraction: 0.5}]",),
        ["loss flow_matching trains jumps of length 0 alone"],
    ),
    "another prediction": (
        ("student.prediction=v_prediction", "teacher=epsilon"),
        ["student.prediction: v_prediction differs from the teacher's epsilon", "student.regression_steps=500"],
    ),
    "guidance": (
        ("guidance.scale=2", "teacher=dit"),
        [
            "student.kind: expected embedded, got scaled: guidance has to be learned at h = 0",
            "student.regression_steps is 0; try --set student.regression_steps=500",
        ],
    ),
    "layers that are not there": (
        ("student.lora.targets=[nowhere]",),
        ["expected linear layers or convolutions of UNet2DModel for nowhere, got none that the network calls"],
    ),
    "groups that do not divide the batch": (
        ("time_sampling.groups=3",),
        ["time_sampling.groups: expected a divisor of training.batch_size 8, got 3"],
    ),
    "groups that do not divide a part": (
        ("time_sampling.groups=4", "training.gradient_accumulation_steps=8"),
        ["time_sampling.groups: expected a multiple of 8, the number of parts of a batch, got 4"],
    ),
    "groups of one loss": (
        (EXTRA.format("eulerian", 0.5, "{groups: 4}"),),
        ["expected the recipe's own, 0, in extra_losses and stages, got 4", "try --set time_sampling.groups=4"],
    ),
    "too few groups": (
        (EXTRA.format("eulerian", 0.25, "null"), "time_sampling.groups=2"),
        ["expected enough for a group of each loss, got 2, of which eulerian has none; try more groups"],
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    root = tmp_path_factory.mktemp("mistakes")
    write_recipe(root / "tiny.yaml", teacher_folder)
    save_teacher(root / "epsilon", scheduler=DDPMScheduler(prediction_type="epsilon"))
    PIPELINES["dit"].build().save_pretrained(root / "dit")
    return root


def check(status: int, err: str, expected: list[str]) -> None:
    assert status == 2, err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert all(part in lines[0] for part in expected), lines[0]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(place, tmp_path, monkeypatch, name):
    changes, expected = MISTAKES[name]
    monkeypatch.chdir(place)
    settings = [part for change in (*SCALED, *changes) for part in ("--set", change)]
    status, _, err = call("--recipe", "tiny.yaml", *settings, "--output", tmp_path / "out")
    check(status, err, expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [("student.kind=embedded",), ("guidance.scale=2", "teacher=dit")])
def test_groups_are_of_scaled_students(place, tmp_path, monkeypatch, changes):
    """Of a kind that the recipe names, or that the teacher requires."""
    monkeypatch.chdir(place)
    settings = [part for change in ("time_sampling.groups=4", *changes) for part in ("--set", change)]
    status, _, err = call("--recipe", "tiny.yaml", *settings, "--output", tmp_path / "out")
    check(status, err, ["time_sampling.groups: expected a scaled student, got an embedded one; leave groups out"])


def test_groups_of_several_processes(monkeypatch):
    settings = TINY | {"student": {"kind": "scaled"}, "time_sampling": {"groups": 2}}
    check_training(Recipe.model_validate(settings))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"time_sampling\.groups: expected a multiple of 4, the number of parts"):
        check_training(Recipe.model_validate(settings))
    check_training(Recipe.model_validate(settings | {"time_sampling": {"groups": 8}}))


class OwnMap(LearnedFlowMap):
    """A flow map that takes the length itself."""

    clock, t_max = FlowMatching(), 1.0

    def mean_velocity_of_jump(self, x, t, h, cond=None):
        return x


def test_students_from_python(tmp_path, teacher_folder):
    recipe = parse({"teacher": str(teacher_folder)} | TINY | {"student": {"kind": "scaled"}}, "here")
    with pytest.raises(
        UserError, match=r"student\.kind: expected embedded, got scaled: a LearnedFlowMap takes h itself; try"
    ):
        distill(recipe, tmp_path / "run", student=OwnMap())
    with pytest.raises(
        UserError, match=r"velocity of a new network has to be learned at h = 0, and student\.regression_steps"
    ):
        distill(recipe, tmp_path / "run", student=tiny_unet())
    assert list(tmp_path.iterdir()) == []


def test_a_regression_without_need_is_refused(teacher_folder):
    student = {"kind": "scaled", "regression_steps": 3}
    with pytest.raises(UserError, match=r"student\.regression_steps: expected 0 .*, got 3; try --set"):
        plan(parse({"teacher": str(teacher_folder)} | TINY | {"student": student}, "here"))


def test_times_on_the_diagonal_are_refused(teacher_folder):
    settings = {"student": {"kind": "scaled"}, "time_sampling": {"diagonal": 0.5}}
    with pytest.raises(UserError, match=r"time_sampling\.diagonal: expected 0"):
        parse({"teacher": str(teacher_folder)} | TINY | settings, "here")
    auto = parse({"teacher": str(teacher_folder)} | TINY | {"time_sampling": {"diagonal": 0.5}}, "here")
    assert auto.student_kind == "embedded"
