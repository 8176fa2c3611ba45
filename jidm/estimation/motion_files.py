"""Formats of a joint motion: .npz, which can be read back, and one table for .csv and pandas."""

from __future__ import annotations

import csv
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jidm.atomic_io import atomic_write
from jidm.errors import InputError

FRAME_FIELDS = {"time": -1, "position": -2, "position_std": -2}
"""Arrays with T entries, and the axis of these."""

STEP_FIELDS = {
    "delta_q": -2,
    "velocity": -2,
    "covariance": -3,
    "residual": -1,
    "explained_fraction": -1,
    "agreement": -1,
    "observable": -2,
    "valid": -1,
}
"""Arrays with T - 1 entries, and the axis of these."""


def save_npz(path: str | Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write all arrays and a JSON header; the file is written completely or not at all."""
    contents: dict[str, Any] = {"header": np.array(json.dumps(dict(header))), **arrays}
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        np.savez_compressed(f, **contents)


def load_npz(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and arrays written by `save_npz`; nothing in the file is ever executed.

    Raises:
        InputError: the file is missing, damaged, or of another kind, or its arrays do not fit together.
    """
    try:
        with open(path, "rb") as f, np.lib.npyio.NpzFile(f, allow_pickle=False) as data:
            header = json.loads(str(data["header"]))
            arrays = {k: torch.from_numpy(data[k]) for k in (*FRAME_FIELDS, *STEP_FIELDS)}
        for key in ("joint_names", "joint_types"):
            header[key] = tuple(header[key])
        _check_shapes(arrays, len(header["joint_names"]))
        return {key: header[key] for key in ("joint_names", "joint_types", "provenance")}, arrays
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a joint motion written by JointMotion.save: {reason}") from None


def save_csv(path: str | Path, joint_names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write `motion_table`; what the last row lacks stays empty.

    Raises:
        InputError: the arrays are of a batch of videos.
    """
    columns, rows = motion_table(joint_names, arrays)
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as f:
        table = csv.writer(f)
        table.writerow(columns)
        table.writerows([int(x) if isinstance(x, bool) else x for x in row] for row in rows)


def motion_table(
    joint_names: Sequence[str], arrays: Mapping[str, np.ndarray]
) -> tuple[list[str], list[list[float | bool | None]]]:
    """Column names, and one row per frame: time, positions, then velocities, residual and validity of the step that follows.

    The last frame has no step; its columns are None.

    Raises:
        InputError: the arrays are of a batch of videos.
    """
    if arrays["position"].ndim != 2:
        raise InputError(f"a table holds one video; this motion has batch shape {arrays['position'].shape[:-2]}")
    position, velocity, residual, valid = (arrays[k].tolist() for k in ("position", "velocity", "residual", "valid"))
    steps = [[*v, r, ok] for v, r, ok in zip(velocity, residual, valid, strict=True)]
    steps.append([None] * (len(joint_names) + 2))
    columns = [*(f"position.{x}" for x in joint_names), *(f"velocity.{x}" for x in joint_names)]
    rows = [[time, *q, *step] for time, q, step in zip(arrays["time"].tolist(), position, steps, strict=True)]
    return ["time", *columns, "residual_px", "valid"], rows


def _check_shapes(arrays: Mapping[str, Tensor], n: int) -> None:
    *batch, T, joints = arrays["position"].shape
    if joints != n or arrays["time"].shape != (T,):
        raise ValueError(
            f"{n} joint names, position {tuple(arrays['position'].shape)}, time {tuple(arrays['time'].shape)}"
        )
    for key, axis in (FRAME_FIELDS | STEP_FIELDS).items():
        length = T if key in FRAME_FIELDS else T - 1
        expected = (length,) if key == "time" else (*batch, length, *[n] * (-1 - axis))
        if arrays[key].shape != expected:
            raise ValueError(f"{key} is {tuple(arrays[key].shape)}, expected {expected}")
