"""Conversion of frames in any common layout to `(*batch, T, 3, H, W)` float RGB in [0, 1].

The layouts of diffusers, flow_grpo and cameras are inferred. Ambiguous input is refused, and the message names the
argument that resolves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import VideoError

_ROUNDING_TOLERANCE = 1e-3  # a value outside a range by less is rounding [unit of the range]
_OVERSHOOT = 0.05  # resampling and half precision exceed a range by at most this fraction of its span
_GRAY, _RGB, _RGBA = 1, 3, 4


def as_video(
    frames: Any,
    *,
    layout: str | None = None,
    value_range: tuple[float, float] | None = None,
    min_frames: int = 1,
) -> Float[Tensor, "*batch T 3 H W"]:
    """Frames in any common layout as `(*batch, T, 3, H, W)` float RGB in [0, 1].

    Inferred without `layout`: `(*batch, T, H, W, C)` and `(*batch, T, C, H, W)` with 1, 3 or 4 channels,
    `(*batch, 3, T, H, W)`, gray `(T, H, W)`; tensors, arrays, PIL images, `Video` objects, outputs of diffusers' video
    pipelines, and (nested) lists of these, one level per axis. Inferred without `value_range`: uint8 is 0..255; float with negative values is [-1, 1]; float
    within [0, 1] is [0, 1], except in the layout `(*batch, 3, T, H, W)`, which is used with [-1, 1]: a bright [-1, 1]
    video cannot be distinguished from a [0, 1] one.

    Gray is repeated into three channels. RGBA is composited over black, so that hidden content of transparent pixels
    never appears as motion. Non-finite pixels are kept as NaN: the motion of such a frame is reported as not valid, and
    other frames are not affected. uint8 and half precision become float32, float64 stays; device and gradients stay.

    Args:
        frames: the video.
        layout: one letter per trailing axis, of B (batch), T or F (time), C, H, W: "THWC", "BCTHW", "THW" (gray);
            axes before those are batch.
        value_range: (black, white) of the input, for instance (-1, 1) or (0, 255).
        min_frames: minimum number of frames; motion needs 2.

    Raises:
        VideoError: layout or range are ambiguous, the frames are latents, sizes differ, or T < min_frames.
    """
    x, known = _to_tensor(frames)
    if x.numel() == 0:
        raise VideoError(f"the video is empty: shape {tuple(x.shape)}")
    order = _parse_layout(layout, x) if layout is not None else known or _infer_layout(x)
    _refuse_latents(x, order, value_range)
    black, white = _parse_range(value_range) if value_range is not None else _infer_range(x, order)
    video = _to_canonical_axes(x, order)
    video = _to_unit_range(video, black, white)
    video = _to_rgb(video)
    if video.shape[-4] < min_frames:
        raise VideoError(
            f"the video has {video.shape[-4]} frame(s) and at least {min_frames} are needed: motion lies between frames"
        )
    return video


# ---- to one tensor --------------------------------------------------------------------------------------------------


def _to_tensor(frames: Any) -> tuple[Tensor, str | None]:
    """The tensor, and the order of its last axes if the type of object defines it (PIL images, `Video`)."""
    known = None
    if isinstance(frames, Tensor):
        x = frames
    elif isinstance(frames, np.ndarray):
        x = _from_numpy(frames)
    elif _is_pil(frames):
        raise VideoError("one image is not a video: pass a list of images")
    elif isinstance(getattr(frames, "pixels", None), Tensor):
        x, known = frames.pixels, "TCHW"  # a Video
    elif is_pipeline_output(frames):
        x, known = _to_tensor(frames.frames)
    elif isinstance(frames, Sequence) and not isinstance(frames, (str, bytes)):
        x, known = _stack(frames)
    else:
        raise VideoError(
            f"cannot read a video from {type(frames).__name__}: pass a tensor, an array or a list of images; "
            "for a file use read_video(path)"
        )
    if x.is_complex() or x.dtype == torch.bool:
        raise VideoError(f"frames of type {x.dtype} are not images: pass uint8 or float")
    return x, known


def _from_numpy(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "uif" or array.dtype.itemsize > 8:
        raise VideoError(f"frames of type {array.dtype} are not images: pass uint8 or float")
    # torch supports neither negative strides nor foreign byte order, and warns about read-only memory.
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def is_pipeline_output(x: Any) -> bool:
    """Whether x is what a video pipeline of diffusers returns: an object with its videos under `frames`."""
    return hasattr(x, "frames") and not isinstance(getattr(x, "pixels", None), Tensor)


def _is_pil(x: Any) -> bool:
    return hasattr(x, "getbands") and hasattr(x, "convert")


def _stack(items: Sequence[Any]) -> tuple[Tensor, str | None]:
    if len(items) == 0:
        raise VideoError("the video is an empty list")
    parts, orders = zip(
        *((_from_pil(item), "THWC") if _is_pil(item) else _to_tensor(item) for item in items), strict=True
    )
    shapes = {(tuple(p.shape), p.dtype) for p in parts}
    if len(shapes) > 1:
        listed = ", ".join(
            f"{shape} {str(dtype).removeprefix('torch.')}" for shape, dtype in sorted(shapes, key=str)[:4]
        )
        raise VideoError(
            f"the listed frames or videos differ in shape or type: {listed}; make them equal or pass one at a time"
        )
    return torch.stack(parts), orders[0] if len(set(orders)) == 1 else None


def _from_pil(image: Any) -> Tensor:
    """(H, W, 3 or 4) uint8, or (H, W, 1) float in [0, 1] of a 16-bit gray image (PIL would clip it at 255)."""
    if image.mode.startswith("I;16"):
        return torch.from_numpy(np.asarray(image).astype(np.float32) / 65535.0)[..., None]
    if image.mode in ("I", "F"):
        raise VideoError(f"PIL images of mode '{image.mode}' have no known range: pass an array and value_range=")
    transparent = "A" in image.getbands() or "transparency" in getattr(image, "info", {})
    return torch.from_numpy(np.array(image.convert("RGBA" if transparent else "RGB")))


# ---- axes -----------------------------------------------------------------------------------------------------------


def _parse_layout(layout: str, x: Tensor) -> str:
    order = layout.upper().replace(" ", "").replace("F", "T")
    if set(order) - set("BTCHW") or len(set(order)) != len(order) or not {"T", "H", "W"} <= set(order):
        raise VideoError(f"layout '{layout}' must name T (or F), H and W once, and may name B and C")
    if "B" in order[1:]:
        raise VideoError(f"layout '{layout}': the batch axis B comes first")
    order = order.lstrip("B")
    if x.ndim < len(order):
        raise VideoError(f"layout '{layout}' needs {len(order)} axes, the frames have shape {tuple(x.shape)}")
    if "C" in order:
        channels = x.shape[order.index("C") - len(order)]
        if channels not in (_GRAY, _RGB, _RGBA):
            raise VideoError(
                f"layout '{layout}' puts {channels} channels in shape {tuple(x.shape)}; images have 1, 3 or 4"
                + _latent_hint(channels)
            )
    return order


def _infer_layout(x: Tensor) -> str:
    shape = tuple(x.shape)
    if x.ndim < 3:
        raise VideoError(f"frames of shape {shape} are not a video: at least (T, H, W) is needed")
    if x.ndim == 3:
        if shape[0] in (_RGB, _RGBA) or shape[-1] in (_GRAY, _RGB, _RGBA):
            raise VideoError(
                f"shape {shape} may be one image or a short gray video: pass a list of images or x[None] "
                'for one frame, layout="THW" for gray'
            )
        return "THW"
    candidates = []
    if shape[-1] in (_GRAY, _RGB, _RGBA):
        candidates.append("THWC")
    if shape[-3] in (_GRAY, _RGB, _RGBA):
        candidates.append("TCHW")
    if shape[-4] == _RGB:
        candidates.append("CTHW")
    if len(candidates) > 1:
        raise VideoError(f"shape {shape} can be read as {' or '.join(candidates)}: pass layout=")
    if not candidates:
        channels = next((c for c in (shape[-3], shape[-4]) if c in (4, 16)), 0)
        raise VideoError(
            f'shape {shape} has no axis of 1, 3 or 4 channels where one is expected: pass layout= ("BTHW" if gray)'
            + _latent_hint(channels)
        )
    return candidates[0]


def _latent_hint(channels: int) -> str:
    return "; if these are latents, decode them with the video model's VAE first" if channels in (4, 16) else ""


def _to_canonical_axes(x: Tensor, order: str) -> Tensor:
    if "C" not in order:
        x, order = x.unsqueeze(-1), order + "C"
    lead = list(range(x.ndim - 4))
    return x.permute(*lead, *(len(lead) + order.index(axis) for axis in "TCHW"))


# ---- value range ----------------------------------------------------------------------------------------------------


def _finite_extremes(x: Tensor) -> tuple[float, float] | None:
    """(min, max) of the finite values, None if there are none."""
    x = x.detach()
    low, high = torch.aminmax(x)
    if not (low.isfinite() and high.isfinite()):
        finite = x[x.isfinite()]
        if finite.numel() == 0:
            return None
        low, high = torch.aminmax(finite)
    return float(low), float(high)


def _refuse_latents(x: Tensor, order: str, value_range: tuple[float, float] | None) -> None:
    """Four channels that are not last, in floating point, are latents: no software passes RGBA in this form."""
    if not x.is_floating_point() or "C" not in order or value_range is not None:
        return
    if x.shape[order.index("C") - len(order)] == _RGBA and order[-1] != "C":
        raise VideoError(
            f"shape {tuple(x.shape)} in floating point looks like latents: "
            "decode them with the video model's VAE first; if it is RGBA pass value_range="
        )


def _parse_range(value_range: tuple[float, float]) -> tuple[float, float]:
    black, white = (float(v) for v in value_range)
    if not (np.isfinite(black) and np.isfinite(white)) or black == white:
        raise VideoError(f"value_range={value_range} must be two different finite numbers (black, white)")
    return black, white


def _infer_range(x: Tensor, order: str) -> tuple[float, float]:
    if x.dtype == torch.uint8:
        return 0.0, 255.0
    if not x.is_floating_point():
        raise VideoError(f"frames of type {x.dtype} have no known range: pass value_range=, for instance (0, 255)")
    extremes = _finite_extremes(x)
    if extremes is None:
        return 0.0, 1.0  # only NaN: the range does not matter, every frame is reported as not valid
    low, high = extremes
    seen = f"float frames with values in [{low:.4g}, {high:.4g}]"
    if low >= -_ROUNDING_TOLERANCE and high <= 1 + _OVERSHOOT:
        if order == "CTHW":
            raise VideoError(f"{seen} in layout (3, T, H, W) may be [0, 1] or bright [-1, 1]: pass value_range=")
        return 0.0, 1.0
    if low >= -1 - 2 * _OVERSHOOT and high <= 1 + 2 * _OVERSHOOT:
        if low > -_OVERSHOOT:
            raise VideoError(f"{seen} may be [0, 1] with overshoot or [-1, 1]: pass value_range=")
        return -1.0, 1.0
    remedy = (
        "pass value_range=, for instance (0, 255)"
        if low >= -_ROUNDING_TOLERANCE
        else "if latents, decode them with the VAE first"
    )
    raise VideoError(f"{seen} are neither [0, 1] nor [-1, 1]: {remedy}")


def _to_unit_range(video: Tensor, black: float, white: float) -> Tensor:
    if not video.is_floating_point() or video.dtype in (torch.float16, torch.bfloat16):
        video = video.to(torch.float32)
    if (black, white) != (0.0, 1.0):
        video = (video - black) / (white - black)
    extremes = _finite_extremes(video)
    if extremes is None:
        return torch.full_like(video, torch.nan)
    low, high = extremes
    if low < -2 * _OVERSHOOT or high > 1 + 2 * _OVERSHOOT:
        span = white - black
        raise VideoError(
            f"values reach from {black + low * span:.4g} to {black + high * span:.4g}, "
            f"outside value_range=({black:g}, {white:g})"
        )
    if not bool(video.isfinite().all()):
        video = torch.where(video.isfinite(), video, torch.nan)  # infinity must not be clamped to white
    return video.clamp(0.0, 1.0) if low < 0.0 or high > 1.0 else video


def _to_rgb(video: Tensor) -> Tensor:
    channels = video.shape[-3]
    if channels == _GRAY:
        return video.expand(*video.shape[:-3], 3, *video.shape[-2:])
    if channels == _RGBA:
        return video[..., :3, :, :] * video[..., 3:, :, :]
    return video
