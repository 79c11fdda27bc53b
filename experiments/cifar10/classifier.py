"""Train a small CIFAR-10 classifier, whose features measure samples where Inception's weights are missing.

    python -m experiments.cifar10.classifier --images cifar10.safetensors --output DIR

Writes ``classifier.pt``, a TorchScript module from images in [0, 1], shape ``[batch, 3, size, size]``, to the features
before the last layer, shape ``[batch, width]``; the weights as safetensors; and ``classifier.json`` with its accuracy
on the test images. It is a residual network of nine layers and takes about half a minute on a data-center GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from fmm_distill.io.files import write_text

MEAN, DEVIATION = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


def convolution(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


class Residual(nn.Module):
    """Two convolutions with a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(width, width), convolution(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of both paths."""
        return x + self.body(x)


class Features(nn.Module):
    """Images in [0, 1] to ``width`` features: the mean over the last layer, an eighth of the image's size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        quarter, half = max(width // 4, 1), max(width // 2, 1)
        self.body = nn.Sequential(
            convolution(3, quarter),
            convolution(quarter, half),
            nn.MaxPool2d(2),
            Residual(half),
            convolution(half, width),
            nn.MaxPool2d(2),
            convolution(width, width),
            nn.MaxPool2d(2),
            Residual(width),
        )
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).reshape(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features of shape ``[batch, width]`` for images of shape ``[batch, 3, size, size]``."""
        return self.body((images.to(self.mean.dtype) - self.mean) / self.deviation).mean((2, 3))


def augmented(pixels: torch.Tensor) -> torch.Tensor:
    """Return images in [0, 1], mirrored with probability 1/2 and shifted by up to an eighth, with reflected borders."""
    count, _, height, width = pixels.shape
    device = pixels.device
    images = pixels.float() / 255
    images = torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.5, images.flip(-1), images)
    margin = height // 8
    padded = F.pad(images, (margin,) * 4, mode="reflect")
    down, right = (torch.randint(0, 2 * margin + 1, (count, 1), device=device) for _ in range(2))
    rows = (torch.arange(height, device=device) + down)[:, None, :, None]
    columns = (torch.arange(width, device=device) + right)[:, None, None, :]
    each = torch.arange(count, device=device)[:, None, None, None]
    return padded[each, torch.arange(3, device=device)[None, :, None, None], rows, columns]


def train(
    pixels: torch.Tensor, labels: torch.Tensor, *, width: int, epochs: int, batch: int, lr: float, precision: str
) -> tuple[Features, nn.Linear]:
    """Train features and head with one cycle of the learning rate; ``precision`` is ``"bf16"`` or ``"fp32"``."""
    device = pixels.device
    features = Features(width).to(device, memory_format=torch.channels_last)
    head = nn.Linear(width, 10).to(device)
    both = nn.ModuleList([features, head])
    batch = min(batch, len(pixels))
    in_epoch = len(pixels) // batch
    steps = epochs * in_epoch
    optimizer = torch.optim.SGD(both.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.2)
    for step in range(steps):
        if step % in_epoch == 0:
            order = torch.randperm(len(pixels), device=device)
        chosen = order[step % in_epoch * batch :][:batch]
        images = augmented(pixels[chosen]).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(head(features(images)).float(), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step} of {steps}  loss {loss.item():.3f}", flush=True)
    return features.eval().requires_grad_(False), head.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(features: Features, head: nn.Linear, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the fraction of correctly classified images, without augmentation, in float32."""
    right = [
        (head(features(part.float() / 255)).argmax(1) == truth).float()
        for part, truth in zip(pixels.split(1000), labels.split(1000), strict=True)
    ]
    return torch.cat(right).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="images.safetensors of experiments.cifar10")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--width", type=int, default=256, help="features")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of training")
    options = parser.parse_args()
    torch.manual_seed(0)
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = {name: value.to(device) for name, value in load_file(options.images).items()}
    sizes = {"width": options.width, "epochs": options.epochs, "batch": options.batch, "lr": options.lr}
    sizes["precision"] = options.precision
    features, head = train(images["train"], images["train_labels"], **sizes)
    found = {"accuracy": accuracy(features, head, images["test"], images["test_labels"])}
    found |= sizes | {"parameters": sum(p.numel() for p in features.parameters()), "test_images": len(images["test"])}
    found["seconds"] = time.monotonic() - started
    options.output.mkdir(parents=True, exist_ok=True)
    features, head = features.cpu().to(memory_format=torch.contiguous_format), head.cpu()
    tensors = {f"features.{name}": value.contiguous() for name, value in features.state_dict().items()}
    tensors |= {f"head.{name}": value for name, value in head.state_dict().items()}
    save_file(tensors, options.output / "classifier.safetensors")
    torch.jit.trace(features, torch.rand(2, *images["test"].shape[1:])).save(str(options.output / "classifier.pt"))
    # Written last: its presence means that the classifier is complete.
    write_text(options.output / "classifier.json", json.dumps(found, indent=2) + "\n")
    print(f"test accuracy {found['accuracy']:.4f} in {found['seconds']:.0f} s")


if __name__ == "__main__":
    main()
