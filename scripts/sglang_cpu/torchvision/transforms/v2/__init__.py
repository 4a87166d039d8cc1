"""As `torchvision.transforms`."""

from torchvision import empty
from torchvision.transforms import InterpolationMode as InterpolationMode

empty(__name__)
