import pytest

from fmm_distill.errors import first_line, named


@pytest.mark.parametrize(
    ("error", "line", "full"),
    [
        (ValueError("one\ntwo"), "one", "ValueError: one"),
        (RuntimeError(""), "RuntimeError", "RuntimeError"),
        (OSError(), "OSError", "OSError"),
        (KeyError("\n"), "'\\n'", "KeyError: '\\n'"),
        (ValueError(" \n \n"), "ValueError", "ValueError"),
    ],
)
def test_an_error_has_one_line_even_without_a_message(error, line, full):
    assert first_line(error) == line
    assert named(error) == full
