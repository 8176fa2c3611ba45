"""Image augmentation: color, tone curve, blur, noise, JPEG, other backgrounds, occluders.

All frames of a pair get the same change, apart from a small flicker, so the motion between them is unchanged. Nothing
is shifted, rotated or scaled: flow, field and joint positions stay valid. The changes of step s depend on (seed, s)
alone and are drawn for the whole common batch, so that each process can take its part of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from jidm.errors import InputError, MissingExtraError, did_you_mean
from jidm.fields.free.config import FLOW_STRIDE
from jidm.training.data.batch import PairBatch

_FRAMES = ("before", "first", "second")
_DRAWN_FRAMES = 4
"""One more than is used: with fewer draws, a seed would no longer reproduce earlier trainings."""
_NOISE_BANK_SIZE = 1 << 20
"""Normal numbers drawn once; noise is cut out of them, because drawing costs more than everything else here."""
_BLUR_SIZE = 7  # [px] of the kernel
_BLUR_SIGMA = (0.3, 1.2)  # [px]
_JPEG_QUALITY = (30, 90)
_MAX_OCCLUDER = 0.4  # largest side, as a fraction of the image's


@dataclass(frozen=True)
class AugmentOptions:
    """How strong and how often.

    Attributes:
        color: range of brightness, contrast and saturation (0.2 = a fifth up or down), and of hue [turns / 4].
        flicker: range of brightness from one frame to the next.
        tone: largest bend of the tone curve, x + tone x (1 - x).
        noise: largest standard deviation of the noise, of the range 0..1.
        blur: fraction of pairs that are blurred.
        jpeg: fraction of pairs that are compressed.
        background: fraction of pairs that get the background of another frame of the recording, where the recording has
            the robot's mask and flow was not estimated from the images.
        erase: fraction of pairs with an occluder.
    """

    color: float = 0.0
    flicker: float = 0.0
    tone: float = 0.0
    noise: float = 0.0
    blur: float = 0.0
    jpeg: float = 0.0
    background: float = 0.0
    erase: float = 0.0


PRESETS: Mapping[str, AugmentOptions | None] = {
    "none": None,
    "light": AugmentOptions(color=0.15, flicker=0.01, tone=0.15, noise=0.02, background=0.5),
    "full": AugmentOptions(
        color=0.3, flicker=0.02, tone=0.3, noise=0.04, blur=0.2, jpeg=0.2, background=0.5, erase=0.3,
    ),
}  # fmt: skip
"""The values of `TrainConfig.augment`."""


@dataclass(frozen=True, eq=False)
class AugmentParams:
    """What happens to each of B pairs, over F frames (before, first, second, and one that is not used).

    Attributes:
        matrix, offset: (B, 3, 3) and (B, F, 3), color x -> matrix x + offset.
        tone: (B,) bend of the tone curve.
        noise: (B,) standard deviation; noise_start: (B, F) where it starts in the bank.
        blur: (B,) standard deviation [px], 0 = none.
        jpeg: (B,) quality, 0 = none.
        box: (B, F, 4) left, top, right, bottom of the occluder, as fractions of the image; empty = none.
        box_color: (B, 3); box_start: (B,) where its texture starts in the bank.
    """

    matrix: Float[Tensor, "B 3 3"]
    offset: Float[Tensor, "B F 3"]
    tone: Float[Tensor, " B"]
    noise: Float[Tensor, " B"]
    noise_start: NDArray[np.int64]
    blur: Float[Tensor, " B"]
    jpeg: NDArray[np.int64]
    box: Float[Tensor, "B F 4"]
    box_color: Float[Tensor, "B 3"]
    box_start: NDArray[np.int64]

    def shard(self, rank: int, world: int) -> AugmentParams:
        """Those of every world-th pair, starting with the rank-th."""
        return replace(self, **{field.name: getattr(self, field.name)[rank::world] for field in fields(self)})


def make_augmentation(preset: str, seed: int) -> Augment | None:
    """The preset of that name; None for "none".

    Raises:
        InputError: no such preset.
    """
    if preset not in PRESETS:
        raise InputError(f"unknown augmentation '{preset}': {did_you_mean(preset, PRESETS)}")
    options = PRESETS[preset]
    return None if options is None else Augment(options, seed)


class Augment:
    """Changes the images of pairs."""

    def __init__(self, options: AugmentOptions, seed: int) -> None:
        self.options, self.seed = options, seed
        self._noise_bank = torch.randn(_NOISE_BANK_SIZE, generator=torch.Generator().manual_seed(seed))

    def sample(self, step: int, size: int) -> AugmentParams:
        """The changes of training step `step` for a common batch of `size` pairs."""
        o, random = self.options, np.random.default_rng((self.seed, step, 2))

        def uniform(scale: float, *shape: int) -> NDArray[np.float64]:
            return random.uniform(-scale, scale, size=(size, *shape))

        def for_fraction(fraction: float, values: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.where(random.random(size) < fraction, values, 0.0)

        brightness, contrast, saturation = uniform(o.color), 1 + uniform(o.color), 1 + uniform(o.color)
        matrix = contrast[:, None, None] * _color_matrix(saturation, uniform(o.color / 4))
        # Contrast is changed about mid gray, so that it does not change brightness.
        offset = (brightness + 0.5 * (1 - contrast))[:, None, None] + uniform(o.flicker, _DRAWN_FRAMES, 1)
        half_bank = _NOISE_BANK_SIZE // 2  # noise of one frame starts in the first half and must end within the bank
        numbers = {
            "matrix": matrix,
            "offset": np.broadcast_to(offset, (size, _DRAWN_FRAMES, 3)),
            "tone": uniform(o.tone),
            "noise": random.uniform(0, o.noise, size),
            "blur": for_fraction(o.blur, random.uniform(*_BLUR_SIGMA, size)),
            "box": _boxes(random, size, o.erase),
            "box_color": random.uniform(0, 1, (size, 3)),
        }
        return AugmentParams(
            **{name: torch.from_numpy(np.ascontiguousarray(x)).float() for name, x in numbers.items()},
            noise_start=random.integers(half_bank, size=(size, _DRAWN_FRAMES)),
            jpeg=for_fraction(o.jpeg, random.integers(*_JPEG_QUALITY, size, endpoint=True).astype(float)).astype(
                np.int64
            ),
            box_start=random.integers(half_bank, size=size),
        )

    def apply(self, batch: PairBatch, params: AugmentParams) -> PairBatch:
        """The changed pairs; where an occluder hides the robot, flow and field get weight 0 and the mask is 0."""
        if (params.box[..., 2] > params.box[..., 0]).any():
            batch = _mask_occluded(batch, params.box)
        frames = {}
        for f, name in enumerate(_FRAMES):
            if (image := getattr(batch, name)) is not None:
                frames[name] = self._augment_frame(image.clone(), params, f)
        return replace(batch, **frames)

    def _augment_frame(self, x: Float[Tensor, "B 3 H W"], params: AugmentParams, f: int) -> Float[Tensor, "B 3 H W"]:
        device, (height, width) = x.device, x.shape[-2:]
        self._erase(x, params, f)
        x = torch.baddbmm(
            params.offset[:, f, :, None].to(device), params.matrix.to(device), x.flatten(2)
        ).unflatten(2, (height, width))  # fmt: skip
        x = x.clamp_(0, 1)
        if self.options.tone:
            x = torch.addcmul(x, x * (1 - x), params.tone[:, None, None, None].to(device))
        x = _blur(x, params.blur)
        if self.options.noise:
            for i, start in enumerate(params.noise_start[:, f].tolist()):
                x[i].add_(self._noise(start, x[i]), alpha=float(params.noise[i]))
        return _jpeg(x.clamp_(0, 1), params.jpeg)

    def _erase(self, x: Tensor, params: AugmentParams, f: int) -> None:
        size = x.new_tensor([x.shape[-1], x.shape[-2]] * 2).cpu()
        for i, box in enumerate((params.box[:, f] * size).round().long().clamp(min=0).tolist()):
            left, top, right, bottom = box
            part = x[i, :, top:bottom, left:right]
            if part.numel():
                texture = self._noise(int(params.box_start[i]), part) * 0.15
                part.copy_((texture + params.box_color[i, :, None, None].to(x.device)).clamp(0, 1))

    def _noise(self, start: int, like: Tensor) -> Tensor:
        start %= max(1, _NOISE_BANK_SIZE - like.numel())
        return self._noise_bank[start : start + like.numel()].view(like.shape).to(like.device)


# ---- the single changes ----------------------------------------------------------------------------------------------


def _color_matrix(saturation: NDArray[np.float64], hue: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, 3, 3): colors rotated by `hue` [turns] and scaled by `saturation` about the gray axis; gray stays gray."""
    gray = np.full((3, 3), 1 / 3)
    cross = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / np.sqrt(3)
    angle = 2 * np.pi * hue
    rotation = np.cos(angle)[:, None, None] * (np.eye(3) - gray) + np.sin(angle)[:, None, None] * cross
    return gray + saturation[:, None, None] * rotation


def _boxes(random: np.random.Generator, size: int, fraction: float) -> NDArray[np.float64]:
    """(B, F, 4) occluders, which drift from frame to frame; empty where there is none."""
    side = random.uniform(0.25 * _MAX_OCCLUDER, _MAX_OCCLUDER, (size, 2)) * (random.random(size) < fraction)[:, None]
    drift = random.uniform(-0.1, 0.1, (size, 2))[:, None] * np.arange(_DRAWN_FRAMES)[None, :, None]
    corner = random.uniform(-0.1, 1.0, (size, 2))[:, None] + drift
    # Clipped, so that a box beyond the image's edge is small or empty.
    return np.clip(np.concatenate([corner, corner + side[:, None]], axis=-1), 0.0, 1.0)


def _blur(x: Float[Tensor, "B 3 H W"], sigma: Float[Tensor, " B"]) -> Float[Tensor, "B 3 H W"]:
    blurred = sigma.nonzero()[:, 0].to(x.device)
    if not len(blurred):
        return x
    try:
        from kornia.filters import gaussian_blur2d
    except ImportError:
        raise MissingExtraError("blurring training images", "kornia", "train") from None

    std = sigma.to(x.device)[blurred]
    x[blurred] = gaussian_blur2d(x[blurred], _BLUR_SIZE, torch.stack([std, std], dim=1), border_type="replicate")
    return x


def _jpeg(x: Float[Tensor, "B 3 H W"], quality: NDArray[np.int64]) -> Float[Tensor, "B 3 H W"]:
    compressed = np.flatnonzero(quality).tolist()
    if not compressed:
        return x
    if x.device.type != "cpu":
        try:
            from kornia.enhance import jpeg_codec_differentiable
        except ImportError:
            raise MissingExtraError("JPEG augmentation on a GPU", "kornia", "train") from None

        qualities = torch.as_tensor(quality[compressed], device=x.device, dtype=x.dtype)
        x[compressed] = jpeg_codec_differentiable(x[compressed], qualities).clamp(0, 1)
        return x
    # On the CPU the real codec is many times faster than one made of tensor operations.
    for i in compressed:
        x[i] = through_jpeg((x[i] * 255).round().to(torch.uint8), int(quality[i])).float() / 255
    return x


def through_jpeg(image: UInt8[Tensor, "3 H W"], quality: int) -> UInt8[Tensor, "3 H W"]:
    """An RGB image on the CPU, compressed as JPEG and decoded again."""
    import cv2

    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1])
    _, stream = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(stream, cv2.IMREAD_COLOR))
    return torch.from_numpy(decoded[..., ::-1].copy()).permute(2, 0, 1)


def _mask_occluded(batch: PairBatch, box: Float[Tensor, "B F 4"]) -> PairBatch:
    box = box.to(batch.first.device)
    boxes = {name: box[:, _FRAMES.index(name)] for name in ("first", "second")}
    changed = {}
    for suffix, here, there in (("", "first", "second"), ("_back", "second", "first")):
        for name in ("mask" + suffix, "field_weight" + suffix, "tangent_weight" + suffix):
            if (confidence := getattr(batch, name)) is not None:
                changed[name] = confidence * ~_covered(boxes[here], *confidence.shape[-2:])
        flow, weight = (getattr(batch, name + suffix) for name in ("flow", "weight"))
        if flow is not None:
            hidden, landing = (_covered(boxes[name], *flow.shape[-2:]) for name in (here, there))
            changed["weight" + suffix] = weight * ~(hidden | _lands_in(flow, landing))
            changed["flow" + suffix] = flow * ~hidden[:, None]
    return replace(batch, **changed)


def _covered(box: Float[Tensor, "B 4"], h: int, w: int) -> Bool[Tensor, "B h w"]:
    """Cells that a box touches."""
    u, v = torch.arange(w, device=box.device), torch.arange(h, device=box.device)
    left, top, right, bottom = (box * box.new_tensor([w, h, w, h])).unbind(-1)
    across = (u + 1 > left[:, None]) & (u < right[:, None]) & (right > left)[:, None]
    down = (v + 1 > top[:, None]) & (v < bottom[:, None]) & (bottom > top)[:, None]
    return down[:, :, None] & across[:, None, :]


def _lands_in(flow: Float[Tensor, "B 2 h w"], hidden: Bool[Tensor, "B h w"]) -> Bool[Tensor, "B h w"]:
    """Cells whose flow leads to a hidden cell."""
    _, _, h, w = flow.shape
    u = (torch.arange(w, device=flow.device) + flow[:, 0] / FLOW_STRIDE).round().clamp(0, w - 1).long()
    v = (torch.arange(h, device=flow.device)[:, None] + flow[:, 1] / FLOW_STRIDE).round().clamp(0, h - 1).long()
    return hidden.flatten(1).gather(1, (v * w + u).flatten(1)).view(-1, h, w)
