"""CATER-GEN worlds without Blender: scenes and actions, a ray tracer, real folders of videos (paper 4.1, A.1)."""

from mage_core.cater.folders import Language, VideoFolder
from mage_core.cater.scene import DATASETS, MODES, CaterGen, Move, SceneObject, Spec, referents

__all__ = ["DATASETS", "MODES", "CaterGen", "Language", "Move", "SceneObject", "Spec", "VideoFolder", "referents"]
