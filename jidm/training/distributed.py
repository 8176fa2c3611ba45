"""Means over a batch that is split over several processes: each holds a part, and all divide by the same number.

Frameworks average gradients over processes. With a weighted mean `sum(w x) / sum(w)` whose denominator is each
process's own, that is not the loss of the whole batch; with the functions here it is.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

_EPS = 1e-6


def all_reduce_mean(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Mean over all processes, without gradient. All processes must call it, in the same order."""
    x = x.detach().clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
        x /= torch.distributed.get_world_size()
    return x


def weighted_mean(x: Float[Tensor, "*shape"], weight: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """This process's part of the weighted mean over all processes' batches; the mean of the parts is the whole.

    Gradients flow to x, and to the weight in the numerator only: weights are data.
    """
    return (x * weight).sum() / all_reduce_mean(weight.sum()).clamp(min=_EPS)
