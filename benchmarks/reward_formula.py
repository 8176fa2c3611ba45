"""EVA's reward of motions whose published figures are known, on 14 joints of its dual PiPER. Prints JSON.

    python benchmarks/reward_formula.py

49 frames at 16 fps; white jitter is the mean of 20 seeds.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from results import add_save, row, save
from torch import Tensor

from jidm.rewards import EvaLimits, eva_reward

ROBOT, FRAMES, DT, SEEDS = "cobot_magic", 49, 1 / 16, range(20)


def motions(limits: EvaLimits) -> dict[str, Tensor]:
    """Name -> joint positions (videos, T, n) [rad or m]."""
    t = DT * torch.arange(FRAMES, dtype=torch.float64)[:, None]
    n = len(limits.joint_scale)

    def jitter(std: float) -> Tensor:
        drawn = [np.random.default_rng(seed).normal(0, std, (FRAMES, n)) for seed in SEEDS]
        return torch.from_numpy(np.stack(drawn)) * limits.joint_scale

    return {
        "stands still": torch.zeros(1, FRAMES, n, dtype=torch.float64),
        "sine of .5 rad on every joint at 1 Hz": (0.5 * (2 * torch.pi * t).sin() * limits.joint_scale)[None],
        "sine of .5 rad on every joint at .25 Hz": (0.5 * (0.5 * torch.pi * t).sin() * limits.joint_scale)[None],
        "white jitter of .01 rad": jitter(0.01),
        "white jitter of .1 rad": jitter(0.1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_save(parser)
    args = parser.parse_args()
    limits = EvaLimits.from_embodiment(ROBOT)
    rewards = {name: float(eva_reward(q, limits, DT).reward.mean()) for name, q in motions(limits).items()}
    print(json.dumps({"benchmark": "reward_formula", "reward": rewards}, indent=2))
    figures = [row(ROBOT, "eva_formula", "reward", value, case=name) for name, value in rewards.items()]
    save(args.save, "reward_formula", figures, raw=rewards, seeds=SEEDS)
