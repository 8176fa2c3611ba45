"""Self-play: a robot moves at random in front of randomised scenes, and what a camera sees is recorded.

Episode k is a function of the configuration and k alone, so that any number of processes in any order, interrupted or
not, write the same data set.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from jidm.camera.model import Camera
from jidm.datasets import DatasetWriter, Feature
from jidm.errors import InputError, JidmError
from jidm.ray_utils import ray_cluster
from jidm.sim.appearance import Appearance
from jidm.sim.babble_motion import babble_motion
from jidm.sim.camera_placement import fit_camera_to_robot
from jidm.sim.collision import FreeSpace
from jidm.sim.objects import random_objects
from jidm.sim.sampling import sample_at_centers
from jidm.sim.scene import Rendering, Scene
from jidm.sim.workspace import workspace_sphere

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

APPEARANCES = ("random", "plain", "textured")


@dataclass(frozen=True, kw_only=True)
class BabbleConfig:
    """What is recorded.

    Attributes:
        embodiment: name of the robot.
        episodes, frames, fps: how much.
        cameras: names of the robot's cameras whose direction of view is used; the picture is framed anew.
        width, height: of the pictures [px], multiples of 4.
        seed: of everything; other seeds give other motions, looks and cameras.
        appearance: "random": textures, light, background and things around drawn per episode; "plain"; "textured".
        max_objects: most things around the robot, see `random_things`; none unless the look is random.
        camera_jitter: per episode, standard deviation of the camera's position [share of its distance], of its
            direction [degrees] and of its focal length [share].
        crop_fraction: share of all poses in which the robot may reach out of the picture, at each border: more shows the robot
            larger.
        range_fraction: share of the usable joint range that motions cover.
        speed: factor on the motions' frequencies.
        avoid_collisions: motions keep links off each other and off the floor.
        extras: also record depth, links and camera.
        supersample: anti-aliasing, see `World`.
    """

    embodiment: str
    episodes: int = 200
    frames: int = 64
    fps: float = 16.0
    cameras: tuple[str, ...] = ("front",)
    width: int = 128
    height: int = 128
    seed: int = 0
    appearance: str = "random"
    max_objects: int = 5
    camera_jitter: tuple[float, float, float] = (0.01, 0.5, 0.02)
    crop_fraction: float = 0.02
    range_fraction: float = 1.0
    speed: float = 1.0
    avoid_collisions: bool = True
    extras: bool = True
    supersample: int = 2

    def __post_init__(self) -> None:
        if min(self.episodes, self.frames - 1, self.width, self.height) < 1 or not self.fps > 0 or not self.speed > 0:
            raise InputError("self-play needs episodes >= 1, frames >= 2, a picture size, fps > 0 and speed > 0")
        if self.width % LABEL_STRIDE or self.height % LABEL_STRIDE:
            raise InputError(f"width and height must be multiples of {LABEL_STRIDE}, got {self.width} x {self.height}")
        if self.appearance not in APPEARANCES:
            raise InputError(f"unknown look '{self.appearance}'; known: {', '.join(APPEARANCES)}")
        if self.max_objects < 0 or not 0 < self.range_fraction <= 1 or min(self.camera_jitter) < 0:
            raise InputError("self-play needs objects >= 0, an amplitude in (0, 1] and a camera jitter >= 0")
        if not 0 <= self.crop_fraction < 0.5:
            raise InputError(f"cropped is a share of poses, at least 0 and below 0.5, got {self.crop_fraction}")
        if not self.cameras:
            raise InputError("self-play needs a camera; name one of the robot's")


LABEL_STRIDE = 4
"""Pixels per cell of the grid on which depth and links are recorded."""

_MESH_TOLERANCE = 0.5  # of a pixel's width at the robot: features below are not drawn
_GRAIN_RANGE = (2.0, 9.0)  # size of textures' features [px]: finer ones flicker, coarser ones are hardly seen on links


class Recorder:
    """A robot ready to be recorded: loaded once, used for any number of episodes."""

    def __init__(self, config: BabbleConfig, embodiment: Embodiment | None = None) -> None:
        from jidm.robot.registry import load_embodiment

        self.config = config
        self.embodiment = embodiment or load_embodiment(config.embodiment)
        self.cameras = {
            name: fit_camera_to_robot(
                self.embodiment,
                self.embodiment.camera(name),
                config.width,
                config.height,
                crop_fraction=config.crop_fraction,
            )
            for name in config.cameras
        }
        self._center, self._radius = workspace_sphere(self.embodiment)
        self._scene: Scene | None = None
        self._free_space: FreeSpace | None = None

    def close(self) -> None:
        """Give the simulators back."""
        for simulator in (self._scene, self._free_space):
            if simulator is not None:
                simulator.close()
        self._scene = self._free_space = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def motion(self, index: int) -> NDArray[np.float64]:
        """Joint positions (T, n) of episode `index` [rad or m]."""
        config = self.config
        if self._free_space is None and config.avoid_collisions:
            self._free_space = FreeSpace(self.embodiment)
        return babble_motion(
            self.embodiment, config.frames, 1 / config.fps, _episode_seed(config, index), range_fraction=config.range_fraction,
            speed=config.speed, is_free=self._free_space,
        )  # fmt: skip

    def episode(self, index: int) -> dict[str, Any]:
        """Episode number `index` as the arguments of `DatasetWriter.write_episode`."""
        config, seed = self.config, _episode_seed(self.config, index)
        q = self.motion(index)
        frames: dict[str, NDArray[np.uint8]] = {}
        extras: dict[str, NDArray[Any]] = {}
        for k, (name, nominal) in enumerate(self.cameras.items()):
            camera = jitter_camera(nominal, config.camera_jitter, np.random.default_rng([seed, k, 0xCA]))
            rendering = self._render(q, camera, seed)
            frames[name] = rendering.rgb
            if config.extras:
                extras |= _ground_truth_features(name, camera, rendering)
        action = np.diff(q, axis=0, append=q[-1:])
        return {"index": index, "frames": frames, "state": q, "action": action, "extras": extras}

    def _render(self, q: NDArray[np.float64], camera: Camera, seed: int) -> Rendering:
        pixel_size = min(self._pixel_size(nominal) for nominal in self.cameras.values())
        if self._scene is None:
            self._scene = Scene(
                self.embodiment,
                supersample=self.config.supersample,
                mesh_tolerance=_MESH_TOLERANCE * pixel_size,
                exact=False,
            )
        scene = self._scene
        scene.seed, scene.objects = seed, ()
        if self.config.appearance == "random":
            scene.appearance = self._random_appearance(seed, self._pixel_size(camera))
            scene.objects = random_objects(camera, self._center, self._radius, seed, self.config.max_objects)
        else:
            scene.appearance = Appearance.plain() if self.config.appearance == "plain" else Appearance.textured()
        return scene.render_video(q, camera)

    def _random_appearance(self, seed: int, pixel_size: float) -> Appearance:
        appearance = Appearance.random(seed)
        grain = pixel_size * np.exp(np.random.default_rng([seed, 0x6A]).uniform(*np.log(_GRAIN_RANGE)))
        return replace(appearance, texture=replace(appearance.texture, grain=float(grain)))

    def _pixel_size(self, camera: Camera) -> float:
        """Width of a pixel at the middle of the robot's working space [m]."""
        T, K = camera.T_camera_base.double().numpy(), camera.K.double().numpy()
        return float((T[2, :3] @ self._center + T[2, 3]) / K[0, 0])


def episode_arrays(config: BabbleConfig, index: int) -> dict[str, Any]:
    """Episode number `index`, a function of config and index alone; see `Stage.episode`."""
    with Recorder(config) as recorder:
        return recorder.episode(index)


def _episode_seed(config: BabbleConfig, index: int) -> int:
    return int(np.random.SeedSequence([config.seed, index]).generate_state(1)[0])


def babble(
    config: BabbleConfig,
    out: str | Path,
    *,
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
    ray: str | None = None,
    progress: bool = False,
) -> None:
    """Record the data set, or what is missing of it. All ways of sharing the work write the same bytes.

    Args:
        out: its folder. Episodes that are there already are left alone.
        workers: processes at work; with `ray`, actors at work, 1 meaning one per CPU of the cluster.
        shard: (i, N): record only episodes i, i + N, ...; whoever finds all episodes there writes the listing.
        ray: have it done by a Ray cluster: its address, "auto" for the one that runs here, "local" for one started and
            stopped for this. All its machines must see `out` under the same path.
        progress: show a progress bar.

    Raises:
        InputError: a number has no meaning.
        DatasetError: the folder holds episodes made otherwise.
        MissingExtraError: PyBullet or Ray is not installed.
        JidmError: a process at work died; what it finished is kept, and running the same again goes on.
    """
    i, count = shard
    if not 0 <= i < count or workers < 1:
        raise InputError(f"shard must be i/N with 0 <= i < N and workers at least 1, got {i}/{count} and {workers}")
    with Recorder(config) as recorder:
        writer = make_writer(config, out, recorder)
        missing = sorted(set(range(i, config.episodes, count)) - writer.completed_episodes())
        if ray is not None:
            recorded = _record_on_ray(config, out, missing, workers, ray)
        elif workers > 1:
            recorded = _record_in_processes(config, out, missing, workers)
        else:
            recorded = _record_serially(writer, recorder, missing)
        for _ in _with_progress(recorded, len(missing), progress):
            pass
    if writer.completed_episodes() >= set(range(config.episodes)):
        writer.finalize()


def make_writer(config: BabbleConfig, out: str | Path, recorder: Recorder) -> DatasetWriter:
    """The writer of this data set; its recipe says how it is made."""
    from jidm import __version__

    robot, h, w = recorder.embodiment, config.height // LABEL_STRIDE, config.width // LABEL_STRIDE
    extras: dict[str, Feature] = {}
    for name in config.cameras if config.extras else ():
        extras[f"observation.depth.{name}"] = Feature("float32", (h, w))
        extras[f"observation.links.{name}"] = Feature("int16", (h, w))
        extras[f"observation.camera.{name}"] = Feature("float64", (16,))
    recipe = asdict(config) | {
        "made_by": "jidm babble",
        "jidm": __version__,
        "embodiment_hash": robot.content_hash,
        "action": "delta_q",
        "cameras": {name: camera.to_dict() for name, camera in recorder.cameras.items()},
    }
    return DatasetWriter(
        out, fps=config.fps, joint_names=robot.joint_names, robot_type=robot.name, extras=extras, recipe=recipe,
        cameras=dict.fromkeys(config.cameras, (config.width, config.height)),
    )  # fmt: skip


def _record_serially(writer: DatasetWriter, recorder: Recorder, indices: list[int]) -> Iterator[int]:
    for index in indices:
        writer.write_episode(**recorder.episode(index))
        yield index


def _record_in_processes(config: BabbleConfig, out: str | Path, indices: list[int], workers: int) -> Iterator[int]:
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # A fork would share the simulator's and torch's threads; a fresh process does not.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(
            workers, mp_context=context, initializer=_init_worker, initargs=(config, str(out))
        ) as pool:
            yield from pool.map(_record, indices)
    except BrokenProcessPool:
        raise JidmError(_WORKER_DIED) from None


_WORKER_DIED = (
    "a process at work died, perhaps for want of memory; run the same again, with fewer workers, to record the rest"
)
_WORKERS: list[_Worker] = []
"""The one of a worker process."""


class _Worker:
    """Records episodes in a process of its own."""

    def __init__(self, config: BabbleConfig, out: str) -> None:
        torch.set_num_threads(1)
        self._recorder = Recorder(config)
        self._writer = make_writer(config, out, self._recorder)

    def record(self, index: int) -> int:
        """Write episode `index`, unless it is there."""
        self._writer.write_episode(**self._recorder.episode(index))
        return index


def _init_worker(config: BabbleConfig, out: str) -> None:
    _exit_with_parent()
    _WORKERS.append(_Worker(config, out))


def _exit_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever, the simulator in its memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)  # an episode that is half written is no episode: whoever goes on writes it anew

    threading.Thread(target=wait, daemon=True).start()


def _record(index: int) -> int:
    return _WORKERS[0].record(index)


def _record_on_ray(
    config: BabbleConfig, out: str | Path, indices: list[int], workers: int, address: str
) -> Iterator[int]:
    if not indices:
        return
    with ray_cluster(address, workers, len(indices)) as count:
        import ray
        from ray.util import ActorPool

        # Writing an episode twice does nothing the second time, so lost actors and their work may begin again.
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(_Worker)
        folder = str(Path(out).resolve())
        pool = ActorPool([actor.remote(config, folder) for _ in range(count)])
        try:
            yield from pool.map_unordered(lambda worker, index: worker.record.remote(index), indices)
        except ray.exceptions.RayActorError:
            raise JidmError(_WORKER_DIED) from None


def jitter_camera(camera: Camera, jitter: tuple[float, float, float], rng: np.random.Generator) -> Camera:
    """The camera a little moved, turned and zoomed."""
    position, angle, focal = jitter
    T, K = camera.T_camera_base.double().numpy().copy(), camera.K.double().numpy().copy()
    distance = float(np.linalg.norm(T[:3, 3]))
    from scipy.spatial.transform import Rotation

    rotation = np.eye(4)
    rotation[:3, :3] = Rotation.from_rotvec(np.deg2rad(angle) * rng.normal(size=3)).as_matrix()
    rotation[:3, 3] = position * distance * rng.normal(size=3)
    K[[0, 1], [0, 1]] *= np.exp(focal * rng.normal())
    return replace(camera, K=torch.from_numpy(K), T_camera_base=torch.from_numpy(rotation @ T))


def _ground_truth_features(name: str, camera: Camera, rendering: Rendering) -> dict[str, NDArray[Any]]:
    depth, link = sample_at_centers(rendering.depth, rendering.link, LABEL_STRIDE)
    K, T = camera.K.double().numpy(), camera.T_camera_base.double().numpy()
    row = np.concatenate([[K[0, 0], K[1, 1], K[0, 2], K[1, 2]], T[:3].ravel()])
    return {
        f"observation.depth.{name}": np.where(link >= 0, depth, 0).astype(np.float32),
        f"observation.links.{name}": link.astype(np.int16),
        f"observation.camera.{name}": np.tile(row, (len(rendering), 1)),
    }


def _with_progress(items: Iterator[int], total: int, show: bool) -> Iterator[int]:
    if not show:
        return items
    from tqdm import tqdm

    return iter(tqdm(items, total=total, unit="episode"))
