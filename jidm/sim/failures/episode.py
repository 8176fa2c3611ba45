"""A rendered video with everything that is known about it, cut into layers: limbs, and what is behind the robot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jidm.camera.model import Camera
from jidm.errors import InputError
from jidm.robot.embodiment import Embodiment
from jidm.robot.kinematics import Kinematics
from jidm.sim.appearance import Appearance
from jidm.sim.objects import SceneObject
from jidm.sim.scene import Rendering, Scene

_EDGE_WIDTH = 1
"""Pixels around the robot that are mixed with it; they go with it."""
_MIN_LIMB_FRACTION = 0.008
"""A limb that takes up less of the picture is not worth spoiling."""

ImageArray = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class RenderedEpisode:
    """One video of a robot before a still camera.

    Attributes:
        scene: what was filmed; it may look otherwise by now.
        appearance, objects, scene_seed: how it looked, with what in it.
        camera: what filmed it.
        q: (T, n) joint positions [rad or m].
        fps: frame rate [1/s].
        rendering: the video.
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
        """Render joint positions q (T, n)."""
        if len(q) < 2:
            raise InputError(f"a take needs at least 2 frames, got {len(q)}")
        return cls(scene, camera, q, fps, scene.render_video(q, camera), scene.appearance, scene.objects, scene.seed)

    def rerender(self, q: NDArray[np.float64], extra_objects: Sequence[SceneObject] = ()) -> ImageArray:
        """The video (T, H, W, 3) of another motion q (T, n) of the same robot in the same place, with more things in it."""
        scene = self.scene
        saved = scene.appearance, scene.objects, scene.seed
        try:
            scene.appearance, scene.objects, scene.seed = (
                self.appearance,
                (*self.objects, *extra_objects),
                self.scene_seed,
            )
            return scene.render_video(q, self.camera).rgb
        finally:
            scene.appearance, scene.objects, scene.seed = saved

    @property
    def robot(self) -> Embodiment:
        """Who moves."""
        return self.scene.embodiment

    def __len__(self) -> int:
        return len(self.q)

    # ---- layers -------------------------------------------------------------------------------------------------

    @cached_property
    def background(self) -> ImageArray:
        """(T, H, W, 3) what is behind the robot: as seen when last or next it was elsewhere, or painted from around it."""
        import cv2

        free = ~np.stack([_dilate(frame) for frame in self.rendering.on_robot])
        time = np.arange(len(self))[:, None, None]
        far = 10 * len(self)  # further than any frame
        last = np.maximum.accumulate(np.where(free, time, -far), 0)
        following = np.minimum.accumulate(np.where(free, time, far)[::-1], 0)[::-1]
        nearest = np.where(time - last <= following - time, last, following).clip(0, len(self) - 1)
        pictures: Any = np.take_along_axis(self.rendering.rgb, nearest[..., None], 0)
        never: Any = (~free.any(0)).astype(np.uint8)
        if never.any():
            painted: list[Any] = [cv2.inpaint(picture, never, 5, cv2.INPAINT_TELEA) for picture in pictures]
            pictures = np.stack(painted)
        return np.asarray(pictures, np.uint8)

    def limb_mask(self, link: int) -> NDArray[np.bool_]:
        """(T, H, W) where a link and all links that it carries are seen."""
        return np.isin(self.rendering.link, self._subtree(link))

    def descendants_mask(self, link: int) -> NDArray[np.bool_]:
        """(T, H, W) where the links are seen that a link carries, without itself."""
        return np.isin(self.rendering.link, self._subtree(link)[1:])

    def visible_limbs(self) -> tuple[int, ...]:
        """Links that move, can be seen, and carry no more than half of what is seen of the robot."""
        movable = {self.robot.model.link_index(joint.child) for joint in self.robot.model.movable_joints}
        whole = self.rendering.on_robot.sum()
        chosen = []
        for link in sorted(movable):
            mask = self.limb_mask(link)
            if mask.mean() >= _MIN_LIMB_FRACTION and mask.sum() <= 0.8 * whole and mask.any((1, 2)).mean() > 0.8:
                chosen.append(link)
        if not chosen:
            raise InputError("no limb of the robot is seen well enough to be spoilt; film it from nearer")
        return tuple(chosen)

    def joint_pixels(self, link: int) -> NDArray[np.float64]:
        """(T, 2) where the joint that carries a link is in the picture [px, (u, v)]."""
        return self._link_origins[:, link]

    def end_pixels(self, link: int) -> NDArray[np.float64]:
        """(T, 2) where the link's own far end is: the next joint, or where there is none, its furthest pixel [px]."""
        model = self.robot.model
        name = model.links[link].name
        children = [model.link_index(joint.child) for joint in model.joints if joint.parent == name]
        children = [
            k for k in children if np.linalg.norm(self.joint_pixels(k) - self.joint_pixels(link), axis=-1).mean() > 2
        ]
        if children:
            return self.joint_pixels(max(children, key=lambda k: self.limb_mask(k).sum()))
        ends = self.joint_pixels(link).copy()
        for t, frame in enumerate(self.rendering.link == link):
            v, u = np.nonzero(frame)
            if len(u):
                k = int(np.argmax((u - ends[t, 0]) ** 2 + (v - ends[t, 1]) ** 2))
                ends[t] = u[k], v[k]
        return ends

    @cached_property
    def _link_origins(self) -> NDArray[np.float64]:
        poses = Kinematics.from_embodiment(self.robot).link_poses(torch.from_numpy(self.q))
        uv, _ = self.camera.project(poses[..., :3, 3])
        return np.asarray(uv.numpy(), np.float64)

    def _subtree(self, link: int) -> list[int]:
        """The link first, then all below it."""
        model, subtree = self.robot.model, [link]
        for k in subtree:
            name = model.links[k].name
            subtree += [model.link_index(joint.child) for joint in model.joints if joint.parent == name]
        return subtree

    def inpaint(self, removed: NDArray[np.bool_]) -> ImageArray:
        """The video with what is behind put in the place of a mask (T, H, W)."""
        video = self.rendering.rgb.copy()
        for t, mask in enumerate(removed):
            hole = _dilate(mask) & ~(self.rendering.on_robot[t] & ~mask)  # not into the rest of the robot
            video[t][hole] = self.background[t][hole]
        return video


def _dilate(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    import cv2

    kernel = np.ones((2 * _EDGE_WIDTH + 1, 2 * _EDGE_WIDTH + 1), np.uint8)
    return np.asarray(cv2.dilate(mask.astype(np.uint8), kernel), bool)
