"""Open exported pipelines with stock diffusers and record their jumps; ``verify`` runs this in a process of its own.

python reload.py JOBS.json

A job is {"folder", "call", "any_call", "seed", "steps", "output", "ip_adapter"}: keywords of the call of a folded and
of an any-step pipeline, numbers of steps, a safetensors file to write, and the arguments with which an IP-Adapter is
loaded; null: there is none.

For each pipeline the file has ``KEY.states``, the samples before each step of its scheduler, ``KEY.end``, those after
the last step, and ``KEY.images`` where the pipeline decodes them. Images alone are clipped and hide differences, and
latents that a pipeline returns may be in another layout and at another scale than its samples.
"""

import contextlib
import copy
import functools
import inspect
import json
import os
import sys
import types

# From here on any import of the package fails: the pipelines have to open without it.
sys.modules["fmm_distill"] = None

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file


def plain(value):
    """Return a copy of samples, as float numbers in the order of their axes."""
    # A copy, since schedulers may change their inputs in place.
    return value.detach().float().clone(memory_format=torch.contiguous_format)


def watch(scheduler, steps):
    """Append the samples before and after each step of a scheduler to ``steps``."""
    kind = type(scheduler)
    parameters = inspect.signature(kind.step)

    # Pipelines read the signature.
    @functools.wraps(kind.step)
    def step(*args, **kwargs):
        # Before the step, which may change its arguments in place.
        before = plain(parameters.bind(*args, **kwargs).arguments["sample"])
        made = kind.step(*args, **kwargs)
        steps.append((before, plain(made[0] if isinstance(made, tuple) else made.prev_sample)))
        return made

    # A bound method, which a deep copy binds to itself: some pipelines step a copy of their scheduler. Not a subclass:
    # others compare the class of their scheduler.
    scheduler.step = types.MethodType(step, scheduler)
    return scheduler


@contextlib.contextmanager
def watched(pipeline, steps):
    """Append the samples before and after each step of a pipeline to ``steps``."""
    module = sys.modules[type(pipeline).__module__]
    if hasattr(module, "FlowMapScheduler"):
        # The any-step pipeline makes a scheduler in each call.
        owner, name, make = module.FlowMapScheduler, "from_stock", module.FlowMapScheduler.from_stock

        def changed(*args):
            return watch(make(*args), steps)

    elif hasattr(module, "FlowMapPipeline"):
        owner, name, make = pipeline, "_jump", pipeline._jump

        def changed(config, x, ends, labels):
            before = plain(x)
            made = make(config, x, ends, labels)
            steps.append((before, plain(made)))
            return made

    else:
        owner, name, make = pipeline, "scheduler", pipeline.scheduler
        changed = watch(copy.copy(make), steps)
    setattr(owner, name, changed)
    try:
        yield
    finally:
        setattr(owner, name, make)


def unchecked(pipeline):
    """Return the pipeline without its checkers and watermarks, which change images: the student is compared."""
    for name in ("safety_checker", "watermarker", "watermark"):
        if getattr(pipeline, name, None) is not None:
            setattr(pipeline, name, None)
    return pipeline


def adapted(pipeline, folder, adapter):
    """Return the pipeline with the IP-Adapter in its folder, if it has one, as a user loads it."""
    if adapter is not None:
        pipeline.load_ip_adapter(folder, **adapter["load"], local_files_only=True)
        pipeline.set_ip_adapter_scale(adapter["scale"])
    return pipeline


def opened(value):
    """Return a keyword of the call with the images of its files in place of their paths."""
    if isinstance(value, list):
        # Sizes are tuples in diffusers, and lists in JSON.
        numbers = value and all(isinstance(item, (int, float)) for item in value)
        return (tuple if numbers else list)(opened(item) for item in value)
    if not (isinstance(value, dict) and set(value) == {"image file"}):
        return value
    image = PIL.Image.open(value["image file"])
    image.load()
    return image


def made_by(pipeline, call, job, steps):
    """Return the recorded tensors of one call, by the second half of their names."""
    pipeline.set_progress_bar_config(disable=True)
    call = {name: opened(value) for name, value in call.items()}
    call = {"generator": torch.Generator().manual_seed(job["seed"]), "num_inference_steps": steps} | call
    made = []
    # Some pipelines draw the latents of an image without their generator.
    torch.manual_seed(job["seed"])
    with watched(pipeline, made):
        # A copy: some pipelines change the lists that they are called with.
        result = pipeline(**copy.deepcopy(call), return_dict=False)
        # Some pipelines return no tuple of one entry, but the entry itself.
        result = result[0] if isinstance(result, (tuple, list)) else result
    tensors = {"states": torch.stack([before for before, _ in made]), "end": made[-1][1]}
    if call.get("output_type") == "latent":
        return tensors
    return tensors | {"images": torch.as_tensor(result).float().contiguous()}


def record_job(job):
    """Return the recorded tensors of all pipelines in the folder."""
    folder, adapter = job["folder"], job["ip_adapter"]
    any_step = unchecked(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True))
    adapted(any_step, folder, adapter)
    made = {}
    for steps in job["steps"]:
        calls = {f"any-{steps}": (any_step, job["any_call"])}
        own = f"{folder}/steps-{steps}"
        if os.path.isdir(own):
            folded = adapted(unchecked(DiffusionPipeline.from_pretrained(own)), own, adapter)
            calls[f"folded-{steps}"] = (folded, job["call"])
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
