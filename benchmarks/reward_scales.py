"""Scales of the reward for a bundled checkpoint, fitted on simulated good videos in front of static, structured backgrounds.

Each video has its own still camera, as far from the nominal one as cameras were in training.

python benchmarks/reward_scales.py panda-sim --out checkpoints/panda-sim/reward.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from reward_validity import FPS, EpisodeGenerator

from jidm import JacobianIDM
from jidm.rewards import ExecutabilityReward, TermScales

SEED, EPISODES = 3900, 40


def measure_scales(checkpoint: str) -> TermScales:
    """Fitted on episodes that are used for nothing else."""
    idm = JacobianIDM.from_pretrained(checkpoint, limits="none")
    assert idm.embodiment is not None
    generator = EpisodeGenerator(idm.embodiment.name, SEED, jitter_cameras=True)
    episodes = [generator.episode(k) for k in range(EPISODES)]
    with torch.no_grad():
        # Without the first pose: users do not know it either.
        calibrated = ExecutabilityReward(idm).fit_scales(
            [episode.rendering.rgb for episode in episodes], fps=FPS, layout="THWC"
        )
    assert calibrated.scales is not None
    return calibrated.scales


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or bundled name")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    measure_scales(args.checkpoint).save(args.out)
