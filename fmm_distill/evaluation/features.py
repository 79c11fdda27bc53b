"""Feature networks: images in [0, 1] to feature vectors and, for classifiers, class scores.

All preprocessing of an image (clipping, rounding, resizing, channels) is done and described here.
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

__all__ = ["FeatureNetwork", "FeatureOutput", "as_bytes", "check_features", "open_features", "unit_images"]

# The file of torch-fidelity, with the name and folder that it expects; the name ends in the first digits of its sha256.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
ALTERNATIVES = (
    "alternatives: evaluation.features: none measures endpoint error, consistency, seconds and memory; the path of a "
    "TorchScript module of your own (*.pt) replaces Inception"
)

_NOT_ROUNDED = "clipped to [0, 1], not rounded, not resized"


@dataclass(frozen=True)
class FeatureOutput:
    """Outputs of a feature network for a batch of images.

    Attributes:
        features: shape ``[batch, d]``.
        scores: of classes, before the softmax, shape ``[batch, classes]``; None: the network has no classes.
    """

    features: Float[Tensor, "batch d"]
    scores: Float[Tensor, "batch classes"] | None


@dataclass(frozen=True)
class FeatureNetwork:
    """A feature network with its preprocessing.

    Attributes:
        description: of the features, for the protocol.
        preprocessing: of the images, for the protocol.
        digest: of weights and preprocessing; equal digests mean equal features of equal images.
        width: the number of features of an image.
        classes: the number of class scores of an image; 0: no classes.
        shape: channels, height and width of an image.
        repeats_gray: the one channel of a gray image is repeated to three.
        forward: features of images in [0, 1].
    """

    description: str
    preprocessing: str
    digest: str
    width: int
    classes: int
    shape: tuple[int, ...]
    repeats_gray: bool
    network: nn.Module
    forward: Callable[[Tensor], FeatureOutput]

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "batch channels height width"]) -> FeatureOutput:
        """Return the features of float images in [0, 1].

        Raises:
            ValueError: on other ranges, dtypes or shapes: a distance would change without any other sign of them.
        """
        if not images.is_floating_point():
            raise ValueError(f"expected float images in [0, 1], got {images.dtype}")
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"expected images of shape {self.shape}, got {tuple(images.shape[1:])}")
        low, high = images.aminmax()
        if low < 0 or high > 1:
            raise ValueError(f"expected images in the range 0 to 1, got {low:g} to {high:g}")
        return self.forward(images.expand(-1, 3, -1, -1) if self.repeats_gray else images)

    def to(self, device: torch.device) -> FeatureNetwork:
        """Move the network to ``device``."""
        self.network.to(device)
        return self


def unit_images(decoded: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
    """Return decoded samples in [-1, 1] as images in [0, 1]: clipped, not rounded."""
    return (decoded / 2 + 0.5).clamp(0, 1)


def as_bytes(images: Float[Tensor, "batch channels height width"]) -> UInt8[Tensor, "batch channels height width"]:
    """Return images in [0, 1] as the uint8 of an image file: rounded, where a cast alone would truncate."""
    # Inputs are in [0, 1] here, so that the cast does not wrap around.
    return (images * 255).round().to(torch.uint8)


def check_features(name: str, shape: tuple[int, ...]) -> None:
    """Check that features are available and accept images of this shape.

    Raises:
        UserError: with the missing file, its folder and the alternatives.
    """
    open_features(name, shape)


def open_features(name: str, shape: tuple[int, ...]) -> FeatureNetwork | None:
    """Return the network of ``evaluation.features``; None for "none".

    Args:
        shape: channels, height and width of the images.

    Raises:
        UserError: if the network is not available or does not accept images of this shape.
    """
    if name == "none":
        return None
    if len(shape) != 3:
        raise UserError(f"evaluation.features: {name} expects images, the teacher generates {_shown(shape)}; try none")
    if name == "digits":
        return _digits(shape)
    return _inception(shape) if name in FEATURES else _from_file(name, shape)


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _digits(shape: tuple[int, ...]) -> FeatureNetwork:
    if shape != (1, 8, 8):
        raise UserError(
            f"evaluation.features: digits expects 1 x 8 x 8 images, the teacher generates {_shown(shape)}; try "
            "inception or a TorchScript module of your own (*.pt), both with --data or evaluation.reference, or none"
        )
    file = BUILTIN / "digits" / "classifier.safetensors"
    network = load_digits_classifier(file.parent)

    def forward(images: Tensor) -> FeatureOutput:
        features = network(images)
        return FeatureOutput(features, network.head(features))

    return FeatureNetwork(
        "32 features of the classifier in builtin:digits",
        _NOT_ROUNDED,
        sha256_of_file(file),
        network.num_features,
        10,
        shape,
        repeats_gray=False,
        network=network,
        forward=forward,
    )


def _from_file(name: str, shape: tuple[int, ...]) -> FeatureNetwork:
    """Return a TorchScript module that was saved by ``torch.jit.save``, after a trial on one image."""
    path, expected = Path(name).expanduser(), "expected a TorchScript module, as torch.jit.save writes it"
    if not path.is_file():
        raise UserError(f"evaluation.features {name}: no such file; {expected}")
    try:
        # To the CPU: the module may have been saved on a GPU that is not here.
        network = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"evaluation.features {name}: can't be opened ({_line(error)}); {expected}") from error
    shown = _shown((1, *shape))
    try:
        with torch.no_grad():
            found = network(torch.full((1, *shape), 0.5))
    except Exception as error:
        raise UserError(
            f"evaluation.features {name}: failed on one image, {shown} ({_line(error)}); expected a module of float "
            "images in [0, 1] with the teacher's shape"
        ) from error
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != 1 or not found.is_floating_point():
        got = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise UserError(
            f"evaluation.features {name}: expected floats of shape [1, d] from one image, {shown}; got {got}"
        )
    if not found.isfinite().all():
        raise UserError(f"evaluation.features {name}: expected finite features of a gray image; got nan or inf")
    digest = sha256_of_file(path)
    return FeatureNetwork(
        f"{found.shape[1]} features of {path.name} (TorchScript, sha256 {digest})",
        _NOT_ROUNDED,
        digest,
        found.shape[1],
        0,
        shape,
        repeats_gray=False,
        network=network,
        forward=lambda images: FeatureOutput(network(images), None),
    )


def _inception(shape: tuple[int, ...]) -> FeatureNetwork:
    """Return the network of the published Fréchet inception distances (Heusel et al. 2017, arXiv 1706.08500)."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(
            f"evaluation.features: inception needs `pip install fmm-distill[fid]`; {ALTERNATIVES}"
        ) from error
    path = _inception_file()
    # torch-fidelity computes the inception score of the logits without bias as well.
    network: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))

    def forward(images: Tensor) -> FeatureOutput:
        features, scores = network(as_bytes(images))
        return FeatureOutput(features.float(), scores.float())

    digest = sha256_of_file(path)
    gray = ", gray repeated to three channels" if shape[0] == 1 else ""
    return FeatureNetwork(
        f"2048 Inception features (torch-fidelity, sha256 {digest[:16]}...)",
        f"clipped to [0, 1], rounded to uint8{gray}, resized to 299 as in TensorFlow 1 (bilinear, no antialiasing)",
        f"{digest} uint8 299",
        2048,
        1008,
        shape,
        repeats_gray=shape[0] == 1,
        network=network,
        forward=forward,
    )


def _inception_file() -> Path:
    """Return the file of Inception's weights; a missing file is downloaded.

    Raises:
        UserError: if the download fails, or the file is not the one of published distances.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    remedy = f"download {INCEPTION_FILE} from {INCEPTION_URL} into {path.parent}"
    if not path.is_file():
        reason = "HF_HUB_OFFLINE is set"
        if not constants.HF_HUB_OFFLINE:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix="6726825d", progress=False)
            except (OSError, RuntimeError) as error:
                reason = _line(error)
        if not path.is_file():
            raise UserError(
                f"evaluation.features: the weights of inception are missing ({reason}): {remedy}; {ALTERNATIVES}"
            )
    if not sha256_of_file(path).startswith("6726825d"):
        raise UserError(f"evaluation.features: expected torch-fidelity's file, got another sha256 of {path}: {remedy}")
    return path


def _line(error: Exception) -> str:
    """Return the last line of a message: errors of TorchScript begin with its stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
