"""A joint step between two pictures by a learned field: match, solve, then compare brightness around the solution.

Both pictures have a field, so both directions are used: `J_first d = flow` and `-J_second d = flow_back`. The
second-order errors of the two linearisations cancel, which replaces re-linearising. The network's own matching begins;
closer looks are Gauss-Newton on the joint step over the brightness of the robot's pixels, from coarse to fine. Nothing in
them is learned: trained weights of pixels, tried in their place, gave less precise steps than the robot's mask alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.field.learned.blocks import doubled, reduced
from jidm.field.learned.config import STRIDE, LearnedFieldConfig
from jidm.field.learned.matching import PairHead
from jidm.field.learned.network import Encoded
from jidm.motion.flow.base import Flow, clean
from jidm.solve.brightness import Brightness, aligned, carry_back, gradients, path
from jidm.solve.least_squares import NormalEquations, Solution, normal_equations, solve_normal_equations

RIDGE = 1e-4
"""Relative damping, the same in training and in decoding."""


@dataclass(frozen=True)
class CloserLook:
    """How brightness is compared once.

    Attributes:
        scale: size of the pictures compared relative to (height, width); None = in all the detail there is.
        noise: brightness that differs where nothing is wrong, see `aligned`; larger while the step may still be off.
    """

    scale: float | None
    noise: float


CLOSER_LOOKS = (
    CloserLook(0.5, 0.4),
    CloserLook(1.0, 0.4),
    CloserLook(None, 0.3),
    CloserLook(None, 0.1),
    CloserLook(None, 0.05),
)
"""From coarse to fine; each begins where the one before ended."""

_ROBOT = 0.01  # cells that show the robot with less than this probability are not compared
_LOOSE = 0.5  # [px] how far a cell's motion may be off before anything is seen
_MIN_MOTION = 0.1  # [px rms] a joint is observable if a typical step of it moves the picture by this much on its own


@runtime_checkable
class StepField(Protocol):
    """What reads pictures: a `LearnedField`, or a `HybridField`."""

    @property
    def config(self) -> LearnedFieldConfig: ...
    @property
    def pair(self) -> PairHead: ...
    @property
    def delta_std(self) -> Tensor: ...
    @property
    def step_spread(self) -> Tensor: ...
    def encode(self, image: Tensor) -> Encoded: ...
    def state(self, seen: Encoded) -> tuple[Tensor, Tensor]: ...
    def jacobian(self, seen: Encoded, q: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Part:
    """Rows and columns of the field's grid around everything that shows the robot in any picture of a batch."""

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def showing(cls, mask: Float[Tensor, "b h w"]) -> Part:
        """A cell more on every side than the robot needs, so that what is interpolated between cells is right there."""
        robot = (mask.detach().sigmoid() > _ROBOT).any(0)
        h, w = robot.shape
        rows, columns = (robot.any(axis).nonzero()[:, 0].tolist() or [0] for axis in (1, 0))
        return cls(max(0, rows[0] - 1), min(h, rows[-1] + 2), max(0, columns[0] - 1), min(w, columns[-1] + 2))

    def of(self, grid: Tensor, times: int = 1) -> Tensor:
        """That part of a grid so many times as fine as the field's."""
        return grid[..., times * self.top : times * self.bottom, times * self.left : times * self.right]

    def corner(self, times: int = 1) -> tuple[int, int]:
        """First row and column on a grid so many times as fine as the field's."""
        return times * self.top, times * self.left


@dataclass(frozen=True, eq=False)
class Look:
    """One direction of one comparison of two pictures.

    Attributes:
        flow: (B, 2, h, w) [px of the picture]: what was matched, or for a closer look around what it looked, in its part
            of the grid.
        log_weight: (B, h, w) of the matching's confidence (inverse variance, 1/px^2); None for a closer look.
        brightness: what the robot's pixels say around the flow; None for the first look.
        part: of the grid that was compared; None for all of it.
    """

    flow: Float[Tensor, "b 2 h w"]
    log_weight: Float[Tensor, "b h w"] | None
    brightness: Brightness | None = None
    part: Part | None = None


@dataclass(frozen=True, eq=False)
class LearnedStep:
    """A step and everything it was made of.

    Attributes:
        solution: of the last look; its residual [px rms] and `explained` are about brightness, that the pictures still
            differ by where the robot is seen, or about flow that was measured elsewhere.
        steps: (B, n) joint step after each look [rad or m].
        looks: each in both directions, from first to second picture and from second to first.
    """

    solution: Solution
    steps: tuple[Float[Tensor, "b n"], ...]
    looks: tuple[tuple[Look, Look], ...]


@dataclass(frozen=True, eq=False)
class SeenAt:
    """A batch of pictures with the field at their joint positions.

    Attributes:
        jacobian: (B, 2, n, h, w) [px of the picture per rad or m].
        mask: (B, h, w) logit of each cell's showing the robot.
    """

    seen: Encoded
    jacobian: Float[Tensor, "b 2 n h w"]
    mask: Float[Tensor, "b h w"]

    @classmethod
    def of(cls, field: StepField, seen: Encoded, q: Float[Tensor, "b n"]) -> SeenAt:
        """Read the field at joint positions q [rad or m]."""
        return cls(seen, *field.jacobian(seen, q.to(seen.image)))

    def fixed(self) -> SeenAt:
        """The same for a solve that must not bend the field."""
        return SeenAt(self.seen, self.jacobian.detach(), self.mask)

    def __getitem__(self, index: Any) -> SeenAt:
        """Index the batch axis."""
        return SeenAt(self.seen[index], self.jacobian[index], self.mask[index])


def learned_step(
    field: StepField, first: SeenAt, second: SeenAt, flow: Flow | None = None,
    *, expected: Float[Tensor, "b n"] | None = None, closer: Sequence[CloserLook] = CLOSER_LOOKS,
) -> LearnedStep:  # fmt: skip
    """The joint step from the first batch of pictures to the second, differentiable in fields, masks and matching.

    Args:
        flow: measured elsewhere, from first to second in the size of the pictures; the network looks itself if not given.
        expected: a step [rad or m] that is likely, say the last one again; closer looks begin with it where by it the
            pictures look more alike than by what was matched.
        closer: the looks after the first.
    """
    a, b = first.seen, second.seen
    forward, backward = field.pair.correlate(a.coarse, b.coarse)
    early = Look(*field.pair.start(forward, a.coarse)), Look(*field.pair.start(backward, b.coarse))
    if flow is not None:
        given = _given(flow, early)
        solution = _solve(field, first, second, given)
        return LearnedStep(_about_flow(solution, first, given[0]), (solution.delta_q,), (given,))
    looks = [early]
    solution = _solve(field, first, second, early)
    steps = [solution.delta_q]
    step = solution.delta_q.detach()
    if expected is not None and closer:
        step = _likelier(first, second, step, expected)
    parts = Part.showing(first.mask), Part.showing(second.mask)
    for how in closer:
        looks.append(
            (
                _closer(how, first, second, parts[0], _path(first, second, parts[0], step)),
                _closer(how, second, first, parts[1], _path(second, first, parts[1], -step)),
            )
        )
        solution = _solve(field, first, second, looks[-1])
        steps.append(step + solution.delta_q)
        step = steps[-1].detach()
    if closer:
        solution = _about_brightness(replace(solution, delta_q=steps[-1]), first, second)
    else:
        solution = _about_flow(solution, first, looks[-1][0])
    return LearnedStep(solution, tuple(steps), tuple(looks))


def seen_motion(look: Look, size: tuple[int, int]) -> tuple[Float[Tensor, "b 2 h w"], Float[Tensor, "b h w"]]:
    """Motion on the robot as a look measured it: around where it looked, corrected cell by cell by what brightness asks for.

    Returns:
        Flow [px of the picture] on the field's grid of that size, and in [0, 1] how much of it was measured: along edges
        half of it is. Both are 0 where nothing was compared; a first look is returned as it is.
    """
    if look.brightness is None or look.part is None:
        assert look.log_weight is not None
        weight = look.log_weight.exp()
        return look.flow, weight / weight.flatten(1).amax(1).clamp(min=1e-12)[:, None, None]
    curvature, slope = (
        4 * F.avg_pool2d(x.flatten(1, -3), 2).unflatten(1, x.shape[1:-2]).movedim((-2, -1), (1, 2))
        for x in (look.brightness.curvature, look.brightness.slope)
    )
    damped = curvature + torch.eye(2).to(curvature) / _LOOSE**2
    left = torch.linalg.solve(damped, -slope)
    told = torch.linalg.solve(damped, curvature).diagonal(dim1=-2, dim2=-1).mean(-1)
    flow = look.flow.new_zeros(len(look.flow), 2, *size)
    weight = flow[:, 0].clone()
    look.part.of(flow)[:] = look.flow * (told > 0)[:, None] + left.movedim(-1, 1)
    look.part.of(weight)[:] = told
    return flow, weight


def _path(here: SeenAt, there: SeenAt, part: Part, step: Float[Tensor, "b n"]) -> Float[Tensor, "b 2 h w"]:
    """Flow of a step on a part of the grid it starts from [px of the picture]."""
    ahead = torch.einsum("bcnhw,bn->bchw", part.of(here.jacobian).detach(), step)
    back = torch.einsum("bcnhw,bn->bchw", there.jacobian.detach(), step)
    return path(ahead, back, STRIDE, part.corner())


def _closer(how: CloserLook, here: SeenAt, there: SeenAt, part: Part, guess: Float[Tensor, "b 2 h w"]) -> Look:
    """Brightness around a guess, on a grid twice as fine as the field's."""
    first, second = (_scaled(x.seen, how.scale) for x in (here, there))
    side = first.shape[-1] // here.mask.shape[-1]  # pixels compared per cell of the field
    larger = side / STRIDE
    carried = carry_back(second, _enlarged(guess, side) * larger, part.corner(side))
    seen = aligned(
        part.of(first, side), carried, _robot(here, part, side), noise=how.noise, cell=side // 2, larger=larger
    )
    return Look(guess, None, seen, part)


def _robot(at: SeenAt, part: Part, side: int) -> Float[Tensor, "b 1 h w"]:
    """How much each pixel of a part counts, `side` of them per cell."""
    robot = part.of(at.mask).sigmoid()[:, None]
    return _enlarged(torch.where(robot > _ROBOT, robot, 0), side)


def _scaled(seen: Encoded, scale: float | None) -> Float[Tensor, "b 3 h w"]:
    if scale is None:
        return seen.image
    return reduced(seen.small, round(1 / scale))


def _enlarged(grid: Float[Tensor, "b c h w"], times: int) -> Tensor:
    return F.interpolate(grid, scale_factor=float(times), mode="bilinear", align_corners=False)


@torch.no_grad()
def _likelier(
    first: SeenAt, second: SeenAt, step: Float[Tensor, "b n"], other: Float[Tensor, "b n"]
) -> Float[Tensor, "b n"]:
    """Of two steps the one by which the robot looks more alike in both pictures, item by item."""
    one, two = (_unlike(first, second, x)[0] for x in (step, other))
    return torch.where((two < one)[:, None], other.to(step), step)


@torch.no_grad()
def _unlike(
    first: SeenAt, second: SeenAt, step: Float[Tensor, "b n"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Mean squares of the brightness by which the robot differs after a step, and of its slope [1/px of the picture]."""
    part = Part.showing(first.mask)
    robot, image = _robot(first, part, STRIDE), part.of(first.seen.small, STRIDE)
    there = _enlarged(_path(first, second, part, step), STRIDE)
    carried = carry_back(second.seen.small, there, part.corner(STRIDE))
    along = gradients((image + carried) / 2)
    squares = ((carried - image).square(), along[0].square() + along[1].square())
    total = robot.flatten(1).sum(-1).clamp(min=1e-6)
    error, slope = ((x.mean(1, keepdim=True) * robot).flatten(1).sum(-1) / total for x in squares)
    return error, slope


@torch.no_grad()
def step_pairs(field: StepField, first: Float[Tensor, "b 3 H W"], second: Float[Tensor, "b 3 H W"]) -> Tensor:
    """(b, n) joint steps of unrelated pairs of pictures [rad or m], the field bent by the poses the pictures show."""
    count = len(first)
    seen = field.encode(torch.cat([first, second]))
    at = SeenAt.of(field, seen, field.state(seen)[0])
    return learned_step(field, at[:count], at[count:]).solution.delta_q


def _solve(field: StepField, first: SeenAt, second: SeenAt, looks: tuple[Look, Look]) -> Solution:
    """What the looks say of the step, counted from their guess."""
    ahead, back = _equations(first, looks[0], 1.0), _equations(second, looks[1], -1.0)
    solution = solve_normal_equations(ahead + back, ridge=RIDGE, unit=field.delta_std, min_motion=_MIN_MOTION)
    spread = field.step_spread.to(solution.covariance)
    return replace(solution, covariance=solution.covariance * spread[:, None] * spread)


def _equations(at: SeenAt, look: Look, sign: float) -> NormalEquations:
    robot = at.mask.sigmoid()
    if look.brightness is not None and look.part is not None:
        return _brightness_equations(sign * look.part.of(at.jacobian), look.part.of(robot), look.brightness)
    assert look.log_weight is not None
    return normal_equations(sign * at.jacobian, look.flow, look.log_weight.exp() * robot, layout="dense")


def _brightness_equations(
    jacobian: Float[Tensor, "b 2 n h w"], robot: Float[Tensor, "b h w"], seen: Brightness
) -> NormalEquations:  # fmt: skip
    """Gauss-Newton on the joint step."""
    J = doubled(jacobian.flatten(1, 2)).unflatten(1, jacobian.shape[1:3]).flatten(-2)
    bent = torch.einsum("bcdp,bdnp->bcnp", seen.curvature.flatten(-2), J)
    count = robot.flatten(1).sum(-1)  # cells of the field, as for flow
    return NormalEquations(
        matrix=J.movedim(2, 1).flatten(2) @ bent.movedim(2, 1).flatten(2).mT,
        vector=-torch.einsum("bcnp,bcp->bn", J, seen.slope.flatten(-2)),
        energy=seen.energy.flatten(1).sum(-1),
        total_weight=count,
        count=count,
    )


def _about_flow(solution: Solution, first: SeenAt, look: Look) -> Solution:
    """The solution with residual and explained share of the forward flow on the robot."""
    assert look.log_weight is not None
    weight = (look.log_weight.exp() * first.mask.sigmoid()).detach()
    told = torch.einsum("bcnhw,bn->bchw", first.jacobian, solution.delta_q)
    total = weight.flatten(1).sum(-1).clamp(min=1e-12)
    left = (weight * (look.flow - told).square().sum(1)).flatten(1).sum(-1) / total
    motion = (weight * look.flow.square().sum(1)).flatten(1).sum(-1) / total
    return _explaining(solution, left, motion)


def _about_brightness(solution: Solution, first: SeenAt, second: SeenAt) -> Solution:
    """The solution with what is left of the difference between the pictures, as motion along the brightness' slope."""
    step = solution.delta_q.detach()
    (left, slope), (before, _) = _unlike(first, second, step), _unlike(first, second, torch.zeros_like(step))
    slope = slope.clamp(min=1e-12)
    return _explaining(solution, left / slope, before / slope)


def _explaining(solution: Solution, left: Float[Tensor, " b"], motion: Float[Tensor, " b"]) -> Solution:
    """The solution with how much of a mean squared motion [px^2] it leaves."""
    explained = (1 - left / motion.clamp(min=1e-12)).clamp(0, 1)
    # An item withdrawn for a NaN or an infinity says nothing rather than those.
    nothing, valid = torch.zeros_like(left), solution.valid
    residual = torch.where(valid, left.clamp(min=1e-12).sqrt(), nothing)
    return replace(solution, residual=residual, explained=torch.where(valid, explained, nothing))


def _given(flow: Flow, like: tuple[Look, Look]) -> tuple[Look, Look]:
    """Flow from elsewhere on the field's grid; nothing is known of the way back."""
    like_flow, like_weight = like[0].flow, like[0].log_weight
    assert like_weight is not None
    h, w = like_flow.shape[-2:]
    small = clean(flow.flow, flow.weight).resized(h, w)  # a NaN would spread even from where nothing counts
    vectors = (small.flow * STRIDE).reshape(like_flow.shape).to(like_flow)
    weight = small.weight.reshape(like_weight.shape).to(like_weight)
    nothing = torch.full_like(weight, -torch.inf)
    return Look(vectors, weight.log()), Look(torch.zeros_like(vectors), nothing)
