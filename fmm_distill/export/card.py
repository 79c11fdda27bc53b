"""The model card of an exported student, made from its manifest and its evaluation."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from fmm_distill.evaluation.result import COLUMNS
from fmm_distill.export.adapter_code import adapter_lines, describe_adapter
from fmm_distill.export.card_lora import HERE, Location, adapters, unequal_jumps
from fmm_distill.export.contents import record
from fmm_distill.export.example_call import imports_of
from fmm_distill.export.manifest import read_manifest, write_manifest
from fmm_distill.export.public import known_paths, public_evaluation, public_manifest
from fmm_distill.export.second_stage import describe_stage
from fmm_distill.io.files import write_text
from fmm_distill.io.reading import check_keys

if TYPE_CHECKING:
    from pathlib import Path
    from types import UnionType

    from fmm_distill.evaluation.result import Evaluation
    from fmm_distill.export.manifest import StudentManifest

__all__ = ["card", "write_card"]

CITATION = """@article{boffi2025flowmap,
  title   = {Flow map matching with stochastic interpolants: a mathematical framework for consistency models},
  author  = {Boffi, Nicholas M. and Albergo, Michael S. and Vanden-Eijnden, Eric},
  journal = {Transactions on Machine Learning Research},
  year    = {2025},
  note    = {arXiv:2406.07507}
}"""


def write_card(folder: Path, manifest: StudentManifest, evaluation: Evaluation | None, run: Path) -> None:
    """Write ``README.md`` and its sources into an exported folder: manifest, numbers, pictures and the recipe.

    Args:
        evaluation: None: its numbers are not those of this student, and the card reports none.
        run: the folder with the recipe and the pictures.
    """
    # A user may have removed a picture from the run; the card then shows none.
    there = [name for name in ("samples.png", "steps.png") if (run / name).is_file()]
    pictures = [] if evaluation is None else there
    for name in (*pictures, "recipe.yaml"):
        shutil.copyfile(run / name, folder / name)
    write_manifest(folder, manifest)
    if evaluation is not None:
        write_text(folder / "evaluation.json", json.dumps(evaluation.to_json(), indent=2) + "\n")
    write_text(folder / "README.md", card(folder))
    numbers = () if evaluation is None else ("evaluation.json",)
    record(folder, *pictures, *numbers, "recipe.yaml", "README.md")


def card(folder: Path, repo: str | None = None, branch: str | None = None, steps: tuple[int, ...] | None = None) -> str:
    """Return the model card of an exported student, without the paths of this machine.

    Args:
        repo: the repository on the Hub that the examples load; None: the folder.
        branch: the branch there; None: the main one.
        steps: the fixed numbers of steps whose pipelines are there; None: all that were exported.

    Raises:
        UserError: if the folder holds no exported student, or one of its files can't be read.
    """
    facts = read_manifest(folder)
    known = known_paths(folder, facts)
    manifest, evaluation = public_manifest(facts, known), public_evaluation(folder, known)
    if evaluation is not None:
        _check_rows(folder, evaluation)
    name = manifest.teacher if repo is None else repo.split("/")[-1]
    location = Location(repo, branch)
    parts = [
        f"---\n{_metadata(manifest, evaluation, name).to_yaml().strip()}\n---",
        f"# A few-step student of {manifest.teacher}",
        _introduction(manifest),
        *([_SCALED] if manifest.kind == "scaled" else []),
        *(["![samples: the same noise in each column](samples.png)"] if (folder / "samples.png").is_file() else []),
        f"## How to use\n\n{_usage(manifest, manifest.steps if steps is None else steps, location)}",
        *unequal_jumps(folder),
        *adapters(folder, manifest, location),
        f"## Evaluation\n\n{_numbers(evaluation, (folder / 'steps.png').is_file(), manifest.kind == 'scaled')}",
        f"## Training\n\n{_training(manifest)}",
        *([] if manifest.second_stage is None else [describe_stage(manifest.second_stage, evaluation)]),
        f"## Limitations\n\n{manifest.limits}",
        f"## Citation\n\n```bibtex\n{CITATION}\n```\n\nThe losses are from {'; '.join(manifest.training['papers'])}.",
    ]
    return "\n\n".join(parts) + "\n"


_SCALED = """Its weights are `W + h dW`: W are the teacher's, dW was trained, and h, from 0 to 1, is the length of a
jump. A grid of N equal jumps has h = 1/N, so that the strength of dW is one over the number of steps. At the strength
0 the network is its teacher, with the guidance that is in its weights, if any."""


def _introduction(manifest: StudentManifest) -> str:
    revision = f" (revision {manifest.revision})" if manifest.revision else ""
    return (
        f"A few-step generator, distilled from {manifest.teacher}{revision} with fmm_distill {manifest.fmm_distill}. "
        "It is a flow map (arXiv 2406.07507): one network that jumps between any two times of its teacher's ODE. The "
        f"number of steps is chosen at each call.{_matched(manifest)}"
    )


def _matched(manifest: StudentManifest) -> str:
    stage = manifest.second_stage
    if stage is None or not stage["steps"]:
        return ""
    return f" A second stage of the training ({stage['loss']}) moved the distribution of its samples to the teacher's."


def _usage(manifest: StudentManifest, steps: tuple[int, ...], location: Location) -> str:
    if manifest.not_any_step:
        return _weights(manifest, location)
    parts = [_fixed(manifest, steps, location), _any_step(manifest, location), *describe_adapter(manifest.ip_adapter)]
    return "\n\n".join(parts)


def _fixed(manifest: StudentManifest, steps: tuple[int, ...], location: Location) -> str:
    """Return the section on pipelines of a fixed number of steps, or the reason why there is none."""
    if not steps:
        reason = f": {manifest.not_fixed}" if manifest.not_fixed else ""
        return f"There is no pipeline for a fixed number of steps{reason}."
    last = steps[-1]
    lines = [f"- `steps-{n}/`: call it with `num_inference_steps={n}` and no other number" for n in steps]
    if location.repo is None:
        opened = f'pipeline = DiffusionPipeline.from_pretrained("{HERE}/steps-{last}")'
    else:
        opened = (
            "from huggingface_hub import snapshot_download\n"
            f'folder = snapshot_download("{location.repo}"{location.revision}, allow_patterns="steps-{last}/*")\n'
            f'pipeline = DiffusionPipeline.from_pretrained(f"{{folder}}/steps-{last}")'
        )
    call = manifest.fixed_call.replace("{steps}", str(last))
    place = f'"{HERE}/steps-{last}"' if location.repo is None else f'f"{{folder}}/steps-{last}"'
    adapted = adapter_lines(manifest.ip_adapter, place)
    code = "\n".join(["from diffusers import DiffusionPipeline", *imports_of(call), opened, *adapted, call])
    title = "For a fixed number of steps, with stock diffusers and without code from this repository:"
    return "\n\n".join([title, f"```python\n{code}\n```", "\n".join(lines)])


def _any_step(manifest: StudentManifest, location: Location) -> str:
    call = manifest.any_step_call.replace("{steps}", "3")
    place = f'"{location.repo or HERE}"'
    imports = "\n".join(["from diffusers import DiffusionPipeline", *imports_of(call)])
    used = "\n".join([*adapter_lines(manifest.ip_adapter, place, location.revision), call])
    task = _task(manifest)
    return f"""For any number of steps, with code from this repository (two files):

```python
{imports}
pipeline = DiffusionPipeline.from_pretrained({place}{location.revision}, trust_remote_code=True)
{used}
```

The call takes `stochasticity`, the strength of the fresh noise in each step, from 0 (the default: none).{task}"""


def _task(manifest: StudentManifest) -> str:
    """Return the part on the task of the teacher's own class; empty: it has none."""
    if manifest.task_call is None:
        return ""
    code = "\n".join([*imports_of(manifest.task_call), manifest.task_call])
    return f"""

The teacher is a `{manifest.task}`. The any-step pipeline has its task, with the same weights, for a given image or
video. `strength` is the fraction of the `num_inference_steps` jumps that are made:

```python
{code}
```"""


def _weights(manifest: StudentManifest, location: Location) -> str:
    objects, network = "`teacher`, a `Teacher` or any object with a velocity", ""
    if manifest.started_from is not None:
        network = ", network=network"
        objects += f", and `network`, a `{manifest.started_from}` as the student was started from"
    return f"""The repository holds the weights of the network, in `network/`, and no pipeline:
{manifest.not_any_step}. In Python it opens with {objects}:

```python
import torch
from fmm_distill import load_student
student = load_student("{location.repo or HERE}"{location.revision}, teacher=teacher{network})
samples = student.generate(torch.randn(4, *student.event_shape), steps=3)
```"""


def _check_rows(folder: Path, evaluation: dict[str, Any]) -> None:
    """Refuse an evaluation without the numbers that the card shows."""
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


def _numbers(evaluation: dict[str, Any] | None, plotted: bool, scaled: bool) -> str:
    if evaluation is None:
        return "It was not evaluated."
    parts = ["Of endpoint error and Fréchet distance, lower is better."]
    parts += [
        _table(evaluation["rows"], scaled=scaled),
        *(["![quality against network calls](steps.png)"] if plotted else []),
    ]
    parts.append("\n".join(f"- {key}: {value}" for key, value in evaluation["protocol"].items()))
    return "\n\n".join(parts)


def _table(rows: list[dict[str, Any]], *, scaled: bool = False) -> str:
    """Return a Markdown table: the columns that every evaluation has, then the other ones that were measured.

    Args:
        scaled: add the strength of the student's change of the weights.
    """
    main = {
        "endpoint_error": "endpoint error",
        "frechet": "Fréchet distance",
        "seconds_per_image": "seconds per sample",
    }
    forms = {column.key: column.form for column in COLUMNS}
    titles = main | {
        column.key: column.title
        for column in COLUMNS
        if column.key not in main and any(row.get(column.key) is not None for row in rows)
    }
    strength = " strength |" if scaled else ""
    lines = [f"| sampler | steps |{strength} network calls | {' | '.join(titles.values())} |"]
    lines.append("|---" * (3 + scaled + len(titles)) + "|")
    for row in rows:
        cells = ("not measured" if row.get(key) is None else format(row[key], forms[key]) for key in titles)
        if scaled:
            # The evaluated sampler makes equal jumps.
            strength = f" {1 / row['steps']:.4g} |" if row["sampler"] == "student" else " |"
        lines.append(f"| {row['sampler']} | {row['steps']} |{strength} {row['calls']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _training(manifest: StudentManifest) -> str:
    training = manifest.training
    hours = "" if manifest.hours is None else f", {_duration(manifest.hours * 3600)}"
    revision = f" (revision {manifest.init_revision})" if manifest.init_revision else ""
    lines = [] if manifest.init is None else [f"- started from the student {manifest.init}{revision}"]
    lines += [
        f"- {training['steps']} steps of {training['batch_size']} samples{hours}",
        f"- loss: {training['loss']}",
        f"- data: {training['data']}",
        f"- seed: {training['seed']}",
        "- all settings: `recipe.yaml`",
    ]
    if manifest.environment is not None:
        lines.append("- environment: " + ", ".join(f"{name} {value}" for name, value in manifest.environment.items()))
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    """Return a duration in hours, minutes or seconds, whichever is the largest that it has one of."""
    for name, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.2g} seconds"


def _metadata(manifest: StudentManifest, evaluation: dict[str, Any] | None, name: str) -> ModelCardData:
    """Return the metadata that the Hub reads."""
    task = manifest.pipeline_tag
    results = [] if evaluation is None or task is None else _results(task, evaluation)
    # Only a teacher of the Hub has a revision.
    base: dict[str, Any] = {}
    if manifest.revision:
        # A relation to a model that the Hub does not have is an error there.
        base = {"base_model": manifest.teacher, "base_model_relation": "finetune"}
    license: dict[str, Any] = manifest.license
    return ModelCardData(
        library_name="fmm_distill" if manifest.not_any_step else "diffusers",
        pipeline_tag=task,
        tags=["flow-map", "distillation", "fmm-distill"],
        datasets=None if manifest.dataset is None else [manifest.dataset],
        model_name=name if results else None,
        eval_results=results or None,
        **license,
        **base,
    )


def _results(task: str, evaluation: dict[str, Any]) -> list[EvalResult]:
    """Return the student's rows as results in the metadata of the Hub, one dataset per kind of reference."""
    protocol, results = evaluation["protocol"], []
    for row in evaluation["rows"]:
        if row["sampler"] != "student":
            continue
        arguments = {"num_inference_steps": row["steps"], "network_calls": row["calls"]}
        if row["endpoint_error"] is not None:
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type="teacher-endpoints",
                    dataset_name=f"{protocol['endpoint_samples']} endpoints of the teacher's ODE",
                    metric_type="endpoint-error",
                    metric_name=f"endpoint error, num_inference_steps={row['steps']}",
                    metric_value=round(row["endpoint_error"], 5),
                    metric_args=arguments,
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
                metric_args=arguments | {"features": protocol["frechet"]},
            )
        )
    return results
