"""The model card that travels with a student, from the facts and the numbers beside it."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from fmm_distill.evaluation.result import COLUMNS
from fmm_distill.export.contents import record
from fmm_distill.export.manifest import read_about, write_about
from fmm_distill.export.public import known_paths, public_about, public_evaluation
from fmm_distill.io.files import write_text
from fmm_distill.io.reading import check_keys

if TYPE_CHECKING:
    from pathlib import Path
    from types import UnionType

    from fmm_distill.evaluation.result import Evaluation
    from fmm_distill.export.manifest import About

__all__ = ["card", "write_card"]

CITATION = """@article{boffi2025flowmap,
  title   = {Flow map matching with stochastic interpolants: a mathematical framework for consistency models},
  author  = {Boffi, Nicholas M. and Albergo, Michael S. and Vanden-Eijnden, Eric},
  journal = {Transactions on Machine Learning Research},
  year    = {2025},
  note    = {arXiv:2406.07507}
}"""
_HERE = "<this folder>"


def write_card(folder: Path, about: About, evaluation: Evaluation | None, run: Path) -> None:
    """Write ``README.md`` and what it is made of into an exported folder: facts, numbers, pictures and the recipe.

    Args:
        evaluation: None: its numbers are not those of this student, and the card says that there are none.
        run: where the recipe and the pictures are.
    """
    # A user may have removed a picture from the run; the card then shows none.
    drawn = [name for name in ("samples.png", "steps.png") if (run / name).is_file()]
    pictures = [] if evaluation is None else drawn
    for name in (*pictures, "recipe.yaml"):
        shutil.copyfile(run / name, folder / name)
    write_about(folder, about)
    if evaluation is not None:
        write_text(folder / "evaluation.json", json.dumps(evaluation.to_json(), indent=2) + "\n")
    write_text(folder / "README.md", card(folder))
    numbers = () if evaluation is None else ("evaluation.json",)
    record(folder, *pictures, *numbers, "recipe.yaml", "README.md")


def card(folder: Path, repo: str | None = None, branch: str | None = None, steps: tuple[int, ...] | None = None) -> str:
    """The model card of an exported student, without the paths of this machine.

    Args:
        repo: the Hub's name of where it is to be found, and ``branch`` there; None: in the folder.
        steps: the numbers of steps whose folded pipelines are there; None: all that were exported.

    Raises:
        UserError: if the folder holds no exported student, or one of its files can't be read.
    """
    facts = read_about(folder)
    known = known_paths(folder, facts)
    about, evaluation = public_about(facts, known), public_evaluation(folder, known)
    if evaluation is not None:
        _check_rows(folder, evaluation)
    steps = about.steps if steps is None else steps
    revision = f" at {about.revision}" if about.revision else ""
    name = about.teacher if repo is None else repo.split("/")[-1]
    parts = [
        f"---\n{_metadata(about, evaluation, name).to_yaml().strip()}\n---",
        f"# A few-step student of {about.teacher}",
        f"A flow map (arXiv 2406.07507) distilled from {about.teacher}{revision} with fmm_distill {about.fmm_distill}: "
        "one network that jumps between any two times of its teacher's ODE, so that the number of steps is chosen when "
        "it is called.",
        *(["![samples: the same noise down each column](samples.png)"] if (folder / "samples.png").is_file() else []),
        f"## Load it\n\n{_folded(about, steps, repo, branch)}\n\n{_any_step(about, repo, branch)}",
        *([_LORA] if about.lora else []),
        f"## What it loses, what it gains\n\n{_numbers(evaluation, (folder / 'steps.png').is_file())}",
        f"## How it was made\n\n{_made(about)}",
        f"## Limits\n\n{about.limits}",
        f"## Citation\n\n```bibtex\n{CITATION}\n```\n\nIts losses are those of {'; '.join(about.made['papers'])}.",
    ]
    return "\n\n".join(parts) + "\n"


_LORA = """`lora/` holds what was trained: the adapters as `load_lora_weights` reads them, and the embedding of the
jump's length, which stock diffusers has no place for. The pipelines here have both merged into their weights."""


def _folded(about: About, steps: tuple[int, ...], repo: str | None, branch: str | None) -> str:
    """How to load a fixed number of steps, or why there is none to load."""
    if not steps:
        reason = f": {about.not_folded}" if about.not_folded else ""
        return f"There is no pipeline for a fixed number of steps{reason}."
    last = steps[-1]
    lines = [f"- `steps-{n}/`: call it with `num_inference_steps={n}` and no other number" for n in steps]
    if repo is None:
        opened = f'pipeline = DiffusionPipeline.from_pretrained("{_HERE}/steps-{last}")'
    else:
        revision = "" if branch is None else f', revision="{branch}"'
        opened = (
            "from huggingface_hub import snapshot_download\n"
            f'folder = snapshot_download("{repo}"{revision}, allow_patterns="steps-{last}/*")\n'
            f'pipeline = DiffusionPipeline.from_pretrained(f"{{folder}}/steps-{last}")'
        )
    code = f"from diffusers import DiffusionPipeline\n{opened}\n{about.folded.replace('{steps}', str(last))}"
    said = "A fixed number of steps, by stock diffusers, no code from this repository:"
    return "\n\n".join([said, f"```python\n{code}\n```", "\n".join(lines)])


def _any_step(about: About, repo: str | None, branch: str | None) -> str:
    revision = "" if branch is None else f', revision="{branch}"'
    return f"""Any number of steps; its code is two files of this repository:

```python
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("{repo or _HERE}"{revision}, trust_remote_code=True)
{about.any_step.replace("{steps}", "3")}
```"""


def _check_rows(folder: Path, evaluation: dict[str, Any]) -> None:
    """Refuse numbers that the card has no form for."""
    todo, where = "export the student again", f"{folder / 'evaluation.json'}: "
    number = float | None
    row: dict[str, type | UnionType] = {"sampler": str, "steps": int, "calls": int, "seconds_per_image": number}
    row |= {"endpoint_error": number, "frechet": number}
    for index, each in enumerate(evaluation["rows"]):
        check_keys(f"{where}rows", {str(index): each}, {str(index): dict}, todo=todo)
        others = {column.key: number for column in COLUMNS if column.key in each}
        check_keys(f"{where}row {index}", each, others | row, todo=todo)
    keys: dict[str, type | UnionType] = {"endpoint_samples": int, "frechet": str, "frechet_samples": int | None}
    check_keys(f"{where}protocol", evaluation["protocol"], keys, todo=todo)


def _numbers(evaluation: dict[str, Any] | None, drawn: bool) -> str:
    if evaluation is None:
        return "It was not evaluated."
    parts = [_table(evaluation["rows"]), *(["![quality against network calls](steps.png)"] if drawn else [])]
    parts.append("\n".join(f"- {key}: {value}" for key, value in evaluation["protocol"].items()))
    return "\n\n".join(parts)


def _table(rows: list[dict[str, Any]]) -> str:
    """The numbers that every evaluation has, then what else was measured."""
    main = {"endpoint_error": "endpoint error", "frechet": "Fréchet distance", "seconds_per_image": "seconds per image"}
    forms = {column.key: column.form for column in COLUMNS}
    titles = main | {
        column.key: column.title
        for column in COLUMNS
        if column.key not in main and any(row.get(column.key) is not None for row in rows)
    }
    lines = [f"| sampler | steps | network calls | {' | '.join(titles.values())} |", "|---" * (3 + len(titles)) + "|"]
    for row in rows:
        cells = ("not measured" if row.get(key) is None else format(row[key], forms[key]) for key in titles)
        lines.append(f"| {row['sampler']} | {row['steps']} | {row['calls']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _made(about: About) -> str:
    made = about.made
    hours = "" if about.hours is None else f", {about.hours:.2g} hours"
    lines = [
        f"- {made['steps']} steps of {made['batch_size']} samples{hours}; loss {made['loss']}; seed {made['seed']}",
        f"- data: {made['data']}",
        "- every setting: `recipe.yaml`",
    ]
    if about.where is not None:
        lines.append("- " + ", ".join(f"{name} {value}" for name, value in about.where.items()))
    return "\n".join(lines)


def _metadata(about: About, evaluation: dict[str, Any] | None, name: str) -> ModelCardData:
    """What the Hub reads."""
    results = [] if evaluation is None or about.pipeline_tag is None else _results(about.pipeline_tag, evaluation)
    # A relation to a model that the Hub does not have is none.
    base: dict[str, Any] = {"base_model": about.teacher, "base_model_relation": "finetune"} if about.revision else {}
    license: dict[str, Any] = about.license
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=about.pipeline_tag,
        tags=["flow-map", "distillation", "fmm-distill"],
        datasets=None if about.dataset is None else [about.dataset],
        model_name=name if results else None,
        eval_results=results or None,
        **license,
        **base,
    )


def _results(task: str, evaluation: dict[str, Any]) -> list[EvalResult]:
    """The student's rows in the metadata of the Hub, a dataset for each kind of reference."""
    protocol, results = evaluation["protocol"], []
    for row in evaluation["rows"]:
        if row["sampler"] != "student":
            continue
        told = {"num_inference_steps": row["steps"], "network_calls": row["calls"]}
        if row["endpoint_error"] is not None:
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type="teacher-endpoints",
                    dataset_name=f"{protocol['endpoint_samples']} endpoints of the teacher's ODE",
                    metric_type="endpoint-error",
                    metric_name=f"endpoint error, num_inference_steps={row['steps']}",
                    metric_value=round(row["endpoint_error"], 5),
                    metric_args=told,
                )
            )
        if row["frechet"] is None:
            continue
        # Only the distance of Inception features goes by the name that everyone compares.
        kind = "fid" if protocol["frechet"].startswith("2048 Inception features") else "frechet-distance"
        results.append(
            EvalResult(
                task_type=task,
                dataset_type="images",
                dataset_name=str(protocol.get("frechet_reference")),
                metric_type=kind,
                metric_name=f"{kind} of {protocol.get('frechet_samples')} samples, num_inference_steps={row['steps']}",
                metric_value=round(row["frechet"], 4),
                metric_args=told | {"features": protocol["frechet"]},
            )
        )
    return results
