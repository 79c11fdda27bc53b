"""Images of the coverage runner: read from a test's dummy inputs, drawn again for each sample."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

from experiments.coverage import checks
from experiments.coverage.distilling import prompt_settings
from experiments.coverage.images import describe_images, draw_prompts, replace_images
from experiments.coverage.opening import open_and_check
from experiments.coverage.report import is_right
from experiments.coverage.sizes import FUNCTIONS, shrink
from experiments.coverage.tasks import call_base
from fmm_distill.config.recipe import load_recipe
from fmm_distill.data.prompts import load_prompts
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.tasks import task_of
from tests.tiny import flow

KONTEXT = dict(flow.PIPELINES["flux"].call) | {"max_area": 256, "_auto_resize": False}
RGB = {"size": [6, 4], "mode": "RGB"}
MASK = {"size": [6, 4], "mode": "L"}


def picture(mode="RGB"):
    return Image.new(mode, (6, 4))


@pytest.mark.parametrize(
    ("name", "value", "form"),
    [
        ("image", picture(), RGB),
        ("mask_image", picture("L"), MASK),
        # A test may give a mask of three channels.
        ("mask_image", picture(), MASK),
        ("image", torch.zeros(1, 3, 4, 6), RGB),
        ("control_mask", torch.zeros(1, 1, 4, 6), MASK),
        ("mask_image", np.zeros((4, 6), dtype=np.float32), MASK),
        ("image", np.zeros((1, 4, 6, 3), dtype=np.float32), RGB),
        ("control_image", [torch.zeros(1, 3, 4, 6)] * 2, [RGB, RGB]),
        # Frames, before and after the channels.
        ("video", torch.zeros(1, 3, 5, 4, 6), [RGB] * 5),
        ("video", torch.zeros(1, 5, 3, 4, 6), [RGB] * 5),
        ("image", [[picture(), picture()]], [[RGB, RGB]]),
        # Latents in the place of an image.
        ("image", torch.zeros(1, 4, 4, 6), {"size": [12, 8], "mode": "RGB"}),
    ],
)
def test_the_form_of_an_image_is_that_of_the_dummy_input(name, value, form):
    assert describe_images({name: value}, [name], 2) == {name: form}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", "a cat"),
        ("image_embeds", torch.zeros(1, 3, 4, 6)),
        ("latents", torch.zeros(1, 3, 4, 6)),
        ("prompt_embeds", torch.zeros(1, 4, 6)),
        ("hint", torch.zeros(1, 4, 4, 6)),
        ("controlnet_frame_indices", [0, 1]),
        ("image", []),
        ("image", [picture(), None]),
    ],
)
def test_other_inputs_are_no_images(name, value):
    assert describe_images({name: value}, [name]) == {}


def test_an_input_that_the_call_does_not_take_is_none():
    assert describe_images({"image": picture()}, ["prompt"]) == {}


def test_each_sample_has_pixels_of_its_own():
    forms = {"image": RGB, "mask_image": {"size": [64, 4], "mode": "L"}, "video": [RGB, RGB]}
    drawn = draw_prompts(("a", "b", "c"), forms)
    assert drawn.texts == ("a", "b", "c")
    assert [image.size for image in drawn.images["image"]] == [(6, 4)] * 3
    assert {image.mode for image in drawn.images["mask_image"]} == {"L"}
    assert {*np.unique(np.asarray(drawn.images["mask_image"][0]))} == {0, 255}
    assert [len(frames) for frames in drawn.images["video"]] == [2, 2, 2]
    assert len(set(drawn.digests())) == 3
    assert drawn.images["image"][0].tobytes() != drawn.images["video"][0][0].tobytes()
    # The same in every process.
    assert draw_prompts(("a", "b", "c"), forms).digests() == drawn.digests()


def test_the_image_under_one_keyword_is_replaced():
    forms = {"control_image": RGB, "image": RGB}
    drawn = draw_prompts(("a", "b"), forms)
    other = replace_images(drawn, "image", RGB)
    assert other.texts == drawn.texts
    assert other.images["control_image"] == drawn.images["control_image"]
    pairs = zip(other.images["image"], drawn.images["image"], strict=True)
    assert all(one.tobytes() != before.tobytes() for one, before in pairs)


@pytest.fixture(scope="module")
def kontext(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kontext")
    pipeline = FluxKontextPipeline(**flow.PIPELINES["flux"].build().components)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def test_a_pipeline_with_an_image_is_checked_with_it(kontext):
    found = open_and_check(kontext, KONTEXT, {"image": {"size": [16, 16], "mode": "RGB"}})
    assert found["checks"].keys() == {"step", "order", "start", "start, embedded", "image"}
    assert [name for name, value in found["checks"].items() if not is_right(name, value)] == []
    assert found["checks"]["image"] > checks.LARGEST
    assert found["one_step"]
    # Without the image it is another pipeline.
    without = open_and_check(kontext, KONTEXT, {})
    assert "image" not in without["checks"]
    assert without["event_shape"] == found["event_shape"]


def test_a_teacher_that_does_not_see_its_image_is_wrong(kontext):
    forms = {"image": {"size": [16, 16], "mode": "RGB"}}
    samples = draw_prompts(checks.PROMPTS, forms)
    teacher = load_teacher(str(kontext), prompts=samples.some((0, 1)), call=KONTEXT)
    found = checks.compare_images(teacher, samples, forms, lambda given: teacher)
    assert found == "does not see image"
    assert not is_right("image", found)


def test_large_sizes_are_small_here_and_in_processes_that_start_later(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    name, (function, sizes) = next(iter(FUNCTIONS.items()))
    for module, (own, _) in FUNCTIONS.items():
        loaded = importlib.import_module(module)
        monkeypatch.setattr(loaded, own, getattr(loaded, own))
    shrink(tmp_path)
    assert getattr(importlib.import_module(name), function)(1024, 1024, 512) == sizes
    code = f"from {name} import {function} as best; print(best(1024, 1024, 512))"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[-2] == str(sizes)


@pytest.mark.parametrize("text", [True, False])
def test_the_command_line_gets_the_prompts_and_images_that_are_opened(tmp_path, text):
    forms = {"image": RGB, "mask_image": MASK, "control_video": [RGB, RGB]}
    written = prompt_settings(tmp_path, forms, text=text)
    given = load_prompts(load_recipe("text", written).prompts)
    opened = draw_prompts(checks.PROMPTS[:2], forms)
    assert given.texts == (opened.texts if text else ("", ""))
    assert given.digests() == opened.digests()
    assert given.images.keys() == forms.keys()


def test_the_command_line_gets_prompts_alone(tmp_path):
    given = load_prompts(load_recipe("text", prompt_settings(tmp_path, {}, text=True)).prompts)
    assert (given.texts, given.images) == (checks.PROMPTS[:2], {})


def test_a_base_gets_the_images_that_its_network_sees_at_the_size_of_the_task():
    task = task_of("StableDiffusionControlNetInpaintPipeline")
    call, forms = call_base(task, {"padding_mask_crop": 1}, {"image": RGB, "mask_image": MASK, "control_image": RGB})
    assert forms == {"image": RGB}
    width, height = RGB["size"]
    assert call == {"width": width, "height": height}


def test_a_base_makes_videos_as_long_as_that_of_the_task():
    call, forms = call_base(task_of("WanVideoToVideoPipeline"), {}, {"video": [RGB, RGB, RGB]})
    assert forms == {}
    assert call["num_frames"] == 3


def test_an_image_that_base_and_task_see_is_not_too_small():
    forms = {"image": {"size": [32, 96], "mode": "RGB"}, "mask_image": MASK}
    found = call_base(task_of("FluxKontextInpaintPipeline"), {}, forms)
    assert found == ({"width": 32, "height": 96, "max_area": 3072}, {"image": {"size": [64, 96], "mode": "RGB"}})
