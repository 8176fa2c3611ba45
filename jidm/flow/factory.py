"""Flow estimators from a name, a function, an array or an estimator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError, did_you_mean
from jidm.flow.base import Flow, FlowEstimator, FrameIndexedFlow, check_pair, finite_items, mask_invalid
from jidm.flow.dis import DisFlow
from jidm.flow.precomputed import PrecomputedFlow
from jidm.flow.raft import MODELS, RaftFlow


@dataclass(frozen=True)
class CallableFlow:
    """A function `(first, second) -> flow`, `(flow, weight)` or `Flow` as an estimator; its result is checked.

    A missing weight is 1. Items with a non-finite pixel, and pixels of non-finite flow or weight, get zero flow and
    zero weight. A method `bidirectional(first, second)` of the function that returns two such results is used for both
    directions.
    """

    function: Callable[[Tensor, Tensor], Any]

    def __call__(self, first: Float[Tensor, "*batch 3 H W"], second: Float[Tensor, "*batch 3 H W"]) -> Flow:
        check_pair(first, second)
        return self._validated(self.function(first, second), first, second)

    def bidirectional(
        self, first: Float[Tensor, "*batch 3 H W"], second: Float[Tensor, "*batch 3 H W"]
    ) -> tuple[Flow, Flow]:
        """Flow from `first` to `second` and back."""
        method = getattr(self.function, "bidirectional", None)
        if method is None:
            return self(first, second), self(second, first)
        check_pair(first, second)
        forward, backward = method(first, second)
        return self._validated(forward, first, second), self._validated(backward, second, first)

    def _validated(self, answer: Any, first: Tensor, second: Tensor) -> Flow:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        if isinstance(answer, Flow):
            flow, weight = answer.flow, answer.weight
        elif isinstance(answer, tuple) and len(answer) == 2:
            flow, weight = torch.as_tensor(answer[0]), torch.as_tensor(answer[1])
        else:
            flow = torch.as_tensor(answer)
            weight = torch.ones_like(flow[..., 0, :, :])
        expected = (*first.shape[:-3], 2, *first.shape[-2:])
        if tuple(flow.shape) != expected:
            raise InputError(f"flow function '{name}' returned shape {tuple(flow.shape)}; expected {expected}")
        return mask_invalid(flow, weight, finite_items(first, second))


def as_flow_estimator(source: Any) -> FlowEstimator:
    """A flow estimator.

    Args:
        source: an estimator; "dis"; "raft" (the same as "raft_large") or "raft_small" with torchvision's default
            weights, downloaded on first use; an array (*batch, T-1, 2, H, W) of flow [px]; or a function
            `(first, second) -> flow, (flow, weight) or Flow`.

    Raises:
        InputError: none of these.
    """
    if isinstance(source, str):
        if source == "dis":
            return DisFlow()
        model = {"raft": "raft_large"}.get(source, source)
        if model in MODELS:
            return RaftFlow(model, weights="DEFAULT")
        raise InputError(f"unknown flow '{source}'; {did_you_mean(source, ('dis', 'raft', *MODELS))}")
    if isinstance(source, (Tensor, np.ndarray)):
        return PrecomputedFlow(source)
    if callable(source):
        own = isinstance(source, (DisFlow, RaftFlow, CallableFlow, FrameIndexedFlow))
        return source if own else CallableFlow(source)
    raise InputError(
        f"cannot measure flow with {type(source).__name__}: pass 'dis', an estimator, an array or a function"
    )
