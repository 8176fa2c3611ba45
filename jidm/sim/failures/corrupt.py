"""One kind of failure at a given strength, with its label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.errors import InputError, did_you_mean
from jidm.sim.failures.episode import ImageArray, RenderedEpisode
from jidm.sim.failures.motions import MOTION_FAILURES
from jidm.sim.failures.pictures import IMAGE_FAILURES
from jidm.sim.objects import SceneObject

PENETRATION = "penetration"
FAILURE_KINDS = (*IMAGE_FAILURES, *MOTION_FAILURES, PENETRATION)
"""Everything that can go wrong."""

_OBSTACLE_SIZE = 0.12, 0.3  # [of the robot's reach] size of the thing the tip goes through, weak and strong


@dataclass(frozen=True, eq=False)
class CorruptedVideo:
    """A video gone wrong.

    Attributes:
        video: (T, H, W, 3) uint8.
        q: (T, n) joint positions that it shows [rad or m]; where the pictures themselves are wrong, those before they were.
        label: kind, strength, seed, the frame it begins at, and what else was drawn; plain JSON.
    """

    video: ImageArray
    q: NDArray[np.float64]
    label: dict[str, Any]


def corrupt(episode: RenderedEpisode, kind: str, strength: float, seed: int) -> CorruptedVideo:
    """Let something go wrong in a take; the same arguments give the same video.

    Args:
        kind: one of `KINDS`. "late", "wrong_goal" and "penetration" show a robot that moves as robots do: only who knows
            the task or the scene can call them wrong.
        strength: in (0, 1].

    Raises:
        InputError: no such kind, or a strength outside (0, 1].
    """
    if kind not in FAILURE_KINDS:
        raise InputError(f"unknown artifact '{kind}': {did_you_mean(kind, FAILURE_KINDS)}")
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


def _obstacle_on_path(
    episode: RenderedEpisode, strength: float, rng: np.random.Generator
) -> tuple[SceneObject, dict[str, Any]]:
    """A box where a tip passes."""
    robot = episode.robot
    tip = robot.model.link_index(robot.tip_links[int(rng.integers(len(robot.tip_links)))])
    poses = [episode.scene.link_poses(q)[tip, :3, 3] for q in episode.q]
    at = poses[int(rng.integers(len(episode) // 2, len(episode)))]
    max_reach = float(np.linalg.norm(poses, axis=-1).max())
    weak, strong = _OBSTACLE_SIZE
    side = max_reach * (weak + (strong - weak) * strength)
    color = tuple(float(c) for c in rng.uniform(0.1, 0.9, 3))
    obstacle = SceneObject("box", size=(side / 2, side / 2, side / 2), position=tuple(map(float, at)), color=color)  # type: ignore[arg-type]
    return obstacle, {"begins": 0, "side_m": side / 2, "position": [float(x) for x in at]}
