"""MAGE: text-image-to-video generation with motion anchors, from simulator to figures (Make It Move, CVPR 2022)."""

from mage_core.generate import generate
from mage_core.weights import load

__all__ = ["generate", "load"]
