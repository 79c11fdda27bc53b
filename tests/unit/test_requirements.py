"""What a pipeline needs besides noise and prompts is found before its weights are opened, and named in words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from diffusers import FluxKontextPipeline, StableDiffusionInstructPix2PixPipeline
from PIL import Image

from fmm_distill.errors import UserError
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.prompts import Prompts
from fmm_distill.teachers.recording import run_pipeline
from fmm_distill.teachers.requirements import describe_optional_inputs
from tests.tiny import diffusion, flow

CONTROL = {"controlnet": ["diffusers", "ControlNetModel"]}
ADAPTER = {"adapter": ["diffusers", "T2IAdapter"]}
# A network with an input for the mask.
MASKED = {"masked": ["diffusers", "UNet2DConditionModel"]}
PRIOR = {"prior": ["diffusers", "PriorTransformer"]}
# Pipelines of diffusers by what they need, and the components that tell.
NEEDS = {
    "FluxFillPipeline": ({}, r"needs an image \(image\) and a mask \(mask_image\)"),
    "StableDiffusionXLInpaintPipeline": (MASKED, r"needs an image \(image\) and a mask \(mask_image\)"),
    "EasyAnimateInpaintPipeline": (MASKED, r"needs a video \(video\) and a mask \(mask_video\)"),
    "FluxControlPipeline": ({}, r"needs a control image \(control_image\)"),
    "CogVideoXFunControlPipeline": ({}, r"needs a control video \(control_video\)"),
    "StableDiffusionControlNetPipeline": (CONTROL, r"needs a control image \(image\)"),
    "AnimateDiffSparseControlNetPipeline": (CONTROL, r"needs a control image \(conditioning_frames\)"),
    "StableDiffusionXLAdapterPipeline": (ADAPTER, r"needs a control image \(image\)"),
    "WanImageToVideoPipeline": ({}, r"needs an image \(image\)"),
    "WanAnimatePipeline": ({}, r"needs an image \(image\), a video \(pose_video\) and a video \(face_video\)"),
    "StableVideoDiffusionPipeline": ({}, r"needs an image \(image\)"),
    "MarigoldDepthPipeline": ({}, r"needs an image \(image\)"),
    "LTXLatentUpsamplePipeline": ({}, r"needs a video \(video\)"),
    "LucyEditPipeline": ({}, r"needs a video \(video\)"),
    "StableDiffusionDepth2ImgPipeline": ({}, r"refines an image \(image\), and diffusers has no pipeline of its net"),
    "KandinskyV22Pipeline": ({}, r"cascade .*it needs the embedding of an image \(image_embeds\)"),
    "KandinskyV22PriorPipeline": (PRIOR, r"cascade of several networks or a part of one \(prior\)"),
    "StableUnCLIPPipeline": (PRIOR, r"cascade of several networks or a part of one \(prior\)"),
    "LEditsPPPipelineStableDiffusion": ({}, r"whose call takes no prompt"),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_a_pipeline_needs_is_found_by_its_signature_and_components(tmp_path, name):
    parts, match = NEEDS[name]
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]} | parts
    if parts.pop("masked", None):
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet" / "config.json").write_text(json.dumps({"in_channels": 9, "out_channels": 4}))
    # Without any file of weights: nothing is opened.
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name} | parts))
    with pytest.raises(UserError, match=match) as caught:
        load_teacher(str(tmp_path), prompts=("a cat",))
    assert name in str(caught.value)


@pytest.mark.parametrize("keyword", ["height", "negative_prompt", "pictures"])
def test_an_image_is_no_other_input_of_a_pipeline(tmp_path, keyword):
    parts = {"transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxKontextPipeline"} | parts))
    prompts = Prompts(("a cat",), {keyword: (Image.new("RGB", (8, 8)),)})
    expected = rf"prompts\.images\.{keyword}: FluxKontextPipeline takes no image {keyword}; it takes image$"
    with pytest.raises(UserError, match=expected):
        load_teacher(str(tmp_path), prompts=prompts)


def test_a_part_that_is_no_pipeline_of_diffusers(tmp_path):
    parts = {"unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"} | parts))
    with pytest.raises(UserError, match="no adapter for unet: UNet2DConditionModel"):
        load_teacher(str(tmp_path))


def test_a_pipeline_that_runs_without_an_image_is_described():
    """Of the table of what was tried: only these can take more than prompts."""
    kinds = set(re.findall(r"`(\w+Pipeline)`", (Path(__file__).parents[2] / "docs" / "teachers.md").read_text()))
    assert len(kinds) > 20
    described = {kind: text for kind in kinds if (text := describe_optional_inputs(kind)) is not None}
    sounds = "a sound (src_audio) and a sound (reference_audio)"
    images = dict.fromkeys(("Flux2Pipeline", "Flux2KleinPipeline"), "an image (image)")
    assert described == images | {"AceStepPipeline": sounds}


def test_no_setting_of_a_pipeline_is_taken_for_data():
    """A parameter with a default of its own is a setting; masks of tokens belong to prompts."""
    assert describe_optional_inputs("BriaFibo2Pipeline") == "an image (image) and a mask (mask)"
    assert describe_optional_inputs("QwenImagePipeline") is None
    assert describe_optional_inputs("StableDiffusionXLPipeline") is None


def test_an_image_that_only_a_run_misses_is_named():
    pipeline = StableDiffusionInstructPix2PixPipeline(
        **diffusion.PIPELINES["sd1"].build().components, requires_safety_checker=False
    )
    with pytest.raises(UserError, match=r"^StableDiffusionInstructPix2PixPipeline does not run without an image \(ima"):
        run_pipeline(pipeline, {"prompt": ["a cat"], "num_inference_steps": 2, "output_type": "latent"})


def test_another_error_is_not_taken_for_a_missing_image():
    pipeline = FluxKontextPipeline(**flow.PIPELINES["flux"].build().components)
    for wrong in ({"max_sequence_length": 1000}, {"prompt": 3}):
        with pytest.raises(UserError, match=r"^FluxKontextPipeline does not run with prompt=") as caught:
            run_pipeline(pipeline, {"prompt": ["a cat"], "num_inference_steps": 2} | wrong)
        assert "without an image" not in str(caught.value)
