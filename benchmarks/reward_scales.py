"""Scales of the reward for a bundled checkpoint: of simulated good videos, before still and structured grounds.

python benchmarks/reward_scales.py panda-sim --out checkpoints/panda-sim/reward.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from reward_validity import FPS, Scenes

from jidm import JacobianIDM
from jidm.adapters.reward import Calibration, ExecutabilityReward

SEED, TAKES = 3900, 60


def scales(checkpoint: str) -> Calibration:
    """Measured on takes that nothing else is measured on."""
    idm = JacobianIDM.from_pretrained(checkpoint, limits="none")
    assert idm.embodiment is not None
    scenes = Scenes(idm.embodiment.name, SEED)
    takes = [scenes.take(k) for k in range(TAKES)]
    with torch.no_grad():
        # The first pose is not told: users do not know it either.
        calibrated = ExecutabilityReward(idm).calibrated([take.seen.rgb for take in takes], fps=FPS, layout="THWC")
    assert calibrated.calibration is not None
    return calibrated.calibration


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or bundled name")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    scales(given.checkpoint).save(given.out)
