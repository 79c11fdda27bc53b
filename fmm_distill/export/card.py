"""The model card that travels with a student."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import yaml

from fmm_distill import __version__
from fmm_distill.checkpoint import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from fmm_distill.evaluate import Evaluation
    from fmm_distill.recipe import Recipe
    from fmm_distill.teachers.base import Teacher

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
    steps = recipe.export.steps
    folded = "\n".join(f"- `steps-{n}/`: call it with `num_inference_steps={n}` and no other number" for n in steps)
    example = steps[-1] if steps else 4
    total = recipe.student.regression_steps + recipe.training.steps
    return f"""---
{yaml.safe_dump(_metadata(teacher), sort_keys=False).strip()}
---
# A few-step student of {teacher.source}

A flow map (arXiv 2406.07507) distilled from {teacher.source}{f" at {teacher.revision}" if teacher.revision else ""}
by fmm_distill {__version__}: loss {recipe.loss_names}, {total} steps of {recipe.training.batch_size} samples,
data: {recipe.data}. The whole recipe is in `recipe.yaml`.

![samples](samples.png)

## Load it

A fixed number of steps, by stock diffusers, no code from this repository:

```python
from diffusers import DDIMPipeline
images = DDIMPipeline.from_pretrained("<this folder>/steps-{example}")(num_inference_steps={example}).images
```

{folded}

Any number of steps; its code is two files of this repository:

```python
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("<this folder>", trust_remote_code=True)
images = pipeline(batch_size=4, num_inference_steps=3).images
```

## What it loses, what it gains

{_table(evaluation)}

![quality against network calls](steps.png)

{_protocol(evaluation)}

## Limits

Unconditional. It copies its teacher's ODE: what the teacher can't draw it can't either.

## Citation

```bibtex
{CITATION}
```
"""


def _metadata(teacher: Teacher) -> dict[str, object]:
    """What the Hub reads."""
    metadata: dict[str, object] = {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["flow-map", "distillation", "fmm-distill"],
    }
    if teacher.licence:
        metadata["license"] = teacher.licence
    if teacher.revision:
        metadata["base_model"] = teacher.source
    return metadata


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
