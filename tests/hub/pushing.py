"""What happens to a student that its user pushes by diffusers itself, in a process of its own (``tests.hub.alone``)."""

from __future__ import annotations

from typing import Any

from tests.hub.server import Hub


def _made_by(pipeline: Any) -> list[float]:
    import torch

    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(5), "output_type": "pt"}
    made: list[float] = pipeline(**call).images.flatten().tolist()
    return made


def push_by_diffusers(hub: Hub, folder: str) -> dict[str, Any]:
    """A pipeline, its network alone, and a pipeline that ``save_pretrained`` pushes."""
    from diffusers import AutoModel, DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.push_to_hub("tester/pushed")
    pipeline.unet.push_to_hub("tester/network")
    pipeline.save_pretrained(f"{folder}-saved", push_to_hub=True, repo_id="tester/saved")
    made = {"expected": _made_by(pipeline)}
    for repo in ("tester/pushed", "tester/saved"):
        made[repo] = _made_by(DiffusionPipeline.from_pretrained(repo, trust_remote_code=True))
    pipeline.unet = AutoModel.from_pretrained("tester/network", trust_remote_code=True)
    made["tester/network"] = _made_by(pipeline)
    names = {repo: sorted(hub.repos[repo].files) for repo in ("tester/pushed", "tester/network", "tester/saved")}
    return {"made": made, "names": names}
