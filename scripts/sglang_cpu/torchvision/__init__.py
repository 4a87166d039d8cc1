"""A stand-in: SGLang and transformers import torchvision for images, which no text model has; its wheels for CUDA do
not load beside torch for CPUs. Every class of it raises when it is made."""

import sys
from types import ModuleType

__version__ = "0.28.0"


def empty(name: str) -> None:
    """Give module `name` any attribute: a class that cannot be made."""
    module: ModuleType = sys.modules[name]

    def refuse(self: object, *_: object, **__: object) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no stand-in on this CPU")

    def look_up(attribute: str) -> type:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return type(attribute, (), {"__init__": refuse})

    module.__getattr__ = look_up  # type: ignore[method-assign]
