"""Build the tiny pipeline of a test class and save it as a teacher's folder."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import torch

from experiments.coverage.images import describe_images
from experiments.coverage.stand_ins import NotHereError, install
from fmm_distill.teachers.prompted.refused_keywords import refused_keyword

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from experiments.coverage.images import Form
    from experiments.coverage.suite import Case

__all__ = ["build"]

# Markers in a text, by the setting of an encoder that has the number of their token.
_MARKERS = {
    "image_token_id": ("<|image_pad|>", "<image>", "[IMG]"),
    "image_token_index": ("<|image_pad|>", "<image>", "[IMG]"),
    "video_token_id": ("<|video_pad|>",),
    "vision_start_token_id": ("<|vision_start|>",),
    "vision_end_token_id": ("<|vision_end|>",),
}
# Components that run in each step.
_NETWORKS = ("transformer", "unet", "controlnet", "adapter", "motion_adapter")


def build(case: Case, checkout: Path, folder: Path, scratch: Path) -> dict[str, Any]:
    """Build the components of a test class, save its pipeline in ``folder``, and describe it.

    Runs in a child of its own, since it replaces parts of transformers and the package ``tests``.
    """
    _import_from(checkout)
    install(scratch)
    test_class = getattr(importlib.import_module(case.module), case.name)
    if not hasattr(test_class, "get_dummy_components"):
        # A test of trained weights.
        return {"skipped": True}
    test = test_class()
    torch.manual_seed(0)
    pipeline = test.pipeline_class(**test.get_dummy_components())
    _check_head(pipeline)
    _grow_embeddings(pipeline)
    _name_markers(pipeline)
    _complete_parts(pipeline)
    _make_distinct(pipeline)
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    _complete_config(pipeline, folder)
    given = _dummy_inputs(test)
    parameters = inspect.signature(pipeline.__call__).parameters
    images = describe_images(given, parameters, getattr(pipeline, "vae_scale_factor", 8))
    return {
        "pipeline": _stock_class(pipeline, folder),
        "call": _size_of(images, parameters) | _keywords(given, parameters) | _template_of(given, images),
        "images": images,
        "parameters": list(parameters),
        "components": {name: type(part).__name__ for name, part in pipeline.components.items() if part is not None},
    }


def _import_from(checkout: Path) -> None:
    """Make ``tests`` the suite's package, also where the project's own is imported already."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))


def _check_head(pipeline: Any) -> None:
    """Refuse a test that passes a language model's logits as embeddings.

    Its network has as many inputs as the language model has tokens, so that no tokenizer with letters fits. Published
    pipelines have the encoder alone.
    """
    if type(getattr(pipeline, "text_encoder", None)).__name__ == "Gemma2ForCausalLM":
        size = pipeline.text_encoder.config.vocab_size
        raise NotHereError(f"a tokenizer of {size} tokens, whose logits are the embeddings, has no local stand-in")


def _grow_embeddings(pipeline: Any) -> None:
    """Give each text encoder an embedding for every token of its local tokenizer."""
    for name, part in pipeline.components.items():
        # A processor has a tokenizer of its own.
        tokenizer = getattr(part, "tokenizer", part)
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"), None)
        if not name.startswith("tokenizer") or tokenizer is None or not hasattr(encoder, "get_input_embeddings"):
            continue
        try:
            rows = len(encoder.get_input_embeddings().weight)
        except NotImplementedError:
            # An encoder without a table of tokens.
            continue
        if rows < len(tokenizer):
            torch.manual_seed(0)
            encoder.resize_token_embeddings(len(tokenizer))
            # An encoder of an encoder-decoder model has a configuration of its own inside of the model's.
            for config in (encoder.config, getattr(encoder.config, "encoder", None)):
                if hasattr(config, "vocab_size"):
                    config.vocab_size = len(tokenizer)


def _name_markers(pipeline: Any) -> None:
    """Give the configuration of each encoder of images the numbers that its local tokenizer has for the markers."""
    tokenizers = [getattr(part, "tokenizer", part) for part in pipeline.components.values()]
    vocabularies = [part.get_vocab() for part in tokenizers if hasattr(part, "get_vocab")]
    for part in pipeline.components.values():
        config = getattr(part, "config", None)
        for name, markers in _MARKERS.items():
            known = [words[marker] for words in vocabularies for marker in markers if marker in words]
            if known and isinstance(part, torch.nn.Module) and hasattr(config, name):
                setattr(config, name, known[0])


def _complete_parts(pipeline: Any) -> None:
    """Give parts the settings of published checkpoints with which their pipeline runs on images."""
    config = pipeline.scheduler.config if hasattr(pipeline, "scheduler") else {}
    # A shift of flow sigmas, of which one test leaves the switch out.
    flow = config.get("use_flow_sigmas") or config.get("flow_shift", 1.0) not in (None, 1.0)
    if flow and config.get("prediction_type") == "epsilon":
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            config, use_flow_sigmas=True, prediction_type="flow_prediction"
        )
    encoder = getattr(pipeline, "image_encoder", None)
    if "(224, 224)" in inspect.getsource(type(pipeline)) and hasattr(getattr(encoder, "config", None), "image_size"):
        # The tests give a tensor, which is not resized. Sixteen patches.
        encoder.config.image_size, encoder.config.patch_size = 224, 56
        torch.manual_seed(0)
        pipeline.register_modules(image_encoder=type(encoder)(encoder.config))


def _make_distinct(pipeline: Any) -> None:
    """Make all weights float32 and finite, and those of the networks that run in each step nonzero.

    Gates and output layers that start at zero would hide a wrong input: the outputs would be equal all the same. Those
    of a ControlNet would hide its image.
    """
    parts: list[nn.Module] = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for part in parts:
        part.eval().float()
        for tensor in (*part.parameters(), *part.buffers()):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                torch.manual_seed(2)
                with torch.no_grad():
                    tensor.normal_(0, 0.1)
    torch.manual_seed(1)
    networks = [getattr(pipeline, name, None) for name in _NETWORKS]
    found = [network for network in networks if isinstance(network, torch.nn.Module)]
    for weight in [weight for network in found for weight in network.parameters()]:
        if weight.ndim >= 2 and weight.numel() > 1 and weight.is_floating_point() and not weight.any():
            with torch.no_grad():
                weight.normal_(0, weight[0].numel() ** -0.5)


def _complete_config(pipeline: Any, folder: Path) -> None:
    """Write the configuration that published checkpoints of PRX have, and that its text encoder is opened with.

    transformers saves that of the encoder alone, from which diffusers opens a model of the full default size.
    """
    encoder = getattr(pipeline, "text_encoder", None)
    if type(encoder).__name__ == "T5GemmaEncoder":
        from transformers import T5GemmaConfig

        T5GemmaConfig(encoder=encoder.config).save_pretrained(folder / "text_encoder")


def _dummy_inputs(test: Any) -> dict[str, Any]:
    for given in (("cpu",), ("cpu", 0), ()):
        try:
            inputs: dict[str, Any] = test.get_dummy_inputs(*given)
        except TypeError:
            # Another signature.
            continue
        return inputs
    return {}


def _keywords(given: dict[str, Any], parameters: Any) -> dict[str, Any]:
    """Return the inputs that a user would set under ``pipeline``: plain values other than the defaults."""
    # Some pipelines change a size to the nearest of those that they were trained at, far larger than a tiny one.
    sized = {"use_resolution_binning": False} if {"height", "use_resolution_binning"} <= parameters.keys() else {}
    return sized | {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
        if name in parameters
        and _is_plain(value)
        and value != parameters[name].default
        and refused_keyword([name]) is None
        and not (value is None and parameters[name].default is inspect.Parameter.empty)
    }


def _size_of(images: dict[str, Form], parameters: Any) -> dict[str, int]:
    """Return the size of the first image as the size of the sample: that of a test without one is in its latents."""
    form: Any = next(iter(images.values()), None)
    while isinstance(form, list):
        form = form[0]
    return (
        {}
        if form is None or not {"height", "width"} <= parameters.keys()
        else dict(zip(("width", "height"), form["size"], strict=True))
    )


def _template_of(given: dict[str, Any], images: dict[str, Form]) -> dict[str, Any]:
    """Return the template of the prompt, which has the number of tokens of the tiny encoder's images."""
    return {name: given[name] for name in ("prompt_template",) if images and name in given}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(isinstance(item, int | float | str) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _stock_class(pipeline: Any, folder: Path) -> str:
    """Return the pipeline's class in diffusers, and write it into the folder.

    The suite tests some pipelines through a wrapper that puts a dummy in the place of a guard from another package. The
    folder then has the stock class and no guard.
    """
    kind = next(cls for cls in type(pipeline).__mro__ if cls.__module__.startswith("diffusers."))
    if kind is not type(pipeline):
        file = folder / "model_index.json"
        index = json.loads(file.read_text(encoding="utf-8")) | {"_class_name": kind.__name__}
        if "safety_checker" in index:
            index["safety_checker"] = [None, None]
            shutil.rmtree(folder / "safety_checker", ignore_errors=True)
        file.write_text(json.dumps(index, indent=2), encoding="utf-8")
    return kind.__name__
