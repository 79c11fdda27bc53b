"""``inspect`` describes students of both kinds, and a network without a time embedding has one of them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from fmm_distill import distill, load_student
from fmm_distill.config.recipe import Recipe, parse
from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import FlowMatching
from fmm_distill.errors import UserError
from fmm_distill.run.inspect import describe_teacher
from fmm_distill.student.student import Student
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.load import load_teacher
from tests.tiny import diffusion, flow, layouts, video
from tests.tiny.diffusion import PIPELINES

TINY = {
    "student": {"kind": "scaled"},
    "training": {"steps": 2, "batch_size": 2, "checkpoint_every": 2},
    "evaluation": {
        "steps": [2],
        "ddim_steps": [],
        "dpmsolver_steps": [],
        "samples": 4,
        "endpoint_samples": 4,
        "endpoint_solver_steps": 4,
        "features": "none",
    },
}


class TimeAsChannel(nn.Module):
    """A network that has the time as one more channel of its input, without an embedding."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv1d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv1d(8, 1, 3, padding=1))

    def forward(self, x, time):
        channel = time.to(x)[:, None, None].expand(-1, 1, x.shape[-1]) / 1000
        return type("Output", (), {"sample": self.layers(torch.cat([x, channel], 1))})()


@pytest.fixture
def channel():
    return Teacher(TimeAsChannel(), Parametrization(FlowMatching(), "flow_prediction"), (1, 8), "here", "own", {})


@pytest.fixture(scope="module")
def dance(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dance")
    PIPELINES["unet1d"].build().save_pretrained(folder, safe_serialization=True)
    return str(folder)


def test_both_kinds(dance):
    said = describe_teacher(load_teacher(dance), Recipe())
    convolutions = re.search(r"\nscaled +weights of (?:\d+ linear layers and )?(\d+) convolutions change", said)
    assert convolutions is not None
    assert int(convolutions[1]) > 5
    assert re.search(r"\nscaled memory +\d+\.\d MiB at peak: .* per further sample\n", said)
    assert re.search(r"\nscaled LoRA +\d+\.\d MiB at rank 16\n", said)
    assert re.search(r"\njump embedding +added after time_proj\n", said)
    assert re.search(r"\nmemory +\d+\.\d MiB at peak: ", said)
    # Its attention has no names of transformers.
    assert "\nLoRA memory     no default layers; name them in student.lora.targets\n" in said


def test_a_network_without_a_time_embedding_is_for_scaled_students_alone(channel):
    with pytest.raises(UserError, match="no time embedding found in TimeAsChannel"):
        Student.from_teacher(channel)
    said = describe_teacher(channel, Recipe())
    assert re.search(r"\nscaled +weights of 2 convolutions change with the jump's length, 81 parameters at", said)
    assert re.search(
        r"\njump embedding +none, students are of kind scaled alone \(no time embedding found in TimeAsChannel: ", said
    )
    assert "\nmemory" not in said


@torch.no_grad()
def test_a_scaled_student_of_it_is_trained_and_exported(channel, tmp_path):
    recipe = parse(TINY, "here")
    distill(recipe, tmp_path / "run", teacher=channel)
    folder = tmp_path / "run" / "student"
    assert json.loads((folder / "verification.json").read_text())["passed"]
    assert json.loads((folder / "student.json").read_text())["kind"] == "scaled"
    loaded = load_student(folder, teacher=channel)
    x = torch.randn(2, *channel.event_shape)
    t = torch.full((2,), 0.8, dtype=torch.float64)
    velocity = channel.velocity(x, t)
    assert torch.equal(loaded.flow_map.mean_velocity(x, t, t), velocity)
    assert not torch.equal(loaded.flow_map.mean_velocity(x, t, 0 * t), velocity)


@torch.no_grad()
def test_a_scaled_student_of_dance_diffusion_is_trained_and_exported(dance, tmp_path):
    distill(parse(TINY | {"teacher": dance}, "here"), tmp_path / "run")
    folder = tmp_path / "run" / "student"
    report = json.loads((folder / "verification.json").read_text())
    assert report["passed"]
    # No stock scheduler has its levels.
    assert all(key.startswith("any-") for key in report["pipelines"])
    facts = json.loads((folder / "student.json").read_text())
    assert facts["kind"] == "scaled"
    assert facts["strengths"] == {}


def test_what_a_pipeline_can_take_and_a_teacher_does_not_get(tmp_path):
    """Flux 2 can take images, Stable Diffusion takes prompts alone."""
    lines = {}
    for module, name in ((flow, "flux2"), (diffusion, "sd1")):
        tiny = module.PIPELINES[name]
        tiny.build().save_pretrained(tmp_path / name, safe_serialization=True)
        teacher = load_teacher(str(tmp_path / name), call=dict(tiny.call))
        lines[name] = [
            line for line in describe_teacher(teacher, parse(TINY, "here")).splitlines() if "can take" in line
        ]
    assert lines == {"flux2": ["opened without  an image (image), which the pipeline can take"], "sd1": []}


@pytest.mark.parametrize(
    ("tiny", "expected"),
    [
        (
            layouts.PIPELINES["kandinsky5"],
            "network(hidden_states=sample and a part that stays the same, timestep=timestep)",
        ),
        (video.PIPELINES["ace-step"], "network(hidden_states=sample, timestep=timestep, timestep_r=timestep)"),
    ],
)
def test_the_call_of_the_network_names_what_is_joined_and_a_second_time(tmp_path, tiny, expected):
    tiny.build().save_pretrained(tmp_path, safe_serialization=True)
    teacher = load_teacher(str(tmp_path), call=dict(tiny.call))
    assert f"network call    {expected}" in describe_teacher(teacher, parse(TINY, "here")).splitlines()
