"""Feature networks for the Fréchet distance: images in [0, 1] to vectors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import nn

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["DigitsClassifier", "FileFeatures", "load_digits_classifier", "load_feature_file"]


class DigitsClassifier(nn.Module):
    """A small convolutional classifier of 8x8 grey digits; its last hidden layer is the feature.

    Trained by ``examples/train_digits_teacher.py``, shipped beside the built-in teacher.
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
        """Features of images in [0, 1]."""
        features: Tensor = self.body(images.to(self.head.weight.dtype) * 2 - 1)
        return features

    def logits(self, images: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch 10"]:
        """Class scores of images in [0, 1]."""
        scores: Tensor = self.head(self(images))
        return scores


def load_digits_classifier(folder: Path) -> DigitsClassifier:
    """The classifier whose weights stand in ``folder/classifier.safetensors``."""
    network = DigitsClassifier()
    network.load_state_dict(load_file(folder / "classifier.safetensors"))
    return network.eval().requires_grad_(False)


class FileFeatures(nn.Module):
    """A TorchScript module as a feature network.

    Attributes:
        num_features: numbers of one image.
        sha256: of its file.
    """

    def __init__(self, scripted: nn.Module, num_features: int, sha256: str) -> None:
        super().__init__()
        self.scripted, self.num_features, self.sha256 = scripted, num_features, sha256

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """Features of images in [0, 1]."""
        features: Tensor = self.scripted(images).double()
        return features


def load_feature_file(name: str, shape: tuple[int, ...]) -> FileFeatures:
    """A TorchScript module as ``torch.jit.save`` wrote it, tried on one image.

    Args:
        name: path of the file.
        shape: channels, height and width of the images that it will be shown.

    Raises:
        UserError: if there is none, or it does not make of one such image ``[1, d]`` finite numbers.
    """
    path, wanted = Path(name).expanduser(), "wanted a TorchScript module as torch.jit.save writes it"
    if not path.is_file():
        raise UserError(f"evaluation.features {name}: no such file; {wanted}")
    try:
        scripted = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"evaluation.features {name}: can't be opened ({_line(error)}); {wanted}") from error
    shown = " x ".join(map(str, (1, *shape)))
    try:
        with torch.no_grad():
            found = scripted(torch.full((1, *shape), 0.5))
    except Exception as error:
        raise UserError(
            f"evaluation.features {name}: failed on one image, {shown} ({_line(error)}); wanted a module that takes "
            "float images in [0, 1] of the teacher's shape"
        ) from error
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != 1 or not found.is_floating_point():
        got = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise UserError(f"evaluation.features {name}: made {got} of one image, {shown}; wanted floats of shape [1, d]")
    if not found.isfinite().all():
        raise UserError(f"evaluation.features {name}: not all features of a grey image are numbers; wanted finite ones")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileFeatures(scripted, found.shape[1], sha256)


def _line(error: Exception) -> str:
    """The last line of a message: TorchScript's own errors begin with its stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
