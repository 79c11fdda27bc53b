from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from fmm_distill.config.recipe import parse
from fmm_distill.errors import UserError
from fmm_distill.export.load import load_student
from fmm_distill.export.manifest import make_manifest, write_manifest
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.run.plan import open_teacher
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from fmm_distill.teachers.first_timesteps import on_first_timesteps
from fmm_distill.teachers.load import load_teacher
from tests.conftest import save_teacher, tiny_unet


def test_levels_and_velocity_are_those_of_the_teacher(teacher):
    short = on_first_timesteps(teacher, 800)
    assert short.schedule.num_timesteps == 800
    position = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64) * 800 / 1000
    t = teacher.schedule.time_at(position)
    assert torch.allclose(short.schedule.network_time(t), teacher.schedule.network_time(t), rtol=1e-4)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(short.velocity(x, t), teacher.velocity(x, t), atol=1e-4)
    assert short.schedule.t_max < teacher.schedule.t_max
    assert teacher.schedule.num_timesteps == 1000


def test_the_student_is_exported_and_loaded_with_these_timesteps(teacher_folder, tmp_path):
    recipe = parse({"teacher": str(teacher_folder), "timesteps": 40}, "test")
    teacher = open_teacher(recipe)
    student = Student.from_teacher(teacher)
    export_pipeline(student, teacher, tmp_path / "student", steps=[2])
    write_manifest(tmp_path / "student", make_manifest(student, teacher, recipe, (2,)))
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = sample(student, noise, 2)
    assert torch.allclose(load_student(tmp_path / "student").generate(noise, 2), expected, atol=1e-6)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student" / "steps-2")
    pipeline.scheduler.set_timesteps(2)
    assert pipeline.scheduler.timesteps.tolist() == [39, 19]
    x = noise
    for timestep in pipeline.scheduler.timesteps:
        with torch.no_grad():
            x = pipeline.scheduler.step(pipeline.unet(x, timestep).sample, timestep, x).prev_sample
    assert torch.allclose(x, expected, atol=1e-5)


def test_zero_terminal_snr_is_left_out(tmp_path):
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False)
    teacher = load_teacher(str(save_teacher(tmp_path / "teacher", scheduler=scheduler)))
    assert teacher.schedule.t_max == 1
    short = on_first_timesteps(teacher, 900)
    again = DDIMScheduler.from_config(short.scheduler_config)
    assert torch.allclose(again.alphas_cumprod, scheduler.alphas_cumprod[:900], rtol=1e-4)


@pytest.mark.parametrize("count", [1001, 5000])
def test_more_than_the_teacher_has(teacher, count):
    with pytest.raises(UserError, match="expected 2 to 1000"):
        on_first_timesteps(teacher, count)


def test_a_flow_has_no_timesteps_to_leave_out(tmp_path):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    teacher = load_teacher(str(save_teacher(tmp_path / "teacher", tiny_unet(), scheduler)))
    with pytest.raises(UserError, match="no discrete schedule"):
        on_first_timesteps(teacher, 500)


def test_all_of_them(teacher):
    assert on_first_timesteps(teacher, None) is teacher
    complete = on_first_timesteps(teacher, 1000)
    assert isinstance(DDPMScheduler.from_config(complete.scheduler_config), DDPMScheduler)
    assert complete.schedule.t_max == pytest.approx(teacher.schedule.t_max, abs=1e-9)
