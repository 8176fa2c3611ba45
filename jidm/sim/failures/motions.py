"""What goes wrong in the motion: jumps, jitter, a robot that stands still, is suddenly elsewhere, or goes somewhere else.

Each takes a take, a strength in (0, 1] and a generator, and returns joint positions (T, n) that no real robot was asked
for, with what it did; the robot is then filmed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.sim.failures.episode import RenderedEpisode

Label = dict[str, Any]
JointPositions = NDArray[np.float64]

_MAX_JUMP = 0.8  # [rad], or the same share of a radian of a prismatic joint's range
_MAX_JITTER = 0.1  # [rad] standard deviation
_MAX_TELEPORT = 1.2  # [rad]
_MAX_GOAL_OFFSET = 1.0  # [rad]


def jump(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[JointPositions, Label]:
    """One joint is elsewhere from one frame to the next, and stays there."""
    start_frame, joint = _draw_start_frame(episode, rng), _draw_joint(episode, rng)
    offset = np.zeros(episode.q.shape[1])
    offset[joint] = _MAX_JUMP * strength * rng.choice([-1, 1]) * _joint_scale(episode)[joint]
    return _offset_from(episode, start_frame, offset), {
        "begins": start_frame,
        "joint": episode.robot.joint_names[joint],
    }


def jitter(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[JointPositions, Label]:
    """All joints tremble."""
    sigma = _MAX_JITTER * strength
    return _clip_to_limits(episode, episode.q + sigma * _joint_scale(episode) * rng.standard_normal(episode.q.shape)), {
        "begins": 0,
        "sigma": sigma,
    }


def freeze(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[JointPositions, Label]:
    """The robot stands still, at full strength from the first frame on."""
    start_frame = round((1 - strength) * (len(episode) - 1))
    return np.concatenate(
        [episode.q[:start_frame], np.repeat(episode.q[start_frame : start_frame + 1], len(episode) - start_frame, 0)]
    ), {"begins": start_frame}


def teleport(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[JointPositions, Label]:
    """The whole robot is in another pose from one frame to the next."""
    start_frame = _draw_start_frame(episode, rng)
    offset = (
        _MAX_TELEPORT * strength * rng.uniform(0.5, 1, episode.q.shape[1]) * rng.choice([-1, 1], episode.q.shape[1])
    )
    return _offset_from(episode, start_frame, offset * _joint_scale(episode)), {"begins": start_frame}


def delay(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[JointPositions, Label]:
    """The robot sets off late and does not arrive; a robot that moves rightly, as far as pictures tell."""
    delay_frames = round(strength * (len(episode) - 1) / 2)
    return episode.q[np.maximum(np.arange(len(episode)) - delay_frames, 0)], {"begins": 0, "frames": delay_frames}


def wrong_goal(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[JointPositions, Label]:
    """The robot goes somewhere else, smoothly; a robot that moves rightly, as far as pictures tell."""
    offset = (
        _MAX_GOAL_OFFSET * strength * rng.uniform(0.5, 1, episode.q.shape[1]) * rng.choice([-1, 1], episode.q.shape[1])
    )
    x = np.linspace(0, 1, len(episode))[:, None]
    return _clip_to_limits(episode, episode.q + x * x * (3 - 2 * x) * offset * _joint_scale(episode)), {"begins": 0}


MOTION_FAILURES: dict[str, Callable[[RenderedEpisode, float, np.random.Generator], tuple[JointPositions, Label]]] = {
    "jump": jump,
    "jitter": jitter,
    "frozen": freeze,
    "teleport": teleport,
    "late": delay,
    "wrong_goal": wrong_goal,
}
"""Name -> what does it."""


def _joint_scale(episode: RenderedEpisode) -> NDArray[np.float64]:
    """(n,) 1 rad; of prismatic joints half their range [m]."""
    robot = episode.robot
    prismatic = np.array([t == "prismatic" for t in robot.joint_types])
    half = (robot.upper - robot.lower) / 2
    return np.where(prismatic & np.isfinite(half), half, 1.0)


def _draw_start_frame(episode: RenderedEpisode, rng: np.random.Generator) -> int:
    return int(rng.integers(len(episode) // 4, max(len(episode) // 4 + 1, 3 * len(episode) // 4)))


def _draw_joint(episode: RenderedEpisode, rng: np.random.Generator) -> int:
    """One that is no gripper."""
    return int(rng.choice(np.flatnonzero(~episode.robot.gripper_mask)))


def _offset_from(episode: RenderedEpisode, start_frame: int, offset: NDArray[np.float64]) -> JointPositions:
    """Moved by an offset from a frame on, to the other side where the limits do not let it."""
    later = episode.q[start_frame:]
    blocked = ((later + offset < episode.robot.lower) | (later + offset > episode.robot.upper)).any(0)
    return _clip_to_limits(
        episode, np.concatenate([episode.q[:start_frame], later + np.where(blocked, -offset, offset)])
    )


def _clip_to_limits(episode: RenderedEpisode, q: JointPositions) -> JointPositions:
    return np.clip(q, episode.robot.lower, episode.robot.upper)
