"""Muon for convolutions and AdamW for the rest, and the learning rate over a run.

With Muon half the steps reach the same loss on a small budget.

Muon (K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") replaces the averaged gradient
of a weight matrix by the nearest matrix with orthonormal rows, found by a Newton-Schulz iteration. torch has it for
matrices only; here convolutions are matrices of (outputs, inputs x kernel).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jidm.training.config import TrainConfig

_MOMENTUM = 0.95
_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration, with the steepest slope at zero that still converges."""
_ITERATIONS = 5
_ADAM_BETAS = (0.9, 0.98)
_MUON_RATE = 10.0  # learning rate of Muon over that of AdamW


class MuonAdamW(torch.optim.AdamW):
    """AdamW with a parameter group of convolutions that is updated by Muon instead.

    Args:
        model: its convolutions between feature maps are updated by Muon, everything else by AdamW.
        learning_rate: of AdamW; Muon's is ten times that.
        weight_decay: of both; vectors (biases, scales) do not decay.
    """

    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float) -> None:
        kernels: list[Tensor] = []
        matrices: list[Tensor] = []
        vectors: list[Tensor] = []
        for p in (p for p in model.parameters() if p.requires_grad):
            is_kernel = p.ndim == 4 and p.shape[-1] > 1 and p.shape[1] > 3
            (kernels if is_kernel else matrices if p.ndim > 1 else vectors).append(p)
        groups: list[dict[str, Any]] = [
            {"params": kernels, "weight_decay": weight_decay / _MUON_RATE, "muon": _MUON_RATE},
            {"params": matrices, "weight_decay": weight_decay, "muon": 0.0},
            {"params": vectors, "weight_decay": 0.0, "muon": 0.0},
        ]
        super().__init__([g for g in groups if g["params"]], lr=learning_rate, betas=_ADAM_BETAS)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updated = []
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    self._muon(p, p.grad, group["lr"] * group["muon"], group["weight_decay"])
                    updated.append((p, p.grad))
                    p.grad = None  # so that AdamW skips it
        super().step()
        for p, gradient in updated:
            p.grad = gradient
        return loss

    def _muon(self, p: Tensor, gradient: Tensor, rate: float, decay: float) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
            state["step"] = torch.zeros(())  # Adam expects it when a saved state is loaded
        state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        nesterov = gradient.lerp(state["momentum"], _MOMENTUM)
        step = orthogonalize(nesterov.flatten(1))
        p.mul_(1 - rate * decay)
        p.add_(step.reshape(p.shape), alpha=-rate * max(1.0, step.shape[0] / step.shape[1]) ** 0.5)


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Linear warm-up over the first steps, times a half cosine over the budget.

    Args:
        config: of the run.
        step: optimizer steps taken.
        progress: fraction of the budget that is used up, of steps or of time.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return config.learning_rate * warm * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


def orthogonalize(matrix: Float[Tensor, "a b"]) -> Float[Tensor, "a b"]:
    """Approximately the nearest matrix with singular values of one (0.7 to 1.2), by a Newton-Schulz iteration."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
