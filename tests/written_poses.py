"""Stand-ins for recordings and models: poses are encoded in the pixels, so a model can decode them exactly."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from jidm.datasets.feature import find_camera
from jidm.estimation.result import JointMotion

POSE_RANGE = 8.0
"""Poses in (-4, 4) are encoded, to about 5e-7."""


def encode_poses(q: np.ndarray, height: int, width: int) -> np.ndarray:
    """(T, H, W, 3) uint8 images whose first pixels hold q (T, n) in 24 bits each."""
    images = np.full((len(q), height, width, 3), 90, np.uint8)
    level = np.rint((q / POSE_RANGE + 0.5) * (2**24 - 1)).astype(np.int64)
    for byte in range(3):
        images[:, 0, : q.shape[1], byte] = (level >> (8 * byte)) & 255
    return images


def decode_poses(video: torch.Tensor, n: int) -> torch.Tensor:
    """The inverse of `encode_poses`, from (T, 3, H, W) images in [0, 1]."""
    bytes_ = (video[:, :, 0, :n] * 255).round().double()
    level = (bytes_ * torch.tensor([1.0, 256.0, 65536.0], dtype=torch.float64)[:, None]).sum(1)
    return (level / (2**24 - 1) - 0.5) * POSE_RANGE


@dataclass
class InMemoryDataset:
    """The interface of a `RecordedDataset`, in memory."""

    q: dict[int, np.ndarray]
    joint_names: tuple[str, ...]
    fps: float = 16.0
    size: tuple[int, int] = (32, 32)
    recipe: dict[str, Any] | None = None
    extras: dict[str, dict[int, np.ndarray]] | None = None

    def __post_init__(self) -> None:
        self.root, self.content_hash, self.cameras, self.recipe = "memory", "0" * 64, ("front",), self.recipe or {}
        self.episode_indices = tuple(self.q)
        self.features = {"observation.images.front": SimpleNamespace(shape=(*self.size, 3))}
        self.features |= {key: SimpleNamespace(shape=()) for key in self.extras or {}}

    def camera(self, camera: str | None = None) -> str:
        return find_camera({"front": "observation.images.front"}, camera, self.root)

    def camera_key(self, camera: str | None = None) -> str:
        return f"observation.images.{self.camera(camera)}"

    def episode(self, index: int) -> Any:
        q = self.q[index]
        return SimpleNamespace(
            index=index,
            length=len(q),
            state=q,
            video=lambda camera: encode_poses(q, *self.size),
            column=lambda key: self.extras[key][index],
        )


class PixelPoseModel:
    """Decodes the poses from the pixels with given errors: steps are scaled, and one step in a video is not valid."""

    def __init__(
        self, joint_names: tuple[str, ...], *, scale: float = 1.0, std: float = 0.01, invalid: int | None = None
    ):
        self.joint_names, self.scale, self.std, self.invalid = joint_names, scale, std, invalid

    def predict_steps(
        self, first: torch.Tensor, second: torch.Tensor, before: torch.Tensor | None = None
    ) -> torch.Tensor:
        n = len(self.joint_names)
        return self.scale * (decode_poses(second, n) - decode_poses(first, n))

    def decode(self, video: torch.Tensor, *, q0: torch.Tensor, fps: float) -> JointMotion:
        n, frames = len(self.joint_names), len(video)
        step = self.predict_steps(video[:-1], video[1:])
        valid = torch.ones(frames - 1, dtype=torch.bool)
        if self.invalid is not None:
            step[self.invalid], valid[self.invalid] = 0.0, False
        time = torch.arange(frames, dtype=torch.float64) / fps
        return JointMotion(
            joint_names=self.joint_names,
            joint_types=("revolute",) * n,
            time=time,
            delta_q=step,
            velocity=step * fps,
            position=torch.cat([q0[None], q0 + step.cumsum(0)]),
            position_std=torch.full((frames, n), self.std, dtype=torch.float64),
            covariance=torch.eye(n, dtype=torch.float64).expand(frames - 1, n, n) * self.std**2,
            residual=torch.zeros(frames - 1),
            explained_fraction=torch.ones(frames - 1),
            agreement=torch.zeros(frames - 1),
            observable=torch.ones(frames - 1, n, dtype=torch.bool),
            valid=valid,
        )
