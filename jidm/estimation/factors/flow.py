"""Optical flow as a measurement of the joint step: `flow = J delta_q`, dense or at points.

Normal equations are summed in one pass over the Jacobian field, in the dtype of the input, and solved in float64. They square
the condition number of J: with cond(J) above 1e3, use float64 input.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.estimation.field_layout import FieldLayout, flatten_field, unflatten
from jidm.estimation.problem import STEP, NormalEquations, State
from jidm.fields.base import FieldAtPose

# Numbers per block: small enough for the processor's cache, so that J is read from memory once.
_BLOCK = 2**19


@dataclass(frozen=True, eq=False)
class FlowFactor:
    """Flow at a field's points, for a joint step of any size, since the points are moved by the exact kinematics.

    Attributes:
        pose: the field at the first frame's joint positions.
        flow: (*batch, N, 2) motion of its points [px].
        weight: (*batch, N) confidence, 0 for hidden points.
        start: (*batch, N, 2) positions of its points in the first frame [px].
    """

    pose: FieldAtPose
    flow: Float[Tensor, "*batch N 2"]
    weight: Float[Tensor, "*batch N"]
    start: Float[Tensor, "*batch N 2"] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self.pose.surface().points)

    def linearize(self, state: State) -> NormalEquations:
        """Normal equations of the joint step around `state["step"]` [rad or m]."""
        jacobian, residual = self.residual(state[STEP])
        batch, J, f, w = flatten_field(jacobian, residual, self.weight, "points")
        return unflatten(accumulate(J, f, w), batch)

    def residual(
        self, step: Float[Tensor, "*batch n"]
    ) -> tuple[Float[Tensor, "*batch N 2 n"], Float[Tensor, "*batch N 2"]]:
        """Jacobian after a joint step [rad or m], and the flow that the step does not explain [px]."""
        surface = self.pose.surface(step)
        return surface.jacobian, self.flow - (surface.points - self.start)


def normal_equations(
    jacobian: Tensor, flow: Tensor, weight: Tensor | None = None, *, layout: FieldLayout | None = None
) -> NormalEquations:
    """Build the least-squares problem of a joint step.

    Args:
        jacobian: dense (*batch, 2, n, H, W) or at points (*batch, N, 2, n) [px per rad or m].
        flow: (*batch, 2, H, W) or (*batch, N, 2) [px].
        weight: (*batch, H, W) or (*batch, N), non-negative; flow of weight 0 is ignored, also if it is NaN (the Jacobian
            must be finite there too). All 1 if not given.
        layout: "dense" or "points"; inferred from the shapes if not given. Only 2x2 pixels of a 2-joint robot fit both.

    Returns:
        The equations; NaN for items of the batch that hold a NaN or an infinity, without any effect on the others.

    Raises:
        InputError: shapes do not fit together or fit both layouts, or a weight is negative.
    """
    batch, J, f, w = flatten_field(jacobian, flow, weight, layout)
    *_, bad, equations = zero_nonfinite_items(J, f, w)
    if bad.any():
        nan = torch.full_like(equations.cost, torch.nan)
        equations = replace(
            equations,
            H=torch.where(bad[:, None, None], nan[:, None, None], equations.H),
            g=torch.where(bad[:, None], nan[:, None], equations.g),
            cost=torch.where(bad, nan, equations.cost),
        )
    return unflatten(equations, batch)


def accumulate(J: Float[Tensor, "B 2 n P"], f: Float[Tensor, "B 2 P"], w: Float[Tensor, "B P"]) -> NormalEquations:
    """Sums over the pixels of flattened fields, block by block."""
    B, _, n, P = J.shape
    items = max(1, _BLOCK // max(1, 2 * (n + 1) * P))
    pixels = max(1, _BLOCK // (2 * (n + 1)))
    sums = []
    for first in range(0, max(B, 1), items):
        rows = slice(first, first + items)
        total: Tensor | float = 0.0
        for start in range(0, max(P, 1), pixels):
            part = slice(start, start + pixels)
            # With the flow as one more row, one product gives H, g and the cost.
            x = torch.cat([J[rows, :, :, part], f[rows, :, None, part]], dim=2)
            total = total + ((x * w[rows, None, None, part]) @ x.mT).sum(1)
        sums.append(total)
    S = torch.cat(sums)  # type: ignore[arg-type]
    return NormalEquations(S[:, :n, :n], S[:, :n, n], S[:, n, n], w.sum(-1), (w > 0).sum(-1).to(w.dtype), ((STEP, n),))


def zero_nonfinite_items(
    J: Float[Tensor, "B 2 n P"], f: Float[Tensor, "B 2 P"], w: Float[Tensor, "B P"]
) -> tuple[Float[Tensor, "B 2 n P"], Float[Tensor, "B 2 P"], Float[Tensor, "B P"], Bool[Tensor, " B"], NormalEquations]:
    """The fields with items set to zero that hold a NaN or infinity, which items those are, and the sums over the rest.

    They are zeroed before anything else is computed, so that all gradients are finite, also those of these items.
    """
    equations = accumulate(J, f, w)
    sums = torch.cat([equations.H.flatten(-2), equations.g, equations.cost[:, None]], dim=-1)
    bad = ~(sums.isfinite().all(-1) & equations.total_weight.isfinite())
    if bad.any():
        J = torch.where(bad[:, None, None, None], torch.zeros_like(J), J)
        f = torch.where(bad[:, None, None], torch.zeros_like(f), f)
        w = torch.where(bad[:, None], torch.zeros_like(w), w)
        equations = accumulate(J, f, w)
    return J, f, w, bad, equations
