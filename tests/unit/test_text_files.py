"""Prompts and tables of any editor: byte order marks, line ends, and separators that are part of a text."""

from __future__ import annotations

import datasets
import pytest

from fmm_distill.config.settings import PromptSettings
from fmm_distill.data.prompts import load_prompts
from fmm_distill.data.records import read_records
from fmm_distill.errors import UserError


def prompts(file, content, **settings):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    key = "file" if file.suffix == ".txt" else "dataset"
    return load_prompts(PromptSettings(**{key: str(file)}, **settings)).texts


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "inside", ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c", "\x1d", "\x1e", "\u00a0", "\u200d"]
)
def test_only_line_ends_end_a_prompt(tmp_path, mark, end, inside):
    text = end.join([f"{mark}a{inside}cat", "two dogs", "caf\u00e9", ""])
    assert prompts(tmp_path / "p.txt", text) == (f"a{inside}cat", "two dogs", "caf\u00e9")


@pytest.mark.parametrize(
    "blank", ["", "  ", "\t", "\u00a0", "\u200b", "\ufeff", "\u2060\u3000", "\u00ad", "\x0c", "\u2028"]
)
def test_lines_of_what_can_not_be_seen_are_no_prompts(tmp_path, blank):
    assert prompts(tmp_path / "p.txt", f"a\n{blank}\nb\n{blank}") == ("a", "b")
    assert prompts(tmp_path / "p.txt", f"{blank}a b{blank}\n") in (("a b",), (f"{blank}a b{blank}",))
    with pytest.raises(UserError, match="no line in it; expected one prompt per line"):
        prompts(tmp_path / "p.txt", f"{blank}\n\n{blank}")


def test_ends_are_trimmed(tmp_path):
    assert prompts(tmp_path / "p.txt", "\ufeff  a cat\u00a0\n\t\u200bb\u2028\r\n\U0001f469\u200d\U0001f680 \n") == (
        "a cat",
        "b",
        "\U0001f469\u200d\U0001f680",
    )


UNREADABLE = [
    ("a cat\nb".encode("utf-16"), "it is UTF-16 text; expected UTF-8"),
    ("\ufeffa".encode("utf-16-be"), "it is UTF-16 text"),
    ("a".encode("utf-32"), "it is UTF-32 text"),
    ("a\nb".encode("utf-16-le"), "line 1 has a NUL byte"),
    (b"a\nb\nc\0d\n", "line 3 has a NUL byte"),
    ("a\ncaf\u00e9".encode("latin-1"), "line 2 has the byte 0xe9, which is not UTF-8"),
]


@pytest.mark.parametrize(("content", "wanted"), UNREADABLE)
@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_what_is_no_utf_8_is_refused_with_its_line(tmp_path, content, wanted, name):
    with pytest.raises(UserError, match=wanted) as caught:
        prompts(tmp_path / name, content)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.csv", 'text,n\n"a, b",1\nNA,2\nx\u2028y,3\n,4\n01,5\n'),
        ("C.CSV", 'n,text\r\n1,"a, b"\r\n2,NA\r\n3,x\u2028y\r\n4,\r\n5,01\r\n'),
        ("c.tsv", "text\tn\na, b\t1\nNA\t2\nx\u2028y\t3\n\t4\n01\t5\n"),
        ("c.jsonl", '{"text": "a, b"}\n\n{"text": "NA"}\r\n{"text": "x\u2028y"}\n{"n": 4}\n{"text": "01"}\n'),
        ("c.ndjson", '{"n": 4}\n{"text": "a, b"}\n{"text": "NA"}\n{"text": "x\u2028y"}\n{"text": "01"}'),
        ("c.json", '[{"text": "a, b"}, {"text": "NA"}, {"text": "x\u2028y"}, {"n": 4}, {"text": "01"}]'),
        ("C.JSON", '{"text": "a, b"}\n{"text": "NA"}\n{"text": "x\u2028y"}\n{"text": "01"}\n'),
    ],
)
def test_a_column_of_every_kind_of_file_is_its_text(tmp_path, mark, name, content):
    assert prompts(tmp_path / name, mark + content) == ("a, b", "NA", "x\u2028y", "01")


def test_a_quoted_field_has_lines(tmp_path):
    (tmp_path / "c.csv").write_bytes(b'text,n\r\n"a\r\nb",1\r\n')
    assert read_records(tmp_path / "c.csv", "here") == {"text": ["a\nb"], "n": ["1"]}


def test_saved_datasets_hold_prompts(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a", "", None, "b\u2028c"]})
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(str(tmp_path / "p.PARQUET"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    for source in (tmp_path / "saved", file, tmp_path / "p.PARQUET"):
        assert load_prompts(PromptSettings(dataset=str(source))).texts == ("a", "b\u2028c")


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("c.csv", "caption\na\n", "column text: .* has caption; expected one of them"),
        ("c.csv", "text,text\na,b\n", "expected the columns' names, each once"),
        ("c.csv", "text\na, b\n", "line 2 has 2 fields and the first line 1; .* put quotes around"),
        ("c.csv", 'text\n"a\n', "line 2 can't be read"),
        ("c.csv", "", "expected the columns' names"),
        ("c.csv", "text\n\n", "no prompt in its column text"),
        ("c.jsonl", "a cat\n", "line 1 is not JSON .*; expected one object per line"),
        ("c.jsonl", '{"text": "a"}\n["b"]\n', "line 2 is list; expected an object"),
        ("c.json", '["a", "b"]', "entry 1 is str; expected an object"),
        ("c.json", '{"text": ["a", "b"]}', "column text: .* has list in it; expected text"),
        ("c.zip", "PK", r"it is an archive \(.zip\); unpack it"),
        ("c.md", "a", r"a file of another kind \(.md\); expected a Hub dataset, or a parquet, CSV"),
        ("c.parquet", "a", "c.parquet is no parquet file"),
    ],
)
def test_files_without_prompts(tmp_path, capfd, name, content, wanted):
    with pytest.raises(UserError, match=f"prompts.*{wanted}") as caught:
        prompts(tmp_path / name, content)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_lines_of_a_text_file_are_no_dataset(tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"it is a text file; for one prompt per line set prompts\.file to it"):
        load_prompts(PromptSettings(dataset=str(tmp_path / "p.txt")))
    with pytest.raises(UserError, match=r"no parquet file in this folder"):
        load_prompts(PromptSettings(dataset=str(tmp_path)))
