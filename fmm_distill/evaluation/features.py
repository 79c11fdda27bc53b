"""Feature networks: images in [0, 1] to vectors and, where there are any, class scores, seen once for all metrics.

What happens to an image on the way (clipping, rounding, resizing, channels) is done here and said here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants

from fmm_distill.config.settings import FEATURES
from fmm_distill.errors import UserError
from fmm_distill.evaluation.digits import load_digits_classifier
from fmm_distill.io.hashes import sha256_of_file
from fmm_distill.teachers.load import BUILTIN

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, UInt8
    from torch import Tensor, nn

__all__ = ["Features", "Seen", "as_bytes", "check_features", "open_features", "unit_images"]

# torch-fidelity's file, by the name and in the place where it looks for it; the name ends in its sha256's first digits.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
WITHOUT = (
    "without it: evaluation.features: none measures endpoint error, consistency, seconds and memory, and the path of a "
    "TorchScript module of your own (*.pt) takes Inception's place"
)


@dataclass(frozen=True)
class Seen:
    """What a network sees in some images.

    Attributes:
        features: shape ``[batch, d]``.
        scores: of classes, before the softmax, shape ``[batch, classes]``; None: the network gives none.
    """

    features: Float[Tensor, "batch d"]
    scores: Float[Tensor, "batch classes"] | None


@dataclass(frozen=True)
class Features:
    """A feature network with all that is done to an image before it.

    Attributes:
        about: which features they are, in words, for the protocol.
        pixels: what is done to an image on the way, in words.
        digest: of the weights and of the way: the same where the same image has the same features.
        count: numbers of one image.
        classes: scores of one image; 0: none.
        shape: of one image; the channels of an image that is shown may be 1 where these are 3 and ``widens``.
    """

    about: str
    pixels: str
    digest: str
    count: int
    classes: int
    shape: tuple[int, ...]
    widens: bool
    network: nn.Module
    see: Callable[[Tensor], Seen]

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "batch channels height width"]) -> Seen:
        """Features of float images in [0, 1].

        Raises:
            ValueError: on images that are no floats in [0, 1], or of another shape: mistakes that would only shift a
                distance.
        """
        if not images.is_floating_point():
            raise ValueError(f"images of {images.dtype}; wanted floats in [0, 1]")
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}; wanted {self.shape}")
        low, high = images.aminmax()
        if low < 0 or high > 1:
            raise ValueError(f"images from {low:g} to {high:g}; wanted the range 0 to 1, not -1 to 1 nor 0 to 255")
        return self.see(images.expand(-1, 3, -1, -1) if self.widens else images)

    def to(self, device: torch.device) -> Features:
        """The same on ``device``."""
        self.network.to(device)
        return self


def unit_images(decoded: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
    """Decoded samples, of range -1 to 1, as images in [0, 1]: clipped, not rounded."""
    return (decoded / 2 + 0.5).clamp(0, 1)


def as_bytes(images: Float[Tensor, "batch channels height width"]) -> UInt8[Tensor, "batch channels height width"]:
    """Images in [0, 1] as a file keeps them: rounded, where a cast alone would cut off."""
    return (images * 255).round().to(torch.uint8)


def check_features(name: str, shape: tuple[int, ...]) -> None:
    """Refuse features that can't be had or don't fit images of this shape, before anything long starts.

    Raises:
        UserError: with what is missing, where to put it and what works without.
    """
    open_features(name, shape)


def open_features(name: str, shape: tuple[int, ...]) -> Features | None:
    """The network of ``evaluation.features``; None: none.

    Args:
        shape: channels, height and width of the images that it is shown.

    Raises:
        UserError: if it can't be had or does not fit.
    """
    if name == "none":
        return None
    if len(shape) != 3:
        raise UserError(f"evaluation.features: {name} looks at images, the teacher makes {_shown(shape)}; wanted none")
    if name == "digits":
        return _digits(shape)
    return _inception(shape) if name in FEATURES else _from_file(name, shape)


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _digits(shape: tuple[int, ...]) -> Features:
    if shape != (1, 8, 8):
        raise UserError(
            f"evaluation.features: digits looks at 1 x 8 x 8 images, the teacher makes {_shown(shape)}: take "
            "inception, or a TorchScript module of your own (*.pt), both with --data or evaluation.reference; or none"
        )
    file = BUILTIN / "digits" / "classifier.safetensors"
    network = load_digits_classifier(file.parent)

    def see(images: Tensor) -> Seen:
        features = network(images)
        return Seen(features, network.head(features))

    about = "32 features of the classifier in builtin:digits"
    return Features(
        about,
        _NOT_ROUNDED,
        sha256_of_file(file),
        network.num_features,
        10,
        shape,
        widens=False,
        network=network,
        see=see,
    )


_NOT_ROUNDED = "clipped to [0, 1], not rounded, not resized"


def _from_file(name: str, shape: tuple[int, ...]) -> Features:
    """A TorchScript module as ``torch.jit.save`` wrote it, tried on one image."""
    path, wanted = Path(name).expanduser(), "wanted a TorchScript module as torch.jit.save writes it"
    if not path.is_file():
        raise UserError(f"evaluation.features {name}: no such file; {wanted}")
    try:
        network = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"evaluation.features {name}: can't be opened ({_line(error)}); {wanted}") from error
    shown = _shown((1, *shape))
    try:
        with torch.no_grad():
            found = network(torch.full((1, *shape), 0.5))
    except Exception as error:
        raise UserError(
            f"evaluation.features {name}: failed on one image, {shown} ({_line(error)}); wanted a module that takes "
            "float images in [0, 1] of the teacher's shape"
        ) from error
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != 1 or not found.is_floating_point():
        got = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise UserError(f"evaluation.features {name}: made {got} of one image, {shown}; wanted floats of shape [1, d]")
    if not found.isfinite().all():
        raise UserError(f"evaluation.features {name}: not all features of a gray image are numbers; wanted finite ones")
    digest = sha256_of_file(path)
    about = f"{found.shape[1]} features of {path.name} (TorchScript, sha256 {digest})"
    return Features(
        about,
        _NOT_ROUNDED,
        digest,
        found.shape[1],
        0,
        shape,
        widens=False,
        network=network,
        see=lambda images: Seen(network(images), None),
    )


def _inception(shape: tuple[int, ...]) -> Features:
    """The network of the published Fréchet inception distances (Heusel et al. 2017, arXiv 1706.08500)."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(f"evaluation.features: inception needs `pip install fmm-distill[fid]`; {WITHOUT}") from error
    path = _inception_file()
    network: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))

    def see(images: Tensor) -> Seen:
        features, scores = network(as_bytes(images))
        return Seen(features.float(), scores.float())

    digest = sha256_of_file(path)
    gray = ", gray repeated to three channels" if shape[0] == 1 else ""
    return Features(
        f"2048 Inception features (torch-fidelity, sha256 {digest[:16]}...)",
        f"clipped to [0, 1], rounded to uint8{gray}, resized to 299 as in TensorFlow 1 (bilinear, no antialiasing)",
        f"{digest} uint8 299",
        2048,
        1008,
        shape,
        widens=shape[0] == 1,
        network=network,
        see=see,
    )


def _inception_file() -> Path:
    """Inception's weights, fetched if they are not there.

    Raises:
        UserError: if they can't be fetched, or are not those that everyone compares with.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    bring = f"bring {INCEPTION_FILE} from {INCEPTION_URL} and put it into {path.parent}"
    if not path.is_file():
        reason = "HF_HUB_OFFLINE is set"
        if not constants.HF_HUB_OFFLINE:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix="6726825d", progress=False)
            except (OSError, RuntimeError) as error:
                reason = _line(error)
        if not path.is_file():
            raise UserError(f"evaluation.features: inception has no weights here ({reason}): {bring}; {WITHOUT}")
    if not sha256_of_file(path).startswith("6726825d"):
        raise UserError(f"evaluation.features: {path} is not torch-fidelity's file (its sha256 is another): {bring}")
    return path


def _line(error: Exception) -> str:
    """The last line of a message: TorchScript's own errors begin with its stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
