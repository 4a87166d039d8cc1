"""Nothing: see the package."""

from torchvision import empty

empty(__name__)
