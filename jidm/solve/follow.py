"""A pose followed through a video by a learned field: steps between frames, and what each frame shows of the pose.

Streaming, two frames at a time. Steps are precise but add up to drift; the pose read off one picture is coarse but does
not drift. A Kalman filter takes both at what they are worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.field.learned.config import LearnedFieldConfig
from jidm.motion.flow.base import Flow
from jidm.solve.belief import Belief, Gaussian, looking_back
from jidm.solve.learned_step import LearnedStep, known, learned_step
from jidm.solve.looks import CLOSER_LOOKS, CloserLook, SeenAt, StepField
from jidm.solve.track import JointLimits, TrackedStep

_INSTANT = 1e-3  # frames are never closer in time than this [s]
_UNSEEN_SHARE = 0.25  # of the trained range, by which a joint without known limits may leave it
_STEP_UNIT = 40.0
"""A joint of unknown type counts by this many of its typical steps: a quarter of it is the largest step believed."""


@dataclass(frozen=True)
class FollowOptions:
    """How a pose is followed with a learned field.

    Attributes:
        persistence: a velocity is expected to last about so long [s].
        memory: the usual speed of a joint is that of about so many frames back.
        anchor: whether the pose read off each picture is used.
        repeats: for so many frames the errors of the pose read off pictures are alike, so each counts that much less.
        gate: readings further than this from the expected pose [standard deviations of both] are not believed, and
            steps that are further off count less.
        confused: a picture is not measured where the step leaves more than this share of the motion unexplained ...
        least_motion: ... of at least this much motion [px rms].
        closer: how pictures are compared once they are matched, if that is better for this field; fewer looks are faster
            and less precise. Frames of a video begin nearer than unrelated pairs do, so one coarse look is enough.
    """

    persistence: float = 0.5
    memory: float = 16.0
    anchor: bool = True
    repeats: float = 16.0
    gate: float = 4.0
    confused: float = 0.9
    least_motion: float = 0.5
    closer: tuple[CloserLook, ...] = CLOSER_LOOKS[2:]


@dataclass(frozen=True, eq=False)
class _Passed:
    """A frame that was looked at.

    Attributes:
        expected, known: positions and velocities before and after it was. move: (2n, 2n) from the last frame's to the
            expected. span: time since the last frame [s].
    """

    expected: Gaussian
    known: Gaussian
    move: Float[Tensor, "m m"]
    span: float


class PoseFollower:
    """Follows one robot in one video with a learned or hybrid field.

    Args:
        field: what reads the pictures.
        limits: of the joints; positions and the speed of steps stay inside.
        options: how.
        remembers: whether everything is kept that `looking_back` needs, (2n)^2 numbers a frame.
    """

    def __init__(
        self, field: StepField, limits: JointLimits, options: FollowOptions, *, remembers: bool = False
    ) -> None:
        self.field, self.limits, self.options, self.remembers = field, limits, options, remembers

    def start(self, frame: Float[Tensor, "3 H W"], q0: Float[Tensor, " n"] | None) -> None:
        """Begin at a frame; without q0 [rad or m] at the pose that the frame shows."""
        seen = self.field.encode(frame[None])
        read, std = self.field.state(seen)
        # A stated pose outside the limits is believed; from there the way is only back.
        self._low = self.limits.lower if q0 is None else torch.minimum(self.limits.lower, q0)
        self._high = self.limits.upper if q0 is None else torch.maximum(self.limits.upper, q0)
        self.q = self._inside(read[0]) if q0 is None else q0
        self.position_covariance = torch.diag(std[0] ** 2) if q0 is None else torch.zeros_like(torch.diag(std[0]))
        self._belief: Belief | None = None
        self._elapsed = 0.0
        self._last = SeenAt.of(self.field, seen, self.q[None])
        self._begun: Gaussian | None = None
        self._passed: list[_Passed] = []

    def skip(self, dt: float) -> TrackedStep:
        """A frame that shows nothing: hold the pose; the next good frame is measured from the last good one."""
        self._elapsed += dt
        zero = torch.zeros_like(self.q)
        unknown = zero.new_zeros(())
        reach = torch.diag(self.limits.reach(self._elapsed) ** 2)
        never = torch.zeros_like(zero, dtype=torch.bool)
        wide = self.position_covariance + reach
        return TrackedStep(
            zero, self.q, wide, torch.diag(self.limits.reach(dt) ** 2), unknown, unknown, never, False, False
        )

    def step(
        self, frame: Float[Tensor, "3 H W"], dt: float, flow: Flow | None = None, back: Flow | None = None
    ) -> TrackedStep:
        """Follow the robot into the next frame.

        Args:
            frame: finite, same size as the first.
            dt: time since the previous frame [s].
            flow: measured elsewhere, from the last good frame to this one; the network matches the pictures if not given.
            back: likewise from this frame to the last good one.
        """
        gap, span = self._elapsed, max(self._elapsed + dt, _INSTANT)
        belief = self._belief
        if belief is None:
            speed = self.field.delta_std / max(dt, _INSTANT)
            speed = torch.minimum(speed, self.limits.velocity)
            belief = Belief.begin(self.q, self.position_covariance, speed, self.field.delta_correlation)
        self._begun = self._begun or belief.state
        move = belief.move(span, self.options.persistence)
        belief = ahead = belief.ahead(span, self.options.persistence)
        seen = self.field.encode(frame[None])
        now = SeenAt.of(self.field, seen, self._inside(belief.q.to(self.q))[None])
        expected = belief.step(span)
        prior = Gaussian(expected.mean[None].to(self.q), expected.covariance[None].to(self.q))
        found = learned_step(self.field, self._last, now, flow, back, prior=prior, closer=self.options.closer)
        solution = found.solution
        if not bool(solution.valid[0]):
            return self.skip(dt)
        measured = Gaussian(self._slow_enough(solution.delta_q[0], span), known(solution.covariance[0]))
        belief = belief.stepped(measured, span, self.options.gate)
        if self.options.anchor:
            position, std = (x[0] for x in self.field.state(seen))
            belief = belief.read(Gaussian(position, torch.diag(std**2 * self.options.repeats)), self.options.gate)
        step = self._possible(belief, span)
        self.q = self._inside(belief.q.to(self.q))
        self._belief = replace(belief, q=self.q.double()).livelier(self.options.memory)
        self.position_covariance = belief.position_covariance.to(self.q)
        if self.remembers:
            self._passed.append(_Passed(ahead.state, self._belief.state, move, span))
        self._low = torch.minimum(self.limits.lower, self.q)
        self._high = torch.maximum(self.limits.upper, self.q)
        self._elapsed = 0.0
        self._last = SeenAt.of(self.field, seen, self.q[None])
        valid = gap == 0.0 and not self._lost(found)
        return TrackedStep(
            step if valid else torch.zeros_like(step), self.q, self.position_covariance,
            self._honest(belief.step(span).covariance.to(self.q)), solution.residual[0], solution.explained[0],
            solution.observable[0], valid,
        )  # fmt: skip

    def told(self, q: Float[Tensor, " n"], std: float) -> None:
        """What the robot itself says its joints were in the last frame that was looked at [rad or m], to within std."""
        measured = Gaussian(q.to(self.q), torch.diag(torch.full_like(self.q, std**2)))
        if self._belief is None:
            self.q, self.position_covariance = measured.mean, measured.covariance
        else:
            self._belief = self._belief.read(measured, math.inf)
            self.q = self._belief.q.to(self.q)
            self.position_covariance = self._belief.position_covariance.to(self.q)
        self._low = torch.minimum(self.limits.lower, self.q)
        self._high = torch.maximum(self.limits.upper, self.q)
        self._last = SeenAt.of(self.field, self._last.seen, self.q[None])

    def looking_back(self, steps: Sequence[TrackedStep]) -> list[TrackedStep]:
        """The steps since `start`, all of them, told by the frames after them as well.

        Steps that are not valid say nothing and stay so; the pose at a frame that showed nothing is held as before it.
        """
        if self._begun is None or not self._passed:
            return list(steps)
        n, told, position = len(self.q), [], steps[0].position
        states = looking_back(
            [x.expected for x in self._passed],
            [self._begun, *(x.known for x in self._passed)],
            [x.move for x in self._passed],
        )
        later = zip(states[1:], self._passed, strict=True)
        for step in steps:
            if not step.used:
                told.append(replace(step, position=position))
                continue
            state, passed = next(later)
            span = passed.span
            q, velocity = (x.to(self.q) for x in (state.mean[:n], state.mean[n:]))
            position, where = self._inside(q), state.covariance[:n, :n].to(self.q)
            covariance = self._honest((state.covariance[n:, n:] * span**2).to(self.q))
            delta_q = self._slow_enough(velocity * span, span) if step.valid else step.delta_q
            told.append(
                replace(step, delta_q=delta_q, position=position, position_covariance=where, covariance=covariance)
            )
        return told

    def _honest(self, covariance: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        """Covariance of a step that knows of errors lasting over frames."""
        spread = self.field.video_spread.to(covariance)
        return covariance * spread[:, None] * spread

    def _possible(self, belief: Belief, span: float) -> Float[Tensor, " n"]:
        """The step that is believed in, no faster than the joints move and no further than they reach."""
        step = self._slow_enough(belief.step(span).mean.to(self.q), span)
        return self._inside(self.q + step) - self.q

    def _slow_enough(self, step: Float[Tensor, " n"], span: float) -> Float[Tensor, " n"]:
        """The step, no faster than the joints move."""
        fastest = self.limits.velocity * span
        return step.clamp(-fastest, fastest)

    def _lost(self, found: LearnedStep) -> bool:
        """Whether there was motion and hardly any of it was the robot's."""
        left = float(found.solution.residual[0])
        explained = float(found.solution.explained[0])
        moved = left / max(1e-6, 1 - explained) ** 0.5
        return moved > self.options.least_motion and explained < 1 - self.options.confused

    def _inside(self, q: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(q, self._low), self._high)


def learned_limits(config: LearnedFieldConfig, like: Tensor) -> JointLimits:
    """Limits of joints of which only a recording is known: its range, a little widened, and any speed."""
    lower, upper = (torch.tensor(x).to(like) for x in (config.q_lower, config.q_upper))
    margin = _UNSEEN_SHARE * (upper - lower)
    return JointLimits(
        lower - margin,
        upper + margin,
        torch.full_like(lower, torch.inf),
        _STEP_UNIT * torch.tensor(config.delta_std).to(like),
    )
