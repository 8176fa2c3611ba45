"""The result of decoding: joint motion over a video, with what is known about its errors."""

from __future__ import annotations

import csv
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.atomic_io import atomic_write
from jidm.errors import InputError

_FRAME_FIELDS = {"time": -1, "position": -2, "position_std": -2}  # fields with T entries, and the axis they lie on
_STEP_FIELDS = {  # fields with T - 1 entries
    "delta_q": -2,
    "velocity": -2,
    "covariance": -3,
    "residual": -1,
    "explained": -1,
    "observable": -2,
    "valid": -1,
}


@dataclass(frozen=True, eq=False)
class JointMotion:
    """Decoded motion of n joints over T frames; step t lies between frames t and t + 1. Everything is finite.

    Attributes:
        joint_names: n names, the order of every joint axis.
        joint_types: "revolute", "continuous" (rad) or "prismatic" (m), per joint.
        time: (T,) time of each frame [s].
        delta_q: (*batch, T-1, n) joint step [rad or m]; 0 where not valid.
        velocity: (*batch, T-1, n) [rad/s or m/s].
        position: (*batch, T, n) [rad or m]; held where not valid.
        position_std: (*batch, T, n) standard deviation of position [rad or m].
        covariance: (*batch, T-1, n, n) of delta_q.
        residual: (*batch, T-1) image motion of the robot that no joint step explains [px rms].
        explained_fraction: (*batch, T-1) share of the robot's image motion that the step explains, in [0, 1].
        observable: (*batch, T-1, n) joints the camera can tell apart at that moment.
        valid: (*batch, T-1) whether the step was measured.
        provenance: what made it: versions, hashes, seeds, options.
    """

    joint_names: tuple[str, ...]
    joint_types: tuple[str, ...]
    time: Float[Tensor, " T"]
    delta_q: Float[Tensor, "*batch S n"]
    velocity: Float[Tensor, "*batch S n"]
    position: Float[Tensor, "*batch T n"]
    position_std: Float[Tensor, "*batch T n"]
    covariance: Float[Tensor, "*batch S n n"]
    residual: Float[Tensor, "*batch S"]
    explained_fraction: Float[Tensor, "*batch S"]
    observable: Bool[Tensor, "*batch S n"]
    valid: Bool[Tensor, "*batch S"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """T, the number of frames."""
        return self.time.shape[-1]

    def __getitem__(self, frames: slice) -> JointMotion:
        """Frames `start:stop` of the video and the steps between them."""
        if not isinstance(frames, slice) or frames.step not in (None, 1):
            raise InputError("a JointMotion is sliced over frames without a stride: motion[start:stop]")
        start, stop, _ = frames.indices(self.frames)
        if stop - start < 1:
            raise InputError(f"frames {start}:{stop} of {self.frames} hold nothing")
        cut = {k: getattr(self, k).narrow(axis, start, stop - start) for k, axis in _FRAME_FIELDS.items()}
        cut |= {k: getattr(self, k).narrow(axis, start, stop - start - 1) for k, axis in _STEP_FIELDS.items()}
        return _with(self, cut)

    def numpy(self) -> dict[str, np.ndarray]:
        """All numeric fields as NumPy arrays."""
        return {k: getattr(self, k).detach().cpu().numpy() for k in (*_FRAME_FIELDS, *_STEP_FIELDS)}

    def save(self, path: str | Path) -> None:
        """Write an .npz that `load` reads; the file appears whole or not at all."""
        header = json.dumps(
            {"joint_names": self.joint_names, "joint_types": self.joint_types, "provenance": dict(self.provenance)}
        )
        arrays: dict[str, Any] = {"header": np.array(header), **self.numpy()}
        with atomic_write(path) as temporary, open(temporary, "wb") as f:
            np.savez_compressed(f, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> JointMotion:
        """Read what `save` wrote; nothing in the file is ever executed.

        Raises:
            InputError: the file is absent, damaged, or another kind of file.
        """
        try:
            with open(path, "rb") as f, np.lib.npyio.NpzFile(f, allow_pickle=False) as data:
                header = json.loads(str(data["header"]))
                arrays = {k: torch.from_numpy(data[k]) for k in (*_FRAME_FIELDS, *_STEP_FIELDS)}
            names, types = tuple(header["joint_names"]), tuple(header["joint_types"])
            _check_shapes(arrays, len(names))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path} is not a joint motion written by JointMotion.save: {reason}") from None
        return cls(names, types, provenance=header["provenance"], **arrays)

    def to_csv(self, path: str | Path) -> None:
        """Write one row per frame: time, position of every joint, then velocity and flags of the step that follows.

        The last frame's step columns are empty. One video only.
        """
        if self.position.dim() != 2:
            raise InputError(f"to_csv writes one video; this motion has batch shape {tuple(self.position.shape[:-2])}")
        p, v = self.position.tolist(), self.velocity.tolist()
        valid, residual = self.valid.tolist(), self.residual.tolist()
        header = ["time"]
        header += [f"position.{name}" for name in self.joint_names] + [f"velocity.{name}" for name in self.joint_names]
        header += ["residual_px", "valid"]

        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as f:
            table = csv.writer(f)
            table.writerow(header)
            for k, time in enumerate(self.time.tolist()):
                step = [*v[k], residual[k], int(valid[k])] if k < len(v) else [""] * (len(self.joint_names) + 2)
                table.writerow([time, *p[k], *step])


def _check_shapes(arrays: Mapping[str, Tensor], n: int) -> None:
    *batch, T, joints = arrays["position"].shape
    if joints != n or arrays["time"].shape != (T,):
        raise ValueError(
            f"{n} joint names, position {tuple(arrays['position'].shape)}, time {tuple(arrays['time'].shape)}"
        )
    for key, axis in (_FRAME_FIELDS | _STEP_FIELDS).items():
        length = T if key in _FRAME_FIELDS else T - 1
        expected = (length,) if key == "time" else (*batch, length, *[n] * (-1 - axis))
        if arrays[key].shape != expected:
            raise ValueError(f"{key} is {tuple(arrays[key].shape)}, expected {expected}")


def stack(motions: list[JointMotion], batch: torch.Size) -> JointMotion:
    """Motions of equally long videos of one robot as one, with leading axes `batch`."""
    arrays = {k: torch.stack([getattr(m, k) for m in motions]) for k in (*_FRAME_FIELDS, *_STEP_FIELDS) if k != "time"}
    return _with(motions[0], {k: v.reshape(*batch, *v.shape[1:]) for k, v in arrays.items()})


def _with(motion: JointMotion, arrays: dict[str, Any]) -> JointMotion:
    return replace(motion, **arrays)
