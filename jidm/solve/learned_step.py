"""A joint step between two pictures by a learned field: match, solve, look again around the solution, solve.

Both pictures have a field, so both directions of the flow are used: `J_first d = flow` and `-J_second d = flow_back`.
The second-order errors of the two linearisations cancel, which replaces re-linearising.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.field.learned.config import STRIDE, LearnedFieldConfig
from jidm.field.learned.matching import PairHead
from jidm.field.learned.network import Encoded
from jidm.motion.flow.base import Flow
from jidm.solve.least_squares import Solution, normal_equations, solve_normal_equations

RIDGE = 1e-4
"""Relative damping, the same in training and in decoding."""

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
        flow: (B, 2, h, w) [px of the picture]; log_weight: (B, h, w) of its confidence (inverse variance, 1/px^2).
    """

    flow: Float[Tensor, "b 2 h w"]
    log_weight: Float[Tensor, "b h w"]


@dataclass(frozen=True, eq=False)
class LearnedStep:
    """A step and everything it was made of. Pairs are (from first to second, from second to first).

    Attributes:
        solution: of the second, closer look.
        start: of the first look.
        looks: first and second look, each in both directions.
    """

    solution: Solution
    start: Solution
    looks: tuple[tuple[Look, Look], tuple[Look, Look]]


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


def learned_step(field: StepField, first: SeenAt, second: SeenAt, flow: Flow | None = None) -> LearnedStep:
    """The joint step from the first batch of pictures to the second, differentiable in everything.

    Args:
        flow: measured elsewhere, from first to second in the size of the pictures; the network looks itself if not given.
    """
    a, b = first.seen, second.seen
    forward, backward = field.pair.correlate(a.match, b.match)
    early = Look(*field.pair.start(forward, a.match)), Look(*field.pair.start(backward, b.match))
    start = _solve(field, first, second, early)
    if flow is not None:
        late = _given(flow, early)
        return LearnedStep(_solve(field, first, second, late), start, (early, late))
    # The solution's own flow is smoother than what was matched, and right where nothing could be matched.
    step = start.delta_q.detach()
    ahead = torch.einsum("bcnhw,bn->bchw", first.jacobian.detach(), step)
    back = torch.einsum("bcnhw,bn->bchw", second.jacobian.detach(), -step)
    late = (
        Look(*field.pair.refine(a.image, a.match, b.image, b.match, ahead)),
        Look(*field.pair.refine(b.image, b.match, a.image, a.match, back)),
    )
    return LearnedStep(_solve(field, first, second, late), start, (early, late))


@torch.no_grad()
def step_pairs(field: StepField, first: Float[Tensor, "b 3 H W"], second: Float[Tensor, "b 3 H W"]) -> Tensor:
    """(b, n) joint steps of unrelated pairs of pictures [rad or m], the field bent by the poses the pictures show."""
    count = len(first)
    seen = field.encode(torch.cat([first, second]))
    at = SeenAt.of(field, seen, field.state(seen)[0])
    return learned_step(field, at[:count], at[count:]).solution.delta_q


def _solve(field: StepField, first: SeenAt, second: SeenAt, looks: tuple[Look, Look]) -> Solution:
    equations = normal_equations(
        first.jacobian, looks[0].flow, looks[0].log_weight.exp() * first.mask.sigmoid(), layout="dense"
    ) + normal_equations(
        -second.jacobian, looks[1].flow, looks[1].log_weight.exp() * second.mask.sigmoid(), layout="dense"
    )
    solution = solve_normal_equations(equations, ridge=RIDGE, unit=field.delta_std, min_motion=_MIN_MOTION)
    spread = field.step_spread.to(solution.covariance)
    return replace(solution, covariance=solution.covariance * spread[:, None] * spread)


def _given(flow: Flow, like: tuple[Look, Look]) -> tuple[Look, Look]:
    """Flow from elsewhere on the field's grid; nothing is known of the way back."""
    h, w = like[0].flow.shape[-2:]
    small = flow.resized(h, w)
    vectors = (small.flow * STRIDE).reshape(like[0].flow.shape).to(like[0].flow)
    weight = small.weight.reshape(like[0].log_weight.shape).to(like[0].log_weight)
    nothing = torch.full_like(weight, -torch.inf)
    return Look(vectors, weight.log()), Look(torch.zeros_like(vectors), nothing)
