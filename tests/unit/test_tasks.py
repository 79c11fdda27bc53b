"""A class that refines or fills an image is opened as its base, which names of classes and a configuration tell."""

from __future__ import annotations

import inspect
import json

import diffusers
import pytest
from PIL import Image

from fmm_distill.errors import UserError
from fmm_distill.teachers.load import find_index, load_teacher
from fmm_distill.teachers.prompts import Prompts
from fmm_distill.teachers.requirements import call_parameters, pipeline_class
from fmm_distill.teachers.tasks import task_of

TASKS = {
    "StableDiffusionXLImg2ImgPipeline": ("StableDiffusionXLPipeline", "image_to_image", ("image",)),
    "WanVideoToVideoPipeline": ("WanPipeline", "video_to_video", ("video",)),
    "VideoToVideoSDPipeline": ("TextToVideoSDPipeline", "video_to_video", ("video",)),
    "FluxKontextInpaintPipeline": ("FluxKontextPipeline", "inpaint", ("image", "mask_image")),
    "IFInpaintingPipeline": ("IFPipeline", "inpaint", ("image", "mask_image")),
}
# Images are inputs of their networks, or their base is no class of diffusers.
OTHERS = (
    "StableDiffusionPipeline",
    "FluxFillPipeline",
    "StableDiffusion3ControlNetInpaintingPipeline",
    "ShapEImg2ImgPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "NoPipeline",
)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_found_by_its_signature_and_its_name(name):
    task = task_of(name)
    assert (task.base, task.method, task.images) == TASKS[name]


@pytest.mark.parametrize("name", OTHERS)
def test_other_classes_have_no_task(name):
    assert task_of(name) is None


@pytest.mark.slow
def test_bases_are_those_of_the_tables_of_diffusers():
    from diffusers.pipelines import auto_pipeline as tables

    bases = tables.AUTO_TEXT2IMAGE_PIPELINES_MAPPING | tables.AUTO_TEXT2VIDEO_PIPELINES_MAPPING
    found = 0
    for table in ("IMAGE2IMAGE", "INPAINT", "VIDEO2VIDEO"):
        for family, kind in getattr(tables, f"AUTO_{table}_PIPELINES_MAPPING").items():
            task = task_of(kind.__name__)
            if task is not None and family in bases:
                assert task.base == bases[family].__name__
                found += 1
    assert found > 30


@pytest.mark.slow
def test_a_base_has_no_task_and_no_component_of_its_own():
    tasks = [task for name in dir(diffusers) if name.endswith("Pipeline") and (task := task_of(name)) is not None]
    assert len(tasks) > 40
    for task in tasks:
        own, base = (inspect.signature(pipeline_class(name)).parameters for name in (task.pipeline, task.base))
        assert task_of(task.base) is None
        assert [name for name, one in base.items() if one.default is one.empty and name not in own] == []
        assert set(task.images) <= call_parameters(pipeline_class(task.pipeline)).keys()


def written(folder, name, config):
    parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "unet", "scheduler")
    index = {"_class_name": name} | {part: ["diffusers", "UNet2DConditionModel"] for part in parts}
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.mark.parametrize(("channels", "opened"), [(4, "StableDiffusionXLPipeline"), (9, None)])
def test_a_network_that_sees_the_mask_is_opened_with_it(tmp_path, channels, opened):
    name = "StableDiffusionXLInpaintPipeline"
    index = find_index(written(tmp_path, name, {"in_channels": channels, "out_channels": 4}))
    assert (index.pipeline, index.task) == ((name, None) if opened is None else (opened, name))


def images_of(name):
    return Prompts(("a cat",), {name: (Image.new("RGB", (8, 8)),)})


def test_images_of_the_task_are_no_images_of_the_base(tmp_path):
    folder = written(tmp_path, "StableDiffusionXLImg2ImgPipeline", {})
    with pytest.raises(UserError, match=r"prompts.images.image: StableDiffusionXLPipeline, by which .*Img2ImgPipeline"):
        load_teacher(folder, prompts=images_of("image"))
