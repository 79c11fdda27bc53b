from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from fmm_distill.config.settings import DataSettings
from fmm_distill.data.samples import load_images
from fmm_distill.evaluation.features import open_features
from fmm_distill.evaluation.generate import GenerationSpec, SampleGenerator
from fmm_distill.evaluation.samplers import Sampler
from fmm_distill.teachers.codec import LatentCodec, Pixels


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
