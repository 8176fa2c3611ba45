"""Dense fields and scattered points in one flat layout for the solver."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError

FieldLayout = Literal["dense", "points"]

_Record = TypeVar("_Record")


def flatten_field(
    jacobian: Tensor, flow: Tensor, weight: Tensor | None, layout: FieldLayout | None
) -> tuple[torch.Size, Float[Tensor, "B 2 n P"], Float[Tensor, "B 2 P"], Float[Tensor, "B P"]]:
    """Jacobian, flow and weight with the batch axes flattened and pixels last; a dense field stays a view.

    Args:
        jacobian, flow, weight, layout: as for `normal_equations`.

    Returns:
        The batch shape, and the three tensors in a common dtype; flow of zero weight is 0.

    Raises:
        InputError: shapes do not fit together or fit both layouts, or a weight is negative.
    """
    if _resolve_layout(jacobian, flow, layout) == "dense":
        batch, expected_weight = flow.shape[:-3], (*flow.shape[:-3], *flow.shape[-2:])
        J, f = jacobian.flatten(-2), flow.flatten(-2)
    else:
        batch, expected_weight = flow.shape[:-2], tuple(flow.shape[:-1])
        # One copy, so that every re-weighting reads contiguous memory.
        J, f = jacobian.movedim(-3, -1).contiguous(), flow.transpose(-1, -2)
    if weight is None:
        weight = torch.ones(expected_weight, dtype=flow.dtype, device=flow.device)
    if tuple(weight.shape) != expected_weight:
        raise InputError(f"weight must be {expected_weight} for this flow, got {tuple(weight.shape)}")
    if (weight < 0).any():
        raise InputError("weight must not be negative; use 0 to ignore a pixel")
    dtype = torch.promote_types(J.dtype, f.dtype)
    count = batch.numel()  # reshape(-1) is ambiguous for an empty batch
    w = weight.to(dtype).reshape(count, f.shape[-1])
    f = f.to(dtype).reshape(count, 2, f.shape[-1])
    f = f.masked_fill(~(w > 0)[:, None], 0.0)  # 0 * NaN is NaN
    return batch, J.to(dtype).reshape(count, *J.shape[-3:]), f, w


def unflatten(record: _Record, batch: torch.Size) -> _Record:
    """The same record with the flat batch axis of every tensor reshaped to `batch`."""
    tensors = {name: x for name, x in vars(record).items() if isinstance(x, Tensor)}
    return replace(record, **{name: x.reshape((*batch, *x.shape[1:])) for name, x in tensors.items()})  # type: ignore[type-var]


def _resolve_layout(jacobian: Tensor, flow: Tensor, layout: FieldLayout | None) -> FieldLayout:
    J, f = tuple(jacobian.shape), tuple(flow.shape)
    # Dense: J has the shape of f with n inserted after the 2; points: with n appended.
    dense = len(f) >= 3 and len(J) == len(f) + 1 and f[-3] == 2 and (*J[:-3], *J[-2:]) == f
    points = len(f) >= 2 and f[-1] == 2 and J[:-1] == f
    if layout is None and dense and points:
        raise InputError(
            f"jacobian {J} and flow {f} fit a dense field and points alike; pass layout='dense' or 'points'"
        )
    fits = {"dense": dense, "points": points}
    for name, fit in fits.items():
        if fit and layout in (None, name):
            return "dense" if name == "dense" else "points"
    if layout not in (None, *fits):
        raise InputError(f"layout must be 'dense', 'points' or None, got {layout!r}")
    raise InputError(
        "jacobian and flow must be (*batch, 2, n, H, W) with (*batch, 2, H, W), or (*batch, N, 2, n) with "
        f"(*batch, N, 2); got {J} and {f}" + (f" for layout='{layout}'" if layout else "")
    )
