"""Rendered frames of robots for real fields: the robot in its camera, another camera, another robot."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from hostile_episodes import Array, Rng, Scene, pick, robot
from reward_validity import EpisodeGenerator

from jidm import JacobianIDM
from jidm.fields.analytic import AnalyticField
from jidm.flow import as_flow_estimator

SIDE, FRAMES, CLIPS, SEED = 96, 16, 3, 6500
_ROBOTS = {
    "finger-5": "planar_finger_5", "panda-sim": "panda", "allegro-right-sim": "allegro_right", "analytic": "planar_finger_2",
    "analytic panda": "panda",
}  # fmt: skip
_OTHERS = {
    "planar_finger_5": "planar_finger_2",
    "planar_finger_2": "panda",
    "panda": "planar_finger_2",
    "allegro_right": "panda",
}


class RenderedScene(Scene):
    """Clips of motor babbling, and the IDM with a real field that measures them.

    Attributes:
        clips: (T, H, W, 3) uint8 and joint positions (T, n) [rad or m] of each.
        others: frames (H, W, 3) uint8 that another camera sees, and of another robot.
    """

    def __init__(
        self, field: str, *, side: int = SIDE, frames: int = FRAMES, clips: int = CLIPS, points: int = 300
    ) -> None:
        name = _ROBOTS[field]
        generator = EpisodeGenerator(name, SEED, side=side, frames=frames)
        if field.startswith("analytic"):
            surface = AnalyticField(robot(name).embodiment, generator.camera, points=points, occluders=2000)  # type: ignore[arg-type]
            idm = JacobianIDM(robot(name).embodiment, surface, as_flow_estimator("dis"))
        else:
            idm = JacobianIDM.from_pretrained(field)
        super().__init__(robot(name), idm)
        self.max_frames = 4
        episodes = [generator.episode(k) for k in range(clips)]
        self.clips = [(np.asarray(x.rendering.rgb), np.asarray(x.q)) for x in episodes]
        another = EpisodeGenerator(_OTHERS[name], SEED, side=side, frames=4).episode(0)
        mirrored = [clip[k, :, ::-1] for clip, _ in self.clips for k in (0, -1)]
        self.others = [*mirrored, *np.asarray(another.rendering.rgb)]
        self._clip, self._time = 0, 0

    def frame(self, rng: Rng, q: Array) -> Array:
        """(H, W, 3) in [0, 1]: the next frame of a clip, of another clip, of another camera or of another robot; q is ignored."""
        self._time += 1
        if rng.random() < 0.05:
            self._clip, self._time = int(rng.integers(len(self.clips))), 0
        video = self.clips[self._clip][0]
        shown = pick(rng, self.others) if rng.random() < 0.1 else video[self._time % len(video)]
        return np.asarray(shown, dtype=np.float64) / 255

    @staticmethod
    def robot_of(field: str) -> str:
        """The name of its robot."""
        return _ROBOTS[field]

    def restart(self, clip: int) -> None:
        """Show a clip from its beginning."""
        self._clip, self._time = clip, -1


@cache
def real_scene(field: str) -> Any:
    """The scene of this field, rendered once."""
    return RenderedScene(field)
