"""A checkpoint is whole or absent."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError

from fmm_distill.errors import UserError
from fmm_distill.io.files import write_text, writing
from fmm_distill.training import checkpoint
from fmm_distill.training.checkpoint import Checkpoint, DamagedCheckpointError
from tests.logs import logged


def at(step: int) -> Checkpoint:
    tensors = {
        "student": {"a.weight": torch.arange(6.0).reshape(2, 3).T * step},
        "optimizer": {"0.step": torch.tensor(step)},
    }
    return Checkpoint(step, tensors, {"scaler": None, "non_finite_steps": {"skipped": 0, "lr_scale": 0.5}})


def test_round_trip(tmp_path):
    saved = checkpoint.save(tmp_path, at(7), keep=2)
    assert saved.name == "step-00000007"
    loaded = checkpoint.load(saved)
    assert loaded.step == 7
    assert loaded.state == {"scaler": None, "non_finite_steps": {"skipped": 0, "lr_scale": 0.5}}
    assert loaded.tensors["student"]["a.weight"].equal(at(7).tensors["student"]["a.weight"])
    assert loaded.tensors["optimizer"]["0.step"].dtype == torch.int64
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}


def test_the_newest_stay(tmp_path):
    assert checkpoint.newest(tmp_path / "none") is None
    for step in (3, 12, 7, 99_999_999):
        checkpoint.save(tmp_path, at(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000012", "step-99999999"]
    assert checkpoint.newest(tmp_path).name == "step-99999999"


@pytest.mark.parametrize("step", [100_000_000, 1_234_567_890])
def test_steps_are_numbers_not_text(tmp_path, step):
    for number in (99_999_998, 99_999_999, step):
        checkpoint.save(tmp_path, at(number), keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-99999999", f"step-{step}"}
    assert checkpoint.newest(tmp_path).name == f"step-{step}"
    path, found = checkpoint.newest_complete(tmp_path)
    assert (path.name, found.step) == (f"step-{step}", step)
    assert checkpoint.newest_state(tmp_path).step == step


@pytest.mark.parametrize(
    "name", ["step-abc", "step-00000005-copy", "step-00000099 (1)", "step-99", "step-", "step-0000000²"]
)
def test_other_names_are_no_checkpoints_and_stay(tmp_path, name):
    saved = checkpoint.save(tmp_path, at(5), keep=1)
    shutil.copytree(saved, tmp_path / name)
    (tmp_path / "step-00000077").touch()
    assert checkpoint.newest(tmp_path) == saved
    assert checkpoint.newest_complete(tmp_path)[0] == saved
    assert checkpoint.newest_state(tmp_path).path == saved
    checkpoint.save(tmp_path, at(6), keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {name, "step-00000006", "step-00000077"}


@pytest.mark.parametrize(
    "then",
    [
        lambda folder: checkpoint.save(folder, at(9), keep=1),
        lambda folder: checkpoint.save(folder, at(6), keep=1),
        lambda folder: [checkpoint.save(folder, at(step), keep=1) for step in (7, 8)],
    ],
    ids=["a newer one", "the same again", "two"],
)
@pytest.mark.parametrize("reads", ["newest_complete", "newest_state"])
def test_a_checkpoint_that_goes_away_while_it_is_read_is_not_damaged(tmp_path, monkeypatch, then, reads):
    """The first files are read, then the run writes, then the others are."""
    checkpoint.save(tmp_path, at(3), keep=2)
    checkpoint.save(tmp_path, at(6), keep=2)
    manifest, lines, busy = checkpoint._manifest, [], []

    def slow(path):
        found = manifest(path)
        if not busy:
            busy.append(path)
            then(tmp_path)
        return found

    monkeypatch.setattr(checkpoint, "_manifest", slow)
    if reads == "newest_state":
        assert checkpoint.newest_state(tmp_path).path == checkpoint.newest(tmp_path)
        return
    with logged(lines):
        path, found = checkpoint.newest_complete(tmp_path)
    assert (path, found.step) == (checkpoint.newest(tmp_path), checkpoint.step_of(path))
    assert lines == []


def test_a_reader_that_is_always_too_late_is_not_told_to_start_again(tmp_path, monkeypatch):
    steps = itertools.count(6)

    def slow(path):
        checkpoint.save(tmp_path, at(next(steps)), keep=1)
        raise DamagedCheckpointError(f"{path} is gone")

    checkpoint.save(tmp_path, at(5), keep=1)
    monkeypatch.setattr(checkpoint, "load", slow)
    monkeypatch.setattr(checkpoint, "_PAUSE", 0)
    with pytest.raises(UserError) as caught:
        checkpoint.newest_complete(tmp_path)
    assert "fresh" not in str(caught.value)
    assert "run the same command again" in str(caught.value)


@pytest.mark.parametrize("call", range(8))
def test_a_kill_between_two_moves_of_a_swap_loses_nothing(tmp_path, monkeypatch, call):
    checkpoint.save(tmp_path, at(3), keep=1)
    calls = itertools.count()

    class KilledError(BaseException):
        pass

    def deadly(function):
        def wrapped(*arguments, **keywords):
            if next(calls) == call:
                raise KilledError
            return function(*arguments, **keywords)

        return wrapped

    with monkeypatch.context() as patched:
        for name in ("rename", "rmdir", "unlink"):
            patched.setattr(os, name, deadly(getattr(os, name)))
        with contextlib.suppress(KilledError):
            checkpoint.save(tmp_path, at(3), keep=1)
    with logged([], pytest.fail):
        path, found = checkpoint.newest_complete(tmp_path)
    assert found.step == 3
    assert checkpoint.step_of(path) == 3
    checkpoint.save(tmp_path, at(3), keep=1)
    checkpoint.save(tmp_path, at(6), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "{}", '{"step": 3}', '{"sha256": [], "step": 3}'])
def test_foreign_content_is_damage(tmp_path, name, text):
    saved = checkpoint.save(tmp_path, at(3), keep=1)
    (saved / name).write_text(text, encoding="utf-8")
    with pytest.raises(DamagedCheckpointError):
        checkpoint.load(saved)
    assert checkpoint.newest_state(tmp_path) is None


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "make room"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "make room"),
        (OSError(errno.EFBIG, "File too large"), "make room"),
        (PermissionError(errno.EACCES, "Permission denied"), "get the right to write there"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "get the right to write there"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "make it, or correct the path"),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), "choose the name of a file"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "the path is taken by"),
        (OSError(errno.EIO, "Input/output error"), "check the disk"),
        (OSError(errno.ESTALE, "Stale file handle"), "check the disk"),
    ],
)
def test_each_error_of_a_disk_has_its_advice(tmp_path, error, advice):
    with pytest.raises(UserError) as caught, writing(tmp_path / "a"):
        raise error
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'a'} could not be written ({getattr(error, 'strerror', None) or error}")
    assert advice in text
    assert ("make room" in text) == (advice == "make room")


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
    with pytest.raises(UserError, match=r"step-00000006 could not be written \(No space left on device\)"):
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
    write_text(file, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(UserError, match="log could not be written"):
        write_text(file, "new")
    assert file.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
