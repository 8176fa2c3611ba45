"""A contact sheet of videos: one row each, a few frames from first to last under a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jidm.datasets.stats import evenly_spaced
from jidm.errors import InputError, JidmError
from jidm.visualization.image import RgbImage, resize, write_image
from jidm.visualization.sheet import DARK, Tile, tile_sheet

_FRAMES, _HEIGHT = 7, 110  # per row; [px]
_MAX_WIDTH = 1600  # [px]


def write_contact_sheet(path: str | Path, rows: Sequence[tuple[str | Path, str]]) -> None:
    """Draw one row per video into a PNG or JPEG; the file appears whole or not at all.

    Args:
        path: of the image.
        rows: video file and the text above it. A video that cannot be read leaves its row dark, with the reason.

    Raises:
        InputError: there are no rows.
    """
    if not rows:
        raise InputError("a contact sheet needs at least one video")
    sheet = tile_sheet([_row(Path(video), text) for video, text in rows], style=DARK)
    write_image(sheet[:, :_MAX_WIDTH], path)


def _row(video: Path, text: str) -> list[Tile]:
    try:
        frames = _sample_frames(video)
    except JidmError as error:
        frames, text = [np.zeros((_HEIGHT, _HEIGHT * 4, 3), np.uint8)], f"{text}  ({error})"
    return [(frame, text if k == 0 else "") for k, frame in enumerate(frames)]


def _sample_frames(video: Path) -> list[RgbImage]:
    from jidm.video.io import read_video

    pixels = read_video(video).pixels
    frames = pixels[evenly_spaced(len(pixels), _FRAMES)].movedim(1, -1).numpy()
    return [resize(frame, round(frame.shape[1] * _HEIGHT / frame.shape[0]), _HEIGHT) for frame in frames]
