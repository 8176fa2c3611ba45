"""All that is read off one video, and how: followed from frame to frame, or pair by pair with gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.adapters.reward.evidence import Evidence, evidence
from jidm.errors import InputError
from jidm.field.learned import LearnedField
from jidm.idm import JacobianIDM
from jidm.joint_motion import JointMotion
from jidm.solve.learned_step import SeenAt, solve_pairs

EVERY = 2
"""Backwards, only every so many frames are decoded: it takes half the time, and steps must also add up."""
_PAIRS = 8  # of frames solved at once


@dataclass(frozen=True, eq=False)
class Reading:
    """All that is read off one video: T frames, S = T - 1 steps, n joints.

    Attributes:
        q: (T, n) decoded positions [rad or m].
        back: ((T + 1) // 2, n) the same of every other frame, decoded from the last of them to the first; None where no
            term asks for it.
        valid: (S,) whether the step was measured.
        dt: time between frames [s].
        lower, upper: (n,) the joints' range, infinite where there is none [rad or m].
        velocity: (n,) the joints' speed limits [rad/s or m/s].
        seen: the pictures beside that motion.
    """

    q: Float[Tensor, "T n"]
    back: Float[Tensor, "half n"] | None
    valid: Bool[Tensor, " S"]
    dt: float
    lower: Float[Tensor, " n"]
    upper: Float[Tensor, " n"]
    velocity: Float[Tensor, " n"]
    seen: Evidence


class Reader:
    """Reads videos with one decoder.

    Args:
        idm: the decoder.
        velocity: (n,) speed limits where the decoder knows no robot [rad/s or m/s].
        backwards: decode every other frame from the last to the first as well.
        by_pairs: every pair of frames by itself and differentiably, which only a learned field can.

    Raises:
        InputError: gradients are asked of a field that is not learned.
    """

    def __init__(self, idm: JacobianIDM, velocity: Float[Tensor, " n"], *, backwards: bool, by_pairs: bool) -> None:
        if by_pairs and not isinstance(idm.field, LearnedField):
            raise InputError("gradients need a learned field: flow in front of an exact one has none")
        self._idm, self._velocity, self._backwards, self._by_pairs = idm, velocity, backwards, by_pairs

    @property
    def kind(self) -> str:
        """How videos are read; scales of one kind say nothing about the other."""
        return "pairs" if self._by_pairs else "followed"

    @property
    def judge(self) -> dict[str, str | None]:
        """With what videos are read, as far as scales depend on it."""
        robot = self._idm.embodiment
        return {
            "field": type(self._idm.field).__name__,
            "checkpoint": self._idm.checkpoint.get("content_hash"),
            "embodiment": None if robot is None else robot.content_hash,
        }

    def read(self, frames: Float[Tensor, "T 3 H W"], dt: float, q0: Any) -> tuple[Reading, JointMotion | None]:
        """One video, and its motion where it was followed.

        Args:
            frames: RGB in [0, 1]. dt: time between them [s].
            q0: (n,) positions in the first; None where the network reads them.
        """
        if self._by_pairs:
            return self._solved(frames, dt, q0), None
        with torch.no_grad():
            motion = self._idm.decode(frames, q0=q0, fps=1 / dt, layout="TCHW")
            back = None
            if self._backwards:
                some = slice(None, None, EVERY)
                last = motion.position[some][-1]
                behind = self._idm.decode(frames[some].flip(0), q0=last, fps=1 / (EVERY * dt), layout="TCHW")
                back = behind.position.flip(0)
            field = self._idm.field
            pictures = field.fitted(frames) if isinstance(field, LearnedField) else frames
            return self._reading(pictures, motion.position, back, motion.valid, dt), motion

    def _solved(self, frames: Float[Tensor, "T 3 H W"], dt: float, q0: Any) -> Reading:
        field = self._idm.field
        assert isinstance(field, LearnedField)
        pictures = field.fitted(frames)
        steps, valid = [], []
        for first, second in zip(pictures[:-1].split(_PAIRS), pictures[1:].split(_PAIRS), strict=True):
            seen = field.encode(torch.cat([first, second]))
            solved = solve_pairs(field, SeenAt.of(field, seen, field.state(seen)[0]), whole=True)
            steps.append(solved.steps[-1])
            valid.append(solved.solution.valid)
        start = field.state(field.encode(pictures[:1]))[0] if q0 is None else torch.as_tensor(q0).to(pictures)[None]
        q = torch.cat([start, start + torch.cat(steps).cumsum(0)])
        return self._reading(pictures, q, None, torch.cat(valid), dt)

    def _reading(self, pictures: Tensor, q: Tensor, back: Tensor | None, valid: Tensor, dt: float) -> Reading:
        lower, upper, velocity = self._limits(q)
        return Reading(q, back, valid, dt, lower, upper, velocity, evidence(self._idm.field, pictures, q))

    def _limits(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        robot = self._idm.embodiment
        if robot is None:
            nowhere = torch.full_like(like[0], math.inf)
            return -nowhere, nowhere, self._velocity.to(like)
        lower, upper, velocity = (
            torch.from_numpy(np.array(x)).to(like) for x in (robot.lower, robot.upper, robot.velocity)
        )
        return lower, upper, velocity
