"""Files that the program wrote and something else broke."""

from __future__ import annotations

import pytest

from fmm_distill.errors import UserError
from fmm_distill.io.reading import read_lines, read_list, read_mapping

TODO = "run the command again"


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.json", b"", "is empty"),
        ("a.json", b" \n", "is empty"),
        ("a.json", b'{"step": 3, "name"', "is truncated"),
        ("a.json", b"step: 3", "is not JSON"),
        ("a.json", b"[1, 2]", "expected a mapping, got a list"),
        ("a.json", b"null", "expected a mapping, got null"),
        ("a.json", b'{"name": "x"}', "step is missing"),
        ("a.json", b'{"step": "3", "name": null}', "step: expected an integer, got text"),
        ("a.json", b'{"step": true, "name": null}', "step: expected an integer, got true or false"),
        ("a.json", b'{"step": 3, "name": []}', "name: expected text or null, got a list"),
        ("a.json", b"\xff\xfe{\x00", "is not UTF-8"),
        ("a.json", b"[" * 100_000, "is "),
        ("a.yaml", b"", "is empty"),
        ("a.yaml", b"a: [1", "is not YAML"),
        ("a.yaml", b"a: 2024-99-99", "is not YAML"),
        ("a.yaml", b"one line of text", "expected a mapping, got text"),
        ("a.yaml", b"# a comment", "expected a mapping, got null"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, name, content, fault):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_mapping(path, {"step": int, "name": str | None}, todo=TODO)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert fault in text
    assert text.endswith(TODO)
    assert "\n" not in text


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    for path, fault in ((tmp_path / "none.json", "is missing"), (tmp_path, "can't be read")):
        with pytest.raises(UserError, match=fault):
            read_mapping(path, todo=TODO)


def test_what_was_written_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"step": 3, "name": null, "rate": 1}', encoding="utf-8")
    found = read_mapping(tmp_path / "a.json", {"step": int, "name": str | None, "rate": float}, todo=TODO)
    assert found == {"step": 3, "name": None, "rate": 1}
    (tmp_path / "b.json").write_text('["a", "b"]', encoding="utf-8")
    assert read_list(tmp_path / "b.json", str, todo=TODO) == ["a", "b"]
    with pytest.raises(UserError, match="item 0: expected an integer, got text"):
        read_list(tmp_path / "b.json", int, todo=TODO)


def test_a_log_is_read_without_its_unfinished_line(tmp_path):
    log = tmp_path / "steps.jsonl"
    assert read_lines(log, {"step": int}, todo=TODO) == []
    log.write_text('{"step": 0}\n{"step": 1}\n{"st', encoding="utf-8")
    assert [line["step"] for line in read_lines(log, {"step": int}, todo=TODO)] == [0, 1]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("7", "line 2: expected a mapping, got an integer"),
        ("{}", "line 2: step is missing"),
        ("", "line 2: not JSON"),
        ("{", "line 2: not JSON"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, fault):
    log = tmp_path / "steps.jsonl"
    log.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=fault):
        read_lines(log, {"step": int}, todo=TODO)
