"""Images of every source are the same pixels, with what belongs to them."""

from __future__ import annotations

import io
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fmm_distill.config.settings import DataSettings, PromptSettings
from fmm_distill.core.draws import draw
from fmm_distill.data.prompts import load_prompts
from fmm_distill.data.samples import LazyPixels, captions_of, load_images, positions_of
from fmm_distill.data.tables import open_table
from fmm_distill.errors import UserError
from fmm_distill.teachers.conditions import Classes
from fmm_distill.training.ema import averaged
from tests.logs import logged

CLASSES = Classes(("zero", "one", "two", "three"), None)


def load(source, shape, conditions=None, in_memory=2**31, **settings):
    return load_images(DataSettings(source=str(source), **settings), shape, conditions, in_memory=in_memory)


def arrays(count, height=6, width=4, channels=3, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8))


def png(array):
    file = io.BytesIO()
    Image.fromarray(array.squeeze()).save(file, "PNG")
    return file.getvalue()


def parquet(place, files, **columns):
    """A parquet file of image files (bytes), with further columns."""
    table = datasets.Dataset.from_dict({"img": [{"bytes": file, "path": None} for file in files], **columns})
    table = table.cast_column("img", datasets.Image(decode=False))
    table.to_parquet(str(place))
    return place


def at(places, seed=0):
    """Draws whose images are at these places."""
    return replace(draw(seed, 0, len(places), (1,)), image=torch.as_tensor(places, dtype=torch.float64))


def test_digits():
    images = load("builtin:digits", (1, 8, 8))
    assert len(images) == 1797
    picked = images.pick(at([0.0, 0.5, 0.9999999])).images
    assert picked.shape == (3, 1, 8, 8)
    everything = torch.cat(list(images.batches(500)))
    assert (float(everything.min()), float(everything.max())) == (0.0, 1.0)
    assert picked[0].equal(everything[0] * 2 - 1)
    assert picked[2].equal(everything[-1] * 2 - 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_and_parquet_hold_the_same_pixels(tmp_path, channels):
    pixels = arrays(5, channels=channels)
    folder = tmp_path / "images"
    folder.mkdir()
    for i, array in enumerate(pixels):
        (folder / f"{i}.png").write_bytes(png(array))
    (tmp_path / "parquet").mkdir()
    parquet(tmp_path / "parquet" / "train-0.parquet", [png(array) for array in pixels])
    parquet(tmp_path / "parquet" / "test-0.parquet", [png(pixels[3])])
    wanted = torch.from_numpy(np.stack(pixels)).movedim(-1, 1)
    for source in (folder, tmp_path / "parquet", tmp_path / "parquet" / "train-0.parquet"):
        assert load(source, (channels, 6, 4)).pixels.equal(wanted)
    assert load(tmp_path / "parquet", (channels, 6, 4), split="test").pixels.equal(wanted[[3]])
    with pytest.raises(UserError, match="no split valid: its parquet files are of test, train"):
        load(tmp_path / "parquet", (channels, 6, 4), split="valid")
    wrong = f"expected {channels} x 8 x 8 .* got {channels} x 6 x 4.*data.fit=crop"
    with pytest.raises(UserError, match=wrong):
        load(folder, (channels, 8, 8))


def test_an_empty_dataset_is_refused(tmp_path):
    table = datasets.Dataset.from_dict({"img": []}, features=datasets.Features({"img": datasets.Image()}))
    table.to_parquet(str(tmp_path / "none.parquet"))
    with pytest.raises(UserError, match="no rows in its parquet"):
        load(tmp_path / "none.parquet", (1, 8, 8))


def test_a_dataset_without_images_is_refused(tmp_path):
    datasets.Dataset.from_dict({"label": [1, 2]}).to_parquet(str(tmp_path / "labels.parquet"))
    with pytest.raises(UserError, match="no image column among label"):
        load(tmp_path / "labels.parquet", (1, 8, 8))
    with pytest.raises(UserError, match=r"data\.image label: .* holds no images"):
        load(tmp_path / "labels.parquet", (1, 8, 8), image="label")


def test_of_two_image_columns_one_is_named(tmp_path):
    one, other = arrays(2), arrays(2, seed=1)
    table = {name: [{"bytes": png(a), "path": None} for a in some] for name, some in (("a", one), ("b", other))}
    features = datasets.Features(dict.fromkeys("ab", datasets.Image(decode=False)))
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / "two.parquet"))
    with pytest.raises(UserError, match=r"2 image columns \(a, b\).*name it in data\.image"):
        load(tmp_path / "two.parquet", (3, 6, 4))
    named = load(tmp_path / "two.parquet", (3, 6, 4), image="b")
    assert named.pixels.equal(torch.from_numpy(np.stack(other)).movedim(-1, 1))
    with pytest.raises(UserError, match=r"data\.image c: .* has a, b"):
        load(tmp_path / "two.parquet", (3, 6, 4), image="c")


@pytest.mark.parametrize("source", ["./nowhere", "nowhere.parquet", "owner/never-cached"])
def test_what_is_not_there_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--data {source}: no such file or folder") as caught:
        load(source, (1, 8, 8))
    assert "\n" not in str(caught.value)


def test_unknown_builtin_images_are_not_sought_on_the_hub():
    with pytest.raises(UserError, match="known: builtin:digits"):
        load("builtin:checkerboard", (1, 8, 8))


def test_four_channels_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="4 x 8 x 8; expected none, because images have 1 or 3 channels"):
        load(tmp_path, (4, 8, 8))


@pytest.mark.parametrize(("height", "width"), [(8, 24), (40, 16)])
def test_cropped_images_keep_the_center_and_their_proportions(tmp_path, height, width):
    # A sine along the longer side, finer than the small image can show at its ends: antialiasing leaves gray.
    along = np.linspace(0, 1, max(height, width))
    ramp = np.round(along * 255).astype(np.uint8)
    array = np.broadcast_to(ramp[:, None] if height > width else ramp, (height, width)).copy()
    Image.fromarray(array).save(tmp_path / "a.png")
    fitted = load(tmp_path, (1, 4, 4), fit="crop").pixels[0, 0].double() / 255
    line = fitted.mean(1 if height > width else 0)
    short, long = min(height, width), max(height, width)
    # Centers of the four pixels of the middle square, as shares of the longer side.
    centers = (torch.arange(4) + 0.5) / 4 * short / long + (1 - short / long) / 2
    torch.testing.assert_close(line, (centers * long - 0.5).double() / (long - 1), rtol=0, atol=0.01)


def test_resizing_is_antialiased(tmp_path):
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    fitted = load(tmp_path, (1, 4, 4), fit="crop").pixels[0, 0].int()
    assert (fitted - 127).abs().max() <= 3


def test_images_of_the_right_size_are_not_touched_by_a_fit(tmp_path):
    parquet(tmp_path / "a.parquet", [png(array) for array in arrays(3)])
    plain = load(tmp_path / "a.parquet", (3, 6, 4)).pixels
    assert load(tmp_path / "a.parquet", (3, 6, 4), fit="crop").pixels.equal(plain)


def broken(files):
    """No image, half an image, nothing."""
    return [*files[:2], b"no image", *files[2:4], files[4][: len(files[4]) // 2], *files[5:], b""]


@pytest.mark.parametrize("in_memory", [2**31, 0])
def test_unreadable_images_are_counted_and_said_once(tmp_path, in_memory):
    files = [png(array) for array in arrays(20, 16, 16)]
    place = parquet(tmp_path / "a.parquet", broken(files), label=[i % 4 for i in range(22)])
    said = []
    with logged(said):
        images = load(place, (3, 16, 16), CLASSES, in_memory, condition="label", max_corrupt=0.2)
        picked = images.pick(at(np.linspace(0, 0.999, 66)))
    assert len(said) == 1
    assert "row 2" in said[0]
    whole = load(parquet(tmp_path / "b.parquet", files), (3, 16, 16)).pixels.float() / 255 * 2 - 1
    rows = [i for i in range(21) if i not in (2, 5)]
    source = torch.tensor([0, 1, 2, 3, *range(5, 20)])
    for image, place in zip(picked.images, picked.conditions, strict=True):
        match = (whole == image).flatten(1).all(1).nonzero().item()
        # The label is that of the image's own row.
        assert int(place * 4) == rows[source.tolist().index(match)] % 4
    if in_memory:
        assert len(images) == 19
        assert "3 of 22 images can't be read and are skipped" in said[0]


@pytest.mark.parametrize("in_memory", [2**31, 0])
def test_too_many_unreadable_images_are_refused(tmp_path, in_memory):
    place = parquet(tmp_path / "a.parquet", broken([png(array) for array in arrays(20, 16, 16)]))
    with pytest.raises(UserError, match=r"of 22 images can't be read.*expected at most a fraction of 0\.01"):
        load(place, (3, 16, 16), in_memory=in_memory).pick(at(np.linspace(0, 0.999, 66)))
    nothing = parquet(tmp_path / "b.parquet", [b"x", b"y"])
    with pytest.raises(UserError, match="2 of 2 images can't be read"):
        load(nothing, (3, 16, 16), in_memory=in_memory, max_corrupt=1.0).pick(at([0.1]))


def test_an_unreadable_file_is_named(tmp_path):
    for i, array in enumerate(arrays(3)):
        (tmp_path / f"{i}.png").write_bytes(png(array))
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n")
    said = []
    with logged(said):
        load(tmp_path, (3, 6, 4), max_corrupt=0.5)
    assert str(tmp_path / "1.png") in said[0]


def test_images_that_do_not_fit_into_memory_are_the_same(tmp_path):
    place = parquet(tmp_path / "a.parquet", [png(array) for array in arrays(7)], label=[0, 1, 2, 3, 0, 1, 2])
    there, lazy = (
        load(place, (3, 6, 4), CLASSES, in_memory=limit, condition="label", flip=True) for limit in (7 * 72, 7 * 72 - 1)
    )
    assert isinstance(there.pixels, torch.Tensor)
    assert isinstance(lazy.pixels, LazyPixels)
    draws = draw(0, 0, 40, (3, 6, 4))
    one, other = there.pick(draws), lazy.pick(draws)
    assert one.images.equal(other.images)
    assert one.conditions.equal(other.conditions)
    for part, same in zip(there.batches(3), lazy.batches(3), strict=True):
        assert part.equal(same)


def test_flips_are_of_the_sample_and_agree_between_processes(tmp_path):
    place = parquet(tmp_path / "a.parquet", [png(array) for array in arrays(9)])
    images, plain = load(place, (3, 6, 4), flip=True), load(place, (3, 6, 4))
    draws = draw(5, 7, 400, (1,))
    whole, unflipped = images.pick(draws).images, plain.pick(draws).images
    halves = [images.pick(draws.part(i, i + 200, "cpu")).images for i in (0, 200)]
    assert torch.cat(halves).equal(whole)
    turned = (whole == unflipped.flip(-1)).flatten(1).all(1)
    assert (turned | (whole == unflipped).flatten(1).all(1)).all()
    assert turned.equal(draws.flip < 0.5)
    assert 0.4 < turned.double().mean() < 0.6
    # Not the same images are mirrored in another step.
    again = replace(draw(5, 8, 400, (1,)), image=draws.image)
    assert not images.pick(again).images.equal(whole)


def test_conditions_belong_to_images(tmp_path):
    # An image's gray is its class.
    labels = [3, 0, 2, 1, 1, 3, 0]
    files = [png(np.full((6, 4, 3), 60 * label, np.uint8)) for label in labels]
    place = parquet(tmp_path / "a.parquet", files, kind=labels)
    images = load(place, (3, 6, 4), CLASSES, condition="kind")
    draws = draw(0, 0, 100, (1,))
    picked = images.pick(draws)
    told = CLASSES.pick(picked.with_conditions(draws).condition).inputs["class_labels"]
    seen = ((picked.images[:, 0, 0, 0] + 1) / 2 * 255 / 60).round().long()
    assert told.equal(seen)
    assert set(told.tolist()) == {0, 1, 2, 3}
    some = torch.tensor([5, 2, 60])
    assert picked.rows(some).conditions.equal(picked.conditions[some])
    with pytest.raises(UserError, match=r"data\.condition label: .* no such column; it has kind"):
        load(place, (3, 6, 4), CLASSES, condition="label")


def test_folders_of_images_are_classes(tmp_path):
    for name, gray in (("cat", 100), ("ape", 0), ("dog", 200)):
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.png").write_bytes(png(np.full((6, 4, 1), gray + i, np.uint8)))
    images = load(tmp_path, (1, 6, 4), CLASSES, condition="label")
    told = CLASSES.pick(images.conditions).inputs["class_labels"]
    assert told.tolist() == (images.pixels[:, 0, 0, 0] // 100).tolist()


@pytest.mark.parametrize(("value", "shown"), [(4, "4"), (-1, "-1"), (None, "None"), ("cat", "'cat'"), (True, "True")])
def test_what_is_no_class_is_refused(value, shown):
    with pytest.raises(UserError, match=f"here: row 1: expected a class of the teacher, 0 to 3, got {shown}"):
        positions_of([2, value], CLASSES, "here")


def test_places_lead_back_to_their_classes():
    many = Classes(tuple(str(i) for i in range(1000)), None)
    places = positions_of(list(range(1000)), many, "here")
    assert many.pick(places).inputs["class_labels"].tolist() == list(range(1000))


def test_captions_are_kept_once_in_their_order(tmp_path):
    files, said = [png(array) for array in arrays(4)], ["two dogs", "a cat", "", "two dogs"]
    table = open_table(DataSettings(source=str(parquet(tmp_path / "a.parquet", files, text=said, label=[1, 2, 3, 4]))))
    assert captions_of(table, "text") == ("two dogs", "a cat", "")
    assert captions_of(table, "label") == ()
    holes = open_table(DataSettings(source=str(parquet(tmp_path / "b.parquet", files, text=["a", None, "b", "c"]))))
    with pytest.raises(
        UserError, match=r"data\.condition text: row 1: expected a caption, which may be empty, got None"
    ):
        captions_of(holes, "text")


def test_average_against_a_hand_computation():
    network = torch.nn.Linear(1, 1, bias=False)
    average = averaged(network, 0.25)
    wanted = None
    for n, value in enumerate((1.0, 3.0, -2.0, 5.0)):
        network.weight.data.fill_(value)
        average.update_parameters(network)
        rate = min(0.25, (1 + n) / (10 + n))
        wanted = value if wanted is None else rate * wanted + (1 - rate) * value
    assert average.module.weight.item() == pytest.approx(wanted)


def test_prompts_are_the_lines_of_a_file_or_a_column(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  two dogs \n", encoding="utf-8")
    assert load_prompts(PromptSettings(file=str(tmp_path / "prompts.txt"))).texts == ("a cat", "two dogs")
    (tmp_path / "captions.csv").write_text('text,other\na cat,1\n"dogs, two",2\n', encoding="utf-8")
    assert load_prompts(PromptSettings(dataset=str(tmp_path / "captions.csv"))).texts == ("a cat", "dogs, two")
    other = PromptSettings(dataset=str(tmp_path / "captions.csv"), column="other")
    assert load_prompts(other).texts == ("1", "2")
    assert len(load_prompts(PromptSettings())) == 0


def test_prompts_that_are_not_there(tmp_path):
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="no line in it"):
        load_prompts(PromptSettings(file=str(tmp_path / "empty.txt")))
    (tmp_path / "captions.csv").write_text("caption\na cat\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"prompts\.column text: .* has caption"):
        load_prompts(PromptSettings(dataset=str(tmp_path / "captions.csv")))
    with pytest.raises(UserError, match=r"prompts\.dataset .*nowhere\.csv: no such file or folder"):
        load_prompts(PromptSettings(dataset=str(tmp_path / "nowhere.csv")))
