"""Pictures of a recording: sample frames, where the joints were, how the pictures move."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.atomic_io import atomic_write
from jidm.datasets.image_motion import CameraSample, FlowSample
from jidm.datasets.summary import DatasetSummary
from jidm.errors import InputError
from jidm.visualization.overlay import RgbImage, flow_to_color

_TILE = 192  # [px] longer side of a picture on a sheet
_GAP = 4
_CAPTION = 16


def frame_sheet(samples: Sequence[CameraSample]) -> RgbImage:
    """One row of sample frames per episode.

    Raises:
        InputError: there is no sample.
    """
    captions = [f"episode {s.episode}: frames {', '.join(map(str, s.frame_indices))}" for s in samples]
    return _sheet([s.images for s in samples], captions)


def flow_sheet(samples: Sequence[FlowSample]) -> RgbImage:
    """Per sample one row: the picture, its motion (hue: direction, saturation: speed), and the confidence.

    Raises:
        InputError: there is no sample.
    """
    import torch

    max_speed = max([sample.speed_p95 for sample in samples] + [1.0])
    rows, captions = [], []
    for s in samples:
        colors = flow_to_color(torch.from_numpy(s.flow), max_speed)
        weight = np.repeat((np.clip(s.weight, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)
        rows.append([s.first, colors, weight])
        captions.append(
            f"episode {s.episode} frame {s.frame}: {s.moving_fraction:.0%} moves, median {s.speed:.1f} px; colour full at {max_speed:.1f} px"
        )
    return _sheet(rows, captions)


def write_image(image: RgbImage, path: str | Path) -> None:
    """Write RGB as PNG; the file appears whole or not at all."""
    import cv2

    with atomic_write(path) as temporary:
        cv2.imwrite(str(temporary), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


def plot_coverage(stats: DatasetSummary, path: str | Path, *, title: str = "", dpi: int = 110) -> None:
    """Draw, per joint, how often each part of its range was visited, and the size of its steps, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(stats.joints)
    figure = Figure(figsize=(11, 1.2 + 0.32 * n), layout="constrained")
    FigureCanvasAgg(figure)
    visits, steps = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    _draw_visits(visits, stats)
    steps.barh(range(n), [j.step_rms for j in stats.joints], color="#1f5fbf")
    steps.set_xlabel("step, rms [rad or m per frame]", fontsize=8)
    visits.set_yticks(range(n), [j.name for j in stats.joints], fontsize=7)
    figure.suptitle(title or "joint space visited", fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def _draw_visits(axes: Any, stats: DatasetSummary) -> None:
    shares = np.array([j.histogram / max(1, j.histogram.sum()) for j in stats.joints])
    image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0.0, vmax=max(0.2, float(shares.max())),
                        extent=(0.0, 1.0, len(shares) - 0.5, -0.5))  # fmt: skip
    for k, j in enumerate(stats.joints):
        axes.text(1.01, k, f"{j.lower:.2f} .. {j.upper:.2f}  {j.coverage:.0%}", fontsize=6, va="center")
    axes.set_xlabel(f"place in the {'limits' if stats.uses_limits else 'recorded range'}", fontsize=8)
    axes.figure.colorbar(image, ax=axes, location="left", fraction=0.03, label="share of frames")


def _sheet(rows: Sequence[Sequence[NDArray[np.uint8]]], captions: Sequence[str]) -> RgbImage:
    """Rows of pictures (H, W, 3), each row under its caption."""
    if not rows or not rows[0]:
        raise InputError("a sheet needs at least one picture; the recording gave none")
    tiles = [[_tile(picture) for picture in row] for row in rows]
    height, width = (max(tile.shape[axis] for row in tiles for tile in row) for axis in (0, 1))
    columns = max(len(row) for row in tiles)
    sheet = np.full((len(rows) * (height + _CAPTION + _GAP), columns * (width + _GAP) - _GAP, 3), 250, dtype=np.uint8)
    for r, row in enumerate(tiles):
        top = r * (height + _CAPTION + _GAP)
        _caption(sheet, captions[r], top)
        for c, tile in enumerate(row):
            left, below = c * (width + _GAP), top + _CAPTION
            sheet[below : below + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def _tile(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2

    scale = _TILE / max(picture.shape[:2])
    if scale >= 1.0:
        return picture
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _caption(sheet: RgbImage, text: str, top: int) -> None:
    import cv2

    cv2.putText(sheet, text, (3, top + 12), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (40, 40, 40), 1, cv2.LINE_AA)
