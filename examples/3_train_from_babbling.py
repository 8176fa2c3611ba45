"""Learn a Jacobian field from motor babbling and decode without URDF and camera. Needs the extras `sim` and `train`.

With the defaults it takes about ten minutes on one CPU core.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro

from jidm import JacobianIDM
from jidm.datasets import open_dataset
from jidm.model_registry import train
from jidm.sim.babble import BabbleConfig, babble
from jidm.training.config import TrainConfig


def main(
    embodiment: str = "planar_finger_2",
    episodes: int = 200,
    frames: int = 32,
    size: int = 128,
    minutes: float | None = 5.0,
    steps: int | None = None,
    out: Path = Path("learned"),
) -> None:
    """Record, train, decode.

    Args:
        embodiment: the robot that babbles.
        episodes: how many are recorded; the last one is held out.
        frames: of each episode.
        size: of the pictures [px].
        minutes: of training.
        steps: of training, in place of minutes.
        out: folder for the data set and the checkpoint.
    """
    config = BabbleConfig(embodiment=embodiment, episodes=episodes, frames=frames, width=size, height=size)
    babble(config, out / "babbling", progress=True)  # started again, it records what is missing

    checkpoint = train(
        TrainConfig(
            data=str(out / "babbling"),
            out=str(out / "checkpoint"),
            embodiment=embodiment,
            test_episodes=str(episodes - 1),
            minutes=None if steps else minutes,
            steps=steps,
            overwrite=True,
        ),
        report=print,
    )

    episode = open_dataset(out / "babbling").episode(episodes - 1)
    idm = JacobianIDM.from_pretrained(checkpoint)
    motion = idm.decode(episode.video(), fps=config.fps, smooth=True)  # neither camera nor first pose
    truth = np.diff(episode.state, axis=0)
    error = np.abs(motion.delta_q.double().numpy() - truth)
    print(f"held-out episode: mean |error of a step| / mean |step| = {error.mean() / np.abs(truth).mean():.3f}")


if __name__ == "__main__":
    tyro.cli(main)
