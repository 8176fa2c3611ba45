"""Failures of the motion: jumps, jitter, a robot that freezes, teleports, is delayed, or goes to another goal.

Each takes an episode, a strength in (0, 1] and a generator, and returns joint positions (T, n) [rad or m] with a label.
The robot is then rendered again at these positions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from jidm.sim.failures.episode import Label, RenderedEpisode

JointPositions = NDArray[np.float64]

# Largest sizes [rad]; for a prismatic joint 1 rad corresponds to half its range.
_MAX_JUMP = 0.8
_MAX_JITTER = 0.1  # standard deviation
_MAX_TELEPORT = 1.2
_MAX_GOAL_OFFSET = 1.0


def jump(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[JointPositions, Label]:
    """One joint jumps between two frames and keeps the offset."""
    start_frame, joint = _draw_start_frame(episode, rng), _draw_joint(episode, rng)
    offset = np.zeros(episode.q.shape[1])
    offset[joint] = _MAX_JUMP * strength * rng.choice([-1, 1]) * _joint_scale(episode)[joint]
    label = {"start_frame": start_frame, "joint": episode.robot.joint_names[joint]}
    return _offset_from(episode, start_frame, offset), label


def jitter(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[JointPositions, Label]:
    """White noise on all joints."""
    sigma = _MAX_JITTER * strength
    noise = sigma * _joint_scale(episode) * rng.standard_normal(episode.q.shape)
    return _clip_to_limits(episode, episode.q + noise), {"start_frame": 0, "sigma": sigma}


def freeze(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[JointPositions, Label]:
    """The robot stands still, at full strength from the first frame on."""
    start_frame = round((1 - strength) * (len(episode) - 1))
    held = np.minimum(np.arange(len(episode)), start_frame)
    return episode.q[held], {"start_frame": start_frame}


def teleport(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[JointPositions, Label]:
    """All joints jump between two frames and keep the offset."""
    start_frame = _draw_start_frame(episode, rng)
    offset = _MAX_TELEPORT * strength * _random_signed(episode, rng) * _joint_scale(episode)
    return _offset_from(episode, start_frame, offset), {"start_frame": start_frame}


def delay(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[JointPositions, Label]:
    """The robot starts late and does not arrive. The motion itself is executable."""
    delay_frames = round(strength * (len(episode) - 1) / 2)
    shifted = np.maximum(np.arange(len(episode)) - delay_frames, 0)
    return episode.q[shifted], {"start_frame": 0, "delay_frames": delay_frames}


def wrong_goal(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[JointPositions, Label]:
    """The robot goes smoothly to another pose. The motion itself is executable."""
    offset = _MAX_GOAL_OFFSET * strength * _random_signed(episode, rng)
    x = np.linspace(0, 1, len(episode))[:, None]
    q = episode.q + x * x * (3 - 2 * x) * offset * _joint_scale(episode)
    return _clip_to_limits(episode, q), {"start_frame": 0}


MOTION_FAILURES: dict[str, Callable[[RenderedEpisode, float, np.random.Generator], tuple[JointPositions, Label]]] = {
    "jump": jump,
    "jitter": jitter,
    "frozen": freeze,
    "teleport": teleport,
    "late": delay,
    "wrong_goal": wrong_goal,
}
"""Kind of failure -> function that makes it."""


def _joint_scale(episode: RenderedEpisode) -> NDArray[np.float64]:
    """(n,) 1 rad for revolute joints, half their range [m] for prismatic ones."""
    robot = episode.robot
    prismatic = np.array([t == "prismatic" for t in robot.joint_types])
    half = (robot.upper - robot.lower) / 2
    return np.where(prismatic & np.isfinite(half), half, 1.0)


def _random_signed(episode: RenderedEpisode, rng: np.random.Generator) -> NDArray[np.float64]:
    """(n,) random numbers of size 0.5 to 1 and either sign."""
    n = episode.q.shape[1]
    return rng.uniform(0.5, 1, n) * rng.choice([-1, 1], n)


def _draw_start_frame(episode: RenderedEpisode, rng: np.random.Generator) -> int:
    return int(rng.integers(len(episode) // 4, max(len(episode) // 4 + 1, 3 * len(episode) // 4)))


def _draw_joint(episode: RenderedEpisode, rng: np.random.Generator) -> int:
    """A joint that belongs to no gripper."""
    return int(rng.choice(np.flatnonzero(~episode.robot.gripper_mask)))


def _offset_from(episode: RenderedEpisode, start_frame: int, offset: NDArray[np.float64]) -> JointPositions:
    """The motion with an offset (n,) from a frame on, of opposite sign for joints whose limits do not allow it."""
    later = episode.q[start_frame:]
    blocked = ((later + offset < episode.robot.lower) | (later + offset > episode.robot.upper)).any(0)
    q = np.concatenate([episode.q[:start_frame], later + np.where(blocked, -offset, offset)])
    return _clip_to_limits(episode, q)


def _clip_to_limits(episode: RenderedEpisode, q: JointPositions) -> JointPositions:
    return np.clip(q, episode.robot.lower, episode.robot.upper)
