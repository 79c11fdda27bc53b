"""The inpainting experiment in its smallest form: holes, a teacher, tables of conditions, settings of students."""

from __future__ import annotations

import io

import datasets
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from experiments.inpainting.budget import BUDGETS
from experiments.inpainting.conditions import write_conditions
from experiments.inpainting.experiment import STUDENTS, Experiment
from experiments.inpainting.holes import LARGEST, SMALLEST, random_holes
from experiments.inpainting.measure import use_of_images
from experiments.inpainting.report import markdown
from experiments.inpainting.teacher import encode, make_teacher
from fmm_distill.config.recipe import load_recipe
from fmm_distill.config.settings import PromptSettings
from fmm_distill.data.prompts import load_prompts
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.prompted.encoding import encoding_by_mode
from fmm_distill.teachers.recording import record

TOY = BUDGETS["toy"]
IMAGES = {"image": "image", "mask_image": "mask"}


def pixels(count=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, TOY.size, TOY.size), dtype=torch.uint8, generator=generator)


def opened(table):
    return load_prompts(PromptSettings(dataset=str(table), column=None, images=IMAGES))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """CIFAR-10's two files with few images."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        files = []
        for image in pixels():
            file = io.BytesIO()
            Image.fromarray(image.movedim(0, -1).numpy()).save(file, "PNG")
            files.append({"bytes": file.getvalue(), "path": None})
        table = datasets.Dataset.from_dict({"img": files, "label": [0] * len(files)})
        table.cast_column("img", datasets.Image(decode=False)).to_parquet(str(folder / f"{split}-0.parquet"))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("work")
    make_teacher(TOY, data, folder)
    return folder


def test_a_hole_is_a_rectangle_with_sides_in_their_range():
    masks = random_holes(200, 16, torch.Generator().manual_seed(0))[:, 0]
    assert masks.unique().tolist() == [0, 1]
    rows, columns = masks.amax(2), masks.amax(1)
    assert torch.equal(masks, rows[:, :, None] * columns[:, None, :])
    for line in (rows, columns):
        # One interval: it begins once, the border before the first pixel included.
        begins = torch.cat([line[:, :1], line.diff(dim=1).clamp(min=0)], 1)
        assert (begins.sum(1) == 1).all()
        assert line.sum(1).unique().tolist() == list(range(round(SMALLEST * 16), round(LARGEST * 16) + 1))
    # Every pixel is in some hole.
    assert masks.amax(0).min() == 1


def test_a_table_has_images_of_the_split_and_other_holes_for_another_seed(tmp_path):
    first, again, other = (opened(write_conditions(pixels(), 6, tmp_path / str(i), i // 2)) for i in range(3))
    assert len(first) == 6
    assert first.digests() == again.digests()
    assert not set(first.digests()) & set(other.digests())
    known = {image.movedim(0, -1).numpy().tobytes() for image in pixels()}
    chosen = {image.tobytes() for image in first.images["image"]}
    assert len(chosen) == 6
    assert chosen <= known


def test_the_teacher_is_trained_with_the_inputs_of_the_stock_pipeline(work, tmp_path):
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(work / "teacher")
    given = opened(write_conditions(pixels(), 3, tmp_path, 5))
    call = given.keywords() | {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    with encoding_by_mode(pipeline, given):
        recorded = record(pipeline, "unet", call).calls[0].arguments["sample"]
    images = torch.stack([torch.from_numpy(np.array(image)) for image in given.images["image"]])
    masks = torch.stack([torch.from_numpy(np.array(mask)) for mask in given.images["mask_image"]])
    images, masks = images.movedim(-1, 1) / 127.5 - 1, masks[:, None] / 255
    torch.testing.assert_close(recorded[:, 4:], encode(pipeline.vae, images, masks)[1])


def test_the_autoencoders_latents_have_unit_variance(work, data):
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(work / "teacher")
    images = pixels().float() / 127.5 - 1
    latents, _ = encode(pipeline.vae, images, torch.zeros(len(images), 1, TOY.size, TOY.size))
    assert latents.std().item() == pytest.approx(1, rel=0.05)


def test_the_settings_of_every_student_fit_the_teacher(work, data, tmp_path):
    experiment = Experiment(data, work, tmp_path / "inpainting.json", TOY, "toy")
    experiment._tables()
    source = str(work / "teacher")
    recipes = [load_recipe("cifar10-fast", experiment.changes(name), teacher=source) for name in STUDENTS]
    assert {recipe.student.kind for recipe in recipes} == set(STUDENTS)
    conditions = load_prompts(recipes[0].prompts)
    assert len(conditions) == TOY.conditions
    teacher = load_teacher(source, prompts=conditions)
    assert teacher.event_shape == (4, 8, 8)
    # Images of the other split.
    assert not set(conditions.digests()) & set(opened(work / "test" / "conditions.jsonl").digests())


def test_a_teacher_that_ignores_the_image_is_seen(work, tmp_path):
    conditions = opened(write_conditions(pixels(), 3, tmp_path / "conditions", 5))
    found = use_of_images(work / "teacher", conditions, 2)
    assert found["samples"] == 3
    assert found["other_image"] > 1e-3
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(work / "teacher")
    with torch.no_grad():
        pipeline.unet.conv_in.weight[:, 4:] = 0
    pipeline.save_pretrained(tmp_path / "blind")
    blind = use_of_images(tmp_path / "blind", conditions, 2)
    assert blind["other_image"] < 1e-6
    # Of pixels in [-1, 1].
    assert 0.1 < blind["around"] < 2


def test_a_run_of_another_budget_is_not_mixed(data, work, tmp_path):
    Experiment(data, tmp_path, tmp_path / "inpainting.json", TOY, "toy")
    with pytest.raises(SystemExit, match="another budget"):
        Experiment(data, tmp_path, tmp_path / "inpainting.json", BUDGETS["cpu"], "cpu")


def test_the_table_has_all_samplers_by_their_calls():
    def row(sampler, calls, error):
        return {"sampler": sampler, "calls": calls, "endpoint_error": error, "seconds_per_image": 0.01 * calls}

    rows = [row("student", 1, 0.125), row("student", 4, 0.1), row("teacher-ddim", 1, 0.5), row("teacher-ddim", 4, 0.25)]
    rows += [row("teacher-heun", 1, 0.5), row("teacher-heun", 3, 0.2)]
    students = {"scaled": {"rows": rows, "rows_of_training": rows[:2], "cpu_seconds": 60.0}}
    text = markdown({"budget": {"calls": [1, 4]}, "teacher": {"network": {"steps": 3}}, "students": students})
    assert "| teacher, DDIM | 0.5000 | 0.2500 | 0.0400 |" in text
    assert "| teacher, Heun | 0.5000 | 0.2000 | 0.0300 |" in text
    assert "| **student, scaled** | 0.1250 | 0.1000 | 0.0400 |" in text
    # The seconds of a run's own evaluation are without decoding.
    assert "at conditions of its training | 0.1250 | 0.1000 |  |" in text
    assert "UniPC" not in text
