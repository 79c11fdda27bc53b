"""Train the teacher of ``builtin:digits``, and the classifier whose features evaluate its samples.

A plain diffusers script: a DDPM (v_prediction, linear betas) on scikit-learn's 1797 gray 8x8 digits.

    pip install scikit-learn
    python examples/train_digits_teacher.py --output fmm_distill/builtin/digits

About 10 minutes on one CPU core. The same seed on the same versions and thread count gives the same
weights. ``--prediction epsilon`` trains the same network on the noise instead.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from fmm_distill.evaluation.digits import DigitsClassifier


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images in [-1, 1], shape (1797, 1, 8, 8), and their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images, torch.tensor(data.target)


def train_classifier(images: torch.Tensor, labels: torch.Tensor) -> tuple[DigitsClassifier, float]:
    """Train a classifier on 1437 images and return it with its accuracy on the other 360."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    network = DigitsClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(40):
        for batch in train[torch.randperm(len(train))].split(64):
            loss = F.cross_entropy(network.logits(images[batch] / 2 + 0.5), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        correct = network.logits(images[test] / 2 + 0.5).argmax(1) == labels[test]
    return network, correct.float().mean().item()


def new_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift",
        time_embedding_dim=128,
        # Without dropout the network memorizes the 1797 images and its ODE branches between neighboring noises.
        dropout=0.1,
    )


def train_unet(images: torch.Tensor, scheduler: DDPMScheduler, steps: int, batch: int, lr: float) -> UNet2DModel:
    """Train a network by the unweighted loss of the scheduler's prediction; return its exponential moving average."""
    network = new_unet()
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        x_0 = images[torch.randint(len(images), (batch,))]
        noise = torch.randn_like(x_0)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (batch,))
        prediction = network(scheduler.add_noise(x_0, noise, timestep), timestep).sample
        is_epsilon = scheduler.config.prediction_type == "epsilon"
        loss = F.mse_loss(prediction, noise if is_epsilon else scheduler.get_velocity(x_0, noise, timestep))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        # The warm-up of the decay removes the random start from the average.
        decay = min(0.9995, (1 + step) / (10 + step))
        with torch.no_grad():
            for averaged, current in zip(average.parameters(), network.parameters(), strict=True):
                averaged.lerp_(current, 1 - decay)
        if step % 500 == 0 or step == steps - 1:
            print(f"step {step:6d}  loss {loss.item():.4f}", flush=True)
    return average.eval()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance of two sets of features, in float64."""
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b)
    # The trace of the matrix root from eigenvalues; rounding makes some of them negative or complex.
    return float(mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(eigenvalues.astype(complex)).real.sum())


@torch.no_grad()
def features_of_samples(unet: UNet2DModel, scheduler: DDPMScheduler, classifier: DigitsClassifier) -> np.ndarray:
    """Return the features of 1797 samples of 100 DDIM steps."""
    ddim = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    ddim.set_timesteps(100)
    x = torch.randn(1797, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for timestep in ddim.timesteps:
        x = ddim.step(unet(x, timestep).sample, timestep, x).prev_sample
    return classifier((x / 2 + 0.5).clamp(0, 1)).double().numpy()


CARD = """---
library_name: diffusers
license: cc-by-4.0
pipeline_tag: unconditional-image-generation
tags: [ddpm, digits]
---
# 8x8 gray digits: a small DDPM

`UNet2DModel` ({parameters} parameters), `DDPMScheduler` (linear betas, {prediction}), trained from scratch on
the 1797 images of scikit-learn's `load_digits` (Optical Recognition of Handwritten Digits, E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0) by `examples/train_digits_teacher.py`
({steps} steps of {batch} images). Images are in [-1, 1].

- Sample quality: Fréchet distance {frechet:.3f} between 1797 samples of 100 DDIM steps and the 1797 images it
  was trained on, in the 32 features of `classifier.safetensors`, images clipped to [0, 1] and not rounded.
  Two random halves of the data are {floor:.3f} apart.
- The classifier was trained on 1437 of the images; its accuracy on the other 360 is {accuracy:.1%}.
- `images.safetensors` holds the images (`images`, uint8 levels 0 to 16) and `labels`.

A teaching aid for fast tests of few-step distillation; of no use for anything else.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prediction", choices=("v_prediction", "epsilon"), default="v_prediction")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    images, labels = digits()
    classifier, accuracy = train_classifier(images, labels)
    print(f"classifier accuracy {accuracy:.4f}")
    scheduler = DDPMScheduler(beta_schedule="linear", prediction_type=arguments.prediction, clip_sample=False)
    unet = train_unet(images, scheduler, arguments.steps, arguments.batch, arguments.lr)
    samples = features_of_samples(unet, scheduler, classifier)
    with torch.no_grad():
        real = classifier(images / 2 + 0.5).double().numpy()
    order = np.random.default_rng(0).permutation(len(real))
    facts = {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "steps": arguments.steps,
        "prediction": arguments.prediction,
        "batch": arguments.batch,
        "frechet": frechet(samples, real),
        "floor": frechet(real[order[:898]], real[order[898:]]),
        "accuracy": accuracy,
    }
    print(json.dumps(facts))
    arguments.output.mkdir(parents=True, exist_ok=True)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(arguments.output, safe_serialization=True)
    save_file(classifier.state_dict(), arguments.output / "classifier.safetensors")
    levels = ((images + 1) * 8).round().to(torch.uint8)
    save_file({"images": levels, "labels": labels.to(torch.uint8)}, arguments.output / "images.safetensors")
    (arguments.output / "README.md").write_text(CARD.format(**facts), encoding="utf-8")


if __name__ == "__main__":
    main()
