"""Small rendered clips with known truth, made once per test run and shared by the tests that decode."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from jidm import Camera, Embodiment, load_embodiment
from jidm.flow import Flow
from jidm.sim import Appearance, Scene, exact_flow, random_motion

WIDTH, HEIGHT, FPS = 160, 120, 16.0


@dataclass(frozen=True, eq=False)
class Clip:
    """A rendered video: rgb (T, H, W, 3) uint8, q (T, n) true joint positions, flow (T-1) exact."""

    robot: Embodiment
    camera: Camera
    rgb: np.ndarray
    q: np.ndarray
    flow: Flow

    @property
    def frames(self) -> Tensor:
        """(T, 3, H, W) float64 in [0, 1]."""
        return torch.from_numpy(self.rgb).permute(0, 3, 1, 2).double() / 255

    @property
    def steps(self) -> np.ndarray:
        """(T-1, n) true joint steps."""
        return np.diff(self.q, axis=0)


@lru_cache(maxsize=8)
def clip(name: str, frames: int = 8, seed: int = 0, textured: bool = False) -> Clip:
    """A clip of smooth random motion about home, the robot in its own colors or covered with noise."""
    robot = load_embodiment(name)
    camera = robot.camera().resized(WIDTH, HEIGHT)
    q = random_motion(robot, frames, 1 / FPS, seed)
    with Scene(robot, seed=seed, appearance=Appearance.textured() if textured else Appearance.plain()) as scene:
        video = scene.render_video(q, camera)
    flows = [exact_flow(robot, camera, video.depth[t], video.link[t], q[t], q[t + 1]) for t in range(frames - 1)]
    flow = Flow(torch.stack([f.flow for f in flows]), torch.stack([f.on_robot for f in flows]).double())
    return Clip(robot, camera, video.rgb, q, flow)
