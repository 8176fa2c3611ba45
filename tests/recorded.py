"""Small in-memory recordings with the interface of data sets, for tests of training without files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rendered import Clip

from jidm.datasets.feature import find_camera


@dataclass
class FakeEpisode:
    index: int
    frames: np.ndarray
    state: np.ndarray
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.state)

    def video(self, camera: str | None = None) -> np.ndarray:
        return self.frames

    def column(self, key: str) -> np.ndarray:
        return self.extras[key]


class FakeDataset:
    """What training uses of a `RecordedDataset`, and a count of the episodes that were opened."""

    def __init__(
        self, root: Path, episodes: list[FakeEpisode], joint_names: tuple[str, ...], *, recipe: Mapping[str, Any] = {}
    ) -> None:
        self.root, self.joint_names, self.recipe, self.fps = root, joint_names, recipe, 16.0
        self._episodes = {e.index: e for e in episodes}
        self.episode_indices = tuple(self._episodes)
        self.cameras = ("front",)
        self.content_hash = f"{root.name}-{len(episodes)}-{[e.length for e in episodes]}"
        shape = episodes[0].frames.shape[1:]
        self.features = {"observation.images.front": SimpleNamespace(dtype="video", shape=shape, names=None)}
        self.features |= {
            key: SimpleNamespace(dtype="float32", shape=x.shape[1:]) for key, x in episodes[0].extras.items()
        }
        self.videos_opened = 0

    def camera(self, camera: str | None = None) -> str:
        return find_camera({"front": "observation.images.front"}, camera, self.root)

    def camera_key(self, camera: str | None = None) -> str:
        return f"observation.images.{self.camera(camera)}"

    def __len__(self) -> int:
        return len(self._episodes)

    def episode(self, index: int) -> FakeEpisode:
        self.videos_opened += 1
        return self._episodes[index]


def numbered_dataset(
    root: Path, lengths: Mapping[int, int], *, joints: int = 2, size: tuple[int, int] = (16, 16)
) -> FakeDataset:
    """Every image of episode e, frame t has red e and green t; joint j is e + t / 100 + j."""
    episodes = []
    for index, length in lengths.items():
        frames = np.zeros((length, *size, 3), dtype=np.uint8)
        frames[..., 0] = index
        frames[..., 1] = np.arange(length)[:, None, None]
        state = index + np.arange(length)[:, None] / 100 + np.arange(joints)[None]
        episodes.append(FakeEpisode(index, frames, state))
    return FakeDataset(root, episodes, tuple(f"joint_{j}" for j in range(joints)))


def rendered_dataset(root: Path, clips: Mapping[int, Clip], *, stride: int = 4) -> FakeDataset:
    """Rendered clips with depth, links and camera as motor babbling records them."""
    from jidm.sim import Scene

    episodes = []
    for index, clip in clips.items():
        camera = clip.camera
        coarse = camera.resized(camera.width // stride, camera.height // stride)
        with Scene(clip.robot) as scene:
            video = scene.render_video(clip.q, coarse)
        pose = np.concatenate(
            [camera.K[[0, 1, 0, 1], [0, 1, 2, 2]].numpy(), camera.T_camera_base[:3].numpy().reshape(-1)]
        )
        extras = {
            "observation.depth.front": np.where(video.link >= 0, video.depth, 0).astype(np.float32),
            "observation.links.front": video.link.astype(np.int16),
            "observation.camera.front": np.tile(pose, (len(clip.q), 1)),
        }
        episodes.append(FakeEpisode(index, clip.rgb, clip.q, extras))
    robot = next(iter(clips.values())).robot
    recipe = {"embodiment": robot.name, "embodiment_hash": robot.content_hash}
    return FakeDataset(root, episodes, robot.joint_names, recipe=recipe)
