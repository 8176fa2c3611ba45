"""One kind of failure at a given strength, with its label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.errors import InputError, did_you_mean
from jidm.sim.artifacts.motions import MOTIONS
from jidm.sim.artifacts.pictures import PICTURES
from jidm.sim.artifacts.take import Picture, Take
from jidm.sim.things import Thing

PENETRATION = "penetration"
KINDS = (*PICTURES, *MOTIONS, PENETRATION)
"""Everything that can go wrong."""

_PIERCED = 0.12, 0.3  # [of the robot's reach] size of the thing the tip goes through, weak and strong


@dataclass(frozen=True, eq=False)
class Corrupted:
    """A video gone wrong.

    Attributes:
        video: (T, H, W, 3) uint8.
        q: (T, n) joint positions that it shows [rad or m]; where the pictures themselves are wrong, those before they were.
        label: kind, strength, seed, the frame it begins at, and what else was drawn; plain JSON.
    """

    video: Picture
    q: NDArray[np.float64]
    label: dict[str, Any]


def corrupt(take: Take, kind: str, strength: float, seed: int) -> Corrupted:
    """Let something go wrong in a take; the same arguments give the same video.

    Args:
        kind: one of `KINDS`. "late", "wrong_goal" and "penetration" show a robot that moves as robots do: only who knows
            the task or the scene can call them wrong.
        strength: in (0, 1].

    Raises:
        InputError: no such kind, or a strength outside (0, 1].
    """
    if kind not in KINDS:
        raise InputError(f"unknown artifact '{kind}': {did_you_mean(kind, KINDS)}")
    if not 0 < strength <= 1:
        raise InputError(f"strength must lie in (0, 1], got {strength}")
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    q = take.q
    if kind in PICTURES:
        video, label = PICTURES[kind](take, strength, rng)
    elif kind in MOTIONS:
        q, label = MOTIONS[kind](take, strength, rng)
        video = take.again(q)
    else:
        thing, label = _in_the_way(take, strength, rng)
        video = take.again(q, [thing])
    return Corrupted(video, q, {"kind": kind, "strength": strength, "seed": seed, **label})


def _in_the_way(take: Take, strength: float, rng: np.random.Generator) -> tuple[Thing, dict[str, Any]]:
    """A box where a tip passes."""
    robot = take.robot
    tip = robot.model.link_index(robot.tip_links[int(rng.integers(len(robot.tip_links)))])
    poses = [take.world.link_poses(q)[tip, :3, 3] for q in take.q]
    at = poses[int(rng.integers(len(take) // 2, len(take)))]
    reach = float(np.linalg.norm(poses, axis=-1).max())
    weak, strong = _PIERCED
    side = reach * (weak + (strong - weak) * strength)
    colour = tuple(float(c) for c in rng.uniform(0.1, 0.9, 3))
    thing = Thing("box", size=(side / 2, side / 2, side / 2), position=tuple(map(float, at)), colour=colour)  # type: ignore[arg-type]
    return thing, {"begins": 0, "side_m": side / 2, "position": [float(x) for x in at]}
