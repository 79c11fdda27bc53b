"""The model card that travels with a student."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, cast

import torch
import yaml

from fmm_distill import __version__
from fmm_distill.checkpoint import write_text
from fmm_distill.export.folded import why_not_folded
from fmm_distill.export.stock import guidance_keyword, unguided
from fmm_distill.teachers.codec import Waves
from fmm_distill.teachers.conditions import Classes, Embeddings

if TYPE_CHECKING:
    from pathlib import Path

    from fmm_distill.evaluate import Evaluation
    from fmm_distill.recipe import Recipe
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.guidance import Guidance

__all__ = ["write_card"]

CITATION = """@article{boffi2025flowmap,
  title   = {Flow map matching with stochastic interpolants: a mathematical framework for consistency models},
  author  = {Boffi, Nicholas M. and Albergo, Michael S. and Vanden-Eijnden, Eric},
  journal = {Transactions on Machine Learning Research},
  year    = {2025},
  note    = {arXiv:2406.07507}
}"""


def write_card(folder: Path, recipe: Recipe, teacher: Teacher, evaluation: Evaluation, run: Path) -> None:
    """Write ``README.md`` into an exported folder and copy the run's two pictures and its recipe beside it."""
    for name in ("samples.png", "steps.png", "recipe.yaml"):
        shutil.copyfile(run / name, folder / name)
    write_text(folder / "README.md", _card(recipe, teacher, evaluation))


def _card(recipe: Recipe, teacher: Teacher, evaluation: Evaluation) -> str:
    total = recipe.student.regression_steps + recipe.training.steps
    return f"""---
{yaml.safe_dump(_metadata(teacher), sort_keys=False).strip()}
---
# A few-step student of {teacher.source}

A flow map (arXiv 2406.07507) distilled from {teacher.source}{f" at {teacher.revision}" if teacher.revision else ""}
by fmm_distill {__version__}: loss {recipe.loss_names}, {total} steps of {recipe.training.batch_size} samples,
data: {recipe.data.source}. The whole recipe is in `recipe.yaml`.

![samples](samples.png)

## Load it

{_folded(recipe.export.steps, teacher)}

Any number of steps; its code is two files of this repository:

```python
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("<this folder>", trust_remote_code=True)
{_example(teacher, 3, any_step=True)}
```

## What it loses, what it gains

{_table(evaluation)}

![quality against network calls](steps.png)

{_protocol(evaluation)}

## Limits

{_limits(recipe, teacher)}

## Citation

```bibtex
{CITATION}
```
"""


def _folded(steps: tuple[int, ...], teacher: Teacher) -> str:
    """How to load a fixed number of steps, or why there is none to load."""
    reason = why_not_folded(teacher)
    if reason or not steps:
        return f"There is no pipeline for a fixed number of steps{f': {reason}' if reason else ''}."
    lines = "\n".join(f"- `steps-{n}/`: call it with `num_inference_steps={n}` and no other number" for n in steps)
    return f"""A fixed number of steps, by stock diffusers, no code from this repository:

```python
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("<this folder>/steps-{steps[-1]}")
{_example(teacher, steps[-1], any_step=False)}
```

{lines}"""


def _example(teacher: Teacher, steps: int, *, any_step: bool) -> str:
    if teacher.conditions is None:
        made = "audios" if isinstance(teacher.codec, Waves) else "images"
        return f"{made} = pipeline(batch_size=4, num_inference_steps={steps}).{made}"
    guidance = unguided(teacher) if teacher.folder is not None else {}
    if any_step and _range(teacher) is not None:
        guidance |= {str(guidance_keyword(teacher)): cast("Guidance", teacher.guidance).scale}
    keywords = "".join(f", {key}={value!r}" for key, value in (teacher.call | guidance).items())
    if isinstance(teacher.conditions, Classes):
        return f"images = pipeline(class_labels=[0, 1], num_inference_steps={steps}{keywords})[0]"
    return f'samples = pipeline("a prompt", num_inference_steps={steps}{keywords})[0]'


def _range(teacher: Teacher) -> tuple[float, float] | None:
    """The scales of guidance that are an input of the student."""
    return None if teacher.guidance is None else teacher.guidance.range


def _limits(recipe: Recipe, teacher: Teacher) -> str:
    copies = "It copies its teacher's ODE: what the teacher can't draw it can't either."
    if teacher.conditions is None:
        return f"Unconditional. {copies}"
    kind = "classes" if isinstance(teacher.conditions, Classes) else "prompts"
    scale = recipe.guidance.scale if teacher.guidance is None else teacher.guidance.scale
    baked = f"guidance {scale:g} is in its weights" if scale != 1 else "its teacher was not guided"
    call = "Turn the pipeline's own guidance off, as above: it would come on top."
    if guidance_keyword(teacher) is None:
        call = "Its network is told its guidance: call it with the keywords above."
    if (scales := _range(teacher)) is not None:
        baked = f"guidance from {scales[0]:g} to {scales[1]:g} is an input of the any-step pipeline"
        call = (
            f"In the pipelines of a fixed number of steps {scale:g} is in the weights: turn their own guidance off, as "
            "above, it would come on top."
        )
    return f"It has seen {len(teacher.conditions.names)} {kind}; {baked}. {call} {copies}"


def _metadata(teacher: Teacher) -> dict[str, object]:
    """What the Hub reads."""
    metadata: dict[str, object] = {"library_name": "diffusers"}
    # The Hub has no task of sounds without a condition.
    if not isinstance(teacher.codec, Waves):
        metadata["pipeline_tag"] = _task(teacher)
    metadata["tags"] = ["flow-map", "distillation", "fmm-distill"]
    if teacher.licence:
        metadata["license"] = teacher.licence
    if teacher.revision:
        metadata["base_model"] = teacher.source
    return metadata


def _task(teacher: Teacher) -> str:
    if not isinstance(teacher.conditions, Embeddings):
        return "unconditional-image-generation"
    return {5: "text-to-video", 3: "text-to-audio"}.get(
        teacher.codec.decode(torch.zeros(1, *teacher.event_shape)).ndim, "text-to-image"
    )


def _table(evaluation: Evaluation) -> str:
    lines = ["| sampler | steps | network calls | endpoint error | Fréchet distance | seconds per image |"]
    lines.append("|---|---|---|---|---|---|")
    for row in evaluation.rows:
        frechet = "not measured" if row.frechet is None else f"{row.frechet:.3f}"
        lines.append(
            f"| {row.sampler} | {row.steps} | {row.calls} | {row.endpoint_error:.4f} | {frechet} "
            f"| {row.seconds_per_image:.5f} |"
        )
    return "\n".join(lines)


def _protocol(evaluation: Evaluation) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in evaluation.protocol.items())
