"""A checkpoint is whole or absent."""

from __future__ import annotations

import json

import pytest
import torch

from fmm_distill import checkpoint
from fmm_distill.checkpoint import Checkpoint, DamagedCheckpointError
from fmm_distill.errors import UserError


def at(step: int) -> Checkpoint:
    tensors = {
        "student": {"a.weight": torch.arange(6.0).reshape(2, 3).T * step},
        "optimizer": {"0.step": torch.tensor(step)},
    }
    return Checkpoint(step, tensors, {"scaler": None, "number": 0.1})


def test_round_trip(tmp_path):
    saved = checkpoint.save(tmp_path, at(7), keep=2)
    assert saved.name == "step-00000007"
    loaded = checkpoint.load(saved)
    assert loaded.step == 7
    assert loaded.state == {"scaler": None, "number": 0.1}
    assert loaded.tensors["student"]["a.weight"].equal(at(7).tensors["student"]["a.weight"])
    assert loaded.tensors["optimizer"]["0.step"].dtype == torch.int64
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}


def test_the_newest_stay(tmp_path):
    assert checkpoint.newest(tmp_path / "none") is None
    for step in (3, 12, 7, 99_999_999):
        checkpoint.save(tmp_path, at(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000012", "step-99999999"]
    assert checkpoint.newest(tmp_path).name == "step-99999999"


def test_a_save_over_the_same_step_replaces_it(tmp_path):
    checkpoint.save(tmp_path, at(3), keep=2)
    other = at(3)
    other.tensors["student"]["a.weight"] += 1
    checkpoint.save(tmp_path, other, keep=2)
    loaded = checkpoint.load(checkpoint.newest(tmp_path))
    assert loaded.tensors["student"]["a.weight"].equal(other.tensors["student"]["a.weight"])


def test_what_a_killed_save_left_is_no_checkpoint_and_goes_away(tmp_path):
    saved = checkpoint.save(tmp_path, at(3), keep=2)
    (tmp_path / ".step-00000006.partial").mkdir()
    (tmp_path / ".step-00000006.partial" / "student.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) == saved
    checkpoint.save(tmp_path, at(9), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000009"]


def test_a_save_that_fails_leaves_the_older_ones(tmp_path, monkeypatch):
    saved = checkpoint.save(tmp_path, at(3), keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match=r"step-00000006 could not be written \(\[Errno 28\] No space left on device\)"):
        checkpoint.save(tmp_path, at(6), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    assert checkpoint.load(saved).step == 3


DAMAGES = [
    (name, damage)
    for name in ("student.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
    for damage in ("missing", "truncated", "flipped")
    # The manifest has no digest of its own.
    if (name, damage) != ("manifest.json", "flipped")
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_damage_is_named(tmp_path, name, damage):
    saved = checkpoint.save(tmp_path, at(3), keep=1)
    content = bytearray((saved / name).read_bytes())
    if damage == "missing":
        (saved / name).unlink()
    elif damage == "truncated":
        (saved / name).write_bytes(content[:-1])
    else:
        content[-1] ^= 1
        (saved / name).write_bytes(content)
    unreadable = name == "manifest.json" or damage == "missing"
    with pytest.raises(DamagedCheckpointError) as caught:
        checkpoint.load(saved)
    what = "is missing" if unreadable else "is truncated or changed"
    assert str(caught.value).startswith(f"checkpoint {saved}: {name} {what}")


def test_the_manifest_covers_every_other_file(tmp_path):
    saved = checkpoint.save(tmp_path, at(3), keep=1)
    manifest = json.loads((saved / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["sha256"]) == {path.name for path in saved.iterdir()} - {"manifest.json"}


def test_write_text_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    file = tmp_path / "log"
    checkpoint.write_text(file, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(UserError, match="log could not be written"):
        checkpoint.write_text(file, "new")
    assert file.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
