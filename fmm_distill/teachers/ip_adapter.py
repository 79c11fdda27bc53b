"""The settings of an IP-Adapter (Ye et al. 2023, arXiv 2308.06721), by which a teacher also attends to an image."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FOLDER", "IMAGE", "IpAdapter"]

# The folder of the weights in a pipeline's.
FOLDER = "ip_adapter"
# The keyword of a pipeline's call by which it is given the image.
IMAGE = "ip_adapter_image"


@dataclass(frozen=True)
class IpAdapter:
    """An adapter, as ``load_ip_adapter`` of stock pipelines names it.

    Attributes:
        source: a Hub id or a folder.
        weight_name: the file of its weights.
        subfolder: the folder of that file.
        image_encoder_folder: the folder of the image encoder in ``subfolder``; with a slash, in ``source``. It is not
            opened where the pipeline has an image encoder.
        scale: the weight of the image in each attention layer.
        revision: branch, tag or commit on the Hub.
        license: entries of its model card, ``license`` and others, where they are known.
    """

    source: str
    weight_name: str
    subfolder: str = ""
    image_encoder_folder: str = "image_encoder"
    scale: float = 1.0
    revision: str | None = None
    license: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as plain values."""
        return asdict(self)
