"""Open exported pipelines with stock diffusers and record their jumps; ``verify`` runs this in a process of its own.

python reload.py JOBS.json

A job is {"folder", "call", "any_call", "seed", "steps", "component", "sample", "count", "output"}: keywords of the call
of a folded and of an any-step pipeline, numbers of steps, the network's name in the pipeline and its first argument's,
the number of samples of a call, a safetensors file to write.

For each pipeline the file has ``KEY.states``, the inputs of its network in each step, ``KEY.end``, the samples after
the last step, and ``KEY.images`` where the pipeline decodes them. Images alone are clipped and hide differences.
"""

import copy
import functools
import json
import os
import sys

# From here on any import of the package fails: the pipelines have to open without it.
sys.modules["fmm_distill"] = None

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file


def plain(value):
    """Return a copy of samples in a tensor or a list, as one float tensor."""
    # A copy, since schedulers may change their inputs in place.
    return (torch.stack(list(value)) if isinstance(value, list) else value).detach().float().clone()


def watched(scheduler, ends):
    """Return the scheduler, which appends the result of each step to ``ends``."""
    step = scheduler.step

    # Pipelines read the signature.
    @functools.wraps(step)
    def recorded(*args, **kwargs):
        made = step(*args, **kwargs)
        ends.append(plain(made[0] if isinstance(made, tuple) else made.prev_sample))
        return made

    scheduler.step = recorded
    return scheduler


def watch_ends(pipeline, call, ends):
    """Append the samples after each step to ``ends``, by the pipeline's scheduler or by its callback."""
    module = sys.modules[type(pipeline).__module__]
    if hasattr(module, "FlowMapScheduler"):
        # The any-step pipeline makes a scheduler in each call.
        make = module.FlowMapScheduler.from_stock
        module.FlowMapScheduler.from_stock = lambda *args: watched(make(*args), ends)
    elif hasattr(module, "FlowMapPipeline"):

        def append(_, number, timestep, given):
            ends.append(plain(given["latents"]))
            return given

        call["callback_on_step_end"] = append
    else:
        watched(pipeline.scheduler, ends)


def unchecked(pipeline):
    """Return the pipeline without its checkers and watermarks, which change images: the student is compared."""
    for name in ("safety_checker", "watermarker", "watermark"):
        if getattr(pipeline, name, None) is not None:
            setattr(pipeline, name, None)
    return pipeline


def made_by(pipeline, call, job, steps):
    """Return the recorded tensors of one call, by the second half of their names."""
    pipeline.set_progress_bar_config(disable=True)
    # Some pipelines change the lists that they are called with.
    call, states, ends = copy.deepcopy(call), [], []
    call |= {"generator": torch.Generator().manual_seed(job["seed"]), "num_inference_steps": steps}

    def watch(_, args, kwargs):
        states.append(plain(kwargs[job["sample"]] if job["sample"] in kwargs else args[0])[: job["count"]])

    watch_ends(pipeline, call, ends)
    hook = getattr(pipeline, job["component"]).register_forward_pre_hook(watch, with_kwargs=True)
    try:
        result = torch.as_tensor(pipeline(**call, return_dict=False)[0]).float().contiguous()
    finally:
        hook.remove()
    if call.get("output_type") == "latent":
        return {"states": torch.stack(states), "end": result}
    return {"states": torch.stack(states), "end": ends[-1], "images": result}


def record_job(job):
    """Return the recorded tensors of all pipelines in the folder."""
    any_step = unchecked(DiffusionPipeline.from_pretrained(job["folder"], trust_remote_code=True))
    made = {}
    for steps in job["steps"]:
        calls = {f"any-{steps}": (any_step, job["any_call"])}
        folded = f"{job['folder']}/steps-{steps}"
        if os.path.isdir(folded):
            calls[f"folded-{steps}"] = (unchecked(DiffusionPipeline.from_pretrained(folded)), job["call"])
        for key, (pipeline, call) in calls.items():
            made |= {f"{key}.{name}": value for name, value in made_by(pipeline, call, job, steps).items()}
    return made


if __name__ == "__main__":
    # Once for the process: some pipelines call their network outside of ``no_grad``.
    torch.set_grad_enabled(False)
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        save_file(record_job(job), job["output"])
