"""A rendered video with its ground truth and all that is needed to render it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.camera.model import Camera
from jidm.errors import InputError
from jidm.robot.embodiment import Embodiment
from jidm.sim.appearance import Appearance
from jidm.sim.failures.layers import ImageArray, ImageLayers
from jidm.sim.objects import SceneObject
from jidm.sim.renderer import Rendering
from jidm.sim.scene import Scene

Label = dict[str, Any]
"""What was changed in a video, plain JSON; `start_frame` is the first frame that is changed."""


@dataclass(frozen=True, eq=False)
class RenderedEpisode:
    """One video of a robot from a fixed camera.

    Attributes:
        scene: what was rendered; its appearance, objects and seed may have changed since.
        camera: the camera.
        q: (T, n) joint positions [rad or m].
        fps: frame rate [1/s].
        rendering: the video.
        appearance, objects, scene_seed: those of the scene when it was rendered.
    """

    scene: Scene
    camera: Camera
    q: NDArray[np.float64]
    fps: float
    rendering: Rendering
    appearance: Appearance
    objects: tuple[SceneObject, ...]
    scene_seed: int

    @classmethod
    def render(cls, scene: Scene, camera: Camera, q: NDArray[np.float64], fps: float) -> RenderedEpisode:
        """Render joint positions q (T, n) [rad or m].

        Raises:
            InputError: q has fewer than two rows, another shape or is not finite.
        """
        if len(q) < 2:
            raise InputError(f"an episode needs at least 2 frames, got {len(q)}")
        return cls(scene, camera, q, fps, scene.render_video(q, camera), scene.appearance, scene.objects, scene.seed)

    def rerender(self, q: NDArray[np.float64], extra_objects: Sequence[SceneObject] = ()) -> ImageArray:
        """The video (T, H, W, 3) of another motion q (T, n) [rad or m] in the same scene, with more objects in it."""
        scene = self.scene
        saved = scene.appearance, scene.objects, scene.seed
        try:
            scene.appearance, scene.seed = self.appearance, self.scene_seed
            scene.objects = (*self.objects, *extra_objects)
            return scene.render_video(q, self.camera).rgb
        finally:
            scene.appearance, scene.objects, scene.seed = saved

    @property
    def robot(self) -> Embodiment:
        """The robot in the video."""
        return self.scene.embodiment

    @cached_property
    def layers(self) -> ImageLayers:
        """Masks of the robot's limbs and the background behind them."""
        return ImageLayers(self.robot, self.camera, self.q, self.rendering)

    def __len__(self) -> int:
        return len(self.q)
