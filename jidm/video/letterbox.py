"""Letterboxing: images scaled into another size without stretching, centered, with black bands around.

Training and decoding share it, so that a model gets the images of a camera in the same form in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from jidm.errors import InputError
from jidm.flow.base import Flow, mask_invalid, resize_images


@dataclass(frozen=True)
class Letterbox:
    """The placement of a (height_in, width_in) image in a (height, width) one.

    A pixel (u, v) of the original is mapped to `((u + 0.5) * scale_u - 0.5 + left, (v + 0.5) * scale_v - 0.5 + top)`.
    The scales differ by the rounding of `inner_*` to whole pixels at most.
    """

    height_in: int
    width_in: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.height_in, self.width_in, self.height, self.width) < 1:
            raise InputError(f"image sizes must be positive, got {self}")

    @property
    def inner_height(self) -> int:
        """Rows of the scaled image."""
        return max(1, min(self.height, round(self.height_in * self._scale)))

    @property
    def inner_width(self) -> int:
        """Columns of the scaled image."""
        return max(1, min(self.width, round(self.width_in * self._scale)))

    @property
    def top(self) -> int:
        """Black rows above it."""
        return (self.height - self.inner_height) // 2

    @property
    def left(self) -> int:
        """Black columns left of it."""
        return (self.width - self.inner_width) // 2

    @property
    def scale_u(self) -> float:
        """Horizontal pixels per pixel of the original."""
        return self.inner_width / self.width_in

    @property
    def scale_v(self) -> float:
        """Vertical pixels per pixel of the original."""
        return self.inner_height / self.height_in

    @property
    def is_identity(self) -> bool:
        """Whether both sizes are equal."""
        return (self.height_in, self.width_in) == (self.height, self.width)

    def apply(self, frames: Float[Tensor, "*batch 3 H W"]) -> Float[Tensor, "*batch 3 h w"]:
        """Images in [0, 1] at the new size, resized bilinearly with antialiasing."""
        if tuple(frames.shape[-2:]) != (self.height_in, self.width_in):
            raise InputError(f"images are {tuple(frames.shape[-2:])}, expected {(self.height_in, self.width_in)}")
        if self.is_identity:
            return frames
        inner = resize_images(frames, self.inner_height, self.inner_width).clamp(0.0, 1.0)
        out = frames.new_zeros(*frames.shape[:-2], self.height, self.width)
        out[..., self.top : self.top + self.inner_height, self.left : self.left + self.inner_width] = inner
        return out

    def apply_to_flow(self, flow: Flow) -> Flow:
        """The same motion in pixels of the letterboxed image; weight 0 in the black bands."""
        if self.is_identity:
            return flow
        inner = mask_invalid(flow.flow, flow.weight).resized(self.inner_height, self.inner_width)
        bands = (
            self.left, self.width - self.left - self.inner_width, self.top, self.height - self.top - self.inner_height
        )  # fmt: skip
        return Flow(torch.nn.functional.pad(inner.flow, bands), torch.nn.functional.pad(inner.weight, bands))

    def apply_to_uint8(self, pixels: UInt8[Tensor, "*batch 3 H W"]) -> UInt8[Tensor, "*batch 3 h w"]:
        """As `apply`, for images of 0..255."""
        if self.is_identity:
            return pixels
        return (self.apply(pixels.float() / 255.0) * 255.0).round().to(torch.uint8)

    @property
    def _scale(self) -> float:
        return min(self.height / self.height_in, self.width / self.width_in)


def scaled_size(height_in: int, width_in: int, *, max_side: int, multiple: int) -> tuple[int, int]:
    """(height, width) of a smaller image of about the same aspect ratio.

    The longer side is at most `max_side`, both sides are multiples of `multiple`. The size never exceeds that of the
    original, unless that is smaller than one multiple.
    """
    scale = min(1.0, max_side / max(height_in, width_in))
    sides = (max(1, int(side * scale / multiple + 0.5)) * multiple for side in (height_in, width_in))
    height, width = (min(side, max(max_side // multiple, 1) * multiple) for side in sides)
    return height, width
