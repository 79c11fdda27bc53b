"""The first call of a network that others wrote is guarded, whatever its configuration says."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fmm_distill.errors import UserError
from fmm_distill.teachers.load import load_teacher
from tests.conftest import save_teacher, tiny_unet
from tests.tiny import diffusion
from tests.tiny.diffusion import image_vae

CALLS = {"sd1": {"prompts": ("a cat", "dogs")}}
KINDS = ("unet2d", "ldm", "dit", "unet1d", "sd1")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_teacher(folder / "unet2d")
    for kind in KINDS[1:]:
        diffusion.PIPELINES[kind].build().save_pretrained(folder / kind, safe_serialization=True)
    return folder


def network_of(folder):
    return folder / ("unet" if (folder / "unet").is_dir() else "transformer")


def with_settings(saved, kind, target, **changes):
    folder = shutil.copytree(saved / kind, target / kind)
    file = network_of(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def refused(folder, kind, match):
    with pytest.raises(UserError, match=match) as caught:
        load_teacher(str(folder), **CALLS.get(kind, {}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [9, 15])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_the_blocks_do_not_halve(saved, tmp_path, kind, size):
    folder = with_settings(saved, kind, tmp_path, sample_size=size)
    shown = {
        "unet2d": rf"its UNet2DModel does not run on a sample of 1 x {size} x {size} \(RuntimeError: Sizes",
        "ldm": rf"its UNet2DModel does not run on a sample of 3 x {size} x {size} \(RuntimeError: Sizes",
        "dit": rf"its DiTTransformer2DModel makes 4 x {size - 1} x .* of a sample of 4 x {size} x {size}",
        "unet1d": f"sample_size {size} and",
        "sd1": r"StableDiffusionPipeline does not run .*`height` and `width` have to be divisible",
    }
    refused(folder, kind, shown[kind])


@pytest.mark.parametrize("size", ["16", 0, -8, 16.5, True, {}, [8, "8"], [0, 8]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_are_none(saved, tmp_path, kind, size):
    refused(with_settings(saved, kind, tmp_path, sample_size=size), kind, "has sample_size ")


@pytest.mark.parametrize("kind", ["unet2d", "ldm", "dit"])
def test_three_sides_and_no_size(saved, tmp_path, kind):
    refused(with_settings(saved, kind, tmp_path / "3", sample_size=[16, 16, 3]), kind, r"sample_size \[16, 16, 3\]")
    refused(with_settings(saved, kind, tmp_path / "0", sample_size=None), kind, "expected sample_size")


@pytest.mark.parametrize("size", [[16, 24], [24, 8]])
@pytest.mark.parametrize("kind", ["unet2d", "ldm", "sd1"])
def test_rectangles(saved, tmp_path, kind, size):
    teacher = load_teacher(str(with_settings(saved, kind, tmp_path, sample_size=size)), **CALLS.get(kind, {}))
    assert list(teacher.event_shape[1:]) == size
    scale = 1 if kind == "unet2d" else 2
    assert list(teacher.codec.decode(torch.zeros(1, *teacher.event_shape)).shape[2:]) == [scale * n for n in size]


def test_a_square_network_has_no_rectangle(saved, tmp_path):
    refused(with_settings(saved, "dit", tmp_path, sample_size=[4, 8]), "dit", "expected one number: a square")


@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("kind", ["dit", "sd1"])
def test_an_autoencoder_of_other_latents(saved, tmp_path, kind, channels):
    folder = shutil.copytree(saved / kind, tmp_path / kind)
    vae = image_vae()
    type(vae).from_config({**vae.config, "latent_channels": channels}).save_pretrained(folder / "vae")
    refused(folder, kind, rf"has samples of 4 channels, its AutoencoderKL latents of {channels}")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"class_embed_type": "timestep"}, r"its UNet2DConditionModel does not run .*class_labels"),
        ({"addition_embed_type": "text_image", "encoder_hid_dim": 8}, "does not run"),
        ({"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"}, r"its UNet2DConditionModel does not run .*mat1"),
    ],
    ids=["labels", "size", "text"],
)
def test_inputs_that_the_pipeline_does_not_give(saved, tmp_path, changes, match):
    folder = shutil.copytree(saved / "sd1", tmp_path / "sd1")
    diffusion.conditional_unet(**changes).save_pretrained(folder / "unet")
    refused(folder, "sd1", match)


def test_a_network_that_raises_what_no_one_expects(saved, tmp_path, monkeypatch):
    def fails(self, *args, **kwargs):
        raise AssertionError("a check of its own")

    folder = shutil.copytree(saved / "unet2d", tmp_path / "unet2d")
    monkeypatch.setattr(type(tiny_unet()), "forward", fails)
    refused(folder, "unet2d", r"its UNet2DModel does not run on a sample of 1 x 8 x 8 \(AssertionError: a check of")
