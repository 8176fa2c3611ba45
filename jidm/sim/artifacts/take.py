"""A rendered video with everything that is known about it, cut into layers: limbs, and what is behind the robot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jidm.errors import InputError
from jidm.robot.camera import Camera
from jidm.robot.embodiment import Embodiment
from jidm.robot.kinematics import Kinematics
from jidm.sim.look import Look
from jidm.sim.things import Thing
from jidm.sim.world import Rendering, World

_RIM = 1
"""Pixels around the robot that are mixed with it; they go with it."""
_SEEN = 0.008
"""A limb that takes up less of the picture is not worth spoiling."""

Picture = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Take:
    """One video of a robot before a still camera.

    Attributes:
        world: what was filmed; it may look otherwise by now.
        look, things, world_seed: how it looked, with what in it.
        camera: what filmed it.
        q: (T, n) joint positions [rad or m].
        fps: frame rate [1/s].
        seen: the video.
    """

    world: World
    camera: Camera
    q: NDArray[np.float64]
    fps: float
    seen: Rendering
    look: Look
    things: tuple[Thing, ...]
    world_seed: int

    @classmethod
    def film(cls, world: World, camera: Camera, q: NDArray[np.float64], fps: float) -> Take:
        """Render joint positions q (T, n)."""
        if len(q) < 2:
            raise InputError(f"a take needs at least 2 frames, got {len(q)}")
        return cls(world, camera, q, fps, world.render_video(q, camera), world.look, world.things, world.seed)

    def again(self, q: NDArray[np.float64], more: Sequence[Thing] = ()) -> Picture:
        """The video (T, H, W, 3) of another motion q (T, n) of the same robot in the same place, with more things in it."""
        world = self.world
        now = world.look, world.things, world.seed
        try:
            world.look, world.things, world.seed = self.look, (*self.things, *more), self.world_seed
            return world.render_video(q, self.camera).rgb
        finally:
            world.look, world.things, world.seed = now

    @property
    def robot(self) -> Embodiment:
        """Who moves."""
        return self.world.embodiment

    def __len__(self) -> int:
        return len(self.q)

    # ---- layers -------------------------------------------------------------------------------------------------

    @cached_property
    def behind(self) -> Picture:
        """(T, H, W, 3) what is behind the robot: as seen when last or next it was elsewhere, or painted from around it."""
        import cv2

        free = ~np.stack([_grown(frame) for frame in self.seen.on_robot])
        time = np.arange(len(self))[:, None, None]
        far = 10 * len(self)  # further than any frame
        last = np.maximum.accumulate(np.where(free, time, -far), 0)
        following = np.minimum.accumulate(np.where(free, time, far)[::-1], 0)[::-1]
        nearest = np.where(time - last <= following - time, last, following).clip(0, len(self) - 1)
        pictures: Any = np.take_along_axis(self.seen.rgb, nearest[..., None], 0)
        never: Any = (~free.any(0)).astype(np.uint8)
        if never.any():
            painted: list[Any] = [cv2.inpaint(picture, never, 5, cv2.INPAINT_TELEA) for picture in pictures]
            pictures = np.stack(painted)
        return np.asarray(pictures, np.uint8)

    def limb(self, link: int) -> NDArray[np.bool_]:
        """(T, H, W) where a link and all links that it carries are seen."""
        return np.isin(self.seen.link, self._carried(link))

    def beyond(self, link: int) -> NDArray[np.bool_]:
        """(T, H, W) where the links are seen that a link carries, without itself."""
        return np.isin(self.seen.link, self._carried(link)[1:])

    def limbs(self) -> tuple[int, ...]:
        """Links that move, can be seen, and carry no more than half of what is seen of the robot."""
        movable = {self.robot.model.link_index(joint.child) for joint in self.robot.model.movable_joints}
        whole = self.seen.on_robot.sum()
        chosen = []
        for link in sorted(movable):
            seen = self.limb(link)
            if seen.mean() >= _SEEN and seen.sum() <= 0.8 * whole and seen.any((1, 2)).mean() > 0.8:
                chosen.append(link)
        if not chosen:
            raise InputError("no limb of the robot is seen well enough to be spoilt; film it from nearer")
        return tuple(chosen)

    def anchor(self, link: int) -> NDArray[np.float64]:
        """(T, 2) where the joint that carries a link is in the picture [px, (u, v)]."""
        return self._origins[:, link]

    def far_end(self, link: int) -> NDArray[np.float64]:
        """(T, 2) where the link's own far end is: the next joint, or where there is none, its furthest pixel [px]."""
        model = self.robot.model
        name = model.links[link].name
        nexts = [model.link_index(joint.child) for joint in model.joints if joint.parent == name]
        nexts = [k for k in nexts if np.linalg.norm(self.anchor(k) - self.anchor(link), axis=-1).mean() > 2]
        if nexts:
            return self.anchor(max(nexts, key=lambda k: self.limb(k).sum()))
        ends = self.anchor(link).copy()
        for t, frame in enumerate(self.seen.link == link):
            v, u = np.nonzero(frame)
            if len(u):
                k = int(np.argmax((u - ends[t, 0]) ** 2 + (v - ends[t, 1]) ** 2))
                ends[t] = u[k], v[k]
        return ends

    @cached_property
    def _origins(self) -> NDArray[np.float64]:
        poses = Kinematics.from_embodiment(self.robot).link_poses(torch.from_numpy(self.q))
        uv, _ = self.camera.project(poses[..., :3, 3])
        return np.asarray(uv.numpy(), np.float64)

    def _carried(self, link: int) -> list[int]:
        """The link first, then all below it."""
        model, carried = self.robot.model, [link]
        for k in carried:
            name = model.links[k].name
            carried += [model.link_index(joint.child) for joint in model.joints if joint.parent == name]
        return carried

    def without(self, gone: NDArray[np.bool_]) -> Picture:
        """The video with what is behind put in the place of a mask (T, H, W)."""
        video = self.seen.rgb.copy()
        for t, mask in enumerate(gone):
            hole = _grown(mask) & ~(self.seen.on_robot[t] & ~mask)  # not into the rest of the robot
            video[t][hole] = self.behind[t][hole]
        return video


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    import cv2

    kernel = np.ones((2 * _RIM + 1, 2 * _RIM + 1), np.uint8)
    return np.asarray(cv2.dilate(mask.astype(np.uint8), kernel), bool)
