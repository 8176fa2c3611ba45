"""One kind of failure at a given strength, with its label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jidm.errors import InputError, did_you_mean
from jidm.sim.appearance import to_vector3
from jidm.sim.failures.episode import Label, RenderedEpisode
from jidm.sim.failures.images import IMAGE_FAILURES
from jidm.sim.failures.layers import ImageArray
from jidm.sim.failures.motions import MOTION_FAILURES
from jidm.sim.objects import SceneObject

PENETRATION = "penetration"
# The order seeds the generator of each kind; changing it changes every corrupted video.
FAILURE_KINDS = (*IMAGE_FAILURES, *MOTION_FAILURES, PENETRATION)
"""Names of all kinds of failure."""

_OBSTACLE_SIZE = 0.06, 0.15
"""Side of the box at strength 0 and 1 [fraction of the tip's largest distance from the base]."""


@dataclass(frozen=True, eq=False)
class CorruptedVideo:
    """A video with a failure.

    Attributes:
        video: (T, H, W, 3) uint8.
        q: (T, n) joint positions that it shows [rad or m]; if the images themselves are corrupted, those of the clean
            video.
        label: kind, strength, seed, `start_frame` and further numbers of the failure; plain JSON.
    """

    video: ImageArray
    q: NDArray[np.float64]
    label: Label


def corrupt(episode: RenderedEpisode, kind: str, strength: float, seed: int) -> CorruptedVideo:
    """The episode with a failure; the same arguments give the same video.

    Args:
        kind: one of `FAILURE_KINDS`. In "late", "wrong_goal" and "penetration" the robot moves as robots do: they are
            failures only with respect to a task or a scene.
        strength: in (0, 1].

    Raises:
        InputError: no such kind, a strength outside (0, 1], or no limb is visible well enough.
    """
    if kind not in FAILURE_KINDS:
        raise InputError(f"unknown failure '{kind}': {did_you_mean(kind, FAILURE_KINDS)}")
    if not 0 < strength <= 1:
        raise InputError(f"strength must lie in (0, 1], got {strength}")
    rng = np.random.default_rng([seed, FAILURE_KINDS.index(kind)])
    q = episode.q
    if kind in IMAGE_FAILURES:
        video, label = IMAGE_FAILURES[kind](episode, strength, rng)
    elif kind in MOTION_FAILURES:
        q, label = MOTION_FAILURES[kind](episode, strength, rng)
        video = episode.rerender(q)
    else:
        obstacle, label = _obstacle_on_path(episode, strength, rng)
        video = episode.rerender(q, [obstacle])
    return CorruptedVideo(video, q, {"kind": kind, "strength": strength, "seed": seed, **label})


def _obstacle_on_path(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[SceneObject, Label]:
    """A box on the path of one of the robot's tips."""
    robot = episode.robot
    tip = robot.model.link_index(robot.tip_links[int(rng.integers(len(robot.tip_links)))])
    positions = [episode.scene.link_poses(q)[tip, :3, 3] for q in episode.q]
    center = positions[int(rng.integers(len(episode) // 2, len(episode)))]
    max_distance = float(np.linalg.norm(positions, axis=-1).max())
    weak, strong = _OBSTACLE_SIZE
    side = max_distance * (weak + (strong - weak) * strength)
    color = to_vector3(rng.uniform(0.1, 0.9, 3))
    obstacle = SceneObject("box", size=(side, side, side), position=to_vector3(center), color=color)
    return obstacle, {"start_frame": 0, "side_m": side, "position": list(obstacle.position)}
