"""What goes wrong in the pictures: limbs that stretch, melt, vanish or double, light that flickers, ground that drifts.

Each takes a take, a strength in (0, 1] and a generator, and returns the video (T, H, W, 3) with what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.sim.failures.episode import ImageArray, RenderedEpisode

Label = dict[str, Any]
SamplingMap = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""For places (..., 2) of a picture [px] where they come from."""

_MAX_STRETCH = 0.8  # of its length that a link grows by at most
_MAX_WARP = 0.6  # of a limb's size by which its pixels are moved at most
_MIN_LINK_LENGTH = 0.08  # of the picture's side: shorter links are not stretched where there are longer ones
_DUPLICATE_ANGLES = 0.7, 1.2  # [rad] between a limb and its double
_MIN_VISIBILITY = 0.5  # of its size a double should be seen beside the robot
_MAX_FLICKER = 0.4  # of full brightness
_MAX_DRIFT = 1.0  # [px of 128] by which the ground moves from frame to frame at most


def stretch(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[ImageArray, Label]:
    """A link grows along itself and pushes away what it carries."""
    lengths = {
        k: float(np.linalg.norm(episode.end_pixels(k) - episode.joint_pixels(k), axis=-1).mean())
        for k in episode.visible_limbs()
    }
    min_length = min(_MIN_LINK_LENGTH * max(episode.rendering.link.shape[1:]), max(lengths.values()))
    link, start_frame, ramp = _plan(episode, rng, [k for k, length in lengths.items() if length >= min_length])
    growth = _MAX_STRETCH * strength * ramp
    anchor, end = episode.joint_pixels(link), episode.end_pixels(link)
    link_mask, descendants_mask = (
        episode.limb_mask(link) & ~episode.descendants_mask(link),
        episode.descendants_mask(link),
    )
    # The link itself stays: longer, it covers where it was, and what it uncovers is more of it.
    video, background = episode.rendering.rgb.copy(), episode.inpaint(descendants_mask)
    for t in np.flatnonzero(ramp).tolist():
        along = end[t] - anchor[t]
        length = float(np.linalg.norm(along))
        if length < 1:
            continue
        video[t] = background[t]
        _paste(
            video[t], episode.rendering.rgb[t], link_mask[t], _stretch_map(anchor[t], along / length, float(growth[t]))
        )
        _paste(video[t], episode.rendering.rgb[t], descendants_mask[t], _translation_map(-growth[t] * along))
    return video, _label(episode, link, start_frame, longer=float(growth[-1]))


def melt(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[ImageArray, Label]:
    """A limb flows out of shape."""
    link, start_frame, ramp = _plan(episode, rng)
    mask = episode.limb_mask(link)
    size = float(np.sqrt(mask.sum((1, 2)).mean()))
    wave = 2 * np.pi / size * rng.uniform(0.5, 1.0, (2, 2)) * rng.choice([-1, 1], (2, 2))
    phase, speed = rng.uniform(0, 2 * np.pi, 2), rng.uniform(1, 3, 2)
    video, background = episode.rendering.rgb.copy(), episode.inpaint(mask)
    for t in np.flatnonzero(ramp).tolist():
        far = _MAX_WARP * strength * ramp[t] * size / 2

        def displaced(x: NDArray[np.float64], far: float = far, t: int = t) -> NDArray[np.float64]:
            return x + far * np.sin(x @ wave.T + phase + speed * t / episode.fps)

        video[t] = background[t]
        _paste(video[t], episode.rendering.rgb[t], mask[t], displaced)
    return video, _label(episode, link, start_frame, moved_px=_MAX_WARP * strength * size / 2)


def fade(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[ImageArray, Label]:
    """A limb fades away."""
    link, start_frame, ramp = _plan(episode, rng, frames=4)
    background = episode.inpaint(episode.limb_mask(link)).astype(np.float64)
    alpha = (strength * ramp)[:, None, None, None]
    return _blend(episode.rendering.rgb, background, alpha), _label(episode, link, start_frame, left=1 - strength)


def duplicate(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[ImageArray, Label]:
    """A second limb appears beside one, turned about its joint."""
    limbs = rng.permutation(episode.visible_limbs()).tolist()
    angles = rng.permutation(
        [
            sign * size
            for sign in (-1, 1)
            for size in (_DUPLICATE_ANGLES[0], sum(_DUPLICATE_ANGLES) / 2, _DUPLICATE_ANGLES[1])
        ]
    ).tolist()
    candidates = [(_duplicate_visibility(episode, k, angle), k, angle) for k in limbs for angle in angles[:2]]
    visibility, link, angle = next((x for x in candidates if x[0] >= _MIN_VISIBILITY), max(candidates))
    _, start_frame, ramp = _plan(episode, rng, [link], frames=4)
    mask, anchor = episode.limb_mask(link), episode.joint_pixels(link)
    video = episode.rendering.rgb.copy()
    for t in range(len(episode)):
        _paste(video[t], episode.rendering.rgb[t], mask[t], _rotation_map(anchor[t], angle))
        own = episode.rendering.on_robot[t]
        video[t][own] = episode.rendering.rgb[t][own]  # the double stands behind the robot
    alpha = (strength * ramp)[:, None, None, None]
    label = _label(episode, link, start_frame, angle=angle, shows=visibility)
    return _blend(episode.rendering.rgb, video.astype(np.float64), alpha), label


def _duplicate_visibility(episode: RenderedEpisode, link: int, angle: float) -> float:
    """Share of a limb's size by which its double is seen beside the robot, in the worse of middle and last frame."""
    fractions = []
    for t in (len(episode) // 2, len(episode) - 1):
        mask = episode.limb_mask(link)[t]
        duplicate_image = np.zeros_like(episode.rendering.rgb[t])
        _paste(
            duplicate_image,
            np.full_like(duplicate_image, 255),
            mask,
            _rotation_map(episode.joint_pixels(link)[t], angle),
        )
        fractions.append(
            float(((duplicate_image[..., 0] > 127) & ~episode.rendering.on_robot[t]).sum() / max(1, mask.sum()))
        )
    return min(fractions)


def _stretch_map(origin: NDArray[np.float64], axis: NDArray[np.float64], stretch_factor: float) -> SamplingMap:
    return lambda x: x - (stretch_factor / (1 + stretch_factor)) * ((x - origin) @ axis)[..., None] * axis


def _translation_map(offset: NDArray[np.float64]) -> SamplingMap:
    return lambda x: x + offset


def _rotation_map(center: NDArray[np.float64], angle: float) -> SamplingMap:
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return lambda x: (x - center) @ rotation + center


def flicker(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[ImageArray, Label]:
    """Brightness and colour of the whole picture change from frame to frame."""
    brightness_change = (
        _MAX_FLICKER * strength * rng.uniform(-1, 1, (len(episode), 1, 1, 3)) * np.array([1.0, 0.9, 1.1])
    )
    brightness_change += _MAX_FLICKER * strength * rng.uniform(-1, 1, (len(episode), 1, 1, 1))
    video = episode.rendering.rgb * (1 + brightness_change / 2)
    return video.clip(0, 255).round().astype(np.uint8), {"begins": 0}


def drift_background(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[ImageArray, Label]:
    """The ground slides away under the robot, which stays where it is."""
    import cv2

    height, width = episode.rendering.link.shape[1:]
    angle = rng.uniform(0, 2 * np.pi)
    step = _MAX_DRIFT * strength * max(height, width) / 128 * np.array([np.cos(angle), np.sin(angle)])
    video = np.empty_like(episode.rendering.rgb)
    for t in range(len(episode)):
        move = np.array([[1, 0, t * step[0]], [0, 1, t * step[1]]])
        video[t] = cv2.warpAffine(episode.background[t], move, (width, height), borderMode=cv2.BORDER_REFLECT_101)
        _paste(video[t], episode.rendering.rgb[t], episode.rendering.on_robot[t], lambda x: x)
    return video, {"begins": 1, "px_per_frame": float(np.hypot(*step))}


IMAGE_FAILURES: dict[str, Callable[[RenderedEpisode, float, np.random.Generator], tuple[ImageArray, Label]]] = {
    "stretched": stretch,
    "melted": melt,
    "missing": fade,
    "doubled": duplicate,
    "flicker": flicker,
    "drift": drift_background,
}
"""Name -> what does it."""


def _plan(
    episode: RenderedEpisode, rng: np.random.Generator, limbs: Sequence[int] = (), *, frames: int | None = None
) -> tuple[int, int, NDArray[np.float64]]:
    """Which limb, from which frame on, and (T,) how far it has gone, from 0 to 1 within so many frames."""
    count, limbs = len(episode), limbs or episode.visible_limbs()
    link = limbs[int(rng.integers(len(limbs)))]
    start_frame = int(rng.integers(1, max(2, count // 3)))
    frames = frames or max(2, count // 3)
    x = ((np.arange(count) - start_frame + 1) / frames).clip(0, 1)
    return link, start_frame, x * x * (3 - 2 * x)


def _label(episode: RenderedEpisode, link: int, start_frame: int, **details: Any) -> Label:
    return {"link": episode.robot.model.links[link].name, "begins": start_frame, **details}


def _paste(target: ImageArray, frame: ImageArray, mask: NDArray[np.bool_], sampling_map: SamplingMap) -> None:
    """Draw what a mask cuts out of a frame; `sampling_map` says for places (H, W, 2) of the picture [px] where they come from."""
    import cv2

    if not mask.any():
        return
    height, width = mask.shape
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float64)
    u, v = (np.ascontiguousarray(x, np.float32) for x in np.moveaxis(sampling_map(pixels), -1, 0))
    alpha = cv2.remap(mask.astype(np.float32), u, v, cv2.INTER_LINEAR, borderValue=0)[..., None]
    # Colours of the cut-out alone: what lies around it would shine through at its rim.
    cut = np.where(mask[..., None], frame, 0).astype(np.float32)
    color = cv2.remap(cut, u, v, cv2.INTER_LINEAR, borderValue=0) / np.maximum(alpha, 1e-3)
    target[:] = np.where(alpha > 1e-3, alpha * color + (1 - alpha) * target, target).clip(0, 255).round()


def _blend(first: ImageArray, second: NDArray[np.float64], alpha: NDArray[np.float64]) -> ImageArray:
    return ((1 - alpha) * first + alpha * second).round().astype(np.uint8)
