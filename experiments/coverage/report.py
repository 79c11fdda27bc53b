"""The page of the results, from the rows of a run alone."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from experiments.coverage.checks import LARGEST
from experiments.coverage.installed import parameters_of
from experiments.coverage.kinds import KINDS, kind_of
from experiments.coverage.outside import OUTSIDE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from experiments.coverage.rows import Row

__all__ = ["Entry", "entries_of", "markdown", "totals"]

RESULTS = ("distilled", "opened", "refused", "crashed", "not built", "not run")
CHECKS = {
    "step": "step",
    "order": "order",
    "start": "start",
    "start, embedded": "start of an embedded student",
    "image": "image",
    "task": "task",
}
_SHOWN = 260
# Inputs that an edited or animated sample starts from.
_IMAGES = ("image", "images", "video", "reference_conditions")


class Entry(dict[str, Any]):
    """A row of the page: key, kind, pipeline, result, reason, wrong and notes."""


def entries_of(rows: Iterable[Row]) -> list[Entry]:
    """Return the rows of the page in its order; tests of trained weights have none."""
    entries = [_entry(row) for row in rows if not row.get("build", {}).get("skipped")]
    return sorted(
        entries, key=lambda e: (KINDS.index(e["kind"]), RESULTS.index(e["result"]), e["pipeline"].lower(), e["key"])
    )


def _entry(row: Row) -> Entry:
    build, found = row.get("build", {}), row.get("open", {})
    pipeline = build.get("pipeline") or build["tested"]
    result, reason = _result(row)
    return Entry(
        key=row["key"],
        kind=kind_of(pipeline, build.get("parameters") or parameters_of(pipeline) or ("prompt",)),
        pipeline=pipeline,
        result=result,
        reason=_short(reason),
        wrong=[name for name, value in found.get("checks", {}).items() if not is_right(name, value)],
        checks=found.get("checks", {}),
        notes=_notes(row),
        prediction=found.get("prediction"),
        event_shape=found.get("event_shape"),
        guidable=found.get("guidable"),
        seconds=found.get("seconds"),
        mib=found.get("mib"),
    )


def _result(row: Row) -> tuple[str, str]:
    """Return the result of a row and its reason in one line."""
    build, found, distilled = (row.get(stage, {}) for stage in ("build", "open", "distill"))
    if "pipeline" not in build:
        return ("not built", build["error"]) if build else ("not run", "")
    if "not reopened" in found:
        return "not built", found["not reopened"]
    if "refused" in found:
        return "refused", found["refused"]
    if "event_shape" not in found:
        return ("crashed", found["error"]) if found else ("not run", "")
    if not distilled:
        return "opened", "not distilled yet"
    if "error" in distilled:
        return "opened", distilled["error"]
    return "distilled", ""


def is_right(name: str, value: float | str) -> bool:
    """Return whether the result of a check is a difference that rounding explains.

    No comparison at all is right for a scheduler without a step of first order, and for an embedded student of a
    network without a time embedding: the tool refuses it.
    """
    if name == "image":
        # Another image makes another velocity.
        return not isinstance(value, str) and value > LARGEST
    if isinstance(value, str):
        return value.startswith("no stock scheduler") or (name == "start, embedded" and value.startswith("UserError"))
    return value <= LARGEST


def _notes(row: Row) -> list[str]:
    build, found, distilled = (row.get(stage, {}) for stage in ("build", "open", "distill"))
    if "event_shape" not in found:
        return []
    notes, images = [], found.get("images", sorted(build.get("images", {})))
    if found.get("task"):
        notes.append(f"opened as {found['task']['base']}, with the task as {found['task']['method']}()")
    if images:
        notes.append(f"called with {', '.join(images)}")
    elif found.get("task"):
        pass
    elif any(name in build["parameters"] for name in _IMAGES):
        notes.append("opens as a pipeline from prompts alone: the student never sees a reference")
    if distilled.get("steps") == [2, 4]:
        notes.append("its stock pipeline does not run with one step")
    if distilled.get("student") == "embedded":
        notes.append("distilled as an embedded student: its stock grid has jumps of different lengths")
    return notes


def _short(text: str) -> str:
    # The folder of the tiny pipeline, which the tool's message starts with.
    text = re.sub(r"(?<![\w<])/\S*?(?=:? |:$|$)", "…", text).removeprefix("…: ")
    text = re.sub(r"^(error|UserError): ", "", text.removeprefix("Error: ")).removeprefix("…: ")
    # The keywords of the call, a long list and the advice are no reason.
    text = re.sub(r"does not run with .*? \((?=\w+: )", "does not run (", text)
    text = re.sub(r"; (try|write an adapter|expected a complete pipeline) .*", "", text)
    text = re.sub(r"(expected one of|it takes) (\w+), (?:\w+, ){5,}", r"\1 \2, …, ", text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1].rstrip() + "…"


def totals(entries: Sequence[Entry]) -> dict[str, Counter[str]]:
    """Return the number of results of each kind, and their sum under ``all``."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        for kind in (entry["kind"], "all"):
            counts[kind].update([entry["result"], "classes"])
            counts[kind]["wrong"] += bool(entry["wrong"])
    return {kind: counts[kind] for kind in (*KINDS, "all") if kind in counts}


def markdown(
    entries: Sequence[Entry],
    versions: Mapping[str, str],
    uncovered: Sequence[tuple[str, str]],
    earlier: Sequence[Entry] = (),
) -> str:
    """Return the page.

    Args:
        versions: the suite's commit and the installed packages.
        uncovered: installed pipeline classes that no test of the suite names, with their kinds.
        earlier: the rows before the changes that the page reports on.
    """
    lines = [_INTRODUCTION.format(**versions), "## Totals", "", *_totals(entries, earlier), ""]
    for kind in KINDS:
        rows = [entry for entry in entries if entry["kind"] == kind]
        if rows:
            lines += [f"## {kind[0].upper()}{kind[1:]}", "", *_table(rows), ""]
    lines += ["## Outside the line, with a reason", "", _OUTSIDE, "", "| family | why | what would have to exist |"]
    lines += ["|---|---|---|", *(f"| {' | '.join(map(_cell, row))} |" for row in OUTSIDE), ""]
    lines += ["## Installed classes that no test of the suite names", "", "| pipeline | kind |", "|---|---|"]
    lines += [f"| `{name}` | {kind} |" for name, kind in uncovered]
    return "\n".join([*lines, ""])


def _totals(entries: Sequence[Entry], earlier: Sequence[Entry]) -> list[str]:
    counts, before = totals(entries), totals(earlier)
    # Rows that have not run are those of an unfinished page.
    columns = ("classes", *(name for name in RESULTS if name != "not run" or counts["all"][name]), "wrong")
    titles = [*columns[:-1], "opened with a wrong check", *(["opened before, distilled before"] if before else [])]
    lines = [f"| kind | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for kind, count in counts.items():
        cells = [str(count[column]) for column in columns]
        if before:
            old = before.get(kind, Counter())
            cells.append(f"{old['opened'] + old['distilled']}, {old['distilled']}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def _table(entries: Sequence[Entry]) -> list[str]:
    lines = ["| pipeline | test | result | prediction, one sample | guidance | detail |", "|---|---|---|---|---|---|"]
    for entry in entries:
        opened, guidance = "", ""
        if entry["event_shape"]:
            opened = f"{entry['prediction']}, {' x '.join(map(str, entry['event_shape']))}"
            guidance = "yes" if entry["guidable"] is True else "no"
        cells = (f"`{entry['pipeline']}`", _test(entry), entry["result"], opened, guidance, _cell(_detail(entry)))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _test(entry: Entry) -> str:
    return entry["key"].rpartition("/")[2].partition("::")[0].removeprefix("test_").removesuffix(".py")


def _detail(entry: Entry) -> str:
    checks = entry["checks"]
    wrong = [
        f"wrong {CHECKS[name]}: {checks[name] if isinstance(checks[name], str) else format(checks[name], '.1e')}"
        for name in entry["wrong"]
    ]
    return "; ".join([*wrong, *([entry["reason"]] if entry["reason"] else []), *entry["notes"]])


def _cell(text: str) -> str:
    """Return a text as a cell of a table: no column of its own, no markup."""
    return _short(text).replace("|", "/").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


_INTRODUCTION = """# What opens

    python -m experiments.coverage --suite diffusers --work runs/coverage --output docs/coverage.md \\
      --rows docs/results/coverage.json --before docs/results/coverage-before.json

This page is written by the command; "before" are the rows of an earlier version. It takes every test class of
diffusers' own pipeline tests (commit `{commit}`), builds the tiny model that the
class describes, with random weights, and does what a user does: it opens the pipeline by its folder, trains a student
for two steps, exports an any-step pipeline and two pipelines of fixed steps, and opens these in a process without this
package. Installed: diffusers {diffusers}, transformers {transformers}, torch {torch}, fmm_distill {fmm_distill}.

A class is **distilled** if all of that passes, **opened** if the teacher opens and a later part fails, **refused** if
the tool prints one line with the reason, and **crashed** if it ends otherwise. "Not built" are tests whose components
need a download or a package that is not installed. The tiny tokenizers and encoders are local ones of the same classes.

A pipeline that its test calls with images (an image to edit, a first frame, a mask, a control image) is opened with
images: one per prompt, of the size of the test's own, with random pixels from a fixed seed. The order of prompts and
images is changed together. A pipeline whose image is optional is opened with it if its test gives one. Images are
encoded to the mode of their latents, in the stock pipeline too: it draws them otherwise.

A pipeline that refines a given image or video, or puts a part of it back between the steps, is opened as its base
class. It is distilled if all of the above passes for the base, and its own task is a method of the exported any-step
pipeline ([image to image](image-conditions.md#image-to-image-and-inpainting-without-a-network-for-it)). Images of its
test that the network of the base sees are given to the base.

Each teacher that opens is checked, up to a relative difference of 1e-4:

- **step**: one Euler step of the teacher's velocity is one step of the stock pipeline, at each of four steps, with its
  own scheduler if that is of first order, else with the stock one of the same noise levels.
- **order**: a sample has the same velocity for the same prompt in another order of the prompts and another batch.
- **start**: a new student equals its teacher.
- **image**: another image with the same prompt makes another velocity, for each image that the pipeline takes.
- **task**: of a pipeline that is opened as its base, the any-step pipeline's own task with a new student is the stock
  pipeline, with the same scheduler, at three of four steps.
- the export: verified as in [Training](training.md#what-is-compared).

A random model of a few thousand weights shows whether a pipeline is called rightly. It does not show how good a student
becomes.
"""
_OUTSIDE = (
    "These families are no single velocity field on samples of one shape, which is what a flow map is learned from."
)
