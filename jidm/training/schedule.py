"""The learning rate over a run."""

from __future__ import annotations

import math

from jidm.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Linear warm-up over the first steps, times half a cosine over the budget.

    Args:
        step: optimiser steps taken.
        progress: share of the budget used up, of steps or of time.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return config.learning_rate * warm * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)
