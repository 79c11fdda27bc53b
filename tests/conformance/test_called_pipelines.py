"""Pipelines that are called otherwise than most: guidance of another kind, or one prompt at a time."""

from __future__ import annotations

import inspect
import json
import shutil

import diffusers
import pytest
import torch
from diffusers import (
    FluxKontextPipeline,
    LDMTextToImagePipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    ZImagePipeline,
)

from fmm_distill.config.recipe import parse
from fmm_distill.errors import UserError
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.load import load_student
from fmm_distill.export.manifest import make_manifest, write_manifest
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.verify import Exported, verify
from fmm_distill.student.student import Student
from fmm_distill.teachers.components import open_pipeline
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.guiders import guider_names, plain_guiders, turn_guiders_off
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.prompted.call_keywords import CallKeywords
from fmm_distill.teachers.prompted.runs import record_guided, record_unguided
from fmm_distill.teachers.prompts import Prompts
from fmm_distill.teachers.recording import record
from tests.conformance.test_prompted_export import moved
from tests.logs import logged
from tests.scaled import one_by_one, points, relative, scaled_student
from tests.tiny import audio, diffusion, flow
from tests.tiny.image_conditions import PIPELINES, images_for

PROMPTS = ("a cat", "two dogs in the snow")


class OffAtZero(ZImagePipeline):
    """Z-Image's guidance, off at 0, under a name that says nothing."""


class AlwaysGuided(StableDiffusionPipeline):
    """It guides whatever its scale is, as OmniGen does."""

    do_classifier_free_guidance = property(lambda self: True)


class NeedsNegative(StableDiffusionPipeline):
    """Guidance needs a negative prompt, as in EasyAnimate."""

    def encode_prompt(self, prompt, device, number, guided, negative_prompt=None, **given):
        if guided:
            iter(negative_prompt)
        return super().encode_prompt(prompt, device, number, guided, negative_prompt, **given)


class NegativeOfItsOwn(StableDiffusionPipeline):
    """Guidance by a text of the pipeline's own, as in Kandinsky 5."""

    def encode_prompt(self, prompt, device, number, guided, negative_prompt=None, **given):
        own = ["low quality"] * len(prompt)
        return super().encode_prompt(prompt, device, number, guided, negative_prompt or own, **given)


class OnePrompt(StableDiffusionPipeline):
    """No list of prompts, as in DreamLite and Wan VACE."""

    def check_inputs(self, prompt, *args, **given):
        if not isinstance(prompt, str):
            raise ValueError("one prompt at a time")
        super().check_inputs(prompt, *args, **given)


class TwoFrames(StableDiffusionInpaintPipeline):
    """It takes two images for the two frames of one video, as AnimateDiff's ControlNet does, and no third one."""

    def check_inputs(self, prompt, image, *args, **given):
        if isinstance(image, list) and len(image) > 2:
            raise ValueError("expected two frames")
        super().check_inputs(prompt, image, *args, **given)


class Unpadded(OnePrompt):
    """Embeddings as long as their prompt, without a mask, as in Qwen-Image-Edit-Plus."""

    def encode_prompt(self, prompt, *args, **given):
        embeds, negative = super().encode_prompt(prompt, *args, **given)
        return embeds[:, : len(prompt.split()) + 2], negative if negative is None else negative[:, :4]


@pytest.fixture
def subclass(monkeypatch):
    """A function that makes a test's pipeline class one of diffusers."""

    def add(kind):
        # Of one module of diffusers, so that stock code finds it.
        monkeypatch.setattr(diffusers, kind.__name__, kind, raising=False)
        return kind

    return add


def saved(kind, name, folder, module=diffusion):
    kind(**module.PIPELINES[name].build().components).save_pretrained(folder, safe_serialization=True)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind.__name__}))
    return str(folder)


def unguided(pipeline, component, call):
    keywords = CallKeywords.of(pipeline, call, 1.0)
    return record_unguided(pipeline, component, keywords, Prompts(PROMPTS), 4, 1.0)


def test_guidance_that_is_off_at_zero_is_found_by_a_run():
    pipeline = OffAtZero(**flow.PIPELINES["z-image"].build().components)
    keywords, recording = unguided(pipeline, "transformer", dict(flow.PIPELINES["z-image"].call))
    assert keywords.off == 0
    assert [len(call.output) for call in recording.calls] == [2, 2, 2, 2]


def test_guidance_that_is_off_at_one_needs_no_second_run(monkeypatch):
    runs = []
    pipeline = diffusion.PIPELINES["sd1"].build()
    call = type(pipeline).__call__

    def counted(self, *args, **given):
        runs.append(given["guidance_scale"])
        return call(self, *args, **given)

    counted.__signature__ = inspect.signature(call)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", counted)
    keywords, _ = unguided(pipeline, "unet", dict(diffusion.PIPELINES["sd1"].call))
    assert (keywords.off, runs) == (1, [1])


def test_guidance_that_is_never_off_is_refused():
    components = diffusion.PIPELINES["sd1"].build().components
    pipeline = AlwaysGuided(**components, requires_safety_checker=False)
    with pytest.raises(UserError, match="expected one output per sample without guidance, got 2 at every guidance_sca"):
        unguided(pipeline, "unet", dict(diffusion.PIPELINES["sd1"].call))


def test_a_negative_prompt_is_given_where_guidance_needs_one():
    call = dict(diffusion.PIPELINES["sd1"].call)
    stock = diffusion.PIPELINES["sd1"].build()
    pipeline = NeedsNegative(**stock.components, requires_safety_checker=False)
    found = [
        record_guided(one, "unet", CallKeywords.of(one, call, 1.0), Prompts(PROMPTS), 4, 3.0).calls[0].arguments
        for one in (stock, pipeline)
    ]
    assert torch.equal(found[0]["encoder_hidden_states"], found[1]["encoder_hidden_states"])


def test_a_negative_prompt_of_the_pipelines_own_is_replaced_by_the_empty_prompt(tmp_path, subclass):
    call = dict(diffusion.PIPELINES["sd1"].call)
    teachers = [
        load_teacher(saved(subclass(kind), "sd1", tmp_path / kind.__name__), prompts=PROMPTS, call=call)
        for kind in (StableDiffusionPipeline, NegativeOfItsOwn)
    ]
    rows = [teacher.conditions.null(teacher.conditions.prompts).inputs["encoder_hidden_states"] for teacher in teachers]
    assert torch.equal(*rows)


def test_one_prompt_at_a_time_is_a_teacher_of_many(tmp_path, subclass):
    call = dict(diffusion.PIPELINES["sd1"].call)
    folders = [saved(subclass(kind), "sd1", tmp_path / kind.__name__) for kind in (StableDiffusionPipeline, OnePrompt)]
    stock, single = (load_teacher(folder, prompts=PROMPTS, call=call) for folder in folders)
    assert single.pipeline.one_prompt
    assert not stock.pipeline.one_prompt
    for name, rows in stock.conditions.prompts.inputs.items():
        torch.testing.assert_close(single.conditions.prompts.inputs[name], rows)
    torch.testing.assert_close(
        *(one.conditions.null(one.conditions.prompts).inputs["encoder_hidden_states"] for one in (single, stock))
    )
    assert isinstance(exporter_of(single).verification_call(1)["prompt"], str)
    assert single.codec.decode(torch.zeros(2, *single.event_shape)).shape[:2] == (2, 3)


@pytest.mark.parametrize("scaled", [False, True])
def test_embeddings_of_several_lengths_are_those_of_one_call_each(tmp_path, subclass, scaled):
    tiny = diffusion.PIPELINES["sd1"]
    teacher = load_teacher(
        saved(subclass(Unpadded), "sd1", tmp_path / "teacher"), prompts=PROMPTS, call=dict(tiny.call)
    )
    assert teacher.parametrization.call.layout.takes_one
    seen = []
    hook = teacher.network.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["encoder_hidden_states"].shape[:2]), with_kwargs=True
    )
    x, t, r, cond = points(teacher)
    v = teacher.velocity(x, t, cond)
    hook.remove()
    assert seen == [(1, 4), (1, 7)]
    student = scaled_student(teacher, 2) if scaled else moved(Student.from_teacher(teacher))
    assert relative(student.mean_velocity(x, t, t, cond), v) < 1e-6
    u = student.mean_velocity(x, t, r, cond)
    assert relative(u, one_by_one(student, x, t, r, cond)) < 1e-6
    assert relative(u, v) > 1e-3


def test_two_images_that_are_frames_of_one_sample_are_no_batch(tmp_path, subclass):
    tiny = PIPELINES["sd-inpaint"]
    kind = subclass(TwoFrames)
    kind(**tiny.build().components, requires_safety_checker=False).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), prompts=Prompts(PROMPTS, images_for(tiny, 2)), call={})
    assert teacher.pipeline.one_prompt


def test_perturbed_attention_is_off_in_the_teacher_and_in_the_export(tmp_path):
    source, call = saved(StableDiffusionPAGPipeline, "sd1", tmp_path / "teacher"), diffusion.PIPELINES["sd1"].call
    with logged([]) as lines:
        teacher = load_teacher(source, prompts=PROMPTS, call=dict(call))
    assert len([line for line in lines if "StableDiffusionPAGPipeline is called with pag_scale=0.0" in line]) == 1
    assert teacher.pipeline.call["pag_scale"] == 0
    assert exporter_of(teacher).verification_call(1)["pag_scale"] == 0
    teacher.conditions.check_null()
    student = moved(Student.from_teacher(teacher))
    folder = export_pipeline(student, teacher, tmp_path / "student", (2,))
    assert len(verify(Exported(student, exporter_of(teacher), folder, (2,)))) == 2
    config = json.loads((folder / "unet" / "config.json").read_text())
    assert config["flow_map"]["call"]["pag_scale"] == 0
    write_manifest(folder, make_manifest(student, teacher, parse({"teacher": source}, "here"), (2,)))
    assert load_student(folder, prompts=PROMPTS).teacher.pipeline.call == teacher.pipeline.call


@pytest.fixture(scope="module")
def guided_by_component(tmp_path_factory):
    folder, tiny = tmp_path_factory.mktemp("teacher"), flow.PIPELINES["hunyuan-image"]
    tiny.build().save_pretrained(folder, safe_serialization=True)
    with logged([]) as lines:
        teacher = load_teacher(str(folder), prompts=PROMPTS, call=dict(tiny.call), guidance=Guidance(3.0))
    return folder, dict(tiny.call), teacher, lines


def test_a_guider_is_off_and_replaced_by_a_plain_combination(guided_by_component):
    folder, call, teacher, lines = guided_by_component
    assert [line for line in lines if line.startswith("the guider of HunyuanImagePipeline (AdaptiveProjectedMixGuidan")]
    pipeline = open_pipeline(folder)
    assert guider_names(pipeline)
    given = {"prompt": list(PROMPTS), "num_inference_steps": 2, "output_type": "latent", "generator": None} | call
    assert len(record(pipeline, "transformer", given).calls) == 4
    with plain_guiders(pipeline, 3.0):
        guided = record(pipeline, "transformer", given)
    assert len(record(turn_guiders_off(pipeline), "transformer", given).calls) == 2
    cond = teacher.conditions.prompts
    null = teacher.conditions.null(cond)
    for name, rows in null.inputs.items():
        assert rows.shape == cond.inputs[name].shape
    first, second = guided.calls[:2]
    torch.testing.assert_close(guided.steps[0].output, second.output + 3 * (first.output - second.output))


def test_a_range_of_guidance_needs_a_keyword(guided_by_component):
    folder, call, _, _ = guided_by_component
    with pytest.raises(UserError, match=r"guidance\.range: expected none for a pipeline whose guidance is a component"):
        load_teacher(str(folder), prompts=PROMPTS, call=call, guidance=Guidance(3.0, range=(1.0, 5.0)))


def test_the_exported_guider_is_off(guided_by_component, tmp_path):
    folder, _, teacher, _ = guided_by_component
    student = moved(Student.from_teacher(teacher))
    exported = export_pipeline(student, teacher, tmp_path / "student", (2,))
    assert len(verify(Exported(student, exporter_of(teacher), exported, (2,)))) == 2
    files = sorted(exported.rglob("guider_config.json"))
    assert len(files) >= 2
    assert not any(json.loads(file.read_text())["enabled"] for file in files)
    assert json.loads((folder / "guider" / "guider_config.json").read_text())["enabled"]


def test_a_text_encoder_of_any_name(tmp_path):
    """The first latent diffusion model from text names it bert."""
    parts = diffusion.PIPELINES["sd1"].build().components
    pipeline = LDMTextToImagePipeline(
        vqvae=parts["vae"],
        bert=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        unet=parts["unet"],
        scheduler=parts["scheduler"],
    )
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    size = {"height": 16, "width": 16}
    teacher = load_teacher(str(tmp_path), prompts=PROMPTS, call=size)
    assert teacher.conditions.names == PROMPTS
    teacher.conditions.check_null()


def test_a_component_that_the_pipeline_makes_itself_has_no_folder(tmp_path):
    tiny = audio.PIPELINES["longcat-audio-dit"]
    tiny.build().save_pretrained(tmp_path, safe_serialization=True)
    shutil.rmtree(tmp_path / "scheduler", ignore_errors=True)
    teacher = load_teacher(str(tmp_path), prompts=PROMPTS, call=dict(tiny.call))
    assert teacher.schedule.kind == "flow"
    shutil.rmtree(tmp_path / "text_encoder")
    with pytest.raises(UserError, match="its text_encoder is missing"):
        load_teacher(str(tmp_path), prompts=PROMPTS)


def test_a_pipeline_that_can_take_an_image_is_opened_with_a_warning(tmp_path):
    source = saved(FluxKontextPipeline, "flux", tmp_path, flow)
    call = dict(flow.PIPELINES["flux"].call) | {"max_area": 64, "_auto_resize": False}
    with logged([]) as lines:
        load_teacher(source, prompts=PROMPTS, call=call)
    warning = "FluxKontextPipeline can take an image (image); this teacher and its student are opened without"
    assert lines.count(warning) == 1
