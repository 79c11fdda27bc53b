"""Images that a pipeline is called with: read from columns of tables, of one size, with a line on every bad row."""

from __future__ import annotations

import json
import logging

import datasets
import numpy as np
import pytest
from PIL import Image

from fmm_distill.config.recipe import override, parse
from fmm_distill.config.settings import PromptSettings
from fmm_distill.data.condition_images import describe_images
from fmm_distill.data.prompts import load_prompts
from fmm_distill.errors import UserError
from tests.cli.runs import call

TEXTS = ("a red cat", "two dogs", "a house")


def picture(number, width=12, height=8, mode="RGB"):
    """An image whose pixels name it."""
    pixels = np.random.RandomState(number).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Three images with their masks, and half of each image as two frames."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / f"images/{i}.png")
        left = np.repeat(np.arange(12)[None] < 4 + 2 * i, 8, 0)
        Image.fromarray((255 * left).astype(np.uint8)).save(tmp_path / f"images/mask{i}.png")
    return tmp_path


def rows(**columns):
    """Rows of names of files, relative to the table."""
    plain = {"text": TEXTS, "source": [f"images/{i}.png" for i in range(3)]}
    plain["mask"] = [f"images/mask{i}.png" for i in range(3)]
    named = plain | columns
    return [dict(zip(named, values, strict=True)) for values in zip(*named.values(), strict=True)]


def table(folder, name="t.jsonl", **columns):
    """A table of rows: JSON lines, or separated by commas."""
    path, found = folder / name, rows(**columns)
    if path.suffix == ".jsonl":
        lines = [json.dumps(row) for row in found]
    else:
        lines = [",".join(found[0]), *(",".join(str(value) for value in row.values()) for row in found)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def load(path, **settings):
    return load_prompts(PromptSettings(dataset=str(path), **{"images": {"image": "source"}} | settings))


def pixels(images):
    return [np.asarray(image).tolist() for image in images]


EXPECTED = [picture(i) for i in range(3)]


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_names_of_files_are_relative_to_their_table(folder, name, monkeypatch):
    monkeypatch.chdir(folder.parent)
    found = load(table(folder, name), images={"image": "source", "mask_image": "mask"})
    assert found.texts == TEXTS
    assert pixels(found.images["image"]) == pixels(EXPECTED)
    # A mask has one channel: the picture of it may be stored with three.
    assert [image.mode for image in found.images["mask_image"]] == ["L"] * 3
    assert [int((np.asarray(mask) == 255).sum()) for mask in found.images["mask_image"]] == [32, 48, 64]


def as_parquet(folder):
    made = datasets.Dataset.from_dict({"text": list(TEXTS), "source": EXPECTED})
    made.to_parquet(folder / "t.parquet")
    return folder / "t.parquet"


def as_saved(folder):
    datasets.Dataset.from_dict({"text": list(TEXTS), "source": EXPECTED}).save_to_disk(folder / "saved")
    return folder / "saved"


def as_bytes(folder):
    """Encoded images without the feature of an image, as other programs write them."""
    encoded = [(folder / f"images/{i}.png").read_bytes() for i in range(3)]
    datasets.Dataset.from_dict({"text": list(TEXTS), "source": encoded}).to_parquet(folder / "b.parquet")
    return folder / "b.parquet"


def as_names(folder):
    names = [f"images/{i}.png" for i in range(3)]
    datasets.Dataset.from_dict({"text": list(TEXTS), "source": names}).to_parquet(folder / "n.parquet")
    return folder / "n.parquet"


@pytest.mark.parametrize("made", [as_parquet, as_saved, as_bytes, as_names])
def test_columns_of_images_of_a_dataset(folder, made):
    found = load(made(folder))
    assert found.texts == TEXTS
    assert pixels(found.images["image"]) == pixels(EXPECTED)


def as_lines_of_lists(folder):
    return table(folder, source=[[f"images/{i}.png", f"images/{(i + 1) % 3}.png"] for i in range(3)])


def as_parquet_of_lists(folder):
    lists = [[EXPECTED[i], EXPECTED[(i + 1) % 3]] for i in range(3)]
    datasets.Dataset.from_dict({"text": list(TEXTS), "source": lists}).to_parquet(folder / "l.parquet")
    return folder / "l.parquet"


@pytest.mark.parametrize("made", [as_lines_of_lists, as_parquet_of_lists])
def test_several_images_per_row(folder, made):
    found = load(made(folder)).images["image"]
    assert [pixels(each) for each in found] == [pixels([EXPECTED[i], EXPECTED[(i + 1) % 3]]) for i in range(3)]
    assert describe_images({"image": found}) == "image: 2 of 8 x 12"


def test_images_are_resized_to_cover_a_size_and_cropped(folder):
    wide = Image.new("RGB", (40, 8), "black")
    wide.paste((255, 0, 0), (12, 0, 28, 8))
    wide.save(folder / "images/0.png")
    found = load(table(folder), image_size=(4, 4)).images["image"]
    assert [image.size for image in found] == [(4, 4)] * 3
    # The center of a wide image fills the square.
    assert (np.asarray(found[0]) == (255, 0, 0)).all()


def test_a_resized_mask_has_no_new_values(folder):
    settings = {"images": {"image": "mask", "mask_image": "mask"}, "image_size": (5, 7)}
    found = load(table(folder), **settings).images
    assert {value for mask in found["mask_image"] for value in np.unique(np.asarray(mask))} == {0, 255}
    # The same files as images are smoothed.
    assert len(np.unique(np.asarray(found["image"][0]))) > 2


def test_rows_without_a_text_have_the_empty_prompt(folder):
    assert load(table(folder, text=["a", "", None])).texts == ("a", "", "")
    without = [{"source": "images/0.png"}, {"source": "images/1.png"}]
    (folder / "w.jsonl").write_text("\n".join(map(json.dumps, without)))
    assert load(folder / "w.jsonl", column=None).texts == ("", "")
    with pytest.raises(UserError, match=r"prompts\.column text: .* has source; expected one of them, or null for no"):
        load(folder / "w.jsonl")


def test_transparent_images_are_composited_with_a_line_on_it(folder, caplog):
    Image.new("RGBA", (12, 8), (0, 0, 0, 0)).save(folder / "images/1.png")
    with caplog.at_level(logging.WARNING):
        found = load(table(folder)).images["image"]
    assert (np.asarray(found[1]) == 255).all()
    assert "prompts.images.image: 1 of 3 images have transparent pixels and are composited on white" in caplog.messages


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["images/0.png", None, "images/2.png"], "an image in column source, row 1 of .*, got an empty cell"),
        (["images/0.png", "", "images/2.png"], "an image in column source, row 1 of .*, got an empty cell"),
        (["images/0.png", [], "images/2.png"], "an image in column source, row 1 of .*, got an empty list"),
        (["images/0.png", 7, "images/2.png"], r"an image in .*, row 1 of .*, got int \(7\)"),
        (["images/0.png", "images/2.png", "no.png"], "an image in .*, row 2 of .*, got no.png, of which there is no"),
        (["images/0.png", "images/2.png", "t.jsonl"], "an image in .*, row 2 of .*, got t.jsonl that can't be read"),
        (["https://a/b.png"] * 3, r"an image in .*, row 0 of .*, got an address \(https://a/b.png\); download it"),
        (["images/0.png", ["images/0.png"], "images/1.png"], "one image, as in row 0 in .*, row 1 .* a list of 1"),
        ([["images/0.png"] * 2, ["images/0.png"], ["images/0.png"]], "a list of 2, as in row 0 in .*, row 1 .* of 1"),
    ],
    ids=["null", "empty", "empty list", "number", "missing", "no image", "address", "mixed", "lengths"],
)
def test_a_bad_row_is_one_line(folder, values, problem):
    with pytest.raises(UserError, match=rf"^prompts\.images\.image: expected {problem}") as error:
        load(table(folder, source=values))
    assert "\n" not in str(error.value)


def test_images_of_different_sizes_need_a_size(folder):
    picture(5, 20, 10).save(folder / "images/1.png")
    with pytest.raises(
        UserError, match=r"got 8 x 12 \(2\), 10 x 20 \(1\) \(height x width\); try --set 'prompts.image_size=\[8, 12\]'"
    ):
        load(table(folder))
    assert {image.size for image in load(table(folder), image_size=(8, 12)).images["image"]} == {(12, 8)}


def test_an_unknown_column(folder):
    with pytest.raises(UserError, match=r"^prompts\.images\.image input: .* has text, source, mask; expected one of"):
        load(table(folder), images={"image": "input"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": {"image": "a"}}, r"prompts.images: expected prompts.dataset with it, got none; name the table"),
        ({"file": "p.txt", "images": {"image": "a"}}, "prompts.images: expected prompts.dataset with it, got none"),
        ({"dataset": "d", "image_size": [8, 8]}, "prompts.image_size: expected prompts.images with it, got none"),
        ({"dataset": "d", "column": None}, "prompts.column: expected a column without prompts.images, got null"),
        ({"dataset": "d", "images": {"prompt": "a"}}, "prompts.images: expected keywords of images, got prompt"),
        ({"dataset": "d", "images": {"image": "a"}, "image_size": [8]}, "prompts.image_size.1: Field required"),
        ({"dataset": "d", "images": {"image": "a"}, "image_size": [0, 8]}, "prompts.image_size.0: .* greater than or"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(UserError, match=message):
        parse({"prompts": settings}, "here")


def test_data_have_no_images_as_conditions():
    prompts = {"dataset": "d", "images": {"image": "a"}}
    with pytest.raises(UserError, match=r"data.source: expected none or teacher with prompts.images, got ./photos"):
        parse({"prompts": prompts, "data": "./photos"}, "here")
    assert parse({"prompts": prompts, "data": "teacher"}, "here").data.source == "teacher"


def test_images_are_set_like_other_settings():
    changes = ("prompts.dataset=t.jsonl", "prompts.images.image=source", "prompts.image_size=[48, 64]")
    recipe = parse(override({}, changes), "here")
    assert recipe.prompts.images == {"image": "source"}
    assert recipe.prompts.image_size == (48, 64)
    assert parse(recipe.model_dump(mode="json"), "again") == recipe


def test_the_command_line_reports_one_line(folder):
    path = table(folder, source=["images/0.png", "gone.png", "images/2.png"])
    # The recipe's own precision would be that of this process from here on.
    changes = [f"prompts.dataset={path}", "prompts.images.image=source", "training.precision=fp32"]
    status, _, err = call("--recipe", "text", "--teacher", "builtin:digits", *(f"--set={one}" for one in changes))
    assert status == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("error: prompts.images.image: expected an image in column source, row 1")
