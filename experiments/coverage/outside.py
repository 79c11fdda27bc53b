"""Families of generators that are no single velocity field, with the reason: a table that is maintained by hand."""

from __future__ import annotations

__all__ = ["OUTSIDE"]

# Family, reason, and what would have to exist.
OUTSIDE = (
    (
        "Kandinsky 2.1 and 2.2",
        "A cascade: a prior draws a CLIP image embedding for the prompt, and a decoder without text encoder denoises "
        "latents given that embedding. Two samples of one prompt have two embeddings.",
        "An adapter for the decoder with the image embeddings as its conditions, and one for the prior, whose network "
        "predicts the embedding itself; an export that writes both pipelines.",
    ),
    (
        "Stable Cascade",
        "A cascade of two networks on latents of two sizes. The second is conditioned on the output of the first.",
        "A schedule for DDPMWuerstchenScheduler, continuous with time in [0, 1], and an adapter per stage with the "
        "outputs of the first stage as conditions of the second.",
    ),
    (
        "DeepFloyd IF, stages 2 and 3; unCLIP's upscalers",
        "They upscale an image: a copy of it with random noise is an input of the network in addition to the sample's "
        "own noise. Two samples of one image have two such inputs.",
        "Conditions with a random part, drawn anew for each sample in training.",
    ),
    (
        "Shap-E",
        "The prior denoises the weights of an implicit 3D scene, given an embedding that its pipeline rescales.",
        "An adapter for PriorTransformer, and metrics of scenes in place of those of images.",
    ),
    (
        "LTX-2, Kandinsky 6, MiniMax-H3, Echo",
        "Sound and video together: the network takes and returns two samples, and two schedulers step them, for some "
        "checkpoints on different noise levels. Echo is a few-step generator already.",
        "An event of several tensors on one time axis, in the losses, the export and the any-step pipeline.",
    ),
    (
        "Cosmos 3 Omni",
        "One packed sequence of text, video, sound and action tokens: the network has no sample argument with a row "
        "per sample, and a time per kind of tokens.",
        "A network call that packs a batch, and an event of several tensors as above.",
    ),
    (
        "LLaDA 2, DiffusionGemma",
        "Discrete diffusion: tokens are unmasked by a Markov chain. There is no velocity and no ODE to map.",
        "A theory of maps between discrete distributions; not the one that this package implements.",
    ),
    (
        "RFD4Proteina",
        "Proteins: coordinates of a backbone and local latents with a scheduler each, which step on different times.",
        "An event of two tensors with a time each; conditions that are no prompts.",
    ),
    (
        "FLUX.2 Klein KV",
        "Its first step has the tokens of the reference image, whose keys and values later steps read from a cache: a "
        "step depends on the times of earlier ones.",
        "Nothing: FLUX.2 Klein with an image is the same model without the cache.",
    ),
    (
        "Wan 2.2 A14B, Ideogram 4",
        "Two networks: one for high noise levels and one for low, or one for each part of the guidance.",
        "A network that chooses by the time, a student of each part, and jumps that end at the boundary.",
    ),
    (
        "FLUX.3, Anima (only as modular blocks)",
        "diffusers has no DiffusionPipeline class for them, and the tool opens pipelines by model_index.json. Their "
        "denoising blocks can be recorded: with the guider disabled, FLUX.3 calls its network once per step, at times "
        "of one line over the scheduler's.",
        "Opening modular_model_index.json with ModularPipeline, prompts by its text blocks, the guider turned off and "
        "read; and an export as a modular pipeline, whose denoising block passes the length of the jump. The "
        "step-distilled FLUX.3 is a flow map already.",
    ),
    (
        "MiniMax-Music3, Wan-Animate 2 (only as modular blocks)",
        "Generated in windows: each window is conditioned on the end of the one before it, inside of the loop.",
        "A teacher of one window, with the end of the previous one as its condition.",
    ),
)
