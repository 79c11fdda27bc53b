"""Run by ``verify`` in a process of its own: open exported pipelines with stock diffusers and keep their images.

python reload.py FOLDER SEED CALL.json OUTPUT.safetensors N [N ...]
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

if __name__ == "__main__":
    folder, seed, output = sys.argv[1], int(sys.argv[2]), sys.argv[4]
    with open(sys.argv[3], encoding="utf-8") as file:
        call = json.load(file)
    torch.set_grad_enabled(False)
    any_step = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    any_step.set_progress_bar_config(disable=True)
    images = {}
    for steps in map(int, sys.argv[5:]):
        pipelines = {"any": any_step}
        if os.path.isdir(f"{folder}/steps-{steps}"):
            pipelines["folded"] = DiffusionPipeline.from_pretrained(f"{folder}/steps-{steps}")
            pipelines["folded"].set_progress_bar_config(disable=True)
        for name, pipeline in pipelines.items():
            generator = torch.Generator().manual_seed(seed)
            # Some pipelines change the lists that they are given.
            made = pipeline(**copy.deepcopy(call), generator=generator, num_inference_steps=steps, return_dict=False)
            images[f"{name}-{steps}"] = torch.as_tensor(made[0]).float().contiguous()
    save_file(images, output)
