"""Images as latents: encoded once, kept on disk, the same after a kill."""

from __future__ import annotations

import os

import pytest
import torch
from diffusers import AutoencoderKL

from fmm_distill.core.draws import draw
from fmm_distill.data import row_store as parts
from fmm_distill.data.latents import Latents, encode_images, latent_layout
from fmm_distill.data.samples import Images
from fmm_distill.teachers.codec import LatentCodec

EVENT = (4, 4, 4)


def codec(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LatentCodec(
            AutoencoderKL(
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=4,
                scaling_factor=0.25,
            )
        )


def images(count=13, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    return Images(torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator), "here", **more)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    # Three latents with their mirrored ones a part.
    monkeypatch.setattr(parts, "PART_BYTES", 3 * (2 * 4 * 64 + 8))
    return tmp_path / "fmm_distill"


def encoded(some, encoder):
    layout = latent_layout(some, encoder, EVENT)
    encode_images(some, encoder, layout)
    return Latents(some, layout)


@pytest.mark.parametrize("flip", [False, True])
def test_latents_are_those_of_their_images_with_their_conditions(flip):
    encoder, some = codec(), images(flip=flip, conditions=torch.linspace(0, 0.9, 13, dtype=torch.float64))
    latents = encoded(some, encoder)
    draws = draw(0, 0, 60, EVENT)
    picked, pictures = latents.pick(draws), some.pick(draws)
    torch.testing.assert_close(picked.images, encoder.encode(pictures.images))
    assert picked.conditions.equal(pictures.conditions)
    if flip:
        plain = images().pick(draws).images
        assert 20 < (pictures.images != plain).flatten(1).any(1).sum() < 40


def test_nothing_is_drawn_when_encoding():
    encoder, some = codec(), images()
    mean = encoder.autoencoder.encode(some.take(torch.arange(13))[0]).latent_dist.mean * 0.25
    torch.testing.assert_close(encoded(some, encoder).parts.rows("latents", torch.arange(13)), mean)


def test_latents_are_encoded_once(own_cache):
    some = images()
    first = encoded(some, codec())
    before = {file: file.stat().st_mtime_ns for file in own_cache.rglob("*.safetensors")}
    assert len(before) == 3

    class Refusing(LatentCodec):
        def encode(self, images):
            raise AssertionError("encoded again")

    again = encoded(some, Refusing(codec().autoencoder))
    assert again.parts.rows("latents", torch.arange(13)).equal(first.parts.rows("latents", torch.arange(13)))
    assert {file: file.stat().st_mtime_ns for file in own_cache.rglob("*.safetensors")} == before


def test_other_pixels_weights_or_flips_have_a_place_of_their_own():
    changed = images()
    changed.pixels[4, 1, 2, 3] += 1
    scaled = codec()
    scaled.factor = 0.5
    pairs = [
        (images(), codec()),
        (images(seed=1), codec()),
        (changed, codec()),
        (images(12), codec()),
        (images(flip=True), codec()),
        (images(levels=128), codec()),
        (images(), codec(1)),
        (images(), scaled),
    ]
    folders = {latent_layout(some, encoder, EVENT).folder for some, encoder in pairs}
    assert len(folders) == len(pairs)
    assert latent_layout(images(), codec(), EVENT).folder in folders


@pytest.mark.parametrize("left", [0, 1, 5])
def test_latents_are_bit_equal_after_a_kill(own_cache, left):
    some, encoder = images(flip=True), codec()
    whole = encoded(some, encoder).parts
    expected = {name: whole.rows(name, torch.arange(13)) for name in ("latents", "mirrored", "rows")}
    for file in sorted(own_cache.rglob("*.safetensors"))[left:]:
        file.unlink()

    class Dying(LatentCodec):
        calls = 2

        def encode(self, images):
            self.calls -= 1
            if self.calls < 0:
                raise KeyboardInterrupt
            return super().encode(images)

    layout = latent_layout(some, encoder, EVENT)
    if left < 4:
        with pytest.raises(KeyboardInterrupt):
            encode_images(some, Dying(encoder.autoencoder), layout)
        assert len(list(own_cache.rglob("*"))) == left + 2
    encode_images(some, encoder, layout)
    again = Latents(some, layout).parts
    assert all(again.rows(name, torch.arange(13)).equal(values) for name, values in expected.items())


def test_what_a_killed_process_left_is_removed_after_a_day(own_cache):
    some, encoder = images(), codec()
    folder = latent_layout(some, encoder, EVENT).folder
    folder.mkdir(parents=True)
    fresh, old = (folder / f".part-0000{i}.safetensors.{i}.partial" for i in (0, 1))
    for file in (fresh, old):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    encoded(some, encoder)
    assert fresh.exists()
    assert not old.exists()


def test_mirrored_latents_are_not_flipped_latents():
    # Or encoding both would be for nothing.
    some, encoder = images(), codec()
    x, _ = some.take(torch.arange(13))
    assert (encoder.encode(x.flip(-1)) - encoder.encode(x).flip(-1)).abs().max() > 1e-2


def test_places_lead_to_the_same_latents_in_every_process():
    some, encoder = images(flip=True), codec()
    latents = encoded(some, encoder)
    draws = draw(0, 4, 40, EVENT)
    whole = latents.pick(draws).images
    halves = [latents.pick(draws.part(i, i + 20, "cpu")).images for i in (0, 20)]
    assert torch.cat(halves).equal(whole)
