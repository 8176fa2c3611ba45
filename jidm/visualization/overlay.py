"""Overlay video of a decoded motion.

Four panels per frame: the input; optical flow as colors (hue is direction, saturation is speed); the part of the flow that
the decoded joint steps do not explain; the robot at the decoded pose over the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from jidm.visualization.image import RgbImage, flow_to_color, heatmap, resize, to_image, to_uint8
from jidm.visualization.sheet import DARK, Tile, tile_sheet

if TYPE_CHECKING:
    from jidm.camera.model import Camera
    from jidm.estimation.result import JointMotion
    from jidm.fields.analytic import AnalyticField

_PANEL_WIDTHS = (320, 640)
_RESIDUAL_GRID = 160  # largest number of cells per side of the dense field; finer ones fall between the surface points
# One color per link, bright enough on dimmed video.
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
    """Write the four-panel video, one frame per step.

    Args:
        path: .mp4 file.
        frames: T frames, each (3, H, W) float RGB in [0, 1]; read once, one at a time.
        motion: decoded from them, without batch axes.
        field: the robot's field in the camera of the video.
        flow: estimates the flow that is shown.
        fps: frame rate of the written video [1/s].
        render_robot: draws the robot at frame t: image (H, W, 3) uint8 and robot mask (H, W); surface points are drawn if
            not given.
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
    """The T - 1 frames of `write_overlay`; arguments as there."""
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
        image = to_image(first)
        pose = draw_points(image, field, q) if render_robot is None else blend(image, *render_robot(t))
        valid = bool(motion.valid[t])
        yield compose(
            [
                (image, "input" if valid else "input (not valid)"),
                (flow_to_color(measured.flow, max_speed), f"flow, full color {max_speed:.1f} px"),
                (heatmap(residual, max_speed / 2), f"unexplained flow, 0 to {max_speed / 2:.1f} px"),
                (pose, "decoded pose"),
            ]
        )


# ---- the panels -----------------------------------------------------------------------------------------------------


def unexplained_flow(
    flow: Float[Tensor, "2 H W"],
    weight: Float[Tensor, "H W"],
    field: AnalyticField,
    q: Float[Tensor, " n"],
    delta_q: Float[Tensor, " n"],
) -> Float[Tensor, "H W"]:
    """`weight * |flow - J delta_q|` [px]: flow that the joint step does not explain, to first order in `delta_q`.

    Off the robot J is 0, so a moving background is fully unexplained.

    Args:
        flow: measured flow [px].
        weight: its confidence.
        field: the robot's field.
        q: joint positions in the first frame [rad or m].
        delta_q: joint step [rad or m].
    """
    rows, columns = residual_grid(*flow.shape[-2:])
    with torch.no_grad():
        jacobian, _ = field.dense(q, rows, columns)
        return residual_flow(flow, weight, jacobian, delta_q)


def residual_grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a field that is fine enough for the residual of an image of this size."""
    shrink = min(1.0, _RESIDUAL_GRID / max(height, width))
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def residual_flow(
    flow: Float[Tensor, "2 H W"],
    weight: Float[Tensor, "H W"],
    jacobian: Float[Tensor, "2 n h w"],
    delta_q: Float[Tensor, " n"],
) -> Float[Tensor, "H W"]:
    """`weight * |flow - J delta_q|` [px], see `unexplained_flow`.

    Args:
        flow: measured flow [px].
        weight: its confidence.
        jacobian: the field on any grid over the image [px of that grid per rad or m].
        delta_q: joint step [rad or m].
    """
    height, width = flow.shape[-2:]
    rows, columns = jacobian.shape[-2:]
    explained = torch.einsum("cnhw,n->chw", jacobian, delta_q.nan_to_num(0.0).to(jacobian))
    explained = torch.nn.functional.interpolate(explained[None], size=(height, width), mode="nearest")[0]
    explained = explained * explained.new_tensor([width / columns, height / rows])[:, None, None]
    return weight * (flow - explained.to(flow)).norm(dim=0)


def draw_points(image: RgbImage, field: AnalyticField, q: Float[Tensor, " n"]) -> RgbImage:
    """The visible surface points of the robot over the dimmed image: color by link, brightness by surface slant.

    Args:
        image: the frame.
        field: the robot's field.
        q: joint positions [rad or m].
    """
    canvas = _dim(image)
    if not bool(q.isfinite().all()):
        return canvas
    with torch.no_grad():
        pose = field.at(q)
        surface = pose.surface()
        assert surface.normals is not None
        toward_camera = -field.camera.T_camera_base[2, :3].to(q)
        cosine = (surface.normals @ toward_camera)[surface.visible].clamp(0.0, 1.0)
        contour = field.contour(q, field.visible_contour(q)).points
    link = pose.surface_points.link[surface.visible].cpu().numpy()
    colors = _LINK_COLORS[link % len(_LINK_COLORS)] * (0.3 + 0.7 * cosine.cpu().double().numpy()[:, None])
    _draw_dots(canvas, surface.points[surface.visible], to_uint8(colors), field.camera)
    _draw_dots(canvas, contour, np.full((len(contour), 3), 255, np.uint8), field.camera)
    return canvas


def _draw_dots(canvas: RgbImage, points: Tensor, colors: RgbImage, camera: Camera) -> None:
    """Draw dots at points (N, 2) in the camera's pixels, with colors (N, 3)."""
    height, width = canvas.shape[:2]
    scale = points.new_tensor([width / camera.width, height / camera.height])
    uv = ((points + 0.5) * scale - 0.5).round().long().cpu().numpy()
    inside = ((uv >= 0) & (uv < (width, height))).all(axis=-1)
    size = max(1, round(width / 320))
    for (column, row), color in zip(uv[inside], colors[inside], strict=True):
        canvas[row : row + size, column : column + size] = color


def blend(image: RgbImage, rendered: RgbImage, mask: NDArray[np.bool_]) -> RgbImage:
    """A rendered robot and its contour over the dimmed image.

    Args:
        image: the input frame.
        rendered: the robot at the decoded pose.
        mask: (H, W) where `rendered` shows the robot.
    """
    import cv2

    if rendered.shape != image.shape:
        height, width = image.shape[:2]
        rendered = to_uint8(cv2.resize(rendered, (width, height), interpolation=cv2.INTER_AREA))
        mask = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
    canvas = _dim(image)
    tint = np.array((0.55, 0.8, 1.0))
    canvas[mask] = to_uint8(0.25 * canvas[mask] + 0.75 * rendered[mask] * tint)
    contour = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)) > 0
    canvas[contour] = (255, 170, 40)
    return canvas


def compose(panels: Sequence[Tile]) -> RgbImage:
    """Panels of one size in rows of two, each under its caption; even height and width, as video encoders need."""
    height, width = panels[0][0].shape[:2]
    panel_width = int(np.clip(width, *_PANEL_WIDTHS)) // 2 * 2
    panel_height = round(height * panel_width / width) // 2 * 2
    tiles = [(resize(image, panel_width, panel_height), caption) for image, caption in panels]
    return tile_sheet([tiles[i : i + 2] for i in range(0, len(tiles), 2)], style=DARK)


# ---- small parts ----------------------------------------------------------------------------------------------------


def _robust_max_speed(motion: JointMotion, field: AnalyticField) -> float:
    """98th percentile of the robot's speed in the video [px]: one color scale for all frames."""
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
    return to_uint8(np.repeat(0.45 * gray, 3, axis=-1))
