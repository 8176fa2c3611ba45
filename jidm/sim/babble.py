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

from jidm.cluster import ray_cluster
from jidm.data import DatasetWriter, Feature
from jidm.errors import InputError, JidmError
from jidm.robot.camera import Camera
from jidm.sim.babble_motion import babble_motion
from jidm.sim.framing import framed_camera
from jidm.sim.freespace import FreeSpace
from jidm.sim.look import Look
from jidm.sim.reach import working_space
from jidm.sim.sampling import at_centres
from jidm.sim.things import random_things
from jidm.sim.world import Rendering, World

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

LOOKS = ("random", "plain", "textured")


@dataclass(frozen=True, kw_only=True)
class BabbleConfig:
    """What is recorded.

    Attributes:
        embodiment: name of the robot.
        episodes, frames, fps: how much.
        cameras: names of the robot's cameras whose direction of view is used; the picture is framed anew.
        width, height: of the pictures [px], multiples of 4.
        seed: of everything; other seeds give other motions, looks and cameras.
        look: "random": textures, light, background and things around drawn per episode; "plain"; "textured".
        objects: most things around the robot, see `random_things`; none unless the look is random.
        camera_jitter: per episode, standard deviation of the camera's position [share of its distance], of its
            direction [degrees] and of its focal length [share].
        cropped: share of all poses in which the robot may reach out of the picture, at each border: more shows the robot
            larger.
        amplitude: share of the usable joint range that motions cover.
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
    look: str = "random"
    objects: int = 5
    camera_jitter: tuple[float, float, float] = (0.01, 0.5, 0.02)
    cropped: float = 0.02
    amplitude: float = 1.0
    speed: float = 1.0
    avoid_collisions: bool = True
    extras: bool = True
    supersample: int = 2

    def __post_init__(self) -> None:
        if min(self.episodes, self.frames - 1, self.width, self.height) < 1 or not self.fps > 0 or not self.speed > 0:
            raise InputError("self-play needs episodes >= 1, frames >= 2, a picture size, fps > 0 and speed > 0")
        if self.width % GRID or self.height % GRID:
            raise InputError(f"width and height must be multiples of {GRID}, got {self.width} x {self.height}")
        if self.look not in LOOKS:
            raise InputError(f"unknown look '{self.look}'; known: {', '.join(LOOKS)}")
        if self.objects < 0 or not 0 < self.amplitude <= 1 or min(self.camera_jitter) < 0:
            raise InputError("self-play needs objects >= 0, an amplitude in (0, 1] and a camera jitter >= 0")
        if not 0 <= self.cropped < 0.5:
            raise InputError(f"cropped is a share of poses, at least 0 and below 0.5, got {self.cropped}")
        if not self.cameras:
            raise InputError("self-play needs a camera; name one of the robot's")


GRID = 4
"""Pixels per cell of the grid on which depth and links are recorded."""

_DETAIL = 0.5  # of a pixel's width at the robot: features below are not drawn
_GRAIN = (2.0, 9.0)  # size of textures' features [px]: finer ones flicker, coarser ones are hardly seen on links


class Stage:
    """A robot ready to be recorded: loaded once, used for any number of episodes."""

    def __init__(self, config: BabbleConfig, embodiment: Embodiment | None = None) -> None:
        from jidm.robot.embodiment import Embodiment

        self.config = config
        self.embodiment = embodiment or Embodiment.load(config.embodiment)
        self.cameras = {
            name: framed_camera(
                self.embodiment, self.embodiment.camera(name), config.width, config.height, cropped=config.cropped
            )
            for name in config.cameras
        }
        self._middle, self._radius = working_space(self.embodiment)
        self._world: World | None = None
        self._free: FreeSpace | None = None

    def close(self) -> None:
        """Give the simulators back."""
        for simulator in (self._world, self._free):
            if simulator is not None:
                simulator.close()
        self._world = self._free = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def motion(self, index: int) -> NDArray[np.float64]:
        """Joint positions (T, n) of episode `index` [rad or m]."""
        config = self.config
        if self._free is None and config.avoid_collisions:
            self._free = FreeSpace(self.embodiment)
        return babble_motion(
            self.embodiment, config.frames, 1 / config.fps, _seed(config, index), amplitude=config.amplitude,
            speed=config.speed, is_free=self._free,
        )  # fmt: skip

    def episode(self, index: int) -> dict[str, Any]:
        """Episode number `index` as the arguments of `DatasetWriter.write_episode`."""
        config, seed = self.config, _seed(self.config, index)
        q = self.motion(index)
        frames: dict[str, NDArray[np.uint8]] = {}
        extras: dict[str, NDArray[Any]] = {}
        for k, (name, nominal) in enumerate(self.cameras.items()):
            camera = jittered(nominal, config.camera_jitter, np.random.default_rng([seed, k, 0xCA]))
            seen = self._render(q, camera, seed)
            frames[name] = seen.rgb
            if config.extras:
                extras |= _extras(name, camera, seen)
        action = np.diff(q, axis=0, append=q[-1:])
        return {"index": index, "frames": frames, "state": q, "action": action, "extras": extras}

    def _render(self, q: NDArray[np.float64], camera: Camera, seed: int) -> Rendering:
        pixel = min(self._pixel(nominal) for nominal in self.cameras.values())
        if self._world is None:
            self._world = World(
                self.embodiment, supersample=self.config.supersample, detail=_DETAIL * pixel, exact=False
            )
        world = self._world
        world.seed, world.things = seed, ()
        if self.config.look == "random":
            world.look = self._random_look(seed, self._pixel(camera))
            world.things = random_things(camera, self._middle, self._radius, seed, self.config.objects)
        else:
            world.look = Look.plain() if self.config.look == "plain" else Look.textured()
        return world.render_video(q, camera)

    def _random_look(self, seed: int, pixel: float) -> Look:
        look = Look.random(seed)
        grain = pixel * np.exp(np.random.default_rng([seed, 0x6A]).uniform(*np.log(_GRAIN)))
        return replace(look, texture=replace(look.texture, grain=float(grain)))

    def _pixel(self, camera: Camera) -> float:
        """Width of a pixel at the middle of the robot's working space [m]."""
        T, K = camera.T_camera_base.double().numpy(), camera.K.double().numpy()
        return float((T[2, :3] @ self._middle + T[2, 3]) / K[0, 0])


def episode_arrays(config: BabbleConfig, index: int) -> dict[str, Any]:
    """Episode number `index`, a function of config and index alone; see `Stage.episode`."""
    with Stage(config) as stage:
        return stage.episode(index)


def _seed(config: BabbleConfig, index: int) -> int:
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
    with Stage(config) as stage:
        writer = make_writer(config, out, stage)
        missing = sorted(set(range(i, config.episodes, count)) - writer.done())
        if ray is not None:
            recorded = _by_ray(config, out, missing, workers, ray)
        elif workers > 1:
            recorded = _by_processes(config, out, missing, workers)
        else:
            recorded = _one_by_one(writer, stage, missing)
        for _ in _with_progress(recorded, len(missing), progress):
            pass
    if writer.done() >= set(range(config.episodes)):
        writer.finish()


def make_writer(config: BabbleConfig, out: str | Path, stage: Stage) -> DatasetWriter:
    """The writer of this data set; its recipe says how it is made."""
    from jidm import __version__

    robot, h, w = stage.embodiment, config.height // GRID, config.width // GRID
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
        "cameras": {name: camera.to_dict() for name, camera in stage.cameras.items()},
    }
    return DatasetWriter(
        out, fps=config.fps, joint_names=robot.joint_names, robot_type=robot.name, extras=extras, recipe=recipe,
        cameras=dict.fromkeys(config.cameras, (config.width, config.height)),
    )  # fmt: skip


def _one_by_one(writer: DatasetWriter, stage: Stage, indices: list[int]) -> Iterator[int]:
    for index in indices:
        writer.write_episode(**stage.episode(index))
        yield index


def _by_processes(config: BabbleConfig, out: str | Path, indices: list[int], workers: int) -> Iterator[int]:
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # A fork would share the simulator's and torch's threads; a fresh process does not.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(config, str(out))) as pool:
            yield from pool.map(_record, indices)
    except BrokenProcessPool:
        raise JidmError(_DIED) from None


_DIED = "a process at work died, perhaps for want of memory; run the same again, with fewer workers, to record the rest"
_AT_WORK: list[_Worker] = []
"""The one of a worker process."""


class _Worker:
    """Records episodes in a process of its own."""

    def __init__(self, config: BabbleConfig, out: str) -> None:
        torch.set_num_threads(1)
        self._stage = Stage(config)
        self._writer = make_writer(config, out, self._stage)

    def record(self, index: int) -> int:
        """Write episode `index`, unless it is there."""
        self._writer.write_episode(**self._stage.episode(index))
        return index


def _begin(config: BabbleConfig, out: str) -> None:
    _end_with_the_parent()
    _AT_WORK.append(_Worker(config, out))


def _end_with_the_parent() -> None:
    """A process whose parent was killed would wait for work for ever, the simulator in its memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)  # an episode that is half written is no episode: whoever goes on writes it anew

    threading.Thread(target=wait, daemon=True).start()


def _record(index: int) -> int:
    return _AT_WORK[0].record(index)


def _by_ray(config: BabbleConfig, out: str | Path, indices: list[int], workers: int, address: str) -> Iterator[int]:
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
            raise JidmError(_DIED) from None


def jittered(camera: Camera, jitter: tuple[float, float, float], rng: np.random.Generator) -> Camera:
    """The camera a little moved, turned and zoomed."""
    position, angle, focal = jitter
    T, K = camera.T_camera_base.double().numpy().copy(), camera.K.double().numpy().copy()
    distance = float(np.linalg.norm(T[:3, 3]))
    from scipy.spatial.transform import Rotation

    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_rotvec(np.deg2rad(angle) * rng.normal(size=3)).as_matrix()
    turn[:3, 3] = position * distance * rng.normal(size=3)
    K[[0, 1], [0, 1]] *= np.exp(focal * rng.normal())
    return replace(camera, K=torch.from_numpy(K), T_camera_base=torch.from_numpy(turn @ T))


def _extras(name: str, camera: Camera, seen: Rendering) -> dict[str, NDArray[Any]]:
    depth, link = at_centres(seen.depth, seen.link, GRID)
    K, T = camera.K.double().numpy(), camera.T_camera_base.double().numpy()
    row = np.concatenate([[K[0, 0], K[1, 1], K[0, 2], K[1, 2]], T[:3].ravel()])
    return {
        f"observation.depth.{name}": np.where(link >= 0, depth, 0).astype(np.float32),
        f"observation.links.{name}": link.astype(np.int16),
        f"observation.camera.{name}": np.tile(row, (len(seen), 1)),
    }


def _with_progress(items: Iterator[int], total: int, show: bool) -> Iterator[int]:
    if not show:
        return items
    from tqdm import tqdm

    return iter(tqdm(items, total=total, unit="episode"))
