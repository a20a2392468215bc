"""MAGE: text-image-to-video generation with motion anchors, from simulator to figures (Make It Move, CVPR 2022).

`generate(image, caption, speed, weights=...)` makes a video; `load(name)` gives trained weights.
"""

import importlib
import sys
import types

__all__ = ["generate", "load"]
_HOMES = {"generate": "mage_core.generate", "load": "mage_core.weights"}   # imported when first asked for


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """`mage_core.generate` is the function, also once the module of that name has been imported."""

    def __setattr__(self, name: str, value) -> None:
        if name == "generate" and isinstance(value, types.ModuleType):   # the import system, when it is done with it
            value = value.generate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
