"""Motor babbling: a robot moves at random in randomized scenes, and rendered videos of it are recorded as a data set.

Episode k is a function of the configuration and k alone. Any number of processes, in any order, interrupted or not,
therefore write the same data set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.camera.model import Camera
from jidm.datasets import DatasetWriter, Feature
from jidm.datasets.feature import geometry_keys
from jidm.errors import InputError
from jidm.robot.registry import load_embodiment
from jidm.sim.appearance import Appearance
from jidm.sim.babble_motion import babble_motion
from jidm.sim.camera_placement import fit_camera_to_robot, jitter_camera
from jidm.sim.collision import FreeSpace
from jidm.sim.motion import log_uniform
from jidm.sim.objects import random_objects
from jidm.sim.parallel import run_in_processes, run_on_ray
from jidm.sim.renderer import Rendering
from jidm.sim.sampling import sample_at_centers
from jidm.sim.scene import Scene
from jidm.sim.workspace import workspace_sphere

APPEARANCES = ("random", "plain", "textured")
LABEL_STRIDE = 4
"""Pixels per cell of the grid on which depth and links are recorded."""

_MESH_TOLERANCE = 0.5  # of a pixel's width at the robot: smaller features of meshes are not drawn
_GRAIN_RANGE = (2.0, 9.0)  # size of textures' features [px]: finer ones alias, coarser ones are hardly visible on links
# Per episode, standard deviation of the camera's position [fraction of its distance], of its direction [degrees] and of
# its focal length [relative].
CAMERA_JITTER = (0.01, 0.5, 0.02)


@dataclass(frozen=True, kw_only=True)
class BabbleConfig:
    """What is recorded.

    Attributes:
        embodiment: name of the robot, or a file or folder, as for `load_embodiment`.
        mesh_roots: folders of the meshes of a URDF file, as for `load_embodiment`.
        episodes, frames, fps: number of episodes, frames of each, frames per second.
        cameras: names of the robot's cameras whose pose is used, with some jitter per episode; focal length and
            principal point are fitted to the robot's workspace.
        width, height: of the images [px], multiples of 4.
        seed: of everything; other seeds give other motions, appearances and cameras.
        appearance: "random": textures, light, background and objects drawn per episode; "plain"; "textured".
        max_objects: largest number of objects around the robot, see `random_objects`; none unless the appearance is
            random.
        crop_fraction: fraction of all poses in which the robot may reach out of the image, at each border. With a larger
            fraction the robot is larger in the image.
        range_fraction: fraction of the usable joint range that motions cover.
        speed: factor on the motions' frequencies.
        supersample: samples per pixel and axis, see `Scene`.

    Raises:
        InputError: a value is out of range.
    """

    embodiment: str
    mesh_roots: tuple[str, ...] = ()
    episodes: int = 200
    frames: int = 64
    fps: float = 16.0
    cameras: tuple[str, ...] = ("front",)
    width: int = 128
    height: int = 128
    seed: int = 0
    appearance: str = "random"
    max_objects: int = 5
    crop_fraction: float = 0.02
    range_fraction: float = 1.0
    speed: float = 1.0
    supersample: int = 2

    def __post_init__(self) -> None:
        if min(self.episodes, self.frames - 1, self.width, self.height) < 1 or not self.fps > 0 or not self.speed > 0:
            raise InputError("babbling needs episodes >= 1, frames >= 2, an image size, fps > 0 and speed > 0")
        if self.width % LABEL_STRIDE or self.height % LABEL_STRIDE:
            raise InputError(f"width and height must be multiples of {LABEL_STRIDE}, got {self.width} x {self.height}")
        if self.appearance not in APPEARANCES:
            raise InputError(f"unknown appearance '{self.appearance}'; known: {', '.join(APPEARANCES)}")
        if self.max_objects < 0 or not 0 < self.range_fraction <= 1:
            raise InputError("babbling needs max_objects >= 0 and a range_fraction in (0, 1]")
        if not 0 <= self.crop_fraction < 0.5:
            raise InputError(f"crop_fraction must be at least 0 and below 0.5, got {self.crop_fraction}")
        if not self.cameras:
            raise InputError("babbling needs a camera; name one of the robot's")


class Recorder:
    """Records episodes of one configuration; robot, cameras and simulators are loaded once.

    Use as a context manager or call `close`.
    """

    def __init__(self, config: BabbleConfig) -> None:
        self.config = config
        self.embodiment = load_embodiment(config.embodiment, mesh_roots=config.mesh_roots)
        robot, size, crop = self.embodiment, (config.width, config.height), config.crop_fraction
        self.cameras = {
            name: fit_camera_to_robot(robot, robot.camera(name), *size, crop_fraction=crop) for name in config.cameras
        }
        self._center, self._radius = workspace_sphere(self.embodiment)

    def close(self) -> None:
        """Disconnect the simulators."""
        for name in ("scene", "_free_space"):
            if name in self.__dict__:
                self.__dict__.pop(name).close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def scene(self) -> Scene:
        """The scene as the last episode left it."""
        pixel_size = min(self._pixel_size(camera) for camera in self.cameras.values())
        tolerance = _MESH_TOLERANCE * pixel_size
        return Scene(self.embodiment, supersample=self.config.supersample, mesh_tolerance=tolerance, exact=False)

    @cached_property
    def _free_space(self) -> FreeSpace:
        return FreeSpace(self.embodiment)

    def motion(self, index: int) -> NDArray[np.float64]:
        """Joint positions (T, n) of episode `index` [rad or m], free of collisions."""
        config = self.config
        return babble_motion(
            self.embodiment, config.frames, 1 / config.fps, _episode_seed(config, index), range_fraction=config.range_fraction,
            speed=config.speed, is_free=self._free_space,
        )  # fmt: skip

    def episode(self, index: int) -> dict[str, Any]:
        """Episode number `index` as the arguments of `DatasetWriter.write_episode`."""
        seed = _episode_seed(self.config, index)
        q = self.motion(index)
        frames: dict[str, NDArray[np.uint8]] = {}
        extras: dict[str, NDArray[Any]] = {}
        for k, (name, nominal) in enumerate(self.cameras.items()):
            camera = jitter_camera(nominal, CAMERA_JITTER, np.random.default_rng([seed, k, 0xCA]))
            rendering = self._render(q, camera, seed)
            frames[name] = rendering.rgb
            extras |= _ground_truth_features(name, camera, rendering)
        action = np.diff(q, axis=0, append=q[-1:])
        return {"index": index, "frames": frames, "state": q, "action": action, "extras": extras}

    def writer(self, out: str | Path) -> DatasetWriter:
        """The writer of the data set; its recipe holds the configuration."""
        from jidm import __version__

        config, robot = self.config, self.embodiment
        h, w = config.height // LABEL_STRIDE, config.width // LABEL_STRIDE
        extras: dict[str, Feature] = {}
        for name in config.cameras:
            features = Feature("float32", (h, w)), Feature("int16", (h, w)), Feature("float64", (16,))
            extras |= zip(geometry_keys(name), features, strict=True)
        source = Path(config.embodiment)
        values = {key: value for key, value in asdict(config).items() if key != "mesh_roots"}
        recipe = values | {
            "made_by": "jidm babble",
            "jidm": __version__,
            # Data sets are published: the name of a robot's file and its hash, not its folders on this machine.
            "embodiment": source.name if source.is_absolute() else config.embodiment,
            "embodiment_hash": robot.content_hash,
            "action": "delta_q",
            "cameras": {name: camera.to_dict() for name, camera in self.cameras.items()},
        }
        return DatasetWriter(
            out, fps=config.fps, joint_names=robot.joint_names, robot_type=robot.name, extras=extras, recipe=recipe,
            cameras=dict.fromkeys(config.cameras, (config.width, config.height)),
        )  # fmt: skip

    def _render(self, q: NDArray[np.float64], camera: Camera, seed: int) -> Rendering:
        scene, config = self.scene, self.config
        scene.seed, scene.objects = seed, ()
        if config.appearance == "random":
            scene.appearance = self._random_appearance(seed, self._pixel_size(camera))
            scene.objects = random_objects(camera, self._center, self._radius, seed, config.max_objects)
        else:
            scene.appearance = Appearance.plain() if config.appearance == "plain" else Appearance.textured()
        return scene.render_video(q, camera)

    def _random_appearance(self, seed: int, pixel_size: float) -> Appearance:
        appearance = Appearance.random(seed)
        grain = pixel_size * log_uniform(np.random.default_rng([seed, 0x6A]), *_GRAIN_RANGE)
        return replace(appearance, texture=replace(appearance.texture, grain=float(grain)))

    def _pixel_size(self, camera: Camera) -> float:
        """Width of a pixel at the center of the robot's workspace [m]."""
        T, K = camera.T_camera_base.double().numpy(), camera.K.double().numpy()
        return float((T[2, :3] @ self._center + T[2, 3]) / K[0, 0])


def babble(
    config: BabbleConfig,
    out: str | Path,
    *,
    workers: int | None = None,
    shard: tuple[int, int] = (0, 1),
    ray: str | None = None,
    progress: bool = False,
) -> None:
    """Record the data set, or what is missing of it. Processes, shards and Ray write the same bytes.

    Args:
        out: its folder. Episodes that are there already are left alone.
        workers: number of processes, 1 if not given; with `ray`, of actors, one per CPU of the cluster if not given.
        shard: (i, N): record only episodes i, i + N, ... The shard that completes the data set writes its metadata.
        ray: use a Ray cluster: its address, "auto" for the one that runs here, "local" for one started and stopped for
            this call. All its machines must see `out` under the same path.
        progress: show a progress bar.

    Raises:
        InputError: a number is out of range.
        DatasetError: the folder holds episodes of another configuration.
        MissingExtraError: PyBullet or Ray is not installed.
        JidmError: a worker process died. Finished episodes are kept, and running the same again records the rest.
    """
    from tqdm import tqdm

    i, count = shard
    if not 0 <= i < count or (workers is not None and workers < 1):
        raise InputError(f"shard must be i/N with 0 <= i < N and workers at least 1, got {i}/{count} and {workers}")
    worker, worker_args = _Worker(config, Path(out)), (config, Path(out).resolve())
    missing = sorted(set(range(i, config.episodes, count)) - worker.writer.completed_episodes())
    recorded: Iterable[object]
    with worker.recorder:
        if ray is not None:
            recorded = run_on_ray(_Worker, worker_args, missing, workers, ray)
        elif workers is not None and workers > 1:
            recorded = run_in_processes(_Worker, worker_args, missing, workers)
        else:
            recorded = map(worker.run, missing)
        for _ in tqdm(recorded, total=len(missing), unit="episode", disable=not progress):
            pass
    if worker.writer.completed_episodes() >= set(range(config.episodes)):
        worker.writer.finalize()


class _Worker:
    """Records single episodes. An episode that is there already is not written again."""

    def __init__(self, config: BabbleConfig, out: Path) -> None:
        self.recorder = Recorder(config)
        self.writer = self.recorder.writer(out)

    def run(self, index: int) -> None:
        self.writer.write_episode(**self.recorder.episode(index))


def _episode_seed(config: BabbleConfig, index: int) -> int:
    return int(np.random.SeedSequence([config.seed, index]).generate_state(1)[0])


def _ground_truth_features(name: str, camera: Camera, rendering: Rendering) -> dict[str, NDArray[Any]]:
    """Depth [m], 0 off the robot, link ids and camera (fx, fy, cx, cy, rows of T_camera_base) of every frame."""
    depth, link = sample_at_centers(rendering.depth, rendering.link, LABEL_STRIDE)
    K, T = camera.K.double().numpy(), camera.T_camera_base.double().numpy()
    row = np.concatenate([[K[0, 0], K[1, 1], K[0, 2], K[1, 2]], T[:3].ravel()])
    columns = np.where(link >= 0, depth, 0).astype(np.float32), link.astype(np.int16), np.tile(row, (len(rendering), 1))
    return dict(zip(geometry_keys(name), columns, strict=True))
