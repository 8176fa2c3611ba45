"""Box-constrained quadratic programming by an active set, batched and differentiable."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Sweeps that change all violating joints at once. Two or three solve nearly every problem, but they can cycle.
_MAX_SWEEPS = 8


def solve_box_qp(
    H: Float[Tensor, "*batch n n"], g: Float[Tensor, "*batch n"], lower: Tensor | None, upper: Tensor | None
) -> tuple[Float[Tensor, "*batch n"], Bool[Tensor, "*batch n"]]:
    """Minimize `x'Hx/2 - g'x` in a box by an active-set method.

    A few sweeps change many joints at once: those that left the box are held at the bound they crossed, those whose
    multiplier points inward are freed. Problems that are not solved then are solved by bounded-variable least squares
    (`_bvls`), which cannot cycle. The gradient is that with the final active set held, which is exact almost everywhere.

    Args:
        H: symmetric and positive definite.
        g: linear term.
        lower, upper: broadcast to g; may be infinite; None = no bounds.

    Returns:
        x, inside the box, and which joints are held at a bound.
    """
    if lower is None or upper is None:
        return torch.linalg.solve(H, g), torch.zeros_like(g, dtype=torch.bool)
    lower, upper = lower.expand_as(g), upper.expand_as(g)
    with torch.no_grad():
        n, count = g.shape[-1], g.shape[:-1].numel()
        H_flat = H.expand(*g.shape, n).reshape(count, n, n)
        side = _active_set(H_flat, *(x.reshape(count, n) for x in (g, lower, upper))).reshape(g.shape)
    x = _solve_with_active_set(H, g, side, lower, upper)
    return torch.minimum(torch.maximum(x, lower), upper), side != 0  # the clamp only guards rounding


def _active_set(
    H: Float[Tensor, "B n n"], g: Float[Tensor, "B n"], lower: Float[Tensor, "B n"], upper: Float[Tensor, "B n"]
) -> Float[Tensor, "B n"]:
    """For every joint: 0 if free, -1 if held at its lower bound, +1 if at its upper."""
    side = torch.zeros_like(g)
    for _ in range(_MAX_SWEEPS):
        x = _solve_with_active_set(H, g, side, lower, upper)
        beyond = (x > upper).to(g) - (x < lower).to(g)
        wrong = torch.where(side == 0, beyond != 0, _inward_multipliers(H, g, x, side) > 0)
        if not wrong.any():
            return side
        side = torch.where(wrong, torch.where(side == 0, beyond, torch.zeros_like(g)), side)
    x = _solve_with_active_set(H, g, side, lower, upper)
    wrong = torch.where(side == 0, (x > upper) | (x < lower), _inward_multipliers(H, g, x, side) > 0).any(-1)
    if wrong.any():
        side[wrong] = _bvls(H[wrong], g[wrong], lower[wrong], upper[wrong])
    return side


def _bvls(H: Tensor, g: Tensor, lower: Tensor, upper: Tensor) -> Float[Tensor, "B n"]:
    """The active set by bounded-variable least squares (Stark and Parker 1995), one joint at a time.

    Either x moves to the optimum over the free joints, and the held joint with the largest inward multiplier is freed; or it
    moves to the first bound on the way, and that joint is held there. The cost falls in every step, so no active set recurs.
    """
    n = g.shape[-1]
    x = torch.zeros_like(g).clamp(lower, upper)
    # Joints that start at a bound begin held there.
    side = (x >= upper).to(g) - ((x <= lower) & (x < upper)).to(g)
    index = torch.arange(n, device=g.device)
    for _ in range(50 + 20 * n):
        optimum = _solve_with_active_set(H, g, side, lower, upper)
        step = optimum - x
        room = torch.where(step > 0, upper - x, lower - x)
        fraction = torch.where((side == 0) & (step != 0), room / torch.where(step == 0, 1.0, step), torch.inf)
        first, joint = fraction.clamp(min=0).min(dim=-1, keepdim=True)
        blocked = first < 1
        x = torch.where(blocked, x + first.clamp(max=1) * step, optimum)
        x = torch.where(side > 0, upper, torch.where(side < 0, lower, x))
        multiplier, entering = _inward_multipliers(H, g, x, side).max(dim=-1, keepdim=True)
        release = ~blocked & (multiplier > 0)
        if not (blocked | release).any():
            break
        side = torch.where(blocked & (index == joint), step.sign(), side)
        side = torch.where(release & (index == entering), torch.zeros_like(side), side)
    return side


def _inward_multipliers(H: Tensor, g: Tensor, x: Tensor, side: Tensor) -> Float[Tensor, "B n"]:
    """Lagrange multipliers of the held joints, positive where they point into the box; 0 within rounding errors."""
    residual = g - torch.einsum("bij,bj->bi", H, x)  # > 0: the cost falls as x grows
    rounding = 1e-12 * (torch.einsum("bij,bj->bi", H.abs(), x.abs()) + g.abs())
    inwards = -side * residual
    return torch.where(inwards > rounding, inwards, torch.zeros_like(g))


def _solve_with_active_set(H: Tensor, g: Tensor, side: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    held = side != 0
    value = torch.where(side > 0, upper, torch.where(side < 0, lower, torch.zeros_like(g)))
    free = (~held).to(H)
    H_free = H * free[..., :, None] * free[..., None, :] + torch.diag_embed(held.to(H))
    right = torch.where(held, value, g - torch.einsum("...ij,...j->...i", H, value))
    return torch.linalg.solve(H_free, right)
