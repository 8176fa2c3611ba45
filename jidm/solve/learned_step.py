"""A joint step between two pictures by a learned field: match, solve, then compare brightness around the solution.

Both pictures have a field, so both directions are used: `J_first d = flow` and `-J_second d = flow_back`. The
second-order errors of the two linearisations cancel, which replaces re-linearising. The network's own matching begins;
closer looks are Gauss-Newton on the joint step over the brightness of the robot's pixels, from coarse to fine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.field.learned.config import FLOW_STRIDE
from jidm.motion.flow.base import Flow, clean
from jidm.solve.belief import Gaussian
from jidm.solve.brightness import Brightness
from jidm.solve.least_squares import NormalEquations, Solution, normal_equations, solve_normal_equations
from jidm.solve.looks import CLOSER_LOOKS, CloserLook, Compared, Matched, Part, SeenAt, StepField, closer_look, unlike

RIDGE = 1e-4
"""Relative damping, the same in training and in decoding."""

_UNKNOWN = 1e4  # variance of what nothing is known of [rad^2 or m^2]
_GUESS_GATE = 2.0  # standard deviations by which a guess may be off before it counts less
_MIN_MOTION = 0.1  # [px rms] a joint is observable if a typical step of it moves the picture by this much on its own


@dataclass(frozen=True, eq=False)
class LearnedStep:
    """A step and everything it was made of.

    Attributes:
        solution: what the last look measured, whatever was known before, and a guess where the field makes one; its residual [px rms] and `explained` are about
            brightness, that the pictures still differ by where the robot is seen, or about flow measured elsewhere.
        steps: (B, n) joint step after each look [rad or m], what was known before counted in.
        matched, compared: what the first look saw and what closer ones did, each from first to second picture and back;
            flow measured elsewhere has a way back only where that was measured too.
    """

    solution: Solution
    steps: tuple[Float[Tensor, "b n"], ...]
    matched: tuple[Matched, ...]
    compared: tuple[tuple[Compared, Compared], ...] = ()

    @property
    def last(self) -> tuple[Matched, ...] | tuple[Compared, Compared]:
        """The look that the solution comes from."""
        return self.compared[-1] if self.compared else self.matched


def learned_step(
    field: StepField, first: SeenAt, second: SeenAt, flow: Flow | None = None, back: Flow | None = None,
    *, prior: Gaussian | None = None, closer: Sequence[CloserLook] = CLOSER_LOOKS, whole: bool = False,
) -> LearnedStep:  # fmt: skip
    """The joint step from the first batch of pictures to the second, differentiable in fields, masks and matching.

    Args:
        flow: measured elsewhere, from first to second in the size of the pictures; the network looks itself if not given.
        back: likewise from second to first, where that was measured too.
        prior: what is known of the step before looking [rad or m]. Every look begins with the step that is most likely
            by it and the look before; the first closer one with its mean where by that the pictures look more alike.
        closer: the looks after the first, for a field that they help.
        whole: gradients run on through all looks; otherwise each is taken to begin where it happens to.

    A field that guesses well does so first, from the first look: its guess is a measurement beside every look's.
    """
    if not bool(field.looks_closer):
        closer = ()
    a, b = first.seen, second.seen
    if flow is not None:
        given = (_given(flow, first),) if back is None else (_given(flow, first), _given(back, second))
        solution = _solve(field, first, second, given, field.flow_spread)
        solution = _beside(solution, _guess(field, first, second, given))
        step = _believed(solution.delta_q, solution, prior)
        return LearnedStep(_about_flow(solution, first, given[0]), (step,), given)
    a, b = first.seen, second.seen
    forward, backward = field.pair.correlate(a.coarse, b.coarse)
    early = Matched(*field.pair.start(forward, a.coarse)), Matched(*field.pair.start(backward, b.coarse))
    compared = []
    guess = _guess(field, first, second, early)
    solution = _beside(_solve(field, first, second, early, field.step_spread), guess)
    steps = [_believed(solution.delta_q, solution, prior)]
    parts = Part.showing(first.mask), Part.showing(second.mask)
    step = steps[0] if whole else steps[0].detach()
    if prior is not None and closer:
        known_before = prior.mean.to(step)
        step = torch.where(_likelier(first, second, parts, known_before, step)[:, None], known_before, step)
    for how in closer:
        there = closer_look(how, first, second, parts[0], step)
        compared.append((there, closer_look(how, second, first, parts[1], -step)))
        solution = _solve(field, first, second, compared[-1], field.step_spread)
        solution = _beside(replace(solution, delta_q=step + solution.delta_q), guess)
        steps.append(_believed(solution.delta_q, solution, prior))
        step = steps[-1] if whole else steps[-1].detach()
    if closer:
        solution = _about_brightness(solution, first, second, parts[0])
    else:
        solution = _about_flow(solution, first, early[0])
    return LearnedStep(solution, tuple(steps), early, tuple(compared))


def usual_step(field: StepField, count: int) -> Gaussian:
    """What is known of `count` steps before anything is seen: how large those of the training were, and which joints
    moved together."""
    std = field.delta_std
    covariance = std[:, None] * field.delta_correlation.to(std) * std
    return Gaussian(std.new_zeros(count, len(std)), covariance.expand(count, -1, -1))


def _guess(field: StepField, first: SeenAt, second: SeenAt, looks: Sequence[Matched]) -> Gaussian | None:
    """The step that the field guesses from what was matched; None if it does not."""
    if not bool(field.guesses):
        return None
    mean, std = field.guess(first.seen, second.seen, [(x.flow, x.log_weight) for x in looks])
    return Gaussian(mean, torch.diag_embed(std.square()))


def _beside(solution: Solution, guess: Gaussian | None) -> Solution:
    """What was measured together with a guess, each counting by its covariance.

    A guess that contradicts the measurement by more than both allow counts that much less: then the robot does what it did
    not do in training, and measuring is what a field is for.
    """
    if guess is None:
        return solution
    solved, nothing = solution.valid[:, None], torch.zeros_like(solution.delta_q)
    one = torch.eye(nothing.shape[-1]).to(nothing)
    seen = Gaussian(
        torch.where(solved, solution.delta_q, nothing),
        torch.where(solved[..., None], known(solution.covariance), one),
    )
    off = (seen.mean - guess.mean)[..., None]
    far = (off.mT @ torch.linalg.solve(seen.covariance + guess.covariance, off))[:, 0] / len(one)
    doubted = Gaussian(guess.mean, guess.covariance * (far / _GUESS_GATE**2).clamp(min=1.0)[..., None])
    both = seen.given(doubted)
    return replace(
        solution,
        delta_q=torch.where(solved, both.mean, solution.delta_q),
        covariance=torch.where(solved[..., None], both.covariance, solution.covariance),
    )


def _believed(step: Float[Tensor, "b n"], solution: Solution, prior: Gaussian | None) -> Float[Tensor, "b n"]:
    """The step once what was known before is counted in; items that were not solved stay as they are."""
    if prior is None:
        return step
    solved = solution.valid[:, None]
    unit = torch.eye(step.shape[-1]).to(step)
    covariance = torch.where(solved[..., None], known(solution.covariance), unit)
    return torch.where(solved, prior.given(Gaussian(torch.where(solved, step, 0), covariance)).mean.to(step), step)


def known(covariance: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """A covariance of finite numbers: what is not known at all is known very badly."""
    return covariance.nan_to_num(posinf=_UNKNOWN).clamp(-_UNKNOWN, _UNKNOWN)


@torch.no_grad()
def _likelier(
    first: SeenAt, second: SeenAt, parts: tuple[Part, Part], one: Float[Tensor, "b n"], other: Float[Tensor, "b n"]
) -> Bool[Tensor, " b"]:
    """Whether the robot looks more alike in both pictures by one step than by the other, item by item."""

    def error(x: Tensor) -> Tensor:
        return unlike(first, second, parts[0], x)[0] + unlike(second, first, parts[1], -x)[0]

    return error(one) < error(other)


def solve_pairs(field: StepField, at: SeenAt, *flows: Flow, whole: bool = False) -> LearnedStep:
    """Steps of pairs of unrelated pictures, all first ones and then all second ones; by flow there and back, if given."""
    count = len(at.mask) // 2
    return learned_step(field, at[:count], at[count:], *flows, prior=usual_step(field, count), whole=whole)


@torch.no_grad()
def step_pairs(field: StepField, first: Float[Tensor, "b 3 H W"], second: Float[Tensor, "b 3 H W"]) -> Tensor:
    """(b, n) joint steps of unrelated pairs of pictures [rad or m], the field bent by the poses the pictures show."""
    seen = field.encode(torch.cat([first, second]))
    return solve_pairs(field, SeenAt.of(field, seen, field.state(seen)[0])).steps[-1]


def _solve(
    field: StepField, first: SeenAt, second: SeenAt, looks: Sequence[Matched | Compared], spread: Float[Tensor, " n"]
) -> Solution:
    """What the looks say of the step, counted from their guess; `spread` times less surely than they think."""
    equations = _equations(first, looks[0], 1.0)
    for back in looks[1:]:
        equations = equations + _equations(second, back, -1.0)
    solution = solve_normal_equations(equations, ridge=RIDGE, unit=field.delta_std, min_motion=_MIN_MOTION)
    spread = spread.to(solution.covariance)
    return replace(solution, covariance=solution.covariance * spread[:, None] * spread)


def _equations(at: SeenAt, look: Matched | Compared, sign: float) -> NormalEquations:
    if isinstance(look, Compared):
        robot = look.part.of(at.mask).sigmoid()
        return _brightness_equations(sign * look.part.of(at.jacobian), robot, look.brightness)
    jacobian, robot = at.on_flow_grid
    return normal_equations(sign * jacobian, look.flow, look.log_weight.exp() * robot, layout="dense")


def _brightness_equations(
    jacobian: Float[Tensor, "b 2 n h w"], robot: Float[Tensor, "b h w"], seen: Brightness
) -> NormalEquations:  # fmt: skip
    """Gauss-Newton on the joint step."""
    J = jacobian.flatten(-2)
    bent = torch.einsum("bcdp,bdnp->bcnp", seen.curvature.flatten(-2), J)
    count = robot.flatten(1).sum(-1)
    return NormalEquations(
        matrix=J.movedim(2, 1).flatten(2) @ bent.movedim(2, 1).flatten(2).mT,
        vector=-torch.einsum("bcnp,bcp->bn", J, seen.slope.flatten(-2)),
        energy=seen.energy.flatten(1).sum(-1),
        total_weight=count,
        count=count,
    )


def _about_flow(solution: Solution, first: SeenAt, look: Matched) -> Solution:
    """The solution with residual and explained share of the forward flow on the robot."""
    jacobian, robot = first.on_flow_grid
    weight = (look.log_weight.exp() * robot).detach()
    told = torch.einsum("bcnhw,bn->bchw", jacobian, solution.delta_q)
    total = weight.flatten(1).sum(-1).clamp(min=1e-12)
    left = (weight * (look.flow - told).square().sum(1)).flatten(1).sum(-1) / total
    motion = (weight * look.flow.square().sum(1)).flatten(1).sum(-1) / total
    return _explaining(solution, left, motion)


def _about_brightness(solution: Solution, first: SeenAt, second: SeenAt, part: Part) -> Solution:
    """The solution with what is left of the difference between the pictures, as motion along the brightness' slope."""
    step = solution.delta_q.detach()
    (left, slope), (before, _) = (unlike(first, second, part, x) for x in (step, torch.zeros_like(step)))
    slope = slope.clamp(min=1e-12)
    return _explaining(solution, left / slope, before / slope)


def _explaining(solution: Solution, left: Float[Tensor, " b"], motion: Float[Tensor, " b"]) -> Solution:
    """The solution with how much of a mean squared motion [px^2] it leaves."""
    explained = (1 - left / motion.clamp(min=1e-12)).clamp(0, 1)
    # An item withdrawn for a NaN or an infinity says nothing rather than those.
    nothing, valid = torch.zeros_like(left), solution.valid
    residual = torch.where(valid, left.clamp(min=1e-12).sqrt(), nothing)
    return replace(solution, residual=residual, explained=torch.where(valid, explained, nothing))


def _given(flow: Flow, first: SeenAt) -> Matched:
    """Flow from elsewhere on the grid of flow."""
    _, like = first.on_flow_grid
    b, h, w = like.shape
    small = clean(flow.flow, flow.weight).resized(h, w)  # a NaN would spread even from where nothing counts
    vectors = (small.flow * FLOW_STRIDE).reshape(b, 2, h, w).to(like)
    weight = small.weight.reshape(b, h, w).to(like)
    return Matched(vectors, weight.log())
