"""Keywords of a pipeline's call that a run sets itself are refused before the teacher is opened."""

from __future__ import annotations

import pytest

from fmm_distill.config.recipe import parse
from fmm_distill.errors import UserError
from fmm_distill.teachers.prompted.refused_keywords import refused_keyword

INSTEAD = {
    "prompt": "prompts.file",
    "prompt_2": "prompts.file",
    "prompt_embeds": "prompts.file",
    "pooled_prompt_embeds": "prompts.file",
    "prompt_embeds_mask": "prompts.file",
    "prompt_attention_mask": "prompts.file",
    "negative_prompt": "empty prompt",
    "negative_prompt_embeds": "empty prompt",
    "negative_prompt_2": "empty prompt",
    "num_images_per_prompt": "training.batch_size",
    "num_videos_per_prompt": "training.batch_size",
    "num_inference_steps": "export.steps",
    "timesteps": "export.steps",
    "sigmas": "export.steps",
    "guidance_scale": "guidance.scale",
    "true_cfg_scale": "guidance.scale",
    "guidance_rescale": "guidance.scale",
    "eta": "without noise",
    "generator": "training.seed",
    "latents": "training.seed",
    "image": "noise alone",
    "ip_adapter_image_embeds": "ip_adapter.source",
    "denoising_end": "from noise to data",
    "output_type": "latents",
    "return_dict": "own call",
    "callback": "own call",
    "callback_on_step_end_tensor_inputs": "own call",
}


@pytest.mark.parametrize("name", INSTEAD)
def test_each_is_refused_by_name_with_what_to_set_instead(name):
    with pytest.raises(UserError, match=rf"pipeline\.{name} is set by the program") as caught:
        # There is no such teacher: it is not looked for.
        parse({"teacher": "no/where", "pipeline": {"height": 32, name: 1}}, "here")
    assert INSTEAD[name] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_shapes_the_samples_is_left_to_the_user():
    names = ("height", "width", "num_frames", "frame_rate", "max_sequence_length", "clean_caption", "clip_skip")
    more = ("use_resolution_binning", "system_prompt", "audio_end_in_s", "enable_prompt_rewrite", "prompt_template")
    assert refused_keyword((*names, *more)) is None
