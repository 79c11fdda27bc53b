"""Distill a text-to-image teacher into LoRA adapters and export it for stock diffusers.

    pip install fmm-distill[lora,text]
    python examples/text_lora.py --output runs/lora

The default teacher is Stable Diffusion 1.5 from the Hub, which needs a GPU with 24 GB. ``--teacher`` takes any other
text-to-image pipeline, by Hub id or folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fmm_distill import Recipe, distill
from fmm_distill.evaluation.result import Evaluation

PROMPTS = ("a photo of a cat", "a watercolor of a lighthouse", "a bowl of oranges on a table", "a map of an island")


def main(arguments: Sequence[str] | None = None) -> Evaluation:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/lora"))
    parser.add_argument("--teacher", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--prompts", type=Path, help="a file with one prompt per line [four prompts]")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args(arguments)
    prompts = options.prompts
    if prompts is None:
        prompts = options.output.with_name(f"{options.output.name}-prompts.txt")
        prompts.parent.mkdir(parents=True, exist_ok=True)
        prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    recipe = Recipe.model_validate(
        {
            "teacher": options.teacher,
            "pipeline": {"height": options.size, "width": options.size},
            "prompts": {"file": str(prompts)},
            # The student learns the guided velocity: it needs one call per step where the teacher needs two.
            "guidance": {"scale": 7.5},
            "student": {"lora": {"rank": 16}},
            "training": {"steps": options.steps, "batch_size": options.batch_size},
            "optimizer": {"lr": 1e-4},
            "evaluation": {
                "steps": [1, 2, 4],
                "ddim_steps": [4],
                "dpmsolver_steps": [],
                "endpoint_samples": 4,
                "endpoint_solver_steps": 16,
                "batch_size": 4,
            },
            "export": {"steps": [2, 4]},
        }
    )
    evaluation = distill(recipe, options.output)
    print(f"load it: DiffusionPipeline.from_pretrained('{options.output}/student/steps-4')")
    return evaluation


if __name__ == "__main__":
    main()
