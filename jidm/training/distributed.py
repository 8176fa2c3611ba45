"""Means over a batch that several processes share: each holds its part, and all must divide by the same number.

Frameworks average gradients over processes. A loss `sum(w x) / sum(w)` with a sum of each process's own in the
denominator would then be another loss than that of the whole batch in one process; these make it the same one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

_EPS = 1e-6


def all_reduce_mean(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Mean of a number over all processes; carries no gradient. All must ask for it, in the same order."""
    x = x.detach().clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
        x /= torch.distributed.get_world_size()
    return x


def weighted_mean(x: Float[Tensor, "*shape"], weight: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """This process's share of the weighted mean over all processes' batches; their mean is the mean of the whole.

    Gradients flow to x, and to the weight in the numerator only: weights are data.
    """
    return (x * weight).sum() / all_reduce_mean(weight.sum()).clamp(min=_EPS)
