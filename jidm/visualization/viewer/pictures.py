"""The pictures of one frame: video, optical flow, Jacobian field of a joint, and the motion that no joint explains."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.evaluation.field_metrics import predict_field
from jidm.fields.analytic import AnalyticField
from jidm.fields.free import LearnedField
from jidm.video.letterbox import Letterbox
from jidm.visualization.field_plots import draw_field, robust_max
from jidm.visualization.image import RgbImage, flow_to_color, heatmap, resize, to_image, to_uint8
from jidm.visualization.overlay import draw_points, residual_flow, residual_grid
from jidm.visualization.sheet import SheetStyle, Tile, tile_sheet

if TYPE_CHECKING:
    from jidm.visualization.viewer.viewed_run import ViewedRun

PICTURES = ("video", "optical flow", "Jacobian field", "residual")
"""Names of the pictures."""

STYLE = SheetStyle(caption=32, gap=6, background=255, text=40, scale=0.66)
TILE_WIDTH, _SINGLE_WIDTH = 400, 640  # [px]
_CACHED_FRAMES = 32  # frames whose fields are kept, so that another joint of the same frame is drawn at once
_SCALE_SAMPLES = 8  # frames from which the color scales of a run are estimated
_MIN_FULL_SCALE = 0.5  # [px] lower bound of the full color, so that noise does not look like motion
_ROBOT_COLOR = (255, 170, 40)


@dataclass(frozen=True, eq=False)
class FrameAnalysis:
    """Fields of one frame, in pixels of `ViewedRun.frames`.

    Attributes:
        jacobian: Jacobian field on a grid over the image [px of that grid per rad or m]; None if the run has no field.
        mask: (h, w) the robot in [0, 1], on the grid of the field.
        flow: optical flow to the next frame [px]; None in the last frame, and if nothing measures it.
        weight: its confidence in [0, 1].
        residual: flow that the joint step does not explain, times its confidence [px].
    """

    jacobian: Float[Tensor, "2 n h w"] | None = None
    mask: Float[Tensor, "h w"] | None = None
    flow: Float[Tensor, "2 H W"] | None = None
    weight: Float[Tensor, "H W"] | None = None
    residual: Float[Tensor, "H W"] | None = None


class FramePictures:
    """Draws the pictures of a run's frames.

    Args:
        run: what is drawn.
    """

    def __init__(self, run: ViewedRun) -> None:
        self.run = run
        self._analyses: OrderedDict[tuple[int, bool], FrameAnalysis] = OrderedDict()
        self._scale_frames = 0  # frames that the run had when the color scales were estimated
        self._max_speed = _MIN_FULL_SCALE
        self._max_lengths: list[float] = []

    def extend(self, run: ViewedRun) -> None:
        """Draw a run that begins with the frames of this one; what was computed for these is kept."""
        self.run = run

    def analyze(self, t: int) -> FrameAnalysis:
        """The fields of frame t."""
        key = t, t + 1 < len(self.run.frames)
        if key not in self._analyses:
            self._analyses[key] = self._analyze(t)
            if len(self._analyses) > _CACHED_FRAMES:
                self._analyses.popitem(last=False)
        self._analyses.move_to_end(key)
        return self._analyses[key]

    def sheet(
        self, t: int, joint: int, names: Sequence[str] = PICTURES, *, title: str = "", show_pose: bool = False
    ) -> RgbImage:
        """Pictures under their captions; four as two rows of two, one enlarged.

        Args:
            t: frame.
            joint: index of the joint whose field is drawn.
            names: of `PICTURES`.
            title: a line on top.
            show_pose: draw the robot at the decoded pose over the video.
        """
        width = TILE_WIDTH if len(names) > 1 else _SINGLE_WIDTH
        tiles = [self.draw(t, joint, name, width, show_pose=show_pose) for name in names]
        per_row = 2 if len(tiles) > 2 else 1
        return tile_sheet([tiles[i : i + per_row] for i in range(0, len(tiles), per_row)], title=title, style=STYLE)

    def draw(self, t: int, joint: int, name: str, width: int, *, show_pose: bool = False) -> Tile:
        """One picture of that width [px] with its caption; arguments as for `sheet`."""
        run, analysis = self.run, self.analyze(t)
        self._update_scales()
        height = max(1, round(run.frames[0].shape[-2] * width / run.frames[0].shape[-1]))
        frame, scale = run.frame(t), run.scale
        if name == "video":
            image = self._draw_pose(frame, t, analysis) if show_pose else to_image(frame)
            valid = t == 0 or bool(run.motion.valid[t - 1])
            caption = f"video, frame {t}{'' if valid else ' (not valid)'}"
            return resize(image, width, height), caption
        if name == "Jacobian field":
            if analysis.jacobian is None or analysis.mask is None:
                return _unknown(frame, width, height), "no field: camera or checkpoint unknown"
            _rows, columns = analysis.jacobian.shape[-2:]
            full, unit = self._max_lengths[joint], "m" if run.motion.joint_types[joint] == "prismatic" else "rad"
            image = draw_field(frame, analysis.jacobian[:, joint], analysis.mask, full, (width, height))
            pixels = full * run.width / columns
            return image, f"field of {run.joint_names[joint]}, to {pixels:.0f} px/{unit}"
        if analysis.flow is None:
            reason = "no next frame" if t + 1 >= len(run.frames) else "not measured"
            return _unknown(frame, width, height), f"{name}: {reason}"
        full = self._max_speed
        if name == "optical flow":
            return resize(flow_to_color(analysis.flow, full), width, height), f"{name}, to {full * scale:.1f} px"
        if analysis.residual is None:
            return _unknown(frame, width, height), "residual: no field"
        half = full / 2
        return resize(heatmap(analysis.residual, half), width, height), f"unexplained motion, to {half * scale:.1f} px"

    # ---- pieces -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _analyze(self, t: int) -> FrameAnalysis:
        run = self.run
        first = run.frame(t)
        second = run.frame(t + 1) if t + 1 < len(run.frames) else None
        q = run.motion.position[t].float()
        delta_q = run.motion.delta_q[t].float() if t < len(run.motion.delta_q) else None
        if isinstance(run.field, LearnedField) and run.flow is None:
            analysis = _analyze_learned(run.field, first, second, q)
        else:
            analysis = _evaluate_field(run, first, q)
            if second is not None and run.flow is not None:
                measured = run.flow(first, second)
                analysis = FrameAnalysis(analysis.jacobian, analysis.mask, measured.flow, measured.weight)
        if analysis.flow is None or analysis.weight is None or analysis.jacobian is None or delta_q is None:
            return analysis
        residual = residual_flow(analysis.flow, analysis.weight, analysis.jacobian, delta_q)
        return FrameAnalysis(analysis.jacobian, analysis.mask, analysis.flow, analysis.weight, residual)

    def _draw_pose(self, frame: Tensor, t: int, analysis: FrameAnalysis) -> RgbImage:
        """The robot at the decoded pose over the frame: surface points of an exact field, outline of a learned one."""
        import cv2

        image = to_image(frame)
        if isinstance(self.run.field, AnalyticField):
            return draw_points(image, self.run.field, self.run.motion.position[t].double())
        if analysis.mask is not None:
            levels = to_uint8(analysis.mask.double().cpu().numpy() * 255)
            mask = resize(levels, image.shape[1], image.shape[0]) > 127
            image[cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0] = (
                _ROBOT_COLOR
            )
        return image

    def _update_scales(self) -> None:
        """Estimate speed and lengths in full color from frames of the whole run, again whenever a live run has doubled.

        Each is the largest of several frames, in every frame the 95th percentile over the robot.
        """
        count = max(min(len(self.run), len(self.run.frames) - 1), 1)
        if count < 2 * self._scale_frames:
            return
        self._scale_frames = count
        samples = [self._analyze(t) for t in np.unique(np.linspace(0, count - 1, _SCALE_SAMPLES).astype(int)).tolist()]
        self._max_speed = max(
            [_MIN_FULL_SCALE / self.run.scale, *(_typical_speed(x) for x in samples if x.flow is not None)]
        )
        lengths = [_typical_lengths(x) for x in samples if x.jacobian is not None]
        self._max_lengths = [max(*column, 1e-3) for column in zip(*lengths)]


def _typical_speed(x: FrameAnalysis) -> float:
    assert x.flow is not None
    speed = x.flow.norm(dim=0)
    if x.mask is None:
        return robust_max(speed, torch.ones_like(speed))
    mask = torch.nn.functional.interpolate(x.mask[None, None].to(speed), size=speed.shape)[0, 0]
    return robust_max(speed, mask)


def _typical_lengths(x: FrameAnalysis) -> list[float]:
    """Per joint, over the part of the robot that the joint moves."""
    assert x.jacobian is not None and x.mask is not None
    return [robust_max(length, x.mask * (length > 1e-6)) for length in x.jacobian.norm(dim=0)]


def compare(
    pictures: Mapping[str, FramePictures], t: int, joint: int, names: Sequence[str], *, show_pose: bool = False
) -> RgbImage:
    """Two runs side by side, one row per picture; arguments as for `FramePictures.sheet`.

    Args:
        pictures: label -> pictures of a run. Shorter runs stay at their last frame.
        joint: index among the joints of the first; others show their joint of that name, or of that index.
    """
    first = next(iter(pictures.values())).run.joint_names[joint]
    columns = []
    for label, p in pictures.items():
        joints = p.run.joint_names
        k = joints.index(first) if first in joints else min(joint, len(joints) - 1)
        tiles = [p.draw(min(t, len(p.run) - 1), k, name, TILE_WIDTH, show_pose=show_pose) for name in names]
        columns.append([(image, f"{label}: {caption}") for image, caption in tiles])
    return tile_sheet([list(row) for row in zip(*columns, strict=True)], style=STYLE)


def _evaluate_field(run: ViewedRun, frame: Tensor, q: Tensor) -> FrameAnalysis:
    if run.field is None:
        return FrameAnalysis()
    height, width = frame.shape[-2:]
    if isinstance(run.field, LearnedField):
        letterbox = Letterbox(height, width, *run.field.config.input_size)
        jacobian, mask = run.field.dense(q, letterbox.height, letterbox.width, run.field.letterbox(frame[None])[0])
        return FrameAnalysis(_without_bands(jacobian, letterbox), _without_bands(mask, letterbox))
    jacobian, mask = run.field.dense(q, *residual_grid(height, width))
    return FrameAnalysis(jacobian, mask)


def _analyze_learned(field: LearnedField, first: Tensor, second: Tensor | None, q: Tensor) -> FrameAnalysis:
    """The network's own field, mask and matching of the frames, without the bands of its letterboxed input."""
    height, width = first.shape[-2:]
    letterbox = Letterbox(height, width, *field.config.input_size)
    a, b = (field.letterbox(x[None]) for x in (first, first if second is None else second))
    prediction = predict_field(_FieldOnly(field), a, b, q[None])
    assert prediction is not None and prediction.mask is not None
    # The network's pixels are those of config.width x height, which may be smaller than the images that it reads.
    rows, columns = prediction.jacobian.shape[-2:]
    network = field.config.width, field.config.height
    to_grid = torch.tensor([columns / network[0], rows / network[1]])[:, None, None, None]
    jacobian = _without_bands(prediction.jacobian[0].cpu() * to_grid, letterbox)
    mask = _without_bands(prediction.mask[0].cpu(), letterbox)
    if second is None or prediction.flow is None or prediction.weight is None:
        return FrameAnalysis(jacobian, mask)
    to_input = torch.tensor([letterbox.width / network[0], letterbox.height / network[1]])
    to_frame = (to_input / torch.tensor([letterbox.scale_u, letterbox.scale_v]))[:, None, None]
    flow = _without_bands(prediction.flow[0].cpu() * to_frame, letterbox)
    weight = _without_bands(prediction.weight[0].cpu(), letterbox)
    both = torch.nn.functional.interpolate(torch.cat([flow, weight[None]])[None], (height, width), mode="bilinear")[0]
    return FrameAnalysis(jacobian, mask, both[:2], both[2])


@dataclass(frozen=True)
class _FieldOnly:
    """A decoder as far as `predict_field` needs it."""

    field: LearnedField


def _without_bands(x: Float[Tensor, "*channels y x"], letterbox: Letterbox) -> Float[Tensor, "*channels h w"]:
    """The part of a grid over a letterboxed image that shows the image itself."""
    rows, columns = x.shape[-2] / letterbox.height, x.shape[-1] / letterbox.width
    top, left = round(letterbox.top * rows), round(letterbox.left * columns)
    height, width = round(letterbox.inner_height * rows), round(letterbox.inner_width * columns)
    return x[..., top : top + max(1, height), left : left + max(1, width)]


def _unknown(frame: Tensor, width: int, height: int) -> RgbImage:
    """A pale frame, where a picture is not available."""
    gray = resize(to_image(frame), width, height).mean(axis=-1, keepdims=True)
    return to_uint8(np.repeat(225 + 0.1 * gray, 3, axis=-1))
