"""Plots of a recorded data set: sample frames, optical flow in them, and the coverage of joint space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jidm.atomic_io import atomic_write
from jidm.datasets.image_motion import CameraSample, FlowSample
from jidm.datasets.summary import DatasetSummary
from jidm.visualization.image import RgbImage, flow_to_color, resize
from jidm.visualization.plot import new_figure
from jidm.visualization.sheet import Tile, tile_sheet

_TILE = 192  # [px] largest side of an image on a sheet


def frame_sheet(samples: Sequence[CameraSample]) -> RgbImage:
    """Sample frames, one row per episode.

    Raises:
        InputError: there is no sample.
    """
    return tile_sheet(
        [_row(s.images, f"episode {s.episode}: frames {', '.join(map(str, s.frame_indices))}") for s in samples]
    )


def flow_sheet(samples: Sequence[FlowSample]) -> RgbImage:
    """One row per sample: the frame, its optical flow (hue: direction, saturation: speed), and the confidence.

    Raises:
        InputError: there is no sample.
    """
    import torch

    max_speed = max([sample.speed_p95 for sample in samples] + [1.0])
    rows = []
    for s in samples:
        colors = flow_to_color(torch.from_numpy(s.flow), max_speed)
        weight = np.repeat((np.clip(s.weight, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)
        caption = (
            f"episode {s.episode} frame {s.frame}: {s.moving_fraction:.0%} moves, median {s.speed:.1f} px; "
            f"full color {max_speed:.1f} px"
        )
        rows.append(_row([s.first, colors, weight], caption))
    return tile_sheet(rows)


def _row(images: Sequence[RgbImage], caption: str) -> list[Tile]:
    tiles = []
    for k, image in enumerate(images):
        scale = min(1.0, _TILE / max(image.shape[:2]))
        tile = resize(image, round(image.shape[1] * scale), round(image.shape[0] * scale)) if scale < 1 else image
        tiles.append((tile, caption if k == 0 else ""))
    return tiles


def plot_coverage(stats: DatasetSummary, path: str | Path, *, title: str) -> None:
    """Plot, per joint, the histogram of its positions over its range and the size of its steps.

    Args:
        stats: of the data set.
        path: PNG, PDF or SVG; appears whole or not at all.
        title: a line on top.
    """
    n = len(stats.joints)
    figure = new_figure(11, 1.2 + 0.32 * n)
    visits, steps = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    _draw_histograms(visits, stats)
    steps.barh(range(n), [j.step_rms for j in stats.joints], color="#1f5fbf")
    steps.set_xlabel("step, rms [rad or m per frame]", fontsize=8)
    visits.set_yticks(range(n), [j.name for j in stats.joints], fontsize=7)
    figure.suptitle(title, fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _draw_histograms(axes: Any, stats: DatasetSummary) -> None:
    fractions = np.array([j.histogram / max(1, j.histogram.sum()) for j in stats.joints])
    image = axes.imshow(fractions, aspect="auto", cmap="Blues", vmin=0.0, vmax=max(0.2, float(fractions.max())),
                        extent=(0.0, 1.0, len(fractions) - 0.5, -0.5))  # fmt: skip
    for k, j in enumerate(stats.joints):
        axes.text(1.01, k, f"{j.lower:.2f} .. {j.upper:.2f}  {j.coverage:.0%}", fontsize=6, va="center")
    axes.set_xlabel(f"position as a fraction of the {'limits' if stats.uses_limits else 'recorded range'}", fontsize=8)
    axes.figure.colorbar(image, ax=axes, location="left", fraction=0.03, label="fraction of frames")
