"""Teachers whose class refines or fills a given image: opened as their base, their students do what the class does."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from fmm_distill.config.recipe import Recipe
from fmm_distill.export.card import card
from fmm_distill.export.manifest import make_manifest, write_manifest
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.remote.scheduler import FlowMapScheduler
from fmm_distill.run.inspect import describe_teacher
from fmm_distill.student.scaled import ScaledWeights
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.prompts import Prompts
from fmm_distill.teachers.requirements import call_parameters
from fmm_distill.teachers.tasks import task_of
from tests.conformance.test_prompted_export import moved
from tests.slow import with_slow
from tests.tiny import diffusion, flow, image_conditions, video
from tests.tiny.image_conditions import picture

FRAMES = 5
VIDEO = {"video": 1}
IMAGE = {"image": 0}
MASKED = {"image": 0, "mask_image": 0}
CONTROLLED = {"control_image": 2}


@dataclass(frozen=True)
class Case:
    """A pipeline class of a task.

    Attributes:
        tiny: the name of the tiny pipeline of its base, in its module.
        images: keywords of the call of the task, and seeds of their pictures.
        seen: keywords of the call of the base, and those of the task for the same images.
    """

    module: object
    tiny: str
    images: dict[str, int]
    seen: dict[str, str] = field(default_factory=dict)

    @property
    def base(self):
        return self.module.PIPELINES[self.tiny]

    def pictures(self):
        side = self.base.call.get("height") or 8
        made = {}
        for name, seed in self.images.items():
            one = picture(seed, (side, side), mask="mask" in name)
            made[name] = [picture(seed + k, (side, side)) for k in range(FRAMES)] if name == "video" else one
        return made


CASES = {
    "StableDiffusionImg2ImgPipeline": Case(diffusion, "sd1", IMAGE),
    "CogVideoXVideoToVideoPipeline": Case(video, "cogvideox", VIDEO),
    "FluxControlInpaintPipeline": Case(
        image_conditions, "flux-control", MASKED | CONTROLLED, {"control_image": "control_image"}
    ),
    "StableDiffusionControlNetImg2ImgPipeline": Case(
        image_conditions, "sd-controlnet", IMAGE | CONTROLLED, {"image": "control_image"}
    ),
    "StableDiffusionControlNetInpaintPipeline": Case(
        image_conditions, "sd-controlnet", MASKED | CONTROLLED, {"image": "control_image"}
    ),
    "StableDiffusionXLInpaintPipeline": Case(diffusion, "sdxl", MASKED),
    "StableDiffusionXLControlNetImg2ImgPipeline": Case(
        image_conditions, "sdxl-controlnet", IMAGE | CONTROLLED, {"image": "control_image"}
    ),
    "StableDiffusion3Img2ImgPipeline": Case(flow, "sd3", IMAGE),
    "ChromaImg2ImgPipeline": Case(flow, "chroma", IMAGE),
    "ZImageInpaintPipeline": Case(flow, "z-image", MASKED),
    "FluxControlImg2ImgPipeline": Case(
        image_conditions, "flux-control", IMAGE | CONTROLLED, {"control_image": "control_image"}
    ),
    "FluxControlNetImg2ImgPipeline": Case(
        image_conditions, "flux-controlnet", IMAGE | CONTROLLED, {"control_image": "control_image"}
    ),
    "FluxControlNetInpaintPipeline": Case(
        image_conditions, "flux-controlnet", MASKED | CONTROLLED, {"control_image": "control_image"}
    ),
    "FluxKontextInpaintPipeline": Case(image_conditions, "flux-kontext", MASKED, {"image": "image"}),
    "WanVideoToVideoPipeline": Case(video, "wan", VIDEO),
    "VideoToVideoSDPipeline": Case(diffusion, "text-to-video", VIDEO),
}
SOON = ("StableDiffusionImg2ImgPipeline", "CogVideoXVideoToVideoPipeline", "FluxControlInpaintPipeline")
NAMES = pytest.mark.parametrize("name", with_slow(CASES, SOON))


def opened(name, folder):
    """The teacher of a case, saved as the pipeline of the task."""
    case = CASES[name]
    getattr(diffusers, name).from_pipe(case.base.build()).save_pretrained(folder, safe_serialization=True)
    given = case.pictures()
    prompts = Prompts(("a cat",), {own: (given[keyword],) for own, keyword in case.seen.items()})
    return load_teacher(str(folder), prompts=prompts, call=dict(case.base.call))


def sampled(pipeline, call):
    pipeline.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipeline(**call, generator=torch.manual_seed(0))[0])


@torch.no_grad()
@NAMES
def test_the_task_is_that_of_the_class(tmp_path, name, caplog):
    with caplog.at_level(logging.WARNING):
        teacher = opened(name, tmp_path / "teacher")
    task = task_of(name)
    assert teacher.pipeline.class_name == task.base
    assert [f"opened as {task.base}" in message for message in caplog.messages].count(True) == 1
    student = Student.from_teacher(teacher, scaled=ScaledWeights())
    folder = export_pipeline(student, teacher, tmp_path / "student", ())
    ours = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    assert type(stock).__name__ == name
    levels = getattr(ours, teacher.pipeline.component).config.flow_map
    stock.scheduler = FlowMapScheduler.from_stock(ours.scheduler, levels)
    call = CASES[name].base.call | teacher.pipeline.unguided() | CASES[name].pictures()
    call = {key: value for key, value in call.items() if key in call_parameters(type(stock))}
    call |= {"prompt": "a cat", "strength": 0.75, "num_inference_steps": 4, "output_type": "latent"}
    made = getattr(ours, task.method)()
    assert type(made).__name__ == f"FlowMap{name}"
    expected = sampled(stock, call)
    assert (sampled(made, call) - expected).abs().max() < 1e-5 * expected.abs().max()
    if teacher.schedule.kind != "flow":
        # The lengths of the jumps reach the network.
        other = export_pipeline(moved(Student.from_teacher(teacher)), teacher, tmp_path / "other", ())
        again = getattr(DiffusionPipeline.from_pretrained(other, trust_remote_code=True), task.method)()
        assert (sampled(again, call) - expected).abs().max() > 1e-4 * expected.abs().max()


@pytest.mark.slow
def test_the_task_is_described(tmp_path):
    teacher = opened("StableDiffusionImg2ImgPipeline", tmp_path)
    line = "StableDiffusionImg2ImgPipeline, which refines an image: the student's image_to_image()"
    assert line in describe_teacher(teacher, Recipe())


def test_the_task_is_on_the_card(tmp_path):
    name = "StableDiffusionImg2ImgPipeline"
    teacher = opened(name, tmp_path / "teacher")
    folder = export_pipeline(Student.from_teacher(teacher), teacher, tmp_path / "student", ())
    manifest = make_manifest(Student.from_teacher(teacher), teacher, Recipe(), ())
    assert (manifest.pipeline, manifest.task) == ("StableDiffusionPipeline", name)
    write_manifest(folder, manifest)
    text = card(folder)
    assert f"The teacher is a `{name}`" in text
    assert 'pipeline.image_to_image()(prompt="a prompt", image=load_image("image.png")' in text
    # The index is that of the base: stock diffusers opens pipelines of fixed steps from noise.
    assert json.loads((folder / "model_index.json").read_text())["_class_name"][1] == "FlowMapStableDiffusionPipeline"


@torch.no_grad()
def test_a_network_that_takes_a_score_in_place_of_a_size(tmp_path):
    """The refiner of Stable Diffusion XL: its pipelines pass the score, by the keywords of the base and of the task."""
    diffusion.PIPELINES["sdxl-refiner"].build().save_pretrained(tmp_path / "teacher", safe_serialization=True)
    # A list, as a recipe has it, next to a tuple.
    teacher = load_teacher(str(tmp_path / "teacher"), prompts=("a cat",), call={"original_size": [8, 8]})
    assert teacher.pipeline.call == {"original_size": (8, 8), "target_size": (6.0,)}
    student = Student.from_teacher(teacher, scaled=ScaledWeights())
    folder = export_pipeline(student, teacher, tmp_path / "student", ())
    ours = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    stock.scheduler = FlowMapScheduler.from_stock(ours.scheduler, ours.unet.config.flow_map)
    call = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "latent"}
    assert sampled(ours, call).isfinite().all()
    call |= {"image": picture(0, (8, 8)), "strength": 0.75, "guidance_scale": 1.0}
    expected = sampled(stock, call)
    assert (sampled(ours.image_to_image(), call) - expected).abs().max() < 1e-5 * expected.abs().max()
    # The score is an input.
    other = sampled(ours.image_to_image(), call | {"aesthetic_score": 2.0})
    assert (other - expected).abs().max() > 1e-3 * expected.abs().max()
