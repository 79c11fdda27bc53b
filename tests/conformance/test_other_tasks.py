"""Image-to-image and inpainting with the any-step pipeline of a base model's student."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline

from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.student.scaled import ScaledWeights
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_prompted_export import moved
from tests.tiny import diffusion, flow, video
from tests.tiny.image_conditions import picture

MODULES = {"sd1": diffusion, "sdxl": diffusion, "flux": flow, "qwen-image": flow, "z-image": flow}
SOON = {"sd1", "flux"}
NAMES = [name if name in SOON else pytest.param(name, marks=pytest.mark.slow) for name in MODULES]


@pytest.fixture(scope="module", params=NAMES)
def exported(request, tmp_path_factory):
    folder, tiny = tmp_path_factory.mktemp(request.param), MODULES[request.param].PIPELINES[request.param]
    tiny.build().save_pretrained(folder / "teacher", safe_serialization=True)
    teacher = load_teacher(str(folder / "teacher"), prompts=("a cat",), call=dict(tiny.call))
    # The student's steps are its teacher's at the start, and others after a change.
    start = export_pipeline(Student.from_teacher(teacher), teacher, folder / "start", (4,))
    other = export_pipeline(moved(Student.from_teacher(teacher)), teacher, folder / "other", ())
    side = tiny.call.get("height") or 8
    call = dict(tiny.call) | teacher.pipeline.unguided() | {"prompt": "a cat", "output_type": "np"}
    return folder / "teacher", start, other, call | {"image": picture(3, (side, side))}


def opened(folder):
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


def stock(teacher, start, auto):
    """The stock pipeline of the task, with the teacher's network and the scheduler of a fixed number of steps."""
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    return auto.from_pipe(pipeline, scheduler=DiffusionPipeline.from_pretrained(start / "steps-4").scheduler)


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.5, 0.75, 1.0])
def test_image_to_image_is_that_of_stock_diffusers(exported, strength):
    teacher, start, other, call = exported
    pipelines = [
        opened(start).image_to_image(),
        stock(teacher, start, AutoPipelineForImage2Image),
        opened(other).image_to_image(),
    ]
    assert type(pipelines[0]).__name__ == f"FlowMap{type(pipelines[1]).__name__}"
    call = call | {"strength": strength, "num_inference_steps": 4}
    ours, theirs, moved_ones = (
        torch.as_tensor(one(**call, generator=torch.manual_seed(0)).images) for one in pipelines
    )
    assert (ours - theirs).abs().max() < 1e-5
    # The lengths of the jumps reach the network.
    assert (ours - moved_ones).abs().max() > 1e-4


@torch.no_grad()
def test_inpainting_is_that_of_stock_diffusers(exported):
    teacher, start, _, call = exported
    side = call["image"].size[0]
    call = call | {"mask_image": picture(3, (side, side), mask=True), "strength": 1.0, "num_inference_steps": 4}
    ours, theirs = (
        torch.as_tensor(one(**call, generator=torch.manual_seed(0)).images)
        for one in (opened(start).inpaint(), stock(teacher, start, AutoPipelineForInpainting))
    )
    assert (ours - theirs).abs().max() < 1e-5


def test_a_family_without_the_task_says_so(tmp_path):
    tiny = flow.PIPELINES["sana"]
    tiny.build().save_pretrained(tmp_path / "teacher", safe_serialization=True)
    teacher = load_teacher(str(tmp_path / "teacher"), prompts=("a cat",), call=dict(tiny.call))
    folder = export_pipeline(Student.from_teacher(teacher), teacher, tmp_path / "student", ())
    with pytest.raises(ValueError, match="diffusers has no pipeline of this task for SanaPipeline"):
        opened(folder).image_to_image()


@pytest.mark.slow
def test_a_task_whose_class_has_one_network_is_refused_a_student_of_two(tmp_path):
    tiny = video.PIPELINES["wan-two"]
    tiny.build().save_pretrained(tmp_path / "teacher", safe_serialization=True)
    teacher = load_teacher(str(tmp_path / "teacher"), prompts=("a cat",), call=dict(tiny.call))
    student = Student.from_teacher(teacher, scaled=ScaledWeights())
    folder = export_pipeline(student, teacher, tmp_path / "student", ())
    with pytest.raises(ValueError, match="WanVideoToVideoPipeline has no transformer_2"):
        opened(folder).video_to_video()
