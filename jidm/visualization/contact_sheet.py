"""Videos side by side: one row each, a few frames from first to last, and a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jidm.atomic_io import atomic_write
from jidm.errors import InputError, JidmError

_FRAMES, _HEIGHT, _TEXT = 7, 110, 24  # per row; [px]
_MAX_WIDTH = 1600  # [px]


def write_contact_sheet(path: str | Path, rows: Sequence[tuple[str | Path, str]]) -> None:
    """Draw one row per video into a PNG or JPEG; the file appears whole or not at all.

    Args:
        rows: video file and what to write above it. A video that cannot be read leaves its row dark, with the reason.

    Raises:
        InputError: there are no rows.
    """
    import cv2

    if not rows:
        raise InputError("a contact sheet needs at least one video")
    drawn = [_row(Path(video), text) for video, text in rows]
    width = max(row.shape[1] for row in drawn)
    sheet = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in drawn])
    with atomic_write(path) as temporary:
        if not cv2.imwrite(str(temporary), sheet[..., ::-1]):
            raise InputError(f"{path}: cannot be written as a picture; name it .png or .jpg")


def _row(video: Path, text: str) -> NDArray[np.uint8]:
    import cv2

    try:
        frames = _sample_frames(video)
    except JidmError as error:
        frames, text = [np.zeros((_HEIGHT, _HEIGHT * 4, 3), np.uint8)], f"{text}  ({error})"
    strip = np.concatenate(frames, 1)[:, :_MAX_WIDTH]
    label = np.zeros((_TEXT, strip.shape[1], 3), np.uint8)
    cv2.putText(label, text, (6, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
    return np.concatenate([label, strip])


def _sample_frames(video: Path) -> list[NDArray[np.uint8]]:
    import cv2

    from jidm.video.io import read_video

    pixels = read_video(video).pixels
    chosen = np.linspace(0, len(pixels) - 1, min(_FRAMES, len(pixels))).round().astype(int)
    frames = []
    for picture in pixels[chosen].movedim(1, -1).numpy():
        width = max(1, round(picture.shape[1] * _HEIGHT / picture.shape[0]))
        frames.append(np.asarray(cv2.resize(picture, (width, _HEIGHT), interpolation=cv2.INTER_AREA), np.uint8))
    return frames
