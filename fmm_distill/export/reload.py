"""Run by ``verify`` in a process of its own: open exported pipelines with stock diffusers and keep what they make.

python reload.py JOBS.json

A job is {"folder", "call", "any_call", "seed", "steps", "output"}: keywords of the call of a folded and of an any-step
pipeline, numbers of steps, a safetensors file to write.
"""

import copy
import json
import os
import sys

# Any import of the package fails from here on: what opens below opens without it.
sys.modules["fmm_distill"] = None

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file


def unchecked(pipeline):
    """The pipeline without what replaces images by black ones or draws on them: the student is compared, not these."""
    for name in ("safety_checker", "watermarker", "watermark"):
        if getattr(pipeline, name, None) is not None:
            setattr(pipeline, name, None)
    return pipeline


def made_by(pipeline, call, job, steps):
    """What a pipeline returns first, as a tensor."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(job["seed"])
    # Some pipelines change the lists that they are given.
    call = copy.deepcopy(call) | {"generator": generator, "num_inference_steps": steps, "return_dict": False}
    return torch.as_tensor(pipeline(**call)[0]).float().contiguous()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        any_step = unchecked(DiffusionPipeline.from_pretrained(job["folder"], trust_remote_code=True))
        made = {}
        for steps in job["steps"]:
            made[f"any-{steps}"] = made_by(any_step, job["any_call"], job, steps)
            folded = f"{job['folder']}/steps-{steps}"
            if os.path.isdir(folded):
                pipeline = unchecked(DiffusionPipeline.from_pretrained(folded))
                made[f"folded-{steps}"] = made_by(pipeline, job["call"], job, steps)
        save_file(made, job["output"])
