"""Every image of a folder is used unless its layout leaves no doubt about splits; what is left out is logged."""

from __future__ import annotations

import io
import json
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fmm_distill.config.settings import DataSettings
from fmm_distill.data.samples import captions_of, load_images
from fmm_distill.data.tables import open_table
from fmm_distill.errors import UserError
from fmm_distill.teachers.conditions import Classes
from tests.logs import logged

CLASSES = Classes(tuple("abcdefgh"), None)
SHAPE = (1, 4, 4)


def image(path, level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), level, np.uint8)).save(path)


def fill(root, *names):
    """Images whose level is their place among the names."""
    for level, name in enumerate(names):
        image(root / name, level)


def load(source, condition=None, in_memory=2**31, **settings):
    """Levels of what is used, its classes, and the lines that are logged."""
    said = []
    settings = DataSettings(source=str(source), condition=condition, **settings)
    with logged(said):
        images = load_images(settings, SHAPE, CLASSES if condition else None, in_memory=in_memory)
        levels = [round(float(part[0, 0, 0, 0]) * 255) for part in images.batches(1) if len(part)]
    classes = None if images.conditions is None else (images.conditions * len(CLASSES.names)).long().tolist()
    return levels, classes, said


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["bus/0.png", "bus/1.png", "car/0.png", "train/0.png"], [0, 0, 1, 2]),
        (["cat/0.png", "validation/0.png", "validation/1.png"], [0, 1, 1]),
        (["dev/0.png", "ops/0.png"], [0, 1]),
        (["a/x/0.png", "a/y/0.png", "b/x/1.png"], [0, 1, 0]),
        (["pets/cat/0.png", "pets/test/0.png", "pets/test/a train.png"], [0, 1, 1]),
    ],
)
def test_folders_are_classes(tmp_path, names, classes):
    fill(tmp_path, *names)
    assert load(tmp_path, "label")[:2] == (list(range(len(names))), classes)
    assert sorted(load(tmp_path)[0]) == list(range(len(names)))


@pytest.mark.parametrize(
    "names",
    [
        ["0.png", "1.png", "2 train.png", "3.png", "4-test.png"],
        ["latest.png", "training.JPG", "validation.PNG", "x.Png"],
        ["a/b/c/0.png", "train/1.png", "z.png"],
    ],
)
def test_names_of_files_are_no_splits(tmp_path, names):
    fill(tmp_path, *names)
    assert sorted(load(tmp_path, fit="crop")[0]) == list(range(len(names)))


def test_a_class_with_the_name_of_a_split_is_logged(tmp_path):
    fill(tmp_path, "bus/0.png", "train/0.png")
    (line,) = load(tmp_path)[2]
    assert line.endswith("train: used like the other folders, not as a split; for a split give its folder")


@pytest.mark.parametrize("above", ["", "data/", "some/where/"])
@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "val"), ("train", "eval")])
def test_folders_that_are_all_named_like_splits_are_splits(tmp_path, above, train, test):
    names = [f"{above}{train}/cat/0.png", f"{above}{train}/dog/0.png", f"{above}{test}/dog/1.png"]
    fill(tmp_path, *names)
    levels, classes, said = load(tmp_path, "label")
    assert (levels, classes) == ([0, 1], [0, 1])
    assert said == [f"data: {tmp_path}: images used: 2; left out: images of other splits ({test}): 1"]
    # A class has the same number in every split.
    assert load(tmp_path, "label", split=test)[:2] == ([2], [1])
    assert load(tmp_path, split="train[:1]")[0] == [0]


def test_a_split_without_classes_has_no_label(tmp_path):
    fill(tmp_path, "train/0.png", "test/0.png")
    with pytest.raises(UserError, match="no such column; it has none besides the images"):
        load(tmp_path, "label")


@pytest.mark.parametrize(
    ("names", "split", "wanted"),
    [
        (["test/0.png"], "train", "data.split train: .* has test; expected one of them, e.g. --set data.split=test"),
        (["train/0.png", "val/0.png"], "test", "data.split test: .* has train, val; expected one of them"),
        (["cat/0.png", "test/0.png"], "test", "data.split test: .* has no splits; expected folders"),
        (["0.png"], "validation", "data.split validation: .* has no splits"),
        (["0.png"], "train[x]", r"data.split train\[x\]: not a slice of train"),
        (["0.png"], "train+test", r"data.split train\+test: not a slice of train|has no splits"),
    ],
)
def test_a_split_that_is_not_there_is_refused(tmp_path, names, split, wanted):
    fill(tmp_path, *names)
    with pytest.raises(UserError, match=wanted) as caught:
        load(tmp_path, split=split)
    assert "\n" not in str(caught.value)


def test_what_is_left_out_is_counted(tmp_path):
    fill(tmp_path, "a.png", "b.jpg", "c.webp", ".hidden.png", "._a.png", ".cache/d.png", "__MACOSX/e.png")
    for name in ("notes.txt", "more.TXT", "a.heic", "LICENSE"):
        (tmp_path / name).write_bytes(b"x")
    levels, _, (line,) = load(tmp_path)
    assert len(levels) == 3
    assert "images used: 3; left out: hidden images: 4; files with other extensions: 4 (2 .txt" in line
    assert "1 .heic" in line
    assert "1 without one" in line


def test_links_are_followed_once(tmp_path):
    fill(tmp_path / "far", "0.png", "1.png")
    here = tmp_path / "here"
    image(here / "2.png", 2)
    (here / "link.png").symlink_to(tmp_path / "far" / "0.png")
    (here / "folder").symlink_to(tmp_path / "far")
    (here / "loop").symlink_to(here)
    levels, _, said = load(here)
    assert sorted(levels) == [0, 0, 1, 2]
    assert "folders that are links to others of it: 1" in said[-1]


@pytest.mark.parametrize("in_memory", [2**31, 0])
def test_images_that_can_not_be_read_take_their_classes_with_them(tmp_path, in_memory):
    names = [f"{name}/{i}.png" for name in ("bus", "car", "train") for i in range(3)]
    fill(tmp_path, *names)
    for name in ("bus/1.png", "train/2.png"):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "car" / "9.png").symlink_to(tmp_path / "nowhere")
    levels, classes, _ = load(tmp_path, "label", max_corrupt=0.4, in_memory=in_memory)
    assert levels == [0, 2, 3, 4, 5, 6, 7]
    if in_memory:
        assert classes == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("at", ["", "train/"])
def test_metadata_give_the_columns(tmp_path, kind, at):
    fill(tmp_path, "train/a.png", "train/b.png", "train/c.png", "test/d.png")
    rows = {"file_name": ["b.png", "a.png", "gone.png"], "label": [3, 1, 2], "text": ["NA", "null", "x\u2028y"]}
    table = tmp_path / at / f"metadata.{kind}"
    place = "" if at else "train/"
    names = [place + name for name in rows["file_name"]]
    if kind == "csv":
        lines = [",".join(map(str, row)) for row in zip(names, rows["label"], rows["text"], strict=True)]
        table.write_bytes(("\ufefffile_name,label,text\r\n" + "\r\n".join(lines)).encode())
    elif kind == "jsonl":
        found = [dict(zip(rows, row, strict=True)) for row in zip(names, rows["label"], rows["text"], strict=True)]
        lines = [json.dumps(row, ensure_ascii=False) for row in found]
        table.write_bytes(("\ufeff" + "\n".join(lines)).encode())
    else:
        datasets.Dataset.from_dict(rows | {"file_name": names}).to_parquet(str(table))
    levels, classes, said = load(tmp_path, "label", max_corrupt=0.4)
    assert (levels, classes) == ([1, 0], [3, 1])
    assert "images of other splits (test): 1; images without a row in " in said[0]
    opened = open_table(DataSettings(source=str(tmp_path)))
    assert captions_of(opened, "text") == ("NA", "null", "x\u2028y")


def test_metadata_of_every_split(tmp_path):
    for number, split in enumerate(("train", "test")):
        image(tmp_path / split / "a.png", number)
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "kind": number}))
    assert load(tmp_path, "kind")[:2] == ([0], [0])
    assert load(tmp_path, "kind", split="test")[:2] == ([1], [1])


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("metadata.csv", "label\n1\n", "it has label; expected a column file_name"),
        ("metadata.csv", "file_name,label\na.png\n", "line 2 has 1 fields and the first line 2"),
        ("metadata.csv", "file_name,profile_name\n../b.png,x\n", "has '../b.png'; expected a path below"),
        ("metadata.csv", "file_name\n/etc/b.png\n", "has '/etc/b.png'; expected a path below"),
        ("metadata.jsonl", '{"file_name": 3}\n', "file_name has 3; expected a path"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n{"file_name\n', "line 2 is not JSON"),
        ("metadata.parquet", "no parquet", "can't be read"),
    ],
)
def test_metadata_that_can_not_be_used(tmp_path, name, content, wanted):
    image(tmp_path / "a.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=wanted) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["list.csv", "LIST.TSV", "list.jsonl", "list.json"])
def test_a_table_of_files_is_a_source(tmp_path, name):
    fill(tmp_path / "far", "0.png", "1.png", "2.png")
    rows = [{"file_name": f"far/{i}.png", "label": i} for i in (2, 0)]
    text = "\n".join(map(json.dumps, rows)) if name == "list.jsonl" else json.dumps(rows)
    if name in ("list.csv", "LIST.TSV"):
        separator = "\t" if "TSV" in name else ","
        text = "\n".join(separator.join(map(str, line)) for line in (rows[0], *(row.values() for row in rows)))
    (tmp_path / name).write_text(text)
    assert load(tmp_path / name, "label")[:2] == ([2, 0], [2, 0])


def test_a_column_of_paths_is_named(tmp_path):
    image(tmp_path / "0.png", 7)
    (tmp_path / "list.csv").write_text("where,label\n0.png,1\n")
    assert load(tmp_path / "list.csv", "label", image="where")[:2] == ([7], [1])


def shards(root, *names):
    """Parquet files of 1, 2, 3 images."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 9, np.uint8)).save(file, "PNG")
    for number, name in enumerate(names, 1):
        table = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}] * number})
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        table.cast_column("image", datasets.Image(decode=False)).to_parquet(str(root / name))


@pytest.mark.parametrize(
    ("names", "split", "count"),
    [
        (["constrained-0", "other-0"], "train", 3),
        (["latest-0", "contest-0", "attest-0"], "train", 6),
        (["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"], "train", 3),
        (["train-0", "test-0"], "test", 2),
        (["data/train-0", "data/dev-0"], "validation", 2),
        (["train/0000", "test/0000"], "test", 2),
        (["unsupervised-00000-of-00001", "train-00000-of-00001"], "unsupervised", 1),
        (["a[1]*", "b"], "train", 3),
    ],
)
def test_parquet_files_state_their_split_or_are_all_used(tmp_path, names, split, count):
    shards(tmp_path, *(f"{name}.parquet" for name in names))
    assert len(load(tmp_path, split=split)[0]) == count


@pytest.mark.parametrize(
    ("names", "split", "wanted"),
    [
        (["latest-0", "other-0"], "test", "no split test: no parquet file's name states a split"),
        (["train-0", "notes"], "train", "train-0.parquet states a split and notes.parquet does not"),
        (["train-0", "test-0"], "val", "no split val: its parquet files are of test, train"),
        (["en/train-0", "fr/train-0"], "train", r"of several datasets \(en, fr\)"),
    ],
)
def test_parquet_files_that_leave_a_doubt_are_refused(tmp_path, names, split, wanted):
    shards(tmp_path, *(f"{name}.parquet" for name in names))
    with pytest.raises(UserError, match=wanted):
        load(tmp_path, split=split)


def test_images_next_to_parquet_are_refused(tmp_path):
    shards(tmp_path, "stray.parquet")
    fill(tmp_path, "0.png", "1.png")
    with pytest.raises(UserError, match=r"2 image files and 1 parquet files \(stray.parquet\); expected one kind"):
        load(tmp_path)


def test_folders_of_save_to_disk(tmp_path):
    fill(tmp_path, "0.png", "1.png")
    files = [str(tmp_path / f"{i}.png") for i in (0, 1)]
    rows = datasets.Dataset.from_dict({"image": files, "label": [4, 2]}).cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows.select([0]), "validation": rows}).save_to_disk(tmp_path / "two")
    assert load(tmp_path / "one", "label")[:2] == ([0, 1], [4, 2])
    assert load(tmp_path / "two", "label")[:2] == ([0], [4])
    assert load(tmp_path / "two", "label", split="val")[:2] == ([0, 1], [4, 2])
    (file,) = (tmp_path / "one").glob("*.arrow")
    assert load(file, "label")[:2] == ([0, 1], [4, 2])
    with pytest.raises(UserError, match="no split test: it has train, validation"):
        load(tmp_path / "two", split="test")


def test_what_is_stored_belongs_to_the_files(tmp_path):
    fill(tmp_path, "0.png", "1.png")

    def fingerprint(**settings):
        return load_images(DataSettings(source=str(tmp_path), **settings), SHAPE, in_memory=0).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(split="train[:1]") != first
    image(tmp_path / "1.png", 200)
    os.utime(tmp_path / "1.png", ns=(1, 1))
    assert fingerprint() != first


def test_a_lazy_set_and_one_in_memory_have_the_same_batches(tmp_path):
    fill(tmp_path, *(f"{i}.png" for i in range(7)))
    (tmp_path / "3.png").write_bytes(b"")
    sets = [
        load_images(DataSettings(source=str(tmp_path), max_corrupt=0.5), SHAPE, in_memory=limit) for limit in (2**31, 0)
    ]
    there, lazy = (torch.cat(list(images.batches(2))) for images in sets)
    assert len(there) == 6
    assert lazy.equal(there)
