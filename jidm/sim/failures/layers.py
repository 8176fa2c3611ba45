"""A rendered video cut into layers: masks of the robot's limbs and the background behind the robot."""

from __future__ import annotations

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
from jidm.sim.renderer import Rendering

_EDGE_WIDTH = 1
"""Width of the anti-aliased border around the robot [px]; it is cut out with the robot."""
_MIN_LIMB_FRACTION = 0.008
"""Limbs that cover a smaller fraction of the image are not corrupted."""

ImageArray = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class ImageLayers:
    """Layers of a video from a fixed camera. A limb is a link with all its descendants in the kinematic tree.

    Attributes:
        robot: the robot in the video.
        camera: the camera.
        q: (T, n) joint positions [rad or m].
        rendering: the video.
    """

    robot: Embodiment
    camera: Camera
    q: NDArray[np.float64]
    rendering: Rendering

    @cached_property
    def background(self) -> ImageArray:
        """(T, H, W, 3) the video without the robot: pixels behind it are taken from the nearest frame in which it was
        elsewhere; pixels that it always covers are inpainted (Telea 2004)."""
        import cv2

        free = ~np.stack([_dilate(frame) for frame in self.rendering.on_robot])
        count = len(free)
        time = np.arange(count)[:, None, None]
        far = 10 * count  # further than any frame
        previous = np.maximum.accumulate(np.where(free, time, -far), 0)
        following = np.minimum.accumulate(np.where(free, time, far)[::-1], 0)[::-1]
        nearest = np.where(time - previous <= following - time, previous, following).clip(0, count - 1)
        images: Any = np.take_along_axis(self.rendering.rgb, nearest[..., None], 0)
        always_covered: Any = (~free.any(0)).astype(np.uint8)
        if always_covered.any():
            inpainted: list[Any] = [cv2.inpaint(image, always_covered, 5, cv2.INPAINT_TELEA) for image in images]
            images = np.stack(inpainted)
        return np.asarray(images, np.uint8)

    def without(self, mask: NDArray[np.bool_]) -> ImageArray:
        """The video (T, H, W, 3) with the background in place of a mask (T, H, W) of robot pixels."""
        video = self.rendering.rgb.copy()
        for t, removed in enumerate(mask):
            hole = _dilate(removed) & ~(self.rendering.on_robot[t] & ~removed)  # keeps the rest of the robot
            video[t][hole] = self.background[t][hole]
        return video

    def limb_mask(self, link: int) -> NDArray[np.bool_]:
        """(T, H, W) where a link or one of its descendants is visible."""
        return np.isin(self.rendering.link, self._subtree(link))

    def descendants_mask(self, link: int) -> NDArray[np.bool_]:
        """(T, H, W) where a descendant of a link is visible."""
        return np.isin(self.rendering.link, self._subtree(link)[1:])

    def visible_limbs(self) -> tuple[int, ...]:
        """Links whose limb moves, is visible in most frames and covers at most 80 % of the robot's visible pixels.

        Raises:
            InputError: there is none.
        """
        movable = {self.robot.model.link_index(joint.child) for joint in self.robot.model.movable_joints}
        whole = self.rendering.on_robot.sum()
        chosen = []
        for link in sorted(movable):
            mask = self.limb_mask(link)
            if mask.mean() >= _MIN_LIMB_FRACTION and mask.sum() <= 0.8 * whole and mask.any((1, 2)).mean() > 0.8:
                chosen.append(link)
        if not chosen:
            raise InputError("no limb of the robot is seen well enough to be corrupted; move the camera closer")
        return tuple(chosen)

    def joint_pixels(self, link: int) -> NDArray[np.float64]:
        """(T, 2) image position of a link's parent joint [px, (u, v)]."""
        return self._link_origins[:, link]

    def end_pixels(self, link: int) -> NDArray[np.float64]:
        """(T, 2) image position of a link's far end [px, (u, v)]: the next joint or, without one, its farthest pixel."""
        start = self.joint_pixels(link)
        children = [k for k in self._children(link) if np.linalg.norm(self.joint_pixels(k) - start, axis=-1).mean() > 2]
        if children:
            return self.joint_pixels(max(children, key=lambda k: self.limb_mask(k).sum()))
        ends = start.copy()
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

    def _children(self, link: int) -> list[int]:
        model = self.robot.model
        name = model.links[link].name
        return [model.link_index(joint.child) for joint in model.joints if joint.parent == name]

    def _subtree(self, link: int) -> list[int]:
        """The link first, then all its descendants."""
        subtree = [link]
        for k in subtree:
            subtree += self._children(k)
        return subtree


def _dilate(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    import cv2

    kernel = np.ones((2 * _EDGE_WIDTH + 1, 2 * _EDGE_WIDTH + 1), np.uint8)
    return np.asarray(cv2.dilate(mask.astype(np.uint8), kernel), bool)
