"""One robot and the objects around it, rendered from any camera at any joint positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike

from jidm.errors import InputError
from jidm.sim.appearance import Appearance
from jidm.sim.meshes import export_visuals
from jidm.sim.objects import SceneObject
from jidm.sim.physics import PhysicsClient, check_positions
from jidm.sim.renderer import Rendering, render_image

if TYPE_CHECKING:
    from jidm.camera.model import Camera
    from jidm.robot.embodiment import Embodiment

_TEXTURE_BASE_COLOR = (0.78, 0.78, 0.78, 1.0)


class Scene(PhysicsClient):
    """A robot and objects in a physics client of their own; the robot's base frame is the world frame.

    Use as a context manager or call `close`. Several scenes can live in one process. One scene must not be used by two
    threads at once. The same embodiment, seed, appearance, objects, camera and q give the same pixels.

    Args:
        embodiment: any robot, composed ones included; its visual shapes are drawn.
        seed: of the textures and the background.
        appearance: textures, light and background; may be changed between renderings by assigning `scene.appearance`.
        supersample: samples per pixel and axis, averaged, because TinyRenderer has no anti-aliasing. The default 3 costs
            little over 1 (most of the time goes into vertices). Depth and links are always sampled at pixel centers,
            which are among the samples if the number is odd; an even number costs a second pass.
        mesh_tolerance: size of the meshes' features that need not be drawn [m]. A third of a pixel's width is not
            visible, and arms of hundreds of thousands of triangles are drawn many times faster.
        exact: take depth and links at pixel centers exactly, and texture every sample. Otherwise an even `supersample`
            takes them from the four samples around the center, see `sample_at_centers`, and textures pixels.

    Raises:
        InputError: supersample is not positive.
        MissingExtraError: PyBullet is not installed.
        EmbodimentError: a mesh is missing or the robot has no visual shapes.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        *,
        seed: int = 0,
        appearance: Appearance | None = None,
        supersample: int = 3,
        mesh_tolerance: float = 0.0,
        exact: bool = True,
    ) -> None:
        if supersample < 1:
            raise InputError(f"supersample must be at least 1, got {supersample}")
        super().__init__(embodiment, partial(export_visuals, mesh_tolerance=mesh_tolerance))
        self.seed, self.supersample, self._exact = seed, supersample, exact
        self._objects: list[tuple[SceneObject, int]] = []
        self._original_colors = self._read_colors()
        self.appearance = appearance or Appearance()

    @property
    def appearance(self) -> Appearance:
        """Textures, light and background in use; assign another to change them without loading the robot again."""
        return self._appearance

    @appearance.setter
    def appearance(self, appearance: Appearance) -> None:
        plain = appearance.texture.kind == "plain"
        for link, shape, rgba in self._original_colors:
            self.call("changeVisualShape", self.body, link, shape, rgbaColor=rgba if plain else _TEXTURE_BASE_COLOR)
        self._appearance = appearance

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        """Objects around the robot; assign others to change them. They hide the robot and are hidden by it."""
        return tuple(item for item, _ in self._objects)

    @objects.setter
    def objects(self, objects: Sequence[SceneObject]) -> None:
        while self._objects:
            self.call("removeBody", self._objects.pop()[1])
        bullet = self.bullet
        for item in objects:
            a, b, c = item.size
            shape = {
                "box": {"shapeType": bullet.GEOM_BOX, "halfExtents": [a / 2, b / 2, c / 2]},
                "sphere": {"shapeType": bullet.GEOM_SPHERE, "radius": a / 2},
                "cylinder": {"shapeType": bullet.GEOM_CYLINDER, "radius": a / 2, "length": c},
            }[item.shape]
            visual = self.call("createVisualShape", rgbaColor=(*item.color, 1.0), **shape)
            body = self.call("createMultiBody", 0, -1, visual)
            self._objects.append((item, body))
        self._place_objects(0)

    def render(self, q: ArrayLike | torch.Tensor, camera: Camera, *, frame: int = 0) -> Rendering:
        """What `camera` sees with the robot at q (n,) [rad or m].

        Args:
            frame: number of the frame in its video; moves the objects and a moving background.

        Raises:
            InputError: q has another shape or is not finite.
            CameraError: the camera has skewed intrinsics.
        """
        self.set_configuration(q)
        if any(np.any(item.velocity) for item, _ in self._objects):
            self._place_objects(frame)
        return render_image(
            self, camera, self.appearance, seed=self.seed, frame=frame, supersample=self.supersample, exact=self._exact
        )

    def frames(self, q: ArrayLike | torch.Tensor, camera: Camera) -> Iterator[Rendering]:
        """The images of a joint trajectory q (T, n) one after another, for videos that do not fit in memory."""
        trajectory = check_positions(q, self.embodiment, "the trajectory (T, n)", 2)
        return (self.render(row, camera, frame=k) for k, row in enumerate(trajectory))

    def render_video(self, q: ArrayLike | torch.Tensor, camera: Camera) -> Rendering:
        """The whole video of a joint trajectory q (T, n): a Rendering with a leading time axis.

        Raises:
            InputError: q has another shape, is not finite or has no rows.
        """
        frames = list(self.frames(q, camera))
        if not frames:
            raise InputError("a trajectory needs at least one row of joint positions")
        return Rendering(*(np.stack([getattr(f, name) for f in frames]) for name in ("rgb", "depth", "link")))

    def _place_objects(self, frame: float) -> None:
        for item, body in self._objects:
            angle = float(np.linalg.norm(item.rotation_vector))
            axis = np.divide(item.rotation_vector, angle) if angle > 0 else np.array([0.0, 0.0, 1.0])
            quaternion = (*(np.sin(angle / 2) * axis).tolist(), float(np.cos(angle / 2)))
            self.call("resetBasePositionAndOrientation", body, item.position_at(frame).tolist(), quaternion)

    def _read_colors(self) -> list[tuple[int, int, tuple[float, ...]]]:
        """Link, number of the shape in its link, and RGBA of every visual shape as loaded."""
        count: dict[int, int] = {}
        colors = []
        for entry in self.call("getVisualShapeData", self.body):
            link = entry[1]
            colors.append((link, count.setdefault(link, 0), entry[7]))
            count[link] += 1
        return colors
