"""Failures of the images: limbs that stretch, melt, fade or double, light that flickers, a background that drifts.

Each takes an episode, a strength in (0, 1] and a generator, and returns the video (T, H, W, 3) with a label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.sim.failures.episode import Label, RenderedEpisode
from jidm.sim.failures.layers import ImageArray

SamplingMap = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Backward map of an image warp: from output pixels (..., 2) to the input pixels that they show [px, (u, v)]."""

_MAX_STRETCH = 0.8  # largest growth of a link [fraction of its length]
_MAX_WARP = 0.6  # largest displacement of pixels [fraction of half the limb's size]
_MIN_LINK_LENGTH = 0.08  # of the image's side: shorter links are not stretched if there are longer ones
_DUPLICATE_ANGLES = 0.7, 1.2  # smallest and largest angle between a limb and its duplicate [rad]
_MIN_VISIBILITY = 0.5  # fraction of a duplicate that should be visible beside the robot
_MAX_FLICKER = 0.4  # relative change of brightness
_MAX_DRIFT = 1.0  # largest motion of the background [px per frame, for an image side of 128 px]


def stretch(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[ImageArray, Label]:
    """A link grows along its axis and pushes its descendants away."""
    layers, rgb = episode.layers, episode.rendering.rgb
    lengths = {
        k: float(np.linalg.norm(layers.end_pixels(k) - layers.joint_pixels(k), axis=-1).mean())
        for k in layers.visible_limbs()
    }
    min_length = min(_MIN_LINK_LENGTH * max(rgb.shape[1:3]), max(lengths.values()))
    link, start_frame, ramp = _plan(episode, rng, [k for k, length in lengths.items() if length >= min_length])
    growth = _MAX_STRETCH * strength * ramp
    anchor, end = layers.joint_pixels(link), layers.end_pixels(link)
    descendants_mask = layers.descendants_mask(link)
    link_mask = layers.limb_mask(link) & ~descendants_mask
    # The link itself is not cut out: the longer link covers it.
    video, background = rgb.copy(), layers.without(descendants_mask)
    for t in np.flatnonzero(ramp).tolist():
        along = end[t] - anchor[t]
        length = float(np.linalg.norm(along))
        if length < 1:
            continue
        video[t] = background[t]
        _paste(video[t], rgb[t], link_mask[t], _stretch_map(anchor[t], along / length, float(growth[t])))
        _paste(video[t], rgb[t], descendants_mask[t], _translation_map(-growth[t] * along))
    return video, _label(episode, link, start_frame, stretch=float(growth[-1]))


def melt(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[ImageArray, Label]:
    """A limb is warped by traveling waves."""
    link, start_frame, ramp = _plan(episode, rng)
    mask, rgb = episode.layers.limb_mask(link), episode.rendering.rgb
    size = float(np.sqrt(mask.sum((1, 2)).mean()))
    wave = 2 * np.pi / size * rng.uniform(0.5, 1.0, (2, 2)) * rng.choice([-1, 1], (2, 2))
    phase, speed = rng.uniform(0, 2 * np.pi, 2), rng.uniform(1, 3, 2)
    video, background = rgb.copy(), episode.layers.without(mask)
    for t in np.flatnonzero(ramp).tolist():
        amplitude = _MAX_WARP * strength * ramp[t] * size / 2

        def displaced(x: NDArray[np.float64], amplitude: float = amplitude, t: int = t) -> NDArray[np.float64]:
            return x + amplitude * np.sin(x @ wave.T + phase + speed * t / episode.fps)

        video[t] = background[t]
        _paste(video[t], rgb[t], mask[t], displaced)
    return video, _label(episode, link, start_frame, warp_px=_MAX_WARP * strength * size / 2)


def fade(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[ImageArray, Label]:
    """A limb fades away."""
    link, start_frame, ramp = _plan(episode, rng, frames=4)
    background = episode.layers.without(episode.layers.limb_mask(link)).astype(np.float64)
    alpha = (strength * ramp)[:, None, None, None]
    return _blend(episode.rendering.rgb, background, alpha), _label(episode, link, start_frame, remaining=1 - strength)


def duplicate(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[ImageArray, Label]:
    """A copy of a limb appears, rotated about its joint."""
    limbs = rng.permutation(episode.layers.visible_limbs()).tolist()
    small, large = _DUPLICATE_ANGLES
    angles = rng.permutation([sign * size for sign in (-1, 1) for size in (small, (small + large) / 2, large)]).tolist()
    candidates = [(_duplicate_visibility(episode, k, angle), k, angle) for k in limbs for angle in angles[:2]]
    visibility, link, angle = next((x for x in candidates if x[0] >= _MIN_VISIBILITY), max(candidates))
    _, start_frame, ramp = _plan(episode, rng, [link], frames=4)
    mask, anchor = episode.layers.limb_mask(link), episode.layers.joint_pixels(link)
    rgb, on_robot = episode.rendering.rgb, episode.rendering.on_robot
    video = rgb.copy()
    for t in range(len(episode)):
        _paste(video[t], rgb[t], mask[t], _rotation_map(anchor[t], angle))
        video[t][on_robot[t]] = rgb[t][on_robot[t]]  # the duplicate is behind the robot
    alpha = (strength * ramp)[:, None, None, None]
    label = _label(episode, link, start_frame, angle=angle, visibility=visibility)
    return _blend(rgb, video.astype(np.float64), alpha), label


def flicker(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[ImageArray, Label]:
    """Brightness and color of the whole image change from frame to frame."""
    count, scale = len(episode), _MAX_FLICKER * strength
    change = scale * rng.uniform(-1, 1, (count, 1, 1, 3)) * np.array([1.0, 0.9, 1.1])
    change += scale * rng.uniform(-1, 1, (count, 1, 1, 1))
    video = episode.rendering.rgb * (1 + change / 2)
    return video.clip(0, 255).round().astype(np.uint8), {"start_frame": 0}


def drift_background(episode: RenderedEpisode, strength: float, rng: np.random.Generator) -> tuple[ImageArray, Label]:
    """The background translates behind the robot, which is unchanged."""
    import cv2

    rgb, background = episode.rendering.rgb, episode.layers.background
    height, width = rgb.shape[1:3]
    angle = rng.uniform(0, 2 * np.pi)
    step = _MAX_DRIFT * strength * max(height, width) / 128 * np.array([np.cos(angle), np.sin(angle)])
    video = np.empty_like(rgb)
    for t in range(len(episode)):
        move = np.array([[1, 0, t * step[0]], [0, 1, t * step[1]]])
        video[t] = cv2.warpAffine(background[t], move, (width, height), borderMode=cv2.BORDER_REFLECT_101)
        _paste(video[t], rgb[t], episode.rendering.on_robot[t], lambda x: x)
    return video, {"start_frame": 1, "px_per_frame": float(np.hypot(*step))}


IMAGE_FAILURES: dict[str, Callable[[RenderedEpisode, float, np.random.Generator], tuple[ImageArray, Label]]] = {
    "stretched": stretch,
    "melted": melt,
    "missing": fade,
    "doubled": duplicate,
    "flicker": flicker,
    "drift": drift_background,
}
"""Kind of failure -> function that makes it."""


def _plan(
    episode: RenderedEpisode, rng: np.random.Generator, limbs: Sequence[int] = (), *, frames: int | None = None
) -> tuple[int, int, NDArray[np.float64]]:
    """A random link of `limbs` (all visible ones if empty), a random start frame, and a smooth ramp (T,) from 0 to 1 that
    lasts `frames` (a third of the video if not given)."""
    count, limbs = len(episode), limbs or episode.layers.visible_limbs()
    link = limbs[int(rng.integers(len(limbs)))]
    start_frame = int(rng.integers(1, max(2, count // 3)))
    frames = frames or max(2, count // 3)
    x = ((np.arange(count) - start_frame + 1) / frames).clip(0, 1)
    return link, start_frame, x * x * (3 - 2 * x)


def _label(episode: RenderedEpisode, link: int, start_frame: int, **details: Any) -> Label:
    return {"link": episode.robot.model.links[link].name, "start_frame": start_frame, **details}


def _duplicate_visibility(episode: RenderedEpisode, link: int, angle: float) -> float:
    """Fraction of a limb's duplicate that is visible beside the robot; the smaller one of the middle and the last frame."""
    fractions = []
    for t in (len(episode) // 2, len(episode) - 1):
        mask, anchor = episode.layers.limb_mask(link)[t], episode.layers.joint_pixels(link)[t]
        image = np.zeros_like(episode.rendering.rgb[t])
        _paste(image, np.full_like(image, 255), mask, _rotation_map(anchor, angle))
        visible = (image[..., 0] > 127) & ~episode.rendering.on_robot[t]
        fractions.append(float(visible.sum() / max(1, mask.sum())))
    return min(fractions)


def _stretch_map(origin: NDArray[np.float64], axis: NDArray[np.float64], growth: float) -> SamplingMap:
    return lambda x: x - (growth / (1 + growth)) * ((x - origin) @ axis)[..., None] * axis


def _translation_map(offset: NDArray[np.float64]) -> SamplingMap:
    return lambda x: x + offset


def _rotation_map(center: NDArray[np.float64], angle: float) -> SamplingMap:
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return lambda x: (x - center) @ rotation + center


def _paste(target: ImageArray, frame: ImageArray, mask: NDArray[np.bool_], sampling_map: SamplingMap) -> None:
    """Warp the masked part of a frame by `sampling_map` and draw it over `target`, in place."""
    import cv2

    if not mask.any():
        return
    height, width = mask.shape
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float64)
    u, v = (np.ascontiguousarray(x, np.float32) for x in np.moveaxis(sampling_map(pixels), -1, 0))
    alpha = cv2.remap(mask.astype(np.float32), u, v, cv2.INTER_LINEAR, borderValue=0)[..., None]
    # Colors of the masked part alone: its surroundings would bleed in at its border.
    cut = np.where(mask[..., None], frame, 0).astype(np.float32)
    color = cv2.remap(cut, u, v, cv2.INTER_LINEAR, borderValue=0) / np.maximum(alpha, 1e-3)
    target[:] = np.where(alpha > 1e-3, alpha * color + (1 - alpha) * target, target).clip(0, 255).round()


def _blend(first: ImageArray, second: NDArray[np.float64], alpha: NDArray[np.float64]) -> ImageArray:
    return ((1 - alpha) * first + alpha * second).round().astype(np.uint8)
