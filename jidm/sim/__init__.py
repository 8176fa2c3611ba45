"""Simulation by PyBullet: images of a robot from any camera, exact optical flow, random motion. Needs the extra `sim`."""

from jidm.sim.appearance import Appearance, Background, Light, Texture
from jidm.sim.ground_truth import ExactFlow, exact_flow, stays_visible
from jidm.sim.motion import random_motion
from jidm.sim.renderer import Rendering
from jidm.sim.scene import Scene

__all__ = [
    "Appearance",
    "Background",
    "ExactFlow",
    "Light",
    "Rendering",
    "Scene",
    "Texture",
    "exact_flow",
    "random_motion",
    "stays_visible",
]
