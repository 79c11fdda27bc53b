"""Images of every source are the same pixels."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fmm_distill.data import load_images, load_prompts
from fmm_distill.ema import averaged
from fmm_distill.errors import UserError
from fmm_distill.recipe import PromptSettings


def test_digits():
    images = load_images("builtin:digits", (1, 8, 8))
    assert len(images) == 1797
    picked = images.pick(torch.tensor([0.0, 0.5, 0.9999999]))
    assert picked.shape == (3, 1, 8, 8)
    everything = torch.cat(list(images.batches(500)))
    assert (float(everything.min()), float(everything.max())) == (0.0, 1.0)
    assert picked[0].equal(everything[0] * 2 - 1)
    assert picked[2].equal(everything[-1] * 2 - 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_and_parquet_hold_the_same_pixels(tmp_path, channels):
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (6, 4, channels), dtype=np.uint8) for _ in range(5)]
    pictures = [Image.fromarray(array.squeeze()) for array in arrays]
    folder = tmp_path / "images"
    folder.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png")
    table = datasets.Dataset.from_dict({"img": pictures}, features=datasets.Features({"img": datasets.Image()}))
    (tmp_path / "parquet").mkdir()
    table.to_parquet(str(tmp_path / "parquet" / "train-0.parquet"))
    table.select([0]).to_parquet(str(tmp_path / "parquet" / "test-0.parquet"))
    wanted = torch.from_numpy(np.stack(arrays)).movedim(-1, 1)
    for source in (folder, tmp_path / "parquet", tmp_path / "parquet" / "train-0.parquet"):
        assert load_images(str(source), (channels, 6, 4)).pixels.equal(wanted)
    with pytest.raises(UserError, match=f"{channels} x 6 x 4 .* the teacher makes {channels} x 8 x 8"):
        load_images(str(folder), (channels, 8, 8))


def test_an_empty_dataset_is_refused(tmp_path):
    table = datasets.Dataset.from_dict({"img": []}, features=datasets.Features({"img": datasets.Image()}))
    table.to_parquet(str(tmp_path / "none.parquet"))
    with pytest.raises(UserError, match="no images"):
        load_images(str(tmp_path / "none.parquet"), (1, 8, 8))


def test_a_dataset_without_images_is_refused(tmp_path):
    datasets.Dataset.from_dict({"label": [1, 2]}).to_parquet(str(tmp_path / "labels.parquet"))
    with pytest.raises(UserError, match="no image column among label"):
        load_images(str(tmp_path / "labels.parquet"), (1, 8, 8))


@pytest.mark.parametrize("source", ["./nowhere", "nowhere.parquet", "owner/never-cached"])
def test_what_is_not_there_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--data {source}: no images could be read") as caught:
        load_images(source, (1, 8, 8))
    assert "\n" not in str(caught.value)


def test_unknown_builtin_images_are_not_sought_on_the_hub():
    with pytest.raises(UserError, match="known: builtin:digits"):
        load_images("builtin:checkerboard", (1, 8, 8))


def test_four_channels_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="4 channels"):
        load_images(str(tmp_path), (4, 8, 8))


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
    assert load_prompts(PromptSettings(file=str(tmp_path / "prompts.txt"))) == ("a cat", "two dogs")
    (tmp_path / "captions.csv").write_text('text,other\na cat,1\n"dogs, two",2\n', encoding="utf-8")
    assert load_prompts(PromptSettings(dataset=str(tmp_path / "captions.csv"))) == ("a cat", "dogs, two")
    other = PromptSettings(dataset=str(tmp_path / "captions.csv"), column="other")
    assert load_prompts(other) == ("1", "2")
    assert load_prompts(PromptSettings()) == ()


def test_prompts_that_are_not_there(tmp_path):
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="no line in it"):
        load_prompts(PromptSettings(file=str(tmp_path / "empty.txt")))
    (tmp_path / "captions.csv").write_text("caption\na cat\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"prompts\.column text: .* has caption"):
        load_prompts(PromptSettings(dataset=str(tmp_path / "captions.csv")))
    with pytest.raises(UserError, match=r"prompts\.dataset .*nowhere\.csv: can't be read"):
        load_prompts(PromptSettings(dataset=str(tmp_path / "nowhere.csv")))
