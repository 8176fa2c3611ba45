"""A joint step between two pictures by a learned field: match, solve, look again around the solution, solve.

Both pictures have a field, so both directions of the flow are used: `J_first d = flow` and `-J_second d = flow_back`.
The second-order errors of the two linearisations cancel, which replaces re-linearising.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.field.learned.network import Encoded, LearnedField
from jidm.solve.least_squares import Solution, normal_equations, solve_normal_equations

RIDGE = 1e-4
"""Relative damping, the same in training and in decoding."""


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
        jacobian: (B, 2, n, h, w) at both pictures [px per rad or m]; mask: their robot logits (B, h, w).
        looks: first and second look, each in both directions.
    """

    solution: Solution
    start: Solution
    jacobian: tuple[Tensor, Tensor]
    mask: tuple[Tensor, Tensor]
    looks: tuple[tuple[Look, Look], tuple[Look, Look]]


@dataclass(frozen=True, eq=False)
class SeenAt:
    """A batch of pictures with the field at their joint positions."""

    seen: Encoded
    jacobian: Float[Tensor, "b 2 n h w"]
    mask: Float[Tensor, "b h w"]

    @classmethod
    def of(cls, field: LearnedField, seen: Encoded, q: Float[Tensor, "b n"]) -> SeenAt:
        """Read the field at joint positions q [rad or m]."""
        return cls(seen, *field.jacobian(seen, q))

    def __getitem__(self, index: Any) -> SeenAt:
        """Index the batch axis."""
        return SeenAt(self.seen[index], self.jacobian[index], self.mask[index])


def learned_step(field: LearnedField, first: SeenAt, second: SeenAt) -> LearnedStep:
    """The joint step from the first batch of pictures to the second, differentiable in everything."""
    a, b = first.seen, second.seen
    forward, backward = field.pair.correlate(a.match, b.match)
    early = Look(*field.pair.start(forward, a.match)), Look(*field.pair.start(backward, b.match))
    start = _solve(field, first, second, early)
    # The solution's own flow is smoother than what was matched, and right where nothing could be matched.
    step = start.delta_q
    guesses = (
        torch.einsum("bcnhw,bn->bchw", first.jacobian, step),
        torch.einsum("bcnhw,bn->bchw", second.jacobian, -step),
    )
    late = (
        Look(*field.pair.refine(a.image, a.match, b.image, b.match, guesses[0].detach())),
        Look(*field.pair.refine(b.image, b.match, a.image, a.match, guesses[1].detach())),
    )
    solution = _solve(field, first, second, late)
    return LearnedStep(solution, start, (first.jacobian, second.jacobian), (first.mask, second.mask), (early, late))


def _solve(field: LearnedField, first: SeenAt, second: SeenAt, looks: tuple[Look, Look]) -> Solution:
    equations = normal_equations(
        first.jacobian, looks[0].flow, looks[0].log_weight.exp() * first.mask.sigmoid(), layout="dense"
    ) + normal_equations(
        -second.jacobian, looks[1].flow, looks[1].log_weight.exp() * second.mask.sigmoid(), layout="dense"
    )
    return solve_normal_equations(equations, ridge=RIDGE, unit=field.delta_std)
