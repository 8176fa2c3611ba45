"""`jidm babble`: record a robot's self-play in simulation as a LeRobot data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(kw_only=True)
class Babble:
    """Record a robot's self-play in simulation as a LeRobot data set.

    Started again after an interruption it records what is missing; several machines share the work with --shard.

    Args:
        embodiment: name of the robot.
        out: folder of the data set.
        episodes: how many.
        frames: of each episode.
        fps: frames a second.
        camera: names of the robot's cameras whose direction of view is used.
        width: of the pictures, pixels.
        height: of the pictures, pixels.
        seed: of everything.
        appearance: random, plain or textured.
        crop_fraction: share of all poses in which the robot may reach out of the picture; more shows it larger.
        range_fraction: share of the usable joint range that motions cover.
        speed: factor on the motions' frequencies.
        workers: processes at work.
        shard: i/N records only every N-th episode from the i-th on.
        ray: let a Ray cluster do it: its address, "auto" for the one that runs here, "local" for one of its own.
        max_objects: most things standing around, when the look is random.
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
        """Record."""
        from jidm.cli.text import parse_shard
        from jidm.sim.babble import BabbleConfig, babble

        config = BabbleConfig(
            embodiment=self.embodiment, episodes=self.episodes, frames=self.frames, fps=self.fps, cameras=self.camera,
            width=self.width, height=self.height, seed=self.seed, appearance=self.appearance, crop_fraction=self.crop_fraction,
            range_fraction=self.range_fraction, speed=self.speed, max_objects=self.max_objects,
        )  # fmt: skip
        babble(config, self.out, workers=self.workers, shard=parse_shard(self.shard), ray=self.ray, progress=True)
        print(
            f"{self.out}: {self.episodes} episodes of {self.frames} frames asked for; see `jidm dataset show {self.out}`"
        )
