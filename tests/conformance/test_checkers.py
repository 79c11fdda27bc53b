"""Safety checkers and watermarks: never in measured or drawn images, always in the export."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, IFPipeline
from diffusers.pipelines.deepfloyd_if import IFWatermarker
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from fmm_distill.evaluation.stock import other_pipeline, reference_pipeline
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.verify import Exported, verify
from fmm_distill.student.student import Student
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.safety import without_checkers
from tests.conformance.test_prompted_export import moved
from tests.logs import logged
from tests.tiny import diffusion

PROMPTS = ("a cat", "two dogs in the snow")
SIDES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def strict_checker():
    """It finds something in every image."""
    vision = SIDES | {"image_size": 8, "patch_size": 4}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=SIDES, vision_config=vision, projection_dim=8))
    with torch.no_grad():
        checker.concept_embeds.fill_(1.0)
        checker.concept_embeds_weights.fill_(-10.0)
    return checker


def checked(name):
    pipeline = diffusion.PIPELINES[name].build()
    extractor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    parts = pipeline.components | {"safety_checker": strict_checker(), "feature_extractor": extractor}
    return type(pipeline)(**parts, requires_safety_checker=True)


def deep_floyd(variance):
    """Pixels from prompts, with a learned variance, a watermark and no autoencoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusion.conditional_unet(
            in_channels=3,
            out_channels=6,
            sample_size=8,
            encoder_hid_dim=8,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            attention_head_dim=4,
            down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
            resnet_time_scale_shift="scale_shift",
        )
        # A prediction of noise on this schedule leaves [-1, 1] at once, and all pixels would be 0 or 1.
        schedule = DDPMScheduler(variance_type=variance, thresholding=True, prediction_type="v_prediction")
        return IFPipeline(
            tokenizer=diffusion.t5_tokenizer(),
            text_encoder=diffusion.t5_encoder(),
            unet=unet,
            scheduler=schedule,
            safety_checker=None,
            feature_extractor=None,
            watermarker=IFWatermarker(),
            requires_safety_checker=False,
        )


def opened(folder, name, **given) -> tuple[Teacher, list[str]]:
    lines: list[str] = []
    call = dict(diffusion.PIPELINES[name].call) if name in diffusion.PIPELINES else {"clean_caption": False}
    with logged(lines):
        return load_teacher(str(folder), prompts=PROMPTS, call=call, **given), lines


@pytest.fixture(scope="module", params=["sd1", "hunyuan-dit"])
def pipeline(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    checked(request.param).save_pretrained(folder, safe_serialization=True)
    return request.param, folder


def test_images_are_decoded_without_it_and_the_log_says_so(pipeline):
    name, folder = pipeline
    teacher, lines = opened(folder, name)
    assert sum("decoded without the safety checker" in line for line in lines) == 1
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    images = teacher.codec.decode(x)
    assert (images.flatten(1).std(dim=1) > 0).all()
    vae = DiffusionPipeline.from_pretrained(folder).vae
    with torch.no_grad():
        wanted = vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1)
    assert (images - wanted).abs().max() < 1e-3


def test_stock_rows_of_an_evaluation_have_none_and_say_so(pipeline):
    name, folder = pipeline
    teacher, _ = opened(folder, name)
    samplers = [reference_pipeline(teacher, torch.device("cpu"), 2)]
    samplers += other_pipeline(str(folder), teacher, torch.device("cpu"), (2,))
    for sampler in samplers:
        assert sampler.run.pipeline.safety_checker is None
        assert "without its safety checker" in sampler.description


def test_the_export_has_the_teachers_checker(pipeline, tmp_path):
    name, folder = pipeline
    teacher, _ = opened(folder, name)
    student = moved(Student.from_teacher(teacher))
    made = export_pipeline(student, teacher, tmp_path / "student", (2,))
    assert all(one.passed for one in verify(Exported(student, exporter_of(teacher), made, (2,))).values())
    for place in (made, made / "steps-2"):
        index = json.loads((place / "model_index.json").read_text())
        assert index["safety_checker"][1] == "StableDiffusionSafetyChecker"
    stock = DiffusionPipeline.from_pretrained(made / "steps-2")
    result = stock("a cat", num_inference_steps=2, output_type="np", **diffusion.PIPELINES[name].call)
    assert result.nsfw_content_detected == [True]
    assert not result.images.any()


@pytest.mark.parametrize("variance", ["learned_range", pytest.param("fixed_small", marks=pytest.mark.slow)])
def test_a_learned_variance_and_a_watermark_of_pixels(tmp_path, variance):
    deep_floyd(variance).save_pretrained(tmp_path / "teacher", safe_serialization=True)
    teacher, lines = opened(tmp_path / "teacher", "if")
    assert any("decoded without the watermarker" in line for line in lines)
    assert teacher.event_shape == (3, 8, 8)
    guided, _ = opened(tmp_path / "teacher", "if", guidance=Guidance(3.0))
    assert guided.guidance is not None
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert (teacher.codec.decode(x) - x).abs().max() < 1e-6
    student = moved(Student.from_teacher(teacher))
    made = export_pipeline(student, teacher, tmp_path / "student", (1, 4))
    assert all(one.passed for one in verify(Exported(student, exporter_of(teacher), made, (1, 4))).values())


def test_an_invisible_watermark_is_switched_off():
    assert without_checkers("StableDiffusionXLPipeline", {"unet": []}) == {"add_watermarker": False}
    assert without_checkers("FluxPipeline", {"transformer": []}) == {}
    both = without_checkers("StableDiffusionPipeline", {"safety_checker": [], "feature_extractor": []})
    assert both == {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    kept = without_checkers(
        "StableDiffusionPipeline", dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    )
    assert "feature_extractor" not in kept
