from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image

from fmm_distill.config.settings import DataSettings
from fmm_distill.data.samples import load_images
from fmm_distill.errors import UserError
from fmm_distill.evaluation.features import open_features
from fmm_distill.evaluation.generate import GenerationSpec, SampleGenerator
from fmm_distill.evaluation.samplers import Sampler
from fmm_distill.teachers.codec import LatentCodec, PipelineCodec, Pixels
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.stepped_samples import from_stepped, to_stepped
from tests.tiny import flow
from tests.tiny.diffusion import sd1


@pytest.mark.parametrize("shift", [None, 0.3])
@torch.no_grad()
def test_latents_are_shifted_and_scaled_as_stock_pipelines_do(shift):
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.25,
        shift_factor=shift,
    )
    codec = LatentCodec(autoencoder)
    x, images = torch.randn(2, 4, 4, 4), torch.rand(2, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(codec.decode(x), autoencoder.decode(x / 0.25 + (shift or 0)).sample)
    mode = autoencoder.encode(images).latent_dist.mode()
    torch.testing.assert_close(codec.encode(images), (mode - (shift or 0)) * 0.25)
    assert not any(p.requires_grad for p in autoencoder.parameters())


class Negative(Pixels):
    """Samples are the images' negatives."""

    def decode(self, x):
        return -x


def test_features_see_the_decoded_samples(teacher):
    digits = load_images(DataSettings(source="builtin:digits"), (1, 8, 8))
    network, some = open_features("digits", (1, 8, 8)), digits.take(torch.arange(5))[0]
    settings = {"count": 5, "stored": 5, "batch_size": 2, "seed": 0, "device": torch.device("cpu"), "features": network}
    teacher.codec = Negative()
    # The warm-up is not of these.
    run = lambda draws: -some[[number % 5 for number in draws.numbers]]  # noqa: E731
    sampler = Sampler("negative", 1, teacher.network, run)
    made = SampleGenerator(GenerationSpec(teacher, **settings)).run(sampler)
    assert torch.equal(made.samples, -some)
    torch.testing.assert_close(made.features, network(some / 2 + 0.5).features)


def pix2pix(folder):
    """Instruct-pix2pix: the latents of an image are joined to the channels of the sample."""
    parts = sd1().components
    parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, in_channels=8)
    parts |= {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    pipeline = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return pipeline


@torch.no_grad()
def test_a_network_that_takes_more_channels_than_it_returns(tmp_path):
    pipeline = pix2pix(tmp_path)
    size = pipeline.unet.config.sample_size
    image = Image.new("RGB", (size * pipeline.vae_scale_factor,) * 2)
    call = {"prompt": ["a cat"], "image": image, "num_inference_steps": 2, "guidance_scale": 1.0}
    codec = PipelineCodec(tmp_path, "unet", pipeline.unet, call, (4, size, size), (4, size, size))
    shapes = []

    def shape_of_output(module, arguments, output):
        shapes.append(tuple(output[0].shape))

    handle = pipeline.unet.register_forward_hook(shape_of_output)
    x = torch.randn(2, 4, size, size)
    images = codec.decode(x)
    handle.remove()
    # The output that the network has, not its input with the condition.
    assert set(shapes) == {(1, 4, size, size)}
    expected = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_the_codec_of_a_teacher_does_not_need_the_empty_prompt(tmp_path):
    tiny = flow.PIPELINES["lumina-next"]
    tiny.build().save_pretrained(tmp_path, safe_serialization=True)
    teacher = load_teacher(str(tmp_path), prompts=("a cat", "two dogs"), call=dict(tiny.call))
    teacher.codec.call["prompt"] = [""]
    with pytest.raises(UserError, match="LuminaPipeline does not run with"):
        teacher.codec.decode(torch.zeros(1, *teacher.event_shape))
    teacher = load_teacher(str(tmp_path), prompts=("a cat", "two dogs"), call=dict(tiny.call))
    assert teacher.codec.decode(torch.zeros(1, *teacher.event_shape)).isfinite().all()


def test_guidance_that_does_not_run_is_refused_where_it_is_used(tmp_path, monkeypatch):
    def fails(probe, *, empty=False):
        raise UserError("does not run") from ValueError("no token")

    monkeypatch.setattr("fmm_distill.teachers.prompted.embeddings._record", fails)
    sd1().save_pretrained(tmp_path, safe_serialization=True)
    assert load_teacher(str(tmp_path)).conditions.empty is None
    with pytest.raises(UserError, match=r"does not run with guidance by the empty prompt \(ValueError: no token\)"):
        load_teacher(str(tmp_path), guidance=Guidance(2.0))


def test_frames_that_are_stepped_one_by_one_become_videos_again():
    videos = torch.randn(2, 4, 3, 5, 6)
    frames = to_stepped(videos, (6, 4, 5, 6))
    assert torch.equal(frames[4], videos[1, :, 1])
    assert torch.equal(from_stepped(frames, (4, 3, 5, 6)), videos)
    assert torch.equal(from_stepped(to_stepped(videos, (2, 60, 6)), (4, 3, 5, 6)), videos)
