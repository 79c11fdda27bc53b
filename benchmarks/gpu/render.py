"""Tables of the JSON files of all stages, and the list of stages with the state of their results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.gpu.machine import sources
from benchmarks.gpu.record import read
from benchmarks.gpu.stage import STAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = ["listing", "render"]

GIB = 2**30
# The published values at 1, 2, 4, 8 and 16 steps (arXiv 2505.18825).
PUBLISHED = (0.086, 0.077, 0.071, 0.070, 0.071)


def listing(results: Path) -> str:
    """Return the list of stages: results with their commits, and whether the code has changed since."""
    lines = []
    for stage in STAGES.values():
        lines += [
            f"{stage.name:13}{stage.title}",
            f"{'':13}{_state(results / f'gpu-{stage.name}.json', stage.sources)}",
        ]
    return "\n".join(lines)


def _state(path: Path, patterns: Iterable[str]) -> str:
    found = read(path)
    if not found:
        return f"no result ({path.name})"
    about, now = found["about"], sources(patterns)
    changed = sorted(
        name for name in now.keys() | about["sources"].keys() if now.get(name) != about["sources"].get(name)
    )
    rows = [row["status"] for row in found["rows"].values()]
    says = f"commit {(about['commit'] or 'unknown')[:12]}, {about['device']}, {about['date']}, "
    says += f"{rows.count('measured')} of {len(rows)} rows measured"
    if about["tiny"]:
        says += ", tiny: no figures"
    if not changed:
        return f"{says}: current"
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"{says}: not current, changed since: {', '.join(changed[:3])}{more}"


def render(paths: Sequence[Path]) -> str:
    """Return the tables of these files as Markdown."""
    texts = []
    for path in paths:
        found = read(path)
        if not path.name.endswith(".previous.json"):
            texts.append("\n".join([*_head(found), "", *TABLES[found["about"]["stage"]](found), "", *_rest(found)]))
    return "\n\n".join(text.strip() for text in texts)


def _head(found: Mapping[str, Any]) -> list[str]:
    about = found["about"]
    changed = f" with changes in {', '.join(about['changed'])}" if about["changed"] else ""
    lines = [
        f"### {about['stage']}",
        "",
        f"{about['device']}, {about['cores']} cores, torch {about['torch']}, diffusers {about['diffusers']}, Python "
        f"{about['python']}, {about['date']}, commit {(about['commit'] or 'unknown')[:12]}{changed}.",
        f"Goal: {about['goal']}.",
    ]
    return [*lines, "**Tiny networks: these are no figures.**"] if about["tiny"] else lines


def _rest(found: Mapping[str, Any]) -> list[str]:
    """Return the rows without a measurement by their reasons."""
    reasons: dict[str, list[str]] = {}
    for name, row in found["rows"].items():
        if row["status"] != "measured":
            reason = row.get("reason", "").split(":")[0] if row["status"] == "skipped" else row.get("reason", "")
            reasons.setdefault(f"{row['status']} ({reason})", []).append(name)
    return [f"- {reason}, {len(names)}: {'; '.join(names)}" for reason, names in reasons.items()]


def measured(found: Mapping[str, Any], **about: object) -> dict[str, dict[str, Any]]:
    """Return the measured rows with these values."""
    return {
        name: row
        for name, row in found["rows"].items()
        if row["status"] == "measured" and all(row.get(key) == value for key, value in about.items())
    }


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """Return a Markdown table whose first ``words`` columns are text; nothing without rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if not lines:
        return []
    rule = "|" + "---|" * words + "---:|" * (len(columns) - words)
    return ["| " + " | ".join(columns) + " |", rule, *lines, ""]


def _shown(ratio: Mapping[str, float] | None) -> str:
    return "" if ratio is None else "{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio)


def _steps(found: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    settings = dict.fromkeys(row["setting"] for row in measured(found).values() if "setting" in row)
    for setting in settings:
        rows = measured(found, setting=setting)
        peers = list(dict.fromkeys(name for row in rows.values() for name in row["by_peer"]))
        columns = ["loss", "derivative", "ms", "by its floor", "by flow matching", "memory by flow matching"]
        cells = [
            [
                *(row["loss"], row["derivative"], f"{row['milliseconds']['step']['median']:.1f}"),
                *(_shown(row["by_floor"]), _shown(row["by_flow_matching"]), f"{row['memory_by_flow_matching']:.2f}"),
                *(
                    f"{_shown(row['by_peer'][name])}, memory {row['memory_by_peer'][name]:.2f}"
                    if name in row["by_peer"]
                    else ""
                    for name in peers
                ),
            ]
            for row in rows.values()
        ]
        lines += [f"{setting}:", "", *table([*columns, *(f"by {name}" for name in peers)], cells, words=2)]
    above = [name for name, row in measured(found).items() if row["by_floor"] and row["by_floor"]["median"] > 1.10]
    slower = [
        f"{name} by {peer}"
        for name, row in measured(found).items()
        for peer, ratio in row["by_peer"].items()
        if ratio["median"] > 0.85
    ]
    count = len(measured(found))
    lines += [f"Above 1.10 of the floor: {len(above)} of {count} rows. {'; '.join(above)}"] if count else []
    return lines + ([f"Above 0.85 of a FastGen step: {'; '.join(slower)}"] if slower else [])


def _large(found: Mapping[str, Any]) -> list[str]:
    columns = [
        "model",
        "student",
        "parameters",
        "s a step",
        "samples a second",
        "peak GiB",
        "estimate GiB",
        "measured by estimate",
    ]
    estimates = {row["of"]: row["bytes"] for row in measured(found, what="estimate").values()}
    cells = []
    for name, row in measured(found, what="step").items():
        estimate = estimates.get(name)
        cells.append(
            [
                *(row["model"], row["student"], f"{row['parameters'] / 1e6:.0f}M", f"{row['seconds_a_step']:.3f}"),
                *(f"{row['batch'] / row['seconds_a_step']:.1f}", f"{row['bytes'] / GIB:.2f}"),
                *(("", "") if estimate is None else (f"{estimate / GIB:.2f}", f"{row['bytes'] / estimate:.2f}")),
            ]
        )
    others = [
        [row["what"], name, f"{row.get('open_seconds', row['seconds']):.0f}", row.get("says", "")]
        for name, row in _others(found)
    ]
    return table(columns, cells, words=2) + table(["what", "row", "s", "result"], others, words=2)


def _others(found: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, row) for name, row in measured(found).items() if row["what"] not in ("step", "estimate")]


def _cifar10(found: Mapping[str, Any]) -> list[str]:
    if "cifar10" not in found:
        return []
    from experiments.cifar10.report import markdown

    return [markdown(found["cifar10"]), *_behind(found["cifar10"]["students"])]


def _behind(students: Mapping[str, Any]) -> list[str]:
    """Return the best student at each number of calls."""
    lines = []
    for n in ("1", "2", "4", "8", "16"):
        ordered = sorted((run["rows"][n]["frechet"], name) for name, run in students.items() if n in run["rows"])
        ours = next((pair for pair in ordered if not pair[1].startswith("fastgen")), None)
        peer = next((pair for pair in ordered if pair[1].startswith("fastgen")), None)
        if ours and peer:
            word = "ahead" if ours[0] < peer[0] else "BEHIND"
            lines.append(f"- {n} calls: {word}: {ours[1]} {ours[0]:.3g}, {peer[1]} {peer[0]:.3g}")
    return lines


def _checkerboard(found: Mapping[str, Any]) -> list[str]:
    columns = ["samples, millions", "seconds", "1 step", "2", "4", "8", "16", "endpoint error, 1 step"]
    cells = [
        [
            *(f"{row['samples'] / 1e6:.1f}", f"{row['trained_seconds']:.0f}"),
            *(f"{value:.3f}" for value in row["kl_50"].values()),
            f"{row['endpoint']['1']:.3f}",
        ]
        for row in measured(found, what="curve").values()
    ]
    lines = table(columns, [*cells, ["15,000", "", *(f"{value:.3f}" for value in PUBLISHED), "(published)"]], words=0)
    rows = list(measured(found, what="curve").values())
    if rows:
        pairs = zip(rows[-1]["kl_50"].items(), PUBLISHED, strict=True)
        missed = [n for (n, value), published in pairs if round(value, 3) > published]
        lines.append(f"Above the published value at: {', '.join(missed) or 'no number of steps'}.")
    return lines


def _sampling(found: Mapping[str, Any]) -> list[str]:
    columns = ["setting", "steps", "pipeline ms", "bare ms", "pipeline by bare", "graph by bare"]
    cells = [
        [
            *(row["setting"], str(row["steps"]), f"{row['milliseconds']['complete']['median']:.2f}"),
            *(f"{row['milliseconds']['bare']['median']:.2f}", _shown(row["ratio"]), _shown(row.get("graph_by_bare"))),
        ]
        for row in measured(found).values()
    ]
    return table(columns, cells)


def _startup(found: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, row in measured(found).items():
        cells = [
            [key, f"{value:.2f}" if isinstance(value, float) else _shown(value)] for key, value in row["values"].items()
        ]
        lines += table([name, "seconds"], cells)
    return lines


def _growth(found: Mapping[str, Any]) -> list[str]:
    from benchmarks.growth_report import markdown

    names = ("curves", "exact_by_central", "options")
    rows = measured(found).values()
    both = {name: [entry for row in rows for entry in row.get(name, ())] for name in names}
    return [markdown(both)] if both["curves"] else []


TABLES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "steps": _steps,
    "large": _large,
    "cifar10": _cifar10,
    "checkerboard": _checkerboard,
    "sampling": _sampling,
    "startup": _startup,
    "growth": _growth,
}
