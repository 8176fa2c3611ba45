"""A video beside its explanation: what moved, what no joint explains, and where the decoded robot stands.

Four panels per frame: the input; optical flow as colours (hue is direction, saturation is speed); the part of the flow
that the decoded joint steps do not explain; the robot at the decoded pose over the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from jidm.errors import InputError
from jidm.flow import FlowEstimator
from jidm.video.io import write_video

if TYPE_CHECKING:
    from jidm.camera.model import Camera
    from jidm.estimation.result import JointMotion
    from jidm.fields.analytic import AnalyticField

RgbImage = NDArray[np.uint8]
"""(H, W, 3) uint8 RGB."""

_PANEL_WIDTHS = (320, 640)
_CAPTION_HEIGHT = 20
# The dense field is evaluated on a grid of at most this many cells a side; a heat map needs no more.
_RESIDUAL_GRID = 320
# One colour per link, bright enough to be seen on dimmed video.
_LINK_COLORS = np.array(
    [
        (86, 180, 233), (230, 159, 0), (0, 200, 140), (240, 228, 66), (213, 94, 0), (204, 121, 167), (120, 140, 255),
        (170, 220, 90), (255, 140, 140), (120, 220, 220),
    ]
)  # fmt: skip


def write_overlay(
    path: str | Path,
    frames: Iterable[Tensor],
    motion: JointMotion,
    field: AnalyticField,
    flow: FlowEstimator,
    *,
    fps: float,
    render_robot: Callable[[int], tuple[RgbImage, NDArray[np.bool_]]] | None = None,
    progress: bool = False,
) -> None:
    """Write the four-panel video, one picture for every step between two frames.

    Args:
        path: where to (.mp4).
        frames: T frames, each (3, H, W) float RGB in [0, 1]; read once, one at a time.
        motion: what was decoded from them, without batch axes.
        field: the robot's field for the camera of the video.
        flow: measures the motion that is shown.
        fps: frame rate of the video written [1/s].
        render_robot: draws the robot at frame t: picture (H, W, 3) uint8 and mask (H, W) of where it is; its surface points
            are drawn if not given.
        progress: show a progress bar.

    Raises:
        InputError: the motion is a batch, or there are more frames than decoded positions.
        VideoError: the video cannot be written.
    """
    write_video(path, overlay_frames(frames, motion, field, flow, render_robot=render_robot, progress=progress), fps)


def overlay_frames(
    frames: Iterable[Tensor],
    motion: JointMotion,
    field: AnalyticField,
    flow: FlowEstimator,
    *,
    render_robot: Callable[[int], tuple[RgbImage, NDArray[np.bool_]]] | None = None,
    progress: bool = False,
) -> Iterator[RgbImage]:
    """The pictures `write_overlay` writes, T - 1 of them; arguments as there."""
    from tqdm import tqdm

    if motion.position.ndim != 2:
        raise InputError(
            f"one video is drawn at a time, this motion is a batch of shape {tuple(motion.position.shape[:-2])}; index it first"
        )
    steps = motion.position.shape[0] - 1
    max_speed = _robust_max_speed(motion, field)
    pairs = tqdm(pairwise(frames), total=steps, desc="overlay", unit="frame", disable=not progress, leave=False)
    for t, (first, second) in enumerate(pairs):
        if t >= steps:
            raise InputError(f"the video has more frames than the {steps + 1} that were decoded")
        measured = flow(first, second)
        q = motion.position[t]
        residual = unexplained_flow(measured.flow, measured.weight, field, q, motion.delta_q[t])
        image = _to_image(first)
        pose = draw_points(image, field, q) if render_robot is None else blend(image, *render_robot(t))
        valid = bool(motion.valid[t])
        yield compose(
            [
                (image, "input" if valid else "input (not valid)"),
                (flow_to_color(measured.flow, max_speed), f"flow, full colour {max_speed:.1f} px"),
                (heatmap(residual, max_speed / 2), f"unexplained flow, 0 to {max_speed / 2:.1f} px"),
                (pose, "decoded pose"),
            ]
        )


# ---- the panels -----------------------------------------------------------------------------------------------------


def flow_to_color(flow: Float[Tensor, "2 H W"], max_speed: float) -> RgbImage:
    """Flow as colours on white: hue is direction (red = right, then yellow-green down, cyan left, violet up).

    Args:
        flow: displacement (u right, v down) [px].
        max_speed: speed drawn in full colour [px]; faster flow is darkened.
    """
    import cv2

    u, v = flow.detach().cpu().double().nan_to_num(0.0).numpy()
    speed = np.hypot(u, v) / max(max_speed, 1e-9)
    hue = np.degrees(np.arctan2(v, u)) % 360.0
    value = np.where(speed > 1.0, np.clip(1.35 - 0.35 * speed, 0.55, 1.0), 1.0)
    hsv = np.stack([hue, np.clip(speed, 0.0, 1.0), value], axis=-1).astype(np.float32)
    return _to_uint8(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255.0)


def heatmap(x: Float[Tensor, "H W"], max_value: float) -> RgbImage:
    """A map of values from 0 (black) to `max_value` (bright yellow); values that are not finite are drawn as 0."""
    import cv2

    level = (x.detach().cpu().double().nan_to_num(0.0) / max(max_value, 1e-9)).clamp(0.0, 1.0).numpy()
    colors = cv2.applyColorMap((level * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return np.ascontiguousarray(colors[..., ::-1])


def unexplained_flow(
    flow: Float[Tensor, "2 H W"],
    weight: Float[Tensor, "H W"],
    field: AnalyticField,
    q: Float[Tensor, " n"],
    delta_q: Float[Tensor, " n"],
) -> Float[Tensor, "H W"]:
    """`weight * |flow - J delta_q|` [px]: motion in the picture that the joint step does not account for.

    Off the robot J is 0, so a moving background stands out in full. First order in `delta_q`.
    """
    height, width = flow.shape[-2:]
    shrink = min(1.0, _RESIDUAL_GRID / max(height, width))
    rows, columns = max(1, round(height * shrink)), max(1, round(width * shrink))
    with torch.no_grad():
        jacobian, _ = field.dense(q, rows, columns)
        explained = torch.einsum("cnhw,n->chw", jacobian, delta_q.nan_to_num(0.0).to(jacobian))
        explained = torch.nn.functional.interpolate(explained[None], size=(height, width), mode="nearest")[0]
        explained = explained * explained.new_tensor([width / columns, height / rows])[:, None, None]
        return weight * (flow - explained.to(flow)).norm(dim=0)


def draw_points(image: RgbImage, field: AnalyticField, q: Float[Tensor, " n"]) -> RgbImage:
    """The visible surface points of the robot at q over the dimmed image: colour by link, brightness by slant."""
    canvas = _dim(image)
    if not bool(q.isfinite().all()):
        return canvas
    with torch.no_grad():
        pose = field.at(q)
        surface = pose.surface()
        normals = field.surface.normal_link.new_zeros(0) if surface.normals is None else surface.normals
        toward_camera = -field.camera.T_camera_base[2, :3].to(q)
        slant = (normals @ toward_camera)[surface.visible].clamp(0.0, 1.0)
        outline = field.contour(q, field.visible_contour(q)).points
    link = pose.surface_points.link[surface.visible].cpu().numpy()
    colors = _LINK_COLORS[link % len(_LINK_COLORS)] * (0.3 + 0.7 * slant.cpu().double().numpy()[:, None])
    _draw_dots(canvas, surface.points[surface.visible], _to_uint8(colors), field.camera)
    _draw_dots(canvas, outline, np.full((len(outline), 3), 255, np.uint8), field.camera)
    return canvas


def _draw_dots(canvas: RgbImage, points: Tensor, colors: RgbImage, camera: Camera) -> None:
    """Set dots at points (N, 2) given in the camera's pixels, in colours (N, 3)."""
    height, width = canvas.shape[:2]
    scale = points.new_tensor([width / camera.width, height / camera.height])
    uv = ((points + 0.5) * scale - 0.5).round().long().cpu().numpy()
    inside = ((uv >= 0) & (uv < (width, height))).all(axis=-1)
    size = max(1, round(width / 320))
    for (column, row), color in zip(uv[inside], colors[inside], strict=True):
        canvas[row : row + size, column : column + size] = color


def blend(image: RgbImage, rendered: RgbImage, mask: NDArray[np.bool_]) -> RgbImage:
    """A drawn robot over the dimmed image, with its outline: where the two disagree, a ghost shows.

    Args:
        image: the input frame.
        rendered: the robot drawn at the decoded pose.
        mask: (H, W) where `rendered` shows the robot.
    """
    import cv2

    if rendered.shape != image.shape:
        height, width = image.shape[:2]
        rendered = _to_uint8(cv2.resize(rendered, (width, height), interpolation=cv2.INTER_AREA))
        mask = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
    canvas = _dim(image)
    tint = np.array((0.55, 0.8, 1.0))
    canvas[mask] = _to_uint8(0.25 * canvas[mask] + 0.75 * rendered[mask] * tint)
    outline = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)) > 0
    canvas[outline] = (255, 170, 40)
    return canvas


def compose(panels: list[tuple[RgbImage, str]]) -> RgbImage:
    """Two by two panels of one size, each under a small caption; even height and width."""
    import cv2

    height, width = panels[0][0].shape[:2]
    wide = int(np.clip(width, *_PANEL_WIDTHS)) // 2 * 2
    high = round(height * wide / width) // 2 * 2
    tiles = []
    for picture, caption in panels:
        shrinking = wide < width
        resized = cv2.resize(picture, (wide, high), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
        strip = np.full((_CAPTION_HEIGHT, wide, 3), 24, np.uint8)
        cv2.putText(strip, caption, (5, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (235, 235, 235), 1, cv2.LINE_AA)
        tiles.append(np.concatenate([strip, resized]))
    rows = [np.concatenate(tiles[i : i + 2], axis=1) for i in range(0, len(tiles), 2)]
    return np.ascontiguousarray(np.concatenate(rows))


# ---- small parts ----------------------------------------------------------------------------------------------------


def _robust_max_speed(motion: JointMotion, field: AnalyticField) -> float:
    """A speed [px] that few robot pixels exceed in this video, so that all frames share one colour scale."""
    steps = motion.delta_q.shape[0]
    speeds = []
    with torch.no_grad():
        for t in np.unique(np.linspace(0, steps - 1, min(steps, 12)).astype(int)):
            q, delta_q = motion.position[t], motion.delta_q[t]
            if bool(q.isfinite().all()) and bool(delta_q.isfinite().all()):
                surface = field.at(q).surface()
                speed = torch.einsum("pcn,n->pc", surface.jacobian, delta_q).norm(dim=-1)
                speeds.append(speed[surface.visible])
    visible_speeds: Any = torch.cat(speeds) if speeds else torch.zeros(0)
    return max(0.5, float(visible_speeds.double().quantile(0.98))) if len(visible_speeds) else 1.0


def _dim(image: RgbImage) -> RgbImage:
    gray = image.astype(np.float32).mean(axis=-1, keepdims=True)
    return _to_uint8(np.repeat(0.45 * gray, 3, axis=-1))


def _to_image(frame: Float[Tensor, "3 H W"]) -> RgbImage:
    return _to_uint8(frame.detach().cpu().double().nan_to_num(0.0).permute(1, 2, 0).numpy() * 255.0)


def _to_uint8(x: NDArray[Any]) -> RgbImage:
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)
