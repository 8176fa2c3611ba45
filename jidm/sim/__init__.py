"""Simulation: a robot drawn by PyBullet from any camera, exact flow, smooth random motion. Needs the extra `sim`."""

from jidm.sim.appearance import Appearance, Background, Light, Texture
from jidm.sim.ground_truth import ExactFlow, exact_flow, stays_visible
from jidm.sim.motion import smooth_motion
from jidm.sim.scene import Rendering, Scene

__all__ = [
    "Appearance",
    "Background",
    "ExactFlow",
    "Light",
    "Rendering",
    "Scene",
    "Texture",
    "exact_flow",
    "smooth_motion",
    "stays_visible",
]
