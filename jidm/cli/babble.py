"""`jidm babble`: record motor babbling of a robot in simulation as a LeRobot data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(kw_only=True)
class Babble:
    """Record motor babbling of a robot in simulation as a LeRobot data set.

    An interrupted run resumes with the missing episodes; several machines share the work with --shard.

    Args:
        embodiment: name of the robot.
        out: folder of the data set.
        episodes: number of episodes.
        frames: frames per episode.
        fps: frame rate [1/s].
        camera: names of the robot's cameras whose viewing directions are used.
        width: of the images [px].
        height: of the images [px].
        seed: of all random numbers.
        appearance: random, plain or textured.
        crop_fraction: fraction of all poses in which the robot may leave the image; larger values show it larger.
        range_fraction: fraction of the usable joint range that motions cover.
        speed: factor on the motions' frequencies.
        workers: parallel processes.
        shard: i/N records every N-th episode starting at the i-th.
        ray: address of a Ray cluster to run on, "auto" for the one on this machine, "local" to start one.
        max_objects: largest number of objects in the scene, if the appearance is random.
    """

    embodiment: Annotated[str, tyro.conf.Positional]
    out: Path
    episodes: int = 200
    frames: int = 64
    fps: float = 16.0
    camera: tuple[str, ...] = ("front",)
    width: int = 128
    height: int = 128
    seed: int = 0
    appearance: str = "random"
    crop_fraction: float = 0.02
    range_fraction: float = 1.0
    speed: float = 1.0
    workers: int = 1
    shard: str = "0/1"
    ray: str | None = None
    max_objects: int = 5

    def run(self) -> None:
        """Record the data set."""
        from jidm.cli.text import parse_shard
        from jidm.sim.babble import BabbleConfig, babble

        config = BabbleConfig(
            embodiment=self.embodiment, episodes=self.episodes, frames=self.frames, fps=self.fps, cameras=self.camera,
            width=self.width, height=self.height, seed=self.seed, appearance=self.appearance, crop_fraction=self.crop_fraction,
            range_fraction=self.range_fraction, speed=self.speed, max_objects=self.max_objects,
        )  # fmt: skip
        babble(config, self.out, workers=self.workers, shard=parse_shard(self.shard), ray=self.ray, progress=True)
        print(
            f"{self.out}: {self.episodes} episodes of {self.frames} frames requested; see `jidm dataset show {self.out}`"
        )
