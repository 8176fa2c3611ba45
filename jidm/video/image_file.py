"""Pictures in files or in memory, decoded by Pillow and shown as their EXIF orientation says."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jidm.errors import VideoError, first_line
from jidm.git_lfs import refuse_lfs_pointer
from jidm.video.container import over_black

_DAMAGE = (OSError, EOFError, ValueError, SyntaxError, TypeError, struct.error)
"""What Pillow raises for damaged files; PNG's faults are its SyntaxError."""

_ORIENTATION = 274  # EXIF tag; values 5 to 8 exchange rows and columns


@dataclass(frozen=True)
class ImageHeader:
    """What a picture says before its pixels are decoded.

    Attributes:
        height, width: as shown [px].
        channels: 1 for gray, 2 with transparency, 3 for color, 4 with transparency.
    """

    height: int
    width: int
    channels: int


def read_image(source: Path | bytes, name: str) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of a picture, turned and mirrored by its EXIF orientation, over black; of several pictures the first.

    Args:
        source: a file, or the content of one.
        name: what messages call it.

    Raises:
        VideoError: it is no readable picture, or a git-LFS pointer.
    """
    from PIL import ImageOps

    with _open(source, name) as image, _damage_named(name):
        return _rgb(ImageOps.exif_transpose(image))


def read_image_header(source: Path | bytes, name: str) -> ImageHeader:
    """Size and channels of a picture, without decoding it. Arguments and errors as of `read_image`."""
    from PIL import ImageOps

    with _open(source, name) as image, _damage_named(name):
        width, height = image.size
        if image.format == "TIFF":
            width, height = ImageOps.exif_transpose(
                image
            ).size  # Pillow may have turned it already, or do so in decoding
        # Pillow decodes a PNG to look for an EXIF block behind its pixels, where none should be.
        elif (image.format != "PNG" or "exif" in image.info) and image.getexif().get(_ORIENTATION, 1) >= 5:
            width, height = height, width
        bands = 3 if image.mode == "P" else len(image.getbands())  # a palette holds colors
        return ImageHeader(height, width, 3 if image.mode == "CMYK" else bands)


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise VideoError(f"{name}: a damaged image ({first_line(error)}); save it again or leave it out") from None


def _open(source: Path | bytes, name: str) -> Any:
    from PIL import Image

    content = source if isinstance(source, bytes) else None
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError:
        raise VideoError(f"{name}: there is no such image; copy it again") from None
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        refuse_lfs_pointer(name, VideoError, content=content if content is not None else _start(source))
        reason = "of no known format" if isinstance(error, Image.UnidentifiedImageError) else first_line(error)
        raise VideoError(f"{name}: not a readable image ({reason}); save it again or leave it out") from None


def _start(path: Any) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1024)
    except OSError:
        return b""


def _rgb(image: Any) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits of gray
        gray = np.asarray(image).astype(np.int64).clip(0, 65535)
        return np.repeat(((gray + 128) // 257).astype(np.uint8)[..., None], 3, -1)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if "A" in image.getbands() or "transparency" in image.info:
        return over_black(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))
