"""Strict YAML: one document, each key once, and no value that YAML 1.1 reads as another than it seems."""

from __future__ import annotations

import re
from typing import Any

import yaml

from fmm_distill.errors import UserError

__all__ = ["read", "read_file_text"]

# A few lines of nested aliases can unfold to more values than fit into memory.
LARGEST = 10_000


def read_file_text(data: bytes, where: str) -> str:
    """Decode the text of a file from UTF-8.

    Raises:
        UserError: on another encoding.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        kind = "UTF-16" if utf16 else f"byte {error.start} is no UTF-8"
        raise UserError(f"{where}: expected text in UTF-8, got {kind}; save it as UTF-8") from error


def read(text: str, where: str) -> Any:  # noqa: ANN401 what YAML holds
    """Parse a YAML text to plain values; None if it is empty.

    Args:
        where: origin of the text, for messages.

    Raises:
        UserError: on invalid YAML, on a duplicate key, with both lines, and on a key that is not text.
    """
    try:
        nodes = list(yaml.compose_all(text, yaml.SafeLoader))
        if len(nodes) > 1:
            line = nodes[1].start_mark.line + 1
            raise UserError(
                f"{where}: expected one document, got {len(nodes)} (--- before line {line}); remove the others"
            )
        if not nodes or nodes[0] is None:
            return None
        _check(nodes[0], where, [], [0])
        loader = yaml.SafeLoader("")
        try:
            return loader.construct_document(nodes[0])
        finally:
            loader.dispose()
    except RecursionError as error:
        raise UserError(f"{where}: not YAML of settings (it is nested too deeply)") from error
    except (yaml.YAMLError, ValueError) as error:
        # A date without such a day, or a number of thousands of digits, is a ValueError.
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise UserError(f"{where}: not YAML ({reason})") from error


def _check(node: yaml.Node, where: str, above: list[tuple[yaml.Node, str]], count: list[int]) -> None:
    """Check a node for duplicate keys, keys that are not text, ambiguous numbers and too many values.

    Args:
        above: the nodes around this one, with their keys.
        count: number of values so far, aliases unfolded.
    """
    count[0] += 1
    if count[0] > LARGEST:
        raise UserError(f"{where}: its aliases (*name) unfold to more than {LARGEST:,} values; write fewer")
    line = node.start_mark.line + 1
    if any(node is other for other, _ in above):
        raise UserError(
            f"{where}: line {line}: expected a value, got an alias (*name) of a group around it; write the value out"
        )
    if isinstance(node, yaml.ScalarNode):
        _check_number(node, where, line)
        return
    if isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _check(value, where, [*above, (node, str(i))], count)
        return
    keys: dict[str, int] = {}
    for key, value in node.value:
        at = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            _check(value, where, [*above, (node, "<<")], count)
            continue
        if key.tag != "tag:yaml.org,2002:str":
            shown = f"{key.value!r}" if isinstance(key, yaml.ScalarNode) else "a list or a group"
            raise UserError(f"{where}: line {at}: a key that YAML does not read as text ({shown}); put it in quotes")
        if key.value in keys:
            path = ".".join([*(name for _, name in above), key.value])
            raise UserError(
                f"{where}: {path} is there twice (lines {keys[key.value]} and {at}), and only one would act: remove one"
            )
        keys[key.value] = at
        _check(value, where, [*above, (node, key.value)], count)


def _check_number(node: yaml.ScalarNode, where: str, line: int) -> None:
    """Refuse ambiguous numbers: YAML 1.1 reads 010 as eight and 1:30 as ninety."""
    if node.tag != "tag:yaml.org,2002:int" and node.tag != "tag:yaml.org,2002:float":
        return
    if re.fullmatch(r"[-+]?0[0-7_]+", node.value) or ":" in node.value:
        raise UserError(
            f"{where}: line {line}: {node.value} is another number in YAML than it seems (octal, or in base 60); write "
            "decimal digits, or quotes around it"
        )
