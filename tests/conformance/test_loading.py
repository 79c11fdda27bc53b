"""Students from their folders: the map that was exported, other times, and the way back to noise."""

from __future__ import annotations

import shutil

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

import fmm_distill
from fmm_distill.config.recipe import parse
from fmm_distill.core.flow_map import diagonal
from fmm_distill.core.solvers import solve
from fmm_distill.errors import UserError
from fmm_distill.export.load import load_student
from fmm_distill.export.manifest import make_manifest, write_manifest
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_export import moved_student
from tests.conformance.test_prompted import FAMILIES
from tests.conftest import save_teacher, tiny_unet

RECIPE = parse({"teacher": "builtin:digits"}, "here")


def exported(folder, teacher, prediction="teacher"):
    student = moved_student(teacher) if prediction == "teacher" else Student.from_teacher(teacher, prediction).eval()
    export_pipeline(student, teacher, folder, ())
    write_manifest(folder, make_manifest(student, teacher, RECIPE, ()))
    return student


def noises(teacher, count=3):
    return torch.randn(count, *teacher.event_shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, teacher_folder):
    folder = tmp_path_factory.mktemp("loaded") / "student"
    teacher = load_teacher(str(teacher_folder))
    student = exported(folder, teacher)
    return student, teacher, load_student(folder), folder


def test_the_public_name(loaded):
    assert fmm_distill.load_student is load_student
    assert loaded[2].event_shape == (1, 8, 8)
    assert loaded[2].manifest.teacher == loaded[1].source


@pytest.mark.parametrize("steps", [1, 3])
def test_samples_are_those_of_the_student(loaded, steps):
    student, teacher, again, _ = loaded
    made = again.generate(noises(teacher), steps)
    torch.testing.assert_close(made, sample(student, noises(teacher), steps), rtol=0, atol=1e-6)
    torch.testing.assert_close(again.decode(made), made, rtol=0, atol=0)


def test_the_users_own_times(loaded):
    student, teacher, again, _ = loaded
    times = torch.tensor([student.t_max, 0.7, 0.2, 0.0], dtype=torch.float64)
    made = again.generate(noises(teacher), times)
    torch.testing.assert_close(made, sample(student, noises(teacher), times), rtol=0, atol=1e-6)
    assert (made - again.generate(noises(teacher), 3)).abs().max() > 1e-3


@pytest.mark.parametrize("times", [[1.0, 0.0], [0.5], [0.2, 0.7, 0.0], [0.5, 0.0]])
def test_times_that_are_no_way_down(loaded, times):
    with pytest.raises(UserError, match="expected two or more times that decrease from"):
        loaded[2].generate(noises(loaded[1]), torch.tensor(times))


def test_the_way_back_is_the_diagonals(loaded):
    """Along the student's own velocity up to noise, and by the closed way down again."""
    student, teacher, again, _ = loaded
    noise = noises(teacher).double()
    student.double(), again.flow_map.double()
    down = student.schedule.time_at(torch.linspace(1, 0, 129, dtype=torch.float64))
    try:
        data = solve(diagonal(student), student.parametrization.prior(noise), down)
        errors = [(again.encode(data, n) - noise).pow(2).mean().sqrt().item() for n in (16, 32, 64)]
    finally:
        student.float(), again.flow_map.float()
    # Equal shares of the way are coarse next to data; there a random network bends the most.
    assert errors[2] < 1e-2 * noise.pow(2).mean().sqrt()
    assert errors[0] > 1.7 * errors[1] > 1.7**2 * errors[2]


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(prediction_type="epsilon", clip_sample=True, timestep_spacing="leading"),
        EulerDiscreteScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
)
def test_schedules_come_back_as_they_were(tmp_path, scheduler):
    teacher = load_teacher(str(save_teacher(tmp_path / "teacher", scheduler=scheduler)))
    student = exported(tmp_path / "student", teacher)
    again = load_student(tmp_path / "student")
    made, own = again.generate(noises(teacher), 4), sample(student, noises(teacher), 4)
    assert (made - own).abs().max() <= 1e-5 * own.abs().max()
    assert again.teacher.scheduler_config["_class_name"] == type(scheduler).__name__


def test_another_prediction_than_the_teachers(tmp_path):
    teacher = load_teacher(str(save_teacher(tmp_path / "teacher", scheduler=DDPMScheduler(clip_sample=False))))
    student = exported(tmp_path / "student", teacher, "v_prediction")
    again = load_student(tmp_path / "student")
    assert again.flow_map.prediction == "v_prediction"
    torch.testing.assert_close(again.generate(noises(teacher), 2), sample(student, noises(teacher), 2))


def test_classes_by_their_number(tmp_path):
    teacher = load_teacher(str(save_teacher(tmp_path / "teacher", tiny_unet(num_class_embeds=5))))
    student = exported(tmp_path / "student", teacher)
    again = load_student(tmp_path / "student")
    noise = noises(teacher)
    made = again.generate(noise, 2, [4, 0, 2])
    told = teacher.conditions.pick(torch.tensor([4.5, 0.5, 2.5]) / 5)
    torch.testing.assert_close(made, sample(student, noise, 2, told), rtol=0, atol=1e-6)
    assert (made - again.generate(noise, 2, [4, 0, 3]))[2].abs().max() > 1e-4
    for wrong in ([0], [0, 1, 5], [0, 1, -1]):
        with pytest.raises(UserError, match="expected 3 numbers below 5, one per sample"):
            again.generate(noise, 2, wrong)


def test_a_network_that_is_told_its_guidance_is_told_it_again(tmp_path):
    tiny = FAMILIES["flux"]
    tiny.build().save_pretrained(tmp_path / "teacher", safe_serialization=True)
    teacher = load_teacher(str(tmp_path / "teacher"), call=dict(tiny.call), guidance=Guidance(3.5))
    student = moved_student(teacher)
    export_pipeline(student, teacher, tmp_path / "student", ())
    recipe = parse({"teacher": "builtin:digits", "guidance": {"scale": 3.5}}, "here")
    write_manifest(tmp_path / "student", make_manifest(student, teacher, recipe, ()))
    again = load_student(tmp_path / "student")
    own = sample(student, noises(teacher), 2, teacher.conditioned_on(torch.zeros(3, dtype=torch.float64)))
    assert (again.generate(noises(teacher), 2) - own).abs().max() <= 1e-5 * own.abs().max()
    told = again.teacher.conditioned_on(torch.zeros(1, dtype=torch.float64))
    assert 3.5 in [float(value.flatten()[0]) for value in told.inputs.values() if value.is_floating_point()]


def test_a_student_that_is_not_whole(loaded, tmp_path):
    folder = shutil.copytree(loaded[3], tmp_path / "student")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"^{folder}: unet/.*safetensors can't be read"):
        load_student(folder)
    with pytest.raises(UserError, match="revision: expected none for the folder"):
        load_student(folder, revision="main")


def test_what_is_no_student_of_ours(loaded, teacher_folder):
    with pytest.raises(UserError, match="conditions: expected none for an unconditional student"):
        loaded[2].generate(noises(loaded[1]), 1, [0, 0, 0])
    with pytest.raises(UserError, match=r"expected an exported student, got a folder without student\.json"):
        load_student(teacher_folder)
    with pytest.raises(UserError, match=r"nobody/nothing: .*HF_HUB_OFFLINE"):
        load_student("nobody/nothing")
    with pytest.raises(UserError, match="expected owner/name on the Hub or an existing folder"):
        load_student("no such folder")


def test_nothing_is_said_of_the_jumps_embedding(loaded, caplog):
    diffusers.utils.logging.enable_propagation()
    try:
        load_student(loaded[3])
    finally:
        diffusers.utils.logging.disable_propagation()
    assert caplog.text == ""
