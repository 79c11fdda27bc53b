"""Train the inpainting teacher: an autoencoder, then a network that predicts the noise of latents around a hole.

    python -m experiments.inpainting.teacher --data DIR --output DIR

Both trainings end after a number of CPU seconds of this process, so that other programs on the machine don't change
them much. ``teacher.json`` has what was trained and for how long.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from experiments.inpainting.budget import BUDGETS
from experiments.inpainting.holes import masked, on_latents, random_holes
from experiments.inpainting.networks import FACTOR, new_autoencoder, new_network, new_scheduler, pipeline_of
from fmm_distill.config.settings import DataSettings
from fmm_distill.data.samples import load_images
from fmm_distill.io.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from experiments.inpainting.budget import Budget

__all__ = ["encode", "load_pixels", "make_teacher"]

KL_WEIGHT = 1e-6


def load_pixels(data: Path, split: str, size: int) -> Tensor:
    """Return all images of a split, uint8, resized."""
    return load_images(DataSettings(source=str(data), split=split, fit="crop"), (3, size, size)).pixels


class Batches:
    """Batches of images in [-1, 1], each mirrored with probability 1/2."""

    def __init__(self, pixels: Tensor, size: int, seed: int) -> None:
        self.pixels, self.size, self.generator = pixels, size, torch.Generator().manual_seed(seed)

    def images(self) -> Tensor:
        """Return a batch of images."""
        index = torch.randint(len(self.pixels), (self.size,), generator=self.generator)
        mirrored = torch.rand(self.size, 1, 1, 1, generator=self.generator) < 0.5
        images = self.pixels[index].float() / 127.5 - 1
        return torch.where(mirrored, images.flip(-1), images)

    def masks(self) -> Tensor:
        """Return a hole for each image of a batch."""
        return random_holes(self.size, self.pixels.shape[-1], self.generator)

    def noise(self, shape: torch.Size) -> Tensor:
        """Return normal noise."""
        return torch.randn(shape, generator=self.generator)

    def timesteps(self) -> Tensor:
        """Return a timestep for each image of a batch."""
        return torch.randint(1000, (self.size,), generator=self.generator)


def train(
    module: nn.Module, loss_of: Callable[[], Tensor], *, seconds: float, rate: float, steps: int, decay: float
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a module until its CPU seconds or steps are over, with half a cosine down.

    Returns:
        Its moving average, and what was measured.
    """
    average = copy.deepcopy(module).requires_grad_(False).eval()
    pairs = [list(each.parameters()) for each in (average, module)]
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.99))
    began, step, losses = time.process_time(), 0, list[float]()
    while step < steps and (spent := time.process_time() - began) < seconds:
        progress = max(step / steps, spent / seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            # The warm-up of the decay removes the random start from the average.
            torch._foreach_lerp_(*pairs, 1 - min(decay, (1 + step) / (10 + step)))
        step += 1
        losses.append(loss.item())
        if step % 200 == 0:
            print(f"step {step:6d}  loss {sum(losses[-200:]) / 200:.4f}  {spent:.0f} s", flush=True)
    last = losses[-200:]
    parameters = sum(p.numel() for p in module.parameters())
    found = {"steps": step, "cpu_seconds": time.process_time() - began, "loss": sum(last) / len(last)}
    return average, found | {"parameters": parameters, "learning_rate": rate}


def train_autoencoder(budget: Budget, pixels: Tensor) -> tuple[AutoencoderKL, dict[str, Any]]:
    """Train the autoencoder on squared errors, and scale its latents to unit variance."""
    torch.manual_seed(0)
    autoencoder, batches = new_autoencoder(budget), Batches(pixels, budget.autoencoder_batch, 0)

    def loss() -> Tensor:
        images = batches.images()
        posterior = autoencoder.encode(images).latent_dist
        latents = posterior.mean + posterior.std * batches.noise(posterior.mean.shape)
        return F.mse_loss(autoencoder.decode(latents).sample, images) + KL_WEIGHT * posterior.kl().mean()

    average, found = train(
        autoencoder,
        loss,
        seconds=budget.autoencoder_seconds,
        rate=budget.autoencoder_rate,
        steps=budget.maximum_steps,
        decay=0.99,
    )
    with torch.no_grad():
        images = pixels[:1024].float() / 127.5 - 1
        latents = average.encode(images).latent_dist.mean
        error = F.mse_loss(average.decode(latents).sample.clamp(-1, 1), images)
    average.register_to_config(scaling_factor=1 / latents.std().item())
    # Of pixels in [-1, 1], on images of the training split.
    return average, found | {"rms_error": error.sqrt().item(), "scaling_factor": average.config.scaling_factor}


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents of images in [-1, 1], and what the network is given of them: masks, latents of the masked images.

    These are the channels that the stock pipeline joins to its sample, with the mode of the encoder's distribution.
    """
    both = autoencoder.encode(torch.cat([images, masked(images, masks)])).latent_dist.mode()
    latents, visible = (both * autoencoder.config.scaling_factor).chunk(2)
    return latents, torch.cat([on_latents(masks, FACTOR), visible], 1)


def train_network(budget: Budget, pixels: Tensor, autoencoder: AutoencoderKL) -> tuple[nn.Module, dict[str, Any]]:
    """Train the network to predict the noise, given the mask and the image without its hole."""
    torch.manual_seed(1)
    network, scheduler, batches = new_network(budget), new_scheduler(), Batches(pixels, budget.teacher_batch, 1)
    # The network is called with the embedding of the empty prompt, as in the pipeline.
    pipeline = pipeline_of(autoencoder, network)
    with torch.no_grad():
        text = pipeline.encode_prompt("", "cpu", budget.teacher_batch, do_classifier_free_guidance=False)[0]

    def loss() -> Tensor:
        latents, given = encode(autoencoder, batches.images(), batches.masks())
        noise, timesteps = batches.noise(latents.shape), batches.timesteps()
        noised = scheduler.add_noise(latents, noise, timesteps)
        return F.mse_loss(network.train()(torch.cat([noised, given], 1), timesteps, text).sample, noise)

    found = train(
        network,
        loss,
        seconds=budget.teacher_seconds,
        rate=budget.teacher_rate,
        steps=budget.maximum_steps,
        decay=budget.ema,
    )
    return found[0], found[1] | {"text_encoder": pipeline.text_encoder}


def make_teacher(budget: Budget, data: Path, output: Path) -> None:
    """Train the teacher and save it as a stock pipeline; a trained autoencoder is used again."""
    pixels = load_pixels(data, "train", budget.size)
    part = output / "autoencoder"
    if not (output / "autoencoder.json").is_file():
        autoencoder, found = train_autoencoder(budget, pixels)
        autoencoder.save_pretrained(part)
        write_text(output / "autoencoder.json", json.dumps(found, indent=2) + "\n")
    autoencoder = AutoencoderKL.from_pretrained(part).eval()
    about = {"autoencoder": json.loads((output / "autoencoder.json").read_text(encoding="utf-8"))}
    network, about["network"] = train_network(budget, pixels, autoencoder)
    pipeline = pipeline_of(autoencoder, network)
    # The one that the network was trained with.
    pipeline.register_modules(text_encoder=about["network"].pop("text_encoder"))
    write_text(output / "teacher.json", json.dumps(about, indent=2) + "\n")
    # diffusers writes model_index.json last, so its presence marks a finished training.
    pipeline.save_pretrained(output / "teacher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of parquet files")
    parser.add_argument("--output", type=Path, required=True, help="the pipeline is in its folder teacher")
    parser.add_argument("--budget", choices=list(BUDGETS), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    make_teacher(BUDGETS[options.budget], options.data, options.output)


if __name__ == "__main__":
    main()
