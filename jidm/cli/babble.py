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
        embodiment: Robot: a name from `jidm embodiments`, a URDF file, or a folder with an embodiment.toml.
        mesh_roots: Folders of the meshes of a URDF file, besides its own: a package, the folder above, or where a mesh's path
            continues.
        out: Folder of the data set.
        episodes: Number of episodes.
        frames: Frames per episode.
        fps: Frame rate [1/s].
        camera: Names of the robot's cameras whose poses are used; focal length and principal point are fitted to the robot.
        width: Width of the images [px], a multiple of 4.
        height: Height of the images [px], a multiple of 4.
        seed: Seed of all random numbers; another seed records other motions, scenes and cameras.
        appearance: Appearance of robot and scene: random, plain or textured.
        crop_fraction: Fraction of all poses in which the robot may reach beyond a border of the image; larger values show it
            larger.
        range_fraction: Fraction of the usable joint range that motions cover.
        speed: Factor on the motions' frequencies.
        workers: Parallel processes, 1 if not given; on Ray one per CPU if not given.
        shard: Do shard i of N (i/N): every N-th episode starting at the i-th.
        ray: Address of a Ray cluster to run on, "auto" for the one on this machine, "local" to start one.
        max_objects: Largest number of objects in the scene, if the appearance is random.
    """

    embodiment: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ROBOT")]
    out: Path
    mesh_roots: tuple[Path, ...] = ()
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
    workers: int | None = None
    shard: str = "0/1"
    ray: str | None = None
    max_objects: int = 5

    def run(self) -> None:
        """Record the data set."""
        from jidm.cli.checks import check_at_least, check_out_folder, check_positive
        from jidm.cli.text import parse_shard

        check_at_least(0, seed=self.seed)
        check_at_least(1, workers=self.workers)
        check_positive(fps=self.fps)
        check_out_folder(self.out)
        from jidm.sim.babble import BabbleConfig, babble

        config = BabbleConfig(
            embodiment=self.embodiment, mesh_roots=tuple(map(str, self.mesh_roots)), episodes=self.episodes, frames=self.frames, fps=self.fps, cameras=self.camera,
            width=self.width, height=self.height, seed=self.seed, appearance=self.appearance, crop_fraction=self.crop_fraction,
            range_fraction=self.range_fraction, speed=self.speed, max_objects=self.max_objects,
        )  # fmt: skip
        babble(config, self.out, workers=self.workers, shard=parse_shard(self.shard), ray=self.ray, progress=True)
        part = "" if self.shard == "0/1" else f"shard {self.shard} of "
        print(f"{self.out}: {part}{self.episodes} episodes of {self.frames} frames; see `jidm dataset show {self.out}`")
