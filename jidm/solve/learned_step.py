"""A joint step between two pictures by a learned field: match, solve, look again around the solution, solve.

Both pictures have a field, so both directions are used: `J_first d = flow` and `-J_second d = flow_back`. The
second-order errors of the two linearisations cancel, which replaces re-linearising. Later looks are Gauss-Newton on the
joint step: a rough one aligns learned textures, close ones every pixel's brightness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.field.learned.blocks import doubled
from jidm.field.learned.config import STRIDE, LearnedFieldConfig
from jidm.field.learned.matching import Brightness, PairHead, carry_back, path
from jidm.field.learned.network import Encoded
from jidm.motion.flow.base import Flow, clean
from jidm.solve.least_squares import NormalEquations, Solution, normal_equations, solve_normal_equations

RIDGE = 1e-4
"""Relative damping, the same in training and in decoding."""

CLOSER_LOOKS = 3
"""After the first: a rough one and two close ones. Each begins where the one before ended."""

Begin = Callable[[int, Float[Tensor, "b n"]], Float[Tensor, "b n"]]
"""(0 for the rough look, 1, 2, ... for the close ones; step of the look before) -> step to begin with."""

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


@dataclass(frozen=True, eq=False)
class Look:
    """One direction of one comparison of two pictures.

    Attributes:
        flow: (B, 2, h, w) [px of the picture]; log_weight: (B, h, w) of its confidence (inverse variance, 1/px^2). Both
            None for a rough look.
        guess: (B, 2, h, w) flow around which it looked, None for the first look.
        brightness: what the pixels say around the guess, None for the first look.
    """

    flow: Float[Tensor, "b 2 h w"] | None
    log_weight: Float[Tensor, "b h w"] | None
    guess: Float[Tensor, "b 2 h w"] | None = None
    brightness: Brightness | None = None

    @property
    def told(self) -> tuple[Float[Tensor, "b 2 h w"], Float[Tensor, "b h w"]]:
        """Flow and log_weight of a look that is not a rough one."""
        assert self.flow is not None and self.log_weight is not None
        return self.flow, self.log_weight


@dataclass(frozen=True, eq=False)
class LearnedStep:
    """A step and everything it was made of.

    Attributes:
        solution: of the last look; its residual and `explained` are about that look's flow.
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
    *, begin: Begin | None = None, closer: int = CLOSER_LOOKS,
) -> LearnedStep:  # fmt: skip
    """The joint step from the first batch of pictures to the second, differentiable in everything.

    Args:
        flow: measured elsewhere, from first to second in the size of the pictures; the network looks itself if not given.
        begin: what the later looks begin with, in place of the step of the look before; see `Begin`.
        closer: how many later looks, the first of them a rough one, the others close.
    """
    a, b = first.seen, second.seen
    forward, backward = field.pair.correlate(a.coarse, b.coarse)
    early = Look(*field.pair.start(forward, a.coarse)), Look(*field.pair.start(backward, b.coarse))
    looks = [early if flow is None else _given(flow, early)]
    solution = _solve(field, first, second, looks[0])
    steps = [solution.delta_q]
    for number in range(closer if flow is None else 0):
        step = steps[-1].detach()
        step = step if begin is None else begin(number, step)
        there, back = _paths(first, second, step)
        look = _rough if number == 0 else _close
        looks.append((look(field.pair, a, b, there), look(field.pair, b, a, back)))
        solution = _solve(field, first, second, looks[-1])
        steps.append(step + solution.delta_q)
    last = [ahead for ahead, _ in looks if ahead.flow is not None][-1]
    return LearnedStep(_about_flow(solution, first, last, steps[-1]), tuple(steps), tuple(looks))


@torch.no_grad()
def likelier(first: SeenAt, second: SeenAt, steps: Sequence[Float[Tensor, "b n"]]) -> Float[Tensor, "b n"]:
    """Of several steps the one by which the robot looks most alike in both pictures, item by item."""
    unlike = []
    for step in steps:
        total = torch.zeros_like(step[:, 0])
        for here, there, flow in zip((first, second), (second, first), _paths(first, second, step), strict=True):
            near = carry_back(there.seen.match, flow / STRIDE)
            robot = here.mask.sigmoid()
            error = (near - here.seen.match).square().mean(1) * robot
            total = total + error.flatten(1).sum(-1) / robot.flatten(1).sum(-1).clamp(min=1e-6)
        unlike.append(total)
    best = torch.stack(unlike).argmin(0)
    return torch.stack(list(steps)).gather(0, best[None, :, None].expand(1, -1, steps[0].shape[-1]))[0]


def _paths(first: SeenAt, second: SeenAt, step: Float[Tensor, "b n"]) -> tuple[Tensor, Tensor]:
    """Flow of a step from the first to the second pictures and back, each on its own grid [px of the picture]."""
    ahead, back = (torch.einsum("bcnhw,bn->bchw", x.jacobian.detach(), step) for x in (first, second))
    return path(ahead, back), path(-back, -ahead)


def _rough(pair: PairHead, here: Encoded, there: Encoded, guess: Tensor) -> Look:
    return Look(None, None, guess, pair.rough(here, there, guess))


def _close(pair: PairHead, here: Encoded, there: Encoded, guess: Tensor) -> Look:
    flow, log_weight, brightness = pair.close(here, there, guess)
    return Look(flow, log_weight, guess, brightness)


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
    jacobian, robot = sign * at.jacobian, at.mask.sigmoid()
    if look.brightness is not None:
        return _brightness_equations(jacobian, robot, look.brightness)
    flow, log_weight = look.told
    return normal_equations(jacobian, flow, log_weight.exp() * robot, layout="dense")


def _brightness_equations(
    jacobian: Float[Tensor, "b 2 n h w"], robot: Float[Tensor, "b h w"], seen: Brightness
) -> NormalEquations:  # fmt: skip
    """Gauss-Newton on the joint step; which of the pixels on and around the robot count, their own weights tell."""
    nearby = doubled(F.max_pool2d(robot[:, None], 3, 1, 1))[:, 0].flatten(1)
    J = doubled(jacobian.flatten(1, 2)).unflatten(1, jacobian.shape[1:3]).flatten(-2)
    bent = torch.einsum("bcdp,bdnp->bcnp", seen.curvature.flatten(-2), J) * nearby[:, None, None]
    count = nearby.sum(-1) / (nearby.shape[-1] / robot[0].numel())  # cells of the field, as for flow
    return NormalEquations(
        matrix=J.movedim(2, 1).flatten(2) @ bent.movedim(2, 1).flatten(2).mT,
        vector=-torch.einsum("bcnp,bcp->bn", J, seen.slope.flatten(-2) * nearby[:, None]),
        energy=(seen.energy.flatten(1) * nearby).sum(-1),
        total_weight=count,
        count=count,
    )


def _about_flow(solution: Solution, first: SeenAt, look: Look, step: Tensor) -> Solution:
    """The solution of the whole step, its residual and explained share those of the forward flow on the robot."""
    flow, log_weight = look.told
    weight = (log_weight.exp() * first.mask.sigmoid()).detach()
    explains = torch.einsum("bcnhw,bn->bchw", first.jacobian, step if look.guess is None else solution.delta_q)
    told = explains if look.guess is None else explains + look.guess
    total = weight.flatten(1).sum(-1).clamp(min=1e-12)
    left = (weight * (flow - told).square().sum(1)).flatten(1).sum(-1) / total
    motion = (weight * flow.square().sum(1)).flatten(1).sum(-1) / total
    explained = (1 - left / motion.clamp(min=1e-12)).clamp(0, 1)
    # An item withdrawn for a NaN or an infinity says nothing rather than those.
    nothing = torch.zeros_like(left)
    residual = torch.where(solution.valid, left.clamp(min=1e-12).sqrt(), nothing)
    return replace(solution, delta_q=step, residual=residual, explained=torch.where(solution.valid, explained, nothing))


def _given(flow: Flow, like: tuple[Look, Look]) -> tuple[Look, Look]:
    """Flow from elsewhere on the field's grid; nothing is known of the way back."""
    like_flow, like_weight = like[0].told
    h, w = like_flow.shape[-2:]
    small = clean(flow.flow, flow.weight).resized(h, w)  # a NaN would spread even from where nothing counts
    vectors = (small.flow * STRIDE).reshape(like_flow.shape).to(like_flow)
    weight = small.weight.reshape(like_weight.shape).to(like_weight)
    nothing = torch.full_like(weight, -torch.inf)
    return Look(vectors, weight.log()), Look(torch.zeros_like(vectors), nothing)
