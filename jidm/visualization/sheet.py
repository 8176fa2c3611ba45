"""Contact sheets: rows of images with captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jidm.errors import InputError
from jidm.visualization.image import RgbImage

Tile = tuple[RgbImage, str]
"""An image and its caption. A caption may extend over following tiles of the row whose captions are empty."""

_TITLE_HEIGHT, _TITLE_SCALE = 28, 0.5
_MIN_SCALE = 0.2


@dataclass(frozen=True)
class SheetStyle:
    """Appearance of a sheet.

    Attributes:
        caption: height of the caption above each row [px].
        gap: between tiles and around the sheet [px].
        background, text: gray levels.
        scale: of the font.
    """

    caption: int
    gap: int
    background: int
    text: int
    scale: float


LIGHT = SheetStyle(caption=18, gap=6, background=250, text=40, scale=0.38)
DARK = SheetStyle(caption=20, gap=0, background=24, text=235, scale=0.4)


def tile_sheet(rows: Sequence[Sequence[Tile]], *, title: str = "", style: SheetStyle = LIGHT) -> RgbImage:
    """Rows of captioned images on one sheet.

    Args:
        rows: tiles from left to right.
        title: a line on top.
        style: appearance.

    Raises:
        InputError: there is no tile.
    """
    if not rows or not rows[0]:
        raise InputError("a sheet needs at least one image")
    heights = [style.caption + max(image.shape[0] for image, _ in row) + style.gap for row in rows]
    width = max(sum(image.shape[1] + style.gap for image, _ in row) for row in rows) + style.gap
    y = _TITLE_HEIGHT if title else style.gap
    sheet = np.full((y + sum(heights), width, 3), style.background, np.uint8)
    if title:
        _put_text(sheet, title, style.gap, 19, style.text, _TITLE_SCALE)
    for row, height in zip(rows, heights, strict=True):
        x = style.gap
        for k, (image, caption) in enumerate(row):
            sheet[y + style.caption : y + style.caption + image.shape[0], x : x + image.shape[1]] = image
            if caption:
                end = next((j for j in range(k + 1, len(row)) if row[j][1]), len(row))
                room = sum(other.shape[1] + style.gap for other, _ in row[k:end])
                scale = _fitting_scale(caption, style.scale, room)
                _put_text(sheet, caption, x + (0 if style.gap else 5), y + style.caption - 6, style.text, scale)
            x += image.shape[1] + style.gap
        y += height
    return sheet


def _fitting_scale(text: str, scale: float, width: int) -> float:
    """The largest font scale, up to `scale`, at which the text fits."""
    import cv2

    while scale > _MIN_SCALE and cv2.getTextSize(_ascii(text), cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0] > width:
        scale -= 0.02
    return scale


def _put_text(sheet: RgbImage, text: str, x: int, y: int, level: int, scale: float) -> None:
    import cv2

    cv2.putText(sheet, _ascii(text), (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, (level,) * 3, 1, cv2.LINE_AA)


def _ascii(text: str) -> str:
    """OpenCV's font has ASCII characters only."""
    return text.encode("ascii", "replace").decode()
