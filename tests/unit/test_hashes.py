"""Digests, cache folders and atomic files."""

from __future__ import annotations

import contextlib
import hashlib
import json

import pytest
import torch

from fmm_distill.io.cache import cache_key, cache_path
from fmm_distill.io.files import atomic_file, atomic_folder
from fmm_distill.io.hashes import sha256_of_file, sha256_of_json, sha256_of_tensors, sha256_of_text


def test_digests_are_plain_sha256(tmp_path):
    expected = hashlib.sha256("é".encode()).hexdigest()
    (tmp_path / "file").write_text("é", encoding="utf-8")
    assert sha256_of_text("é") == sha256_of_file(tmp_path / "file") == expected
    assert sha256_of_json({"b": 1, "a": [None]}) == hashlib.sha256(b'{"b": 1, "a": [null]}').hexdigest()


def test_a_digest_of_tensors_depends_on_names_types_shapes_and_values_but_not_on_order():
    weights = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(2, dtype=torch.bfloat16)}
    digest = sha256_of_tensors(weights)
    assert digest == sha256_of_tensors(dict(reversed(weights.items())))
    # A parameter, and a view that is not contiguous, count as their values do.
    same = {"a": torch.nn.Parameter(weights["a"]), "b": weights["b"].t().contiguous().t()}
    assert sha256_of_tensors(same) == digest
    others = [
        sha256_of_tensors(weights, "prefix"),
        sha256_of_tensors(weights | {"b": weights["b"].flatten()}),
        sha256_of_tensors(weights | {"b": weights["b"].int()}),
        sha256_of_tensors(weights | {"a": weights["a"] + 1}),
        sha256_of_tensors({"b": weights["b"], "c": weights["a"]}),
    ]
    assert len({digest, *others}) == 1 + len(others)


def test_the_cache_is_next_to_the_hubs(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert cache_path("kind", "name") == tmp_path / "fmm_distill" / "kind" / "name"
    assert not list(tmp_path.iterdir())
    assert cache_key([1, "a"]) == hashlib.sha256(json.dumps([1, "a"]).encode()).hexdigest()[:32]


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path, shared):
    path = tmp_path / "file"
    path.write_text("old")
    with contextlib.suppress(ZeroDivisionError), atomic_file(path, shared=shared) as partial:
        partial.write_text("half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]
    with atomic_file(path, shared=shared) as partial:
        partial.write_text("new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "new")]


def test_the_first_folder_of_a_name_stays(tmp_path):
    path = tmp_path / "below" / "folder"
    with contextlib.suppress(ZeroDivisionError), atomic_folder(path) as partial:
        (partial / "file").write_text("half")
        raise ZeroDivisionError
    assert not list(path.parent.iterdir())
    with atomic_folder(path) as outer:
        (outer / "file").write_text("second")
        with atomic_folder(path) as first:
            # The same process has one name for both, so the outer one is made again.
            (first / "file").write_text("first")
        outer.mkdir()
        (outer / "file").write_text("second")
    assert (path / "file").read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
