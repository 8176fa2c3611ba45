"""Simulation: a robot drawn by PyBullet from any camera, exact flow, smooth random motion. Needs the extra `sim`."""

from jidm.sim.look import Background, Light, Appearance, Texture
from jidm.sim.motion import smooth_motion
from jidm.sim.truth import ExactFlow, exact_flow, stays_visible
from jidm.sim.world import Rendering, Scene

__all__ = [
    "Background",
    "ExactFlow",
    "Light",
    "Appearance",
    "Rendering",
    "Texture",
    "Scene",
    "exact_flow",
    "smooth_motion",
    "stays_visible",
]
