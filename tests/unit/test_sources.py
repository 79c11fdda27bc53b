"""What is no source of data is refused in one line, at once, and nothing else is written."""

from __future__ import annotations

import io
import tarfile
import time
import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image

from fmm_distill.config.settings import DataSettings, PromptSettings
from fmm_distill.data.prompts import load_prompts
from fmm_distill.data.tables import open_table
from fmm_distill.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what users take for data."""
    root = tmp_path_factory.mktemp("sources")
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(file, "PNG")
    (root / "photos").mkdir()
    (root / "photos" / "0.png").write_bytes(file.getvalue())
    (root / "one.PNG").write_bytes(file.getvalue())
    with zipfile.ZipFile(root / "a.zip", "w") as archive:
        archive.writestr("0.png", file.getvalue())
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz")):
        with tarfile.open(root / name, mode) as archive:
            archive.add(root / "one.PNG", "0.png")
    (root / "tars").mkdir()
    (root / "tars" / "0.tar").write_bytes((root / "a.tar").read_bytes())
    np.savez(root / "a.npz", images=np.zeros((2, 4, 4)))
    np.save(root / "a.npy", np.zeros((2, 4, 4)))
    (root / "a.csv").write_text("image,label\n0.png,1\n")
    (root / "a.mp4").write_bytes(b"x")
    (root / "plain").write_bytes(b"x")
    (root / "no.parquet").write_bytes(b"PK")
    datasets.Dataset.from_dict({"label": [1] * 100}).to_parquet(str(root / "labels.parquet"))
    (root / "half.parquet").write_bytes((root / "labels.parquet").read_bytes()[:-60])
    (root / "mixed").mkdir()
    for name, column in (("a", "x"), ("b", "y")):
        datasets.Dataset.from_dict({column: [1]}).to_parquet(str(root / "mixed" / f"{name}.parquet"))
    (root / "empty").mkdir()
    (root / "broken.arrow").write_bytes(b"x")
    (root / "saved").mkdir()
    (root / "saved" / "state.json").write_text("{}")
    return root


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    def refuse(_):
        raise AssertionError("it waits to ask again")

    monkeypatch.setattr(time, "sleep", refuse)


LINES = {
    "a.zip": r"it is an archive \(\.zip\); unpack it and give the folder",
    "a.tar": r"it is an archive \(\.tar\); unpack it",
    "a.tar.gz": r"it is an archive \(\.gz\); unpack it",
    "tars": r"no images in this folder, which has 1 \.tar: unpack it first; expected none, teacher",
    "a.npz": r"it is a file of arrays \(\.npz\); save the images as PNG files in a folder",
    "a.npy": r"it is a file of arrays \(\.npy\)",
    "a.csv": "it has image, label; expected a column file_name",
    "a.mp4": r"it is a file of another kind \(\.mp4\); expected none, teacher, a Hub dataset, a folder",
    "plain": r"it is a file of another kind \(without an extension\)",
    "one.PNG": "it is one image; give its folder",
    "no.parquet": "no.parquet is no parquet file",
    "half.parquet": "its parquet can't be read; expected complete files",
    "labels.parquet": "no image column among label",
    "mixed": "its parquet can't be read .*; expected files with the same columns",
    "empty": "no images in this folder, which has no files; expected none, teacher",
    "broken.arrow": "it can't be read .*; expected what save_to_disk wrote",
    "saved": "it can't be read .*; expected what save_to_disk wrote",
    "no": "no such file or folder; for no data give none",
    "False": "no such file or folder; for no data give none",
    "nome": r"no such file or folder, did you mean none\?",
    "Teacher": r"no such file or folder, did you mean teacher\?",
    "./photo": r"no such file or folder, did you mean photos\?",
    "photos/x/y": "no such file or folder; expected none, teacher",
    "b.zip": r"no such file or folder, did you mean a\.zip\?",
    "mnist": "no such file or folder, and on the Hub: the cache is incomplete, and HF_HUB_OFFLINE=1",
    "owner/photos": "no such file or folder, and on the Hub: the cache is incomplete",
    "csv": "it is the name of a format, not of a dataset; expected none, teacher",
    "imagefolder": "it is the name of a format",
    "a b": "no such file or folder, and no name on the Hub",
}


@pytest.mark.parametrize("source", LINES)
def test_what_is_no_source_of_images(place, monkeypatch, capfd, source):
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=f"--data {source}: {LINES[source]}") as caught:
        open_table(DataSettings(source=source))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("nowhere.csv", "no such file or folder; expected a Hub dataset, or"),
        ("b.CSV", r"no such file or folder"),
        ("./c.jsonl", "no such file or folder"),
        ("owner/captions", "no such file or folder, and on the Hub: the cache is incomplete"),
        ("half.parquet", "its parquet can't be read"),
        ("one.PNG", "it is one image"),
    ],
)
def test_what_is_no_source_of_prompts(place, monkeypatch, capfd, source, wanted):
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=f"prompts.dataset {source}: {wanted}") as caught:
        load_prompts(PromptSettings(dataset=source))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_configuration_is_of_a_hub_dataset(place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=r"data\.config en: photos is on this disk; expected null"):
        open_table(DataSettings(source="photos", config="en"))
