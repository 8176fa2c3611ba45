"""The result of decoding: joint motion over a video with its uncertainty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.errors import InputError, MissingExtraError
from jidm.estimation.motion_files import FRAME_FIELDS, STEP_FIELDS, load_npz, motion_table, save_csv, save_npz
from jidm.estimation.motion_text import as_html, as_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike
    from pandas import DataFrame

    from jidm.estimation.motion_figure import PositionAndVelocityLimits


@dataclass(frozen=True, eq=False, repr=False)
class JointMotion:
    """Decoded motion of n joints over T frames; step t lies between frames t and t + 1. Everything is finite.

    Attributes:
        joint_names: n names, the order of every joint axis.
        joint_types: "revolute", "continuous" (rad) or "prismatic" (m), per joint.
        time: (T,) time of each frame [s].
        delta_q: (*batch, T-1, n) joint step [rad or m]; 0 where not valid.
        velocity: (*batch, T-1, n) [rad/s or m/s].
        position: (*batch, T, n) [rad or m]; held where a frame was not measured. The sum of the steps, corrected by whatever
            measures positions themselves: contours, or the pose that a network predicts from each frame. So its differences
            are not `delta_q` exactly, and with a weak network not nearly.
        position_std: (*batch, T, n) standard deviation of position [rad or m].
        covariance: (*batch, T-1, n, n) of delta_q.
        residual: (*batch, T-1) image motion of the robot that no joint step explains [px rms].
        explained_fraction: (*batch, T-1) fraction of the energy of the robot's image motion that the step explains.
        agreement: (*batch, T-1) how well the last frames agree with robot, camera and pose: a standard score, see
            `jidm.estimation.agreement`; 0 where the model does not measure it.
        observable: (*batch, T-1, n) joints whose motion can be distinguished from that of the others.
        valid: (*batch, T-1) whether the step was measured.
        provenance: how it was decoded: versions, hashes, seeds, options.
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
    agreement: Float[Tensor, "*batch S"]
    observable: Bool[Tensor, "*batch S n"]
    valid: Bool[Tensor, "*batch S"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str | list[str]:
        """What contradicts robot, camera or start pose, in words; empty if nothing does. Of a batch, one text per video."""
        verdict: str | list[str] = self.provenance.get("verdict", "")
        return verdict

    @property
    def frames(self) -> int:
        """T, the number of frames."""
        return self.time.shape[-1]

    def __getitem__(self, frames: slice) -> JointMotion:
        """Frames `start:stop` of the video and the steps between them.

        Raises:
            InputError: the slice has a stride or holds no frame.
        """
        if not isinstance(frames, slice) or frames.step not in (None, 1):
            raise InputError("a JointMotion is sliced over frames without a stride: motion[start:stop]")
        start, stop, _ = frames.indices(self.frames)
        if stop - start < 1:
            raise InputError(f"frames {start}:{stop} of {self.frames} are none")
        cut: dict[str, Any] = {
            k: getattr(self, k).narrow(axis, start, stop - start) for k, axis in FRAME_FIELDS.items()
        }
        cut |= {k: getattr(self, k).narrow(axis, start, stop - start - 1) for k, axis in STEP_FIELDS.items()}
        return replace(self, **cut)

    def __repr__(self) -> str:
        return as_line(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the line of `repr`, and a row per joint."""
        return as_html(self)

    def to(self, *args: Any, **kwargs: Any) -> JointMotion:
        """The motion on another device or in another floating dtype, arguments as for `Tensor.to`.

        `time` keeps its precision, the flags stay boolean.

        Raises:
            InputError: the dtype is not a floating one.
        """
        like = self.position.to(*args, **kwargs)
        if not like.is_floating_point():
            raise InputError("a JointMotion holds floating point numbers; convert to torch.float32 or torch.float64")
        kept = ("time", "observable", "valid")
        values = {key: getattr(self, key) for key in (*FRAME_FIELDS, *STEP_FIELDS)}
        return replace(self, **{k: x.to(like.device) if k in kept else x.to(like) for k, x in values.items()})

    def plot(
        self, *, truth: ArrayLike | None = None, limits: PositionAndVelocityLimits | None = None,
        joints: Sequence[str] | None = None, title: str = "",
    ) -> Figure:  # fmt: skip
        """Velocity and position of every joint as a figure, with bands of two standard deviations.

        `motion.plot().savefig("motion.png")` writes it. One video only.

        Args:
            truth: (T, n) true joint positions [rad or m].
            limits: lower and upper position and velocity limits, (n,) each.
            joints: which to draw; all if not given.
            title: a line on top.

        Raises:
            InputError: this is a batch of videos, or the arguments do not fit.
        """
        from jidm.estimation.motion_figure import draw_motion

        return draw_motion(self, truth=truth, limits=limits, joints=joints, title=title)

    def to_pandas(self) -> DataFrame:
        """The table of `to_csv` with `time` [s] as the index; the last frame has no step, its columns are missing values.

        Raises:
            InputError: this is a batch of videos.
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise MissingExtraError("to_pandas", "pandas", None) from None
        columns, rows = motion_table(self.joint_names, self.numpy())
        return pd.DataFrame(rows, columns=columns).set_index("time").astype({"valid": "boolean"})

    def numpy(self) -> dict[str, np.ndarray]:
        """All numeric fields as NumPy arrays."""
        return {k: getattr(self, k).detach().cpu().numpy() for k in (*FRAME_FIELDS, *STEP_FIELDS)}

    def save(self, path: str | Path) -> None:
        """Write an .npz file that `load` reads; it is written completely or not at all."""
        header = {
            "joint_names": self.joint_names, "joint_types": self.joint_types, "provenance": dict(self.provenance)
        }  # fmt: skip
        save_npz(path, header, self.numpy())

    @classmethod
    def load(cls, path: str | Path) -> JointMotion:
        """Read a file written by `save`; nothing in it is ever executed.

        Raises:
            InputError: the file is missing, damaged, or of another kind.
        """
        header, arrays = load_npz(path)
        return cls(**{**header, **arrays})

    def to_csv(self, path: str | Path) -> None:
        """Write one row per frame: time, positions, then velocities, residual and validity of the step that follows.

        The last frame's step columns are empty. One video only.

        Raises:
            InputError: this is a batch of videos.
        """
        save_csv(path, self.joint_names, self.numpy())


def stack(motions: list[JointMotion], batch: torch.Size) -> JointMotion:
    """Motions of equally long videos of one robot as one motion with leading axes `batch`."""
    arrays: dict[str, Any] = {}
    for key in (*FRAME_FIELDS, *STEP_FIELDS):
        if key != "time":
            stacked = torch.stack([getattr(motion, key) for motion in motions])
            arrays[key] = stacked.reshape(*batch, *stacked.shape[1:])
    provenance = {**motions[0].provenance, "verdict": [x.verdict for x in motions]}
    return replace(motions[0], **arrays, provenance=provenance)
