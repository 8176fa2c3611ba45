"""What goes wrong in the pictures: limbs that stretch, melt, vanish or double, light that flickers, ground that drifts.

Each takes a take, a strength in (0, 1] and a generator, and returns the video (T, H, W, 3) with what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.sim.artifacts.take import Picture, Take

Label = dict[str, Any]
Source = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""For places (..., 2) of a picture [px] where they come from."""

_LONGER = 0.8  # of its length that a link grows by at most
_MELTS = 0.6  # of a limb's size by which its pixels are moved at most
_LONG = 0.08  # of the picture's side: shorter links are not stretched where there are longer ones
_TURN = 0.7, 1.2  # [rad] between a limb and its double
_SHOWS = 0.5  # of its size a double should be seen beside the robot
_FLICKER = 0.4  # of full brightness
_DRIFT = 1.0  # [px of 128] by which the ground moves from frame to frame at most


def stretched(take: Take, strength: float, rng: np.random.Generator) -> tuple[Picture, Label]:
    """A link grows along itself and pushes away what it carries."""
    lengths = {k: float(np.linalg.norm(take.far_end(k) - take.anchor(k), axis=-1).mean()) for k in take.limbs()}
    enough = min(_LONG * max(take.seen.link.shape[1:]), max(lengths.values()))
    link, begins, ramp = _plan(take, rng, [k for k, length in lengths.items() if length >= enough])
    growth = _LONGER * strength * ramp
    anchor, end = take.anchor(link), take.far_end(link)
    own, beyond = take.limb(link) & ~take.beyond(link), take.beyond(link)
    # The link itself stays: longer, it covers where it was, and what it uncovers is more of it.
    video, bare = take.seen.rgb.copy(), take.without(beyond)
    for t in np.flatnonzero(ramp).tolist():
        along = end[t] - anchor[t]
        length = float(np.linalg.norm(along))
        if length < 1:
            continue
        video[t] = bare[t]
        _paste(video[t], take.seen.rgb[t], own[t], _shrunk(anchor[t], along / length, float(growth[t])))
        _paste(video[t], take.seen.rgb[t], beyond[t], _moved(-growth[t] * along))
    return video, _label(take, link, begins, longer=float(growth[-1]))


def melted(take: Take, strength: float, rng: np.random.Generator) -> tuple[Picture, Label]:
    """A limb flows out of shape."""
    link, begins, ramp = _plan(take, rng)
    mask = take.limb(link)
    size = float(np.sqrt(mask.sum((1, 2)).mean()))
    wave = 2 * np.pi / size * rng.uniform(0.5, 1.0, (2, 2)) * rng.choice([-1, 1], (2, 2))
    phase, speed = rng.uniform(0, 2 * np.pi, 2), rng.uniform(1, 3, 2)
    video, bare = take.seen.rgb.copy(), take.without(mask)
    for t in np.flatnonzero(ramp).tolist():
        far = _MELTS * strength * ramp[t] * size / 2

        def flow(x: NDArray[np.float64], far: float = far, t: int = t) -> NDArray[np.float64]:
            return x + far * np.sin(x @ wave.T + phase + speed * t / take.fps)

        video[t] = bare[t]
        _paste(video[t], take.seen.rgb[t], mask[t], flow)
    return video, _label(take, link, begins, moved_px=_MELTS * strength * size / 2)


def missing(take: Take, strength: float, rng: np.random.Generator) -> tuple[Picture, Label]:
    """A limb fades away."""
    link, begins, ramp = _plan(take, rng, frames=4)
    gone = take.without(take.limb(link)).astype(np.float64)
    share = (strength * ramp)[:, None, None, None]
    return _mixed(take.seen.rgb, gone, share), _label(take, link, begins, left=1 - strength)


def doubled(take: Take, strength: float, rng: np.random.Generator) -> tuple[Picture, Label]:
    """A second limb appears beside one, turned about its joint."""
    limbs = rng.permutation(take.limbs()).tolist()
    angles = rng.permutation(
        [sign * size for sign in (-1, 1) for size in (_TURN[0], sum(_TURN) / 2, _TURN[1])]
    ).tolist()
    tried = [(_double_shows(take, k, angle), k, angle) for k in limbs for angle in angles[:2]]
    shows, link, angle = next((x for x in tried if x[0] >= _SHOWS), max(tried))
    _, begins, ramp = _plan(take, rng, [link], frames=4)
    mask, anchor = take.limb(link), take.anchor(link)
    video = take.seen.rgb.copy()
    for t in range(len(take)):
        _paste(video[t], take.seen.rgb[t], mask[t], _turned(anchor[t], angle))
        own = take.seen.on_robot[t]
        video[t][own] = take.seen.rgb[t][own]  # the double stands behind the robot
    share = (strength * ramp)[:, None, None, None]
    label = _label(take, link, begins, angle=angle, shows=shows)
    return _mixed(take.seen.rgb, video.astype(np.float64), share), label


def _double_shows(take: Take, link: int, angle: float) -> float:
    """Share of a limb's size by which its double is seen beside the robot, in the worse of middle and last frame."""
    shares = []
    for t in (len(take) // 2, len(take) - 1):
        mask = take.limb(link)[t]
        double = np.zeros_like(take.seen.rgb[t])
        _paste(double, np.full_like(double, 255), mask, _turned(take.anchor(link)[t], angle))
        shares.append(float(((double[..., 0] > 127) & ~take.seen.on_robot[t]).sum() / max(1, mask.sum())))
    return min(shares)


def _shrunk(at: NDArray[np.float64], axis: NDArray[np.float64], growth: float) -> Source:
    return lambda x: x - (growth / (1 + growth)) * ((x - at) @ axis)[..., None] * axis


def _moved(step: NDArray[np.float64]) -> Source:
    return lambda x: x + step


def _turned(at: NDArray[np.float64], angle: float) -> Source:
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return lambda x: (x - at) @ turn + at


def flickering(take: Take, strength: float, rng: np.random.Generator) -> tuple[Picture, Label]:
    """Brightness and colour of the whole picture change from frame to frame."""
    off = _FLICKER * strength * rng.uniform(-1, 1, (len(take), 1, 1, 3)) * np.array([1.0, 0.9, 1.1])
    off += _FLICKER * strength * rng.uniform(-1, 1, (len(take), 1, 1, 1))
    video = take.seen.rgb * (1 + off / 2)
    return video.clip(0, 255).round().astype(np.uint8), {"begins": 0}


def drifting(take: Take, strength: float, rng: np.random.Generator) -> tuple[Picture, Label]:
    """The ground slides away under the robot, which stays where it is."""
    import cv2

    height, width = take.seen.link.shape[1:]
    angle = rng.uniform(0, 2 * np.pi)
    step = _DRIFT * strength * max(height, width) / 128 * np.array([np.cos(angle), np.sin(angle)])
    video = np.empty_like(take.seen.rgb)
    for t in range(len(take)):
        move = np.array([[1, 0, t * step[0]], [0, 1, t * step[1]]])
        video[t] = cv2.warpAffine(take.behind[t], move, (width, height), borderMode=cv2.BORDER_REFLECT_101)
        _paste(video[t], take.seen.rgb[t], take.seen.on_robot[t], lambda x: x)
    return video, {"begins": 1, "px_per_frame": float(np.hypot(*step))}


PICTURES: dict[str, Callable[[Take, float, np.random.Generator], tuple[Picture, Label]]] = {
    "stretched": stretched,
    "melted": melted,
    "missing": missing,
    "doubled": doubled,
    "flicker": flickering,
    "drift": drifting,
}
"""Name -> what does it."""


def _plan(
    take: Take, rng: np.random.Generator, limbs: Sequence[int] = (), *, frames: int | None = None
) -> tuple[int, int, NDArray[np.float64]]:
    """Which limb, from which frame on, and (T,) how far it has gone, from 0 to 1 within so many frames."""
    count, limbs = len(take), limbs or take.limbs()
    link = limbs[int(rng.integers(len(limbs)))]
    begins = int(rng.integers(1, max(2, count // 3)))
    frames = frames or max(2, count // 3)
    x = ((np.arange(count) - begins + 1) / frames).clip(0, 1)
    return link, begins, x * x * (3 - 2 * x)


def _label(take: Take, link: int, begins: int, **more: Any) -> Label:
    return {"link": take.robot.model.links[link].name, "begins": begins, **more}


def _paste(onto: Picture, frame: Picture, mask: NDArray[np.bool_], source: Source) -> None:
    """Draw what a mask cuts out of a frame; `source` says for places (H, W, 2) of the picture [px] where they come from."""
    import cv2

    if not mask.any():
        return
    height, width = mask.shape
    places = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float64)
    u, v = (np.ascontiguousarray(x, np.float32) for x in np.moveaxis(source(places), -1, 0))
    alpha = cv2.remap(mask.astype(np.float32), u, v, cv2.INTER_LINEAR, borderValue=0)[..., None]
    # Colours of the cut-out alone: what lies around it would shine through at its rim.
    cut = np.where(mask[..., None], frame, 0).astype(np.float32)
    colour = cv2.remap(cut, u, v, cv2.INTER_LINEAR, borderValue=0) / np.maximum(alpha, 1e-3)
    onto[:] = np.where(alpha > 1e-3, alpha * colour + (1 - alpha) * onto, onto).clip(0, 255).round()


def _mixed(one: Picture, other: NDArray[np.float64], share: NDArray[np.float64]) -> Picture:
    return ((1 - share) * one + share * other).round().astype(np.uint8)
