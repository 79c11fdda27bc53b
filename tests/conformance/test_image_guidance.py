"""Teachers with a second guidance, by their image: InstructPix2Pix."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLInstructPix2PixPipeline

from fmm_distill.config.recipe import parse
from fmm_distill.errors import UserError
from fmm_distill.evaluation.protocol import differences, protocol_of
from fmm_distill.evaluation.solvers import steps_within
from fmm_distill.evaluation.stock import reference_pipeline
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.example_call import example_call
from fmm_distill.export.manifest import make_manifest
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.verify import Exported, verify_all
from fmm_distill.run.inspect import describe_teacher
from fmm_distill.run.plan import Plan
from fmm_distill.student.student import Student
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.prompts import Prompts
from fmm_distill.teachers.recording import record
from tests.conformance.stock_steps import check_steps, euler_of
from tests.conformance.test_prompted_export import moved
from tests.tiny import diffusion
from tests.tiny.base import seeded
from tests.tiny.image_conditions import PIPELINES, Conditioned, changed, images_for

TEXTS = ("a cat", "two dogs in the snow")
TINY = PIPELINES["instruct-pix2pix"]
BOTH = Guidance(3.0, image_scale=1.5)


def saved(tiny, folder):
    tiny.build().save_pretrained(folder, safe_serialization=True)
    return folder, Prompts(TEXTS, images_for(tiny, 2))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(TINY, tmp_path_factory.mktemp("instruct") / "teacher")


@pytest.fixture(scope="module")
def teacher(source):
    return load_teacher(str(source[0]), prompts=source[1], guidance=BOTH)


@torch.no_grad()
def check_guided(folder, teacher, guidance):
    """All Euler steps of the guided teacher are those of its pipeline."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler, teacher = euler_of(pipeline, teacher), replace(teacher, guidance=guidance)
    run = {"output_type": "latent", "num_inference_steps": 4, "generator": torch.manual_seed(0)}
    run |= teacher.pipeline.call | teacher.pipeline.guided(guidance.scale, guidance.image_scale)
    seen = record(pipeline, "unet", run | teacher.conditions.given.keywords())
    assert len(seen.calls[0].output) == 3 * len(seen.steps[0].sample)
    check_steps(seen, teacher, pipeline.scheduler, teacher.conditions.prompts)


@pytest.mark.parametrize("image_scale", [1.0, 1.5, 2.5])
def test_a_guided_step_is_the_pipelines(source, teacher, image_scale):
    check_guided(source[0], teacher, Guidance(3.0, image_scale=image_scale))


@torch.no_grad()
def test_the_stock_pipeline_is_guided_alike_in_an_evaluation(source, teacher):
    sampler = reference_pipeline(teacher, torch.device("cpu"), 2)
    assert "image_guidance_scale=1.5" in sampler.about
    assert "guidance_scale=3.0" in sampler.about
    off = load_teacher(str(source[0]), prompts=source[1], guidance=Guidance(1.0, image_scale=1.5))
    with pytest.raises(
        UserError, match=r"guidance\.scale 1 with guidance\.image_scale 1\.5, at which it does not guide"
    ):
        reference_pipeline(off, torch.device("cpu"), 2)
    # Three calls per velocity.
    assert steps_within(teacher, (12,))["ddim_steps"] == (4,)
    settings = parse({"teacher": "builtin:digits", "evaluation": {"features": "none"}}, "here").evaluation
    both, one = (
        protocol_of(replace(teacher, guidance=each), settings, None, None, torch.device("cpu"), decodes=False)
        for each in (BOTH, Guidance(3.0))
    )
    assert differences(both, one) == {"image_guidance": (1.5, None)}


def test_a_student_is_called_without_guidance_and_its_card_has_both_scales(teacher):
    off = "image_guidance_scale=1.0, guidance_scale=1.0"
    assert all(off in example_call(teacher, any_step=any_step) for any_step in (True, False))
    student = Student.from_teacher(teacher)
    recipe = parse({"teacher": "builtin:digits", "guidance": {"scale": 3.0, "image_scale": 1.5}}, "here")
    assert (
        "guidance 3 and image guidance 1.5 are in its weights" in make_manifest(student, teacher, recipe, (2,)).limits
    )
    assert "guided by 3 and by 1.5 by the image" in str(Plan(recipe, teacher, student, None, None, "AdamW", None))
    assert "; guidance, and by the image (guidance.image_scale)" in describe_teacher(teacher, recipe)


def test_what_has_no_such_guidance(source, tmp_path, caplog):
    folder, prompts = source
    load_teacher(str(folder), prompts=prompts, guidance=Guidance(3.0))
    assert "guidance.image_scale is 1: the second guidance of" in caplog.text
    with pytest.raises(UserError, match=r"pipeline\.image_guidance_scale .* is guidance\.image_scale"):
        load_teacher(str(folder), prompts=prompts, call={"image_guidance_scale": 2.0})
    inpainting, prompts = saved(PIPELINES["sd-inpaint"], tmp_path / "inpaint")
    plain = load_teacher(str(inpainting), prompts=prompts, guidance=Guidance(3.0))
    assert plain.conditions.image_guidance is None
    with pytest.raises(UserError, match=r"guidance\.image_scale: expected 1 for a pipeline without a second guidance"):
        load_teacher(str(inpainting), prompts=prompts, guidance=BOTH)


def sdxl_instruct():
    parts = diffusion.sdxl().components
    parts = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    return StableDiffusionXLInstructPix2PixPipeline(**parts | {"unet": changed(parts["unet"], in_channels=8)})


@pytest.mark.slow
def test_sdxl(tmp_path):
    tiny = Conditioned(seeded(sdxl_instruct), {"height": 8, "width": 8}, {"image": (8, 8)})
    folder, prompts = saved(tiny, tmp_path / "teacher")
    teacher = load_teacher(str(folder), prompts=prompts, call=dict(tiny.call), guidance=BOTH)
    check_guided(folder, teacher, BOTH)
    student = moved(Student.from_teacher(teacher))
    exported = export_pipeline(student, teacher, tmp_path / "student", (2,))
    (found,) = verify_all([Exported(student, exporter_of(teacher), exported, (2,))])
    assert all(one.passed for one in found.values()), found
