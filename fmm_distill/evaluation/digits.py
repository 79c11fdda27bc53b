"""The classifier whose features are the metrics' features of 8x8 digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor

__all__ = ["DigitsClassifier", "load_digits_classifier"]


class DigitsClassifier(nn.Module):
    """A small convolutional classifier of 8x8 gray digits; its last hidden layer is the feature.

    ``examples/train_digits_teacher.py`` trains it; its weights are shipped with the built-in teacher.
    """

    num_features = 32

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, self.num_features),
            nn.Tanh(),
        )
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, images: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch 32"]:
        """Return the features of images in [0, 1]."""
        features: Tensor = self.body(images.to(self.head.weight.dtype) * 2 - 1)
        return features

    def logits(self, images: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch 10"]:
        """Return the class scores of images in [0, 1], before the softmax."""
        scores: Tensor = self.head(self(images))
        return scores


def load_digits_classifier(folder: Path) -> DigitsClassifier:
    """Return the classifier with the weights of ``folder/classifier.safetensors``."""
    network = DigitsClassifier()
    network.load_state_dict(load_file(folder / "classifier.safetensors"))
    return network.eval().requires_grad_(False)
