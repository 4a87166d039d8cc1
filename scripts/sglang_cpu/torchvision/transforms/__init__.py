"""The names of interpolations, which transformers reads when it is imported; nothing else."""

from enum import Enum

from torchvision import empty


class InterpolationMode(Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


empty(__name__)
