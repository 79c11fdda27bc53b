"""Runs of teachers that are given images: stored, resumed, opened, evaluated and described with their images."""

from __future__ import annotations

import inspect
import json
import shutil

import diffusers.utils
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImageVariationPipeline
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from fmm_distill import Prompts, distill, load_student, load_teacher
from fmm_distill.config.recipe import load_recipe, parse
from fmm_distill.errors import UserError
from fmm_distill.evaluation.draws import places_of
from fmm_distill.evaluation.gallery import SEED, Gallery
from fmm_distill.evaluation.given_images import rows_of_images
from fmm_distill.evaluation.html_report import write_report
from fmm_distill.evaluation.protocol import differences
from fmm_distill.evaluation.result import Evaluation, Row
from fmm_distill.export.card import card
from fmm_distill.export.example_call import imports_of
from fmm_distill.export.manifest import make_manifest, read_manifest
from fmm_distill.run.evaluate import EvaluationRequest, measure_target, open_target
from fmm_distill.run.folder import check_folder
from fmm_distill.run.inputs import with_paths
from fmm_distill.run.inspect import describe_teacher
from fmm_distill.run.plan import open_teacher, plan
from fmm_distill.run.prompts import check_prompts
from fmm_distill.run.reopen import open_run
from fmm_distill.student.student import Student
from tests.tiny import diffusion
from tests.tiny.image_conditions import PIPELINES

TEXTS = ("a red cat", "two dogs", "a house")
# A pipeline that fits an image to a size of its own would take one of a million pixels.
CALL = {"height": 8, "width": 8, "max_area": 64, "_auto_resize": False}
EVALUATION = {
    "steps": [1, 2],
    "ddim_steps": [],
    "dpmsolver_steps": [],
    "features": "none",
    "samples": 4,
    "endpoint_samples": 4,
    "endpoint_solver_steps": 2,
    "batch_size": 4,
}


def picture(number, size=(16, 16)):
    pixels = np.random.RandomState(number).randint(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_table(folder, first=0):
    """A table of three rows with an image and a mask each."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i, text in enumerate(TEXTS):
        picture(first + i).save(folder / f"{i}.png")
        Image.fromarray((np.arange(256).reshape(16, 16) % 16 > 4 + i).astype(np.uint8) * 255).save(folder / f"m{i}.png")
        rows.append({"text": text, "source": f"{i}.png", "mask": f"m{i}.png"})
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "t.jsonl"


def settings(teacher, table, **prompts):
    return {
        "teacher": str(teacher),
        "prompts": {"dataset": str(table), "images": {"image": "source"}} | prompts,
        "pipeline": CALL,
        "student": {"kind": "scaled", "lora": {"rank": 2}},
        "training": {"steps": 2, "batch_size": 2, "checkpoint_every": 2},
        "evaluation": EVALUATION,
        "export": {"steps": [2]},
    }


def saved(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp(name)
    PIPELINES[name].build().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def kontext(tmp_path_factory):
    """An editor of images."""
    return saved(tmp_path_factory, "flux-kontext")


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory):
    return saved(tmp_path_factory, "sd-inpaint")


@pytest.fixture(scope="module")
def image_to_video(tmp_path_factory):
    return saved(tmp_path_factory, "wan-image")


@pytest.fixture(scope="module")
def run(tmp_path_factory, kontext):
    """A finished run, and the table of its images."""
    folder = tmp_path_factory.mktemp("run")
    table = write_table(folder / "data")
    distill(parse(settings(kontext, table), "here"), folder / "run")
    return folder / "run", table


def test_the_properties_of_a_teacher_have_the_images(inpainting, tmp_path):
    table = write_table(tmp_path / "data")
    plain = settings(inpainting, table, images={"image": "source", "mask_image": "mask"}, image_size=[8, 8])
    recipe = parse(plain | {"pipeline": {"height": 8, "width": 8}}, "here")
    teacher = open_teacher(recipe)
    lines = describe_teacher(teacher, recipe).splitlines()
    facts = {line[:16].strip(): line[16:] for line in lines}
    assert facts["conditioning"].startswith("prompts and images, as ")
    assert facts["pipeline takes"] == "an image (image) and a mask (mask_image)"
    assert facts["opened with"] == "3 prompts with images (height x width), image: 8 x 8; mask_image: 8 x 8"
    assert "opened without" not in facts
    given = teacher.conditions.given
    assert given.texts == TEXTS
    assert [mask.mode for mask in given.images["mask_image"]] == ["L"] * 3


@pytest.mark.parametrize(
    ("name", "folder", "keywords"),
    [
        ("edit", "kontext", CALL),
        ("image-to-video", "image_to_video", {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}),
    ],
)
def test_the_recipes_fit_teachers_of_their_kind(request, tmp_path, name, folder, keywords):
    changes = [f"prompts.dataset={write_table(tmp_path / 'data')}", "prompts.image_size=[16, 16]"]
    # Of the accelerator that the recipe is for.
    changes += [f"pipeline={json.dumps(keywords)}", "training.precision=fp32"]
    teacher = request.getfixturevalue(folder)
    recipe = load_recipe(name, changes, teacher=str(teacher))
    assert set(recipe.prompts.images) == {"image"}
    job = plan(recipe)
    assert "; 3 prompts and images" in str(job)
    assert job.student.network.config is not None
    task = {"edit": "image-to-image", "image-to-video": "image-to-video"}[name]
    assert make_manifest(job.student, job.teacher, recipe, recipe.export.steps).pipeline_tag == task


def test_texts_that_a_pipeline_does_not_take_are_logged(tmp_path, caplog):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=8))
    parts = diffusion.sd1().components
    StableDiffusionImageVariationPipeline(
        vae=parts["vae"],
        image_encoder=encoder.eval(),
        unet=parts["unet"],
        scheduler=parts["scheduler"],
        safety_checker=None,
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8),
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "pipeline", safe_serialization=True)
    recipe = settings(tmp_path / "pipeline", write_table(tmp_path / "data")) | {"pipeline": {"height": 8, "width": 8}}
    unused = "takes images without a prompt: the texts of prompts.column are not used"
    open_teacher(parse(recipe, "here"))
    assert any(unused in message for message in caplog.messages)
    caplog.clear()
    recipe["prompts"]["column"] = None
    open_teacher(parse(recipe, "here"))
    assert not any(unused in message for message in caplog.messages)


def test_images_without_texts(kontext, tmp_path):
    teacher = open_teacher(parse(settings(kontext, write_table(tmp_path / "data"), column=None), "here"))
    assert teacher.conditions.names == ("", "", "")
    assert teacher.conditions.noun == "images"


def test_a_picture_shows_the_images_of_its_conditions_above_the_samples(kontext):
    images = tuple(picture(i, (16, 32)) for i in range(3))
    teacher = load_teacher(str(kontext), prompts=Prompts(TEXTS, {"image": images}), call=CALL)
    gallery = Gallery(teacher, 1, 5, SEED, torch.device("cpu"))
    student = Student.from_teacher(teacher)
    rows = gallery.rows(student, (1,))
    assert list(rows) == ["image", "teacher's ODE", "student, 1 step"]
    height, width = rows["teacher's ODE"].shape[-2:]
    assert rows["image"].shape == (5, 3, height, width)
    numbers = places_of(teacher.conditions, range(5), SEED)
    assert len(set(numbers)) > 1
    for number, shown in zip(numbers, rows["image"], strict=True):
        own = np.asarray(ImageOps.pad(images[number], (width, height), Image.Resampling.BICUBIC, color="white"))
        assert torch.equal(shown, torch.from_numpy(own.copy()).movedim(-1, 0).float() / 127.5 - 1)
        # An image that is twice as wide as high has white bars of a quarter of the height.
        assert (shown[:, : height // 4] == 1).all()
        assert (shown[:, height // 4] < 1).any()
    first = gallery.interpolation(student, (1,))["image"]
    assert torch.equal(first, rows["image"][:1].expand_as(first))


def test_a_run_stores_its_prompts_and_the_digests_of_their_images(run):
    folder, _ = run
    images = [picture(i) for i in range(3)]
    assert json.loads((folder / "prompts.json").read_text()) == list(TEXTS)
    assert json.loads((folder / "prompt_images.json").read_text()) == digests_of(range(3))
    assert len(set(digests_of(range(3)))) == 3
    job = open_run(folder)
    assert job.teacher.conditions.names == TEXTS
    assert [np.asarray(own).tolist() for own in job.teacher.conditions.images["image"]] == [
        np.asarray(own).tolist() for own in images
    ]


def test_a_run_does_not_continue_with_other_images(run, kontext, tmp_path):
    folder, table = run
    other = write_table(tmp_path / "other", first=1)
    more = {"training": {"steps": 3, "batch_size": 2, "checkpoint_every": 2}}
    with pytest.raises(UserError, match=r"expected the images that the run began with, got others for 3 of 3 prompts"):
        distill(parse(settings(kontext, other) | more, "here"), folder)
    with pytest.raises(UserError, match=r"prompts\.images\.image: expected source, got mask"):
        distill(parse(settings(kontext, table, images={"image": "mask"}) | more, "here"), folder)
    assert json.loads((folder / "prompt_images.json").read_text()) == digests_of(range(3))
    # The same images in another folder.
    moved = with_paths(parse(settings(kontext, write_table(tmp_path / "moved")) | more, "here"))
    changes = check_folder(folder, moved, fresh=False, seen={})
    assert [change.partition(":")[0] for change in changes] == ["prompts.dataset", "training.steps"]
    check_prompts(folder, open_teacher(moved))


def digests_of(numbers):
    return Prompts(TEXTS, {"image": tuple(picture(i) for i in numbers)}).digests()


def test_a_run_opens_with_its_own_images_alone(run, tmp_path):
    folder, table = run
    gone = table.with_name("gone.jsonl")
    table.rename(gone)
    try:
        with pytest.raises(UserError, match=r"no such file or folder.*; the run in .* needs its images: restore them"):
            open_run(folder)
        with pytest.raises(UserError, match=r"no such file or folder.*; --prompts FILE sets another table with the c"):
            open_target(str(folder / "student"), EvaluationRequest(against_teacher=False))
    finally:
        gone.rename(table)
    shutil.copy(table.with_name("1.png"), tmp_path / "1.png")
    picture(7).save(table.with_name("1.png"))
    try:
        with pytest.raises(UserError, match=r"got others for 1 of 3 prompts, the first of them number 1; restore"):
            open_run(folder)
    finally:
        shutil.copy(tmp_path / "1.png", table.with_name("1.png"))


def test_an_exported_student_is_evaluated_with_the_images_of_a_table(run, tmp_path):
    folder, _ = run
    other = write_table(tmp_path / "other", first=5)
    measured = []
    for prompts in (None, str(other)):
        request = EvaluationRequest(against_teacher=False, prompts=prompts)
        measured.append(measure_target(open_target(str(folder / "student"), request), request))
    # Numbers of other images are not comparable.
    assert list(differences(measured[0].protocol, measured[1].protocol)) == ["images"]
    assert measured[0].rows[0].seconds_per_image > 0


def test_calls_are_those_of_sampling_without_the_decoding(run):
    folder, _ = run
    request = EvaluationRequest(teacher_steps=2)
    measured = measure_target(open_target(str(folder), request), request)
    rows = [row for row in measured.rows if row.sampler != "teacher-heun"]
    assert {row.sampler for row in rows} == {"student", "teacher-euler", "teacher"}
    assert all(row.calls == row.steps for row in rows)


def test_an_exported_student_is_loaded_with_images(run):
    folder, _ = run
    images = tuple(picture(i) for i in range(2))
    student = load_student(folder / "student", prompts=Prompts(TEXTS[:2], {"image": images}))
    noise = torch.randn(2, *student.event_shape, generator=torch.Generator().manual_seed(0))
    one = student.generate(noise, 2)
    swapped = load_student(folder / "student", prompts=Prompts(TEXTS[:2], {"image": images[::-1]}))
    assert not torch.allclose(one, swapped.generate(noise, 2))
    for prompts, got in ((TEXTS, "none"), (Prompts(TEXTS[:2], {"picture": images}), "picture")):
        with pytest.raises(UserError, match=rf"expected images with the prompts by the keywords image, got {got}; try"):
            load_student(folder / "student", prompts=prompts)


def test_the_card_calls_pipelines_with_an_image(run, tmp_path, monkeypatch):
    folder, _ = run
    manifest = read_manifest(folder / "student")
    assert manifest.images == ("image",)
    assert manifest.pipeline_tag == "image-to-image"
    assert "Trained on 3 prompts and images (image: 16 x 16; height x width)" in manifest.limits
    text = card(folder / "student")
    examples = [block.partition("\n```")[0] for block in text.split("```python\n")[1:]]
    # Fixed steps, any steps, and the adapters.
    assert len(examples) == 3
    picture(0).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    for example in examples:
        assert 'prompt="a prompt", image=load_image("image.png")' in example
        assert "from diffusers.utils import load_image\n" in example
    found = {}
    # As a reader of the card runs it.
    exec(examples[0].replace("<this folder>", str(folder / "student")), found)
    assert found["samples"][0].size == (8, 8)


@pytest.mark.parametrize("images", [None, "image; sha256 0"])
def test_the_report_explains_the_rows_of_images(tmp_path, images):
    (tmp_path / "samples.png").write_bytes(b"a picture")
    # Nothing is measured: the plots are empty.
    evaluation = Evaluation({"images": images}, [Row("student", 1, 1, None, None, 0.1)])
    write_report(evaluation, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert ("First row below the given images: the solution" in page) == (images is not None)
    assert ("First row: the solution" in page) == (images is None)


def test_rows_of_lists():
    frames = tuple([picture(10 * i + k, (4, 4)) for k in range(5)] for i in range(2))
    rows = rows_of_images({"video": frames, "image": tuple(own[:2] for own in frames)}, [1, 0, 1], (4, 4))
    assert list(rows) == ["video, middle", "image 1", "image 2"]
    expected = torch.stack([torch.from_numpy(np.asarray(frames[i][2]).copy()).movedim(-1, 0) for i in (1, 0, 1)])
    assert torch.equal(rows["video, middle"], expected.float() / 127.5 - 1)


def test_examples_of_other_conditions():
    assert imports_of('pipeline("a prompt")') == []
    assert imports_of('video=load_video("a.mp4"), image=load_image("b.png")') == [
        "from diffusers.utils import load_image, load_video"
    ]
    for name in ("load_image", "load_video"):
        assert inspect.isfunction(getattr(diffusers.utils, name))
