"""CATER-GEN worlds without Blender: scenes and actions, a ray tracer, real folders of videos (paper 4.1, A.1)."""

from mage_core.cater.scene import CaterGen, Move, SceneObject, Spec, referents

__all__ = ["CaterGen", "Move", "SceneObject", "Spec", "referents"]
