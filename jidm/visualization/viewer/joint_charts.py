"""The joints of one frame against their limits, and one joint over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from jidm.visualization.image import RgbImage
from jidm.visualization.plot import draw_joint

if TYPE_CHECKING:
    from jidm.visualization.plot import PositionAndVelocityLimits
    from jidm.visualization.viewer.viewed_run import ViewedRun

RUN_COLORS = ("#1f5fbf", "#d95f02")
"""Of the first and the second run, in charts and for the second robot."""

_OUTSIDE, _UNOBSERVABLE, _TRUTH = "#c03030", "#e0a030", "#111111"
_TABLE = "display:grid;grid-template-columns:auto minmax(70px,1fr) auto;gap:5px 8px;align-items:center;"
_TABLE += "font-size:12px;line-height:1.2;padding:4px 10px 8px 10px"
_CHART_SIZE, _CHART_DPI = (4.4, 3.3), 180  # [inch], [px per inch]


def joint_bars(runs: Sequence[ViewedRun], t: int, selected: int) -> str:
    """HTML with one row per joint: its range, in it the position and two standard deviations to either side.

    The range is that of the limits; of a joint without limits, that of its motion. The position is red outside the limits, the
    band amber where the joint is not observable. A thin black line is the true or recorded position.

    Args:
        runs: one, or two with the same joints.
        t: frame.
        selected: index of the joint that is emphasized.
    """
    rows = []
    for k, name in enumerate(runs[0].joint_names):
        lower, upper = _range(runs, k)
        marks, texts = [], []
        for color, run in zip(RUN_COLORS, runs, strict=False):
            mark, text = _marks(run, min(t, len(run) - 1), k, lower, upper, color)
            marks.append(mark)
            texts.append(text)
        unit = "m" if runs[0].motion.joint_types[k] == "prismatic" else "rad"
        weight = "bold" if k == selected else "normal"
        track = (
            f'<div style="position:relative;height:14px;border-radius:3px;background:#e9ecef">{"".join(marks)}</div>'
        )
        rows.append(
            f'<div style="font-weight:{weight}">{escape(_short(name, runs[0].joint_names))}</div>{track}'
            f'<div style="font-variant-numeric:tabular-nums;text-align:right">{" ".join(texts)} {unit}</div>'
        )
    return f'<div class="jidm-joints" style="{_TABLE}">{"".join(rows)}</div>'


def _marks(run: ViewedRun, t: int, k: int, lower: float, upper: float, color: str) -> tuple[str, str]:
    """Band, true position and position of a joint as HTML, and the position as text."""
    position, std = float(run.motion.position[t, k]), float(run.motion.position_std[t, k])
    steps = len(run.motion.observable)
    observable = bool(run.motion.observable[min(max(t - 1, 0), steps - 1), k]) if steps else True
    limits = run.limits
    outside = limits is not None and not (limits[0][k] - 1e-6 <= position <= limits[1][k] + 1e-6)
    marks = []
    if run.decoded:
        left, right = (_percent(x, lower, upper) for x in (position - 2 * std, position + 2 * std))
        marks.append(
            _box("band", left, f"{max(right - left, 0.5):.2f}%", _UNOBSERVABLE if not observable else color, 0.35)
        )
    if run.truth is not None:
        marks.append(_box("truth", _percent(float(run.truth[t, k]), lower, upper), "1px", _TRUTH, 1.0))
    marks.append(_box("position", _percent(position, lower, upper), "3px", _OUTSIDE if outside else color, 1.0))
    return "".join(marks), f'<span style="color:{_OUTSIDE if outside else color}">{position:.3f}</span>'


def _box(name: str, left: float, width: str, color: str, opacity: float) -> str:
    return (
        f'<div class="{name}" style="position:absolute;top:0;height:14px;left:{left:.2f}%;width:{width};'
        f'background:{color};opacity:{opacity}"></div>'
    )


def _percent(x: float, lower: float, upper: float) -> float:
    return float(np.clip(100 * (x - lower) / (upper - lower), 0.0, 99.0))


def _range(runs: Sequence[ViewedRun], k: int) -> tuple[float, float]:
    """The limits of a joint, or the range of its motion."""
    limits = runs[0].limits
    if limits is not None and np.isfinite([limits[0][k], limits[1][k]]).all() and limits[0][k] < limits[1][k]:
        return float(limits[0][k]), float(limits[1][k])
    low = min(float(run.motion.position[:, k].min()) for run in runs)
    high = max(float(run.motion.position[:, k].max()) for run in runs)
    margin = max(0.1 * (high - low), 0.05)
    return low - margin, high + margin


def _short(name: str, names: Sequence[str]) -> str:
    """A joint's name without the beginning that all share, which would leave no room for the bars."""
    common = min((len(x) for x in names), default=0)
    while common and len({x[:common] for x in names}) > 1:
        common -= 1
    cut = name[:common].rfind("_") + 1
    return name[cut:] if len(names) > 1 and cut < len(name) else name


class JointChart:
    """Position and velocity of one joint over time, with bands of two standard deviations, limits, and a cursor.

    Args:
        runs: label -> run, all with the same joints; they are drawn up to the length of the shortest.
        joint: name of the joint.
    """

    def __init__(self, runs: Mapping[str, ViewedRun], joint: str) -> None:
        first = next(iter(runs.values()))
        frames = min(len(run) for run in runs.values())
        self._time = first.motion.time[:frames].double().numpy()
        truth = None if first.truth is None else first.truth[:frames]
        motions = {label: run.motion[:frames] for label, run in runs.items()}
        self._axes = []
        if frames < 2:  # a live run that has just begun
            self._image = np.full(
                (round(_CHART_SIZE[1] * _CHART_DPI), round(_CHART_SIZE[0] * _CHART_DPI), 3), 255, np.uint8
            )
            return
        k = first.joint_names.index(joint)
        figure = draw_joint(motions, joint, truth=truth, limits=_limits_in_reach(first, k), size=_CHART_SIZE)
        figure.set_dpi(_CHART_DPI)
        figure.canvas.draw()
        self._image = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
        height = self._image.shape[0]
        for axis in figure.axes:
            box = axis.get_window_extent()
            left, right = (float(axis.transData.transform((x, 0))[0]) for x in axis.get_xlim())
            self._axes.append((left, right, axis.get_xlim(), round(height - box.y1), round(height - box.y0)))

    def draw(self, t: int) -> RgbImage:
        """The chart with the cursor at frame t."""
        image = self._image.copy()
        time = self._time[min(t, len(self._time) - 1)]
        for left, right, (start, end), top, bottom in self._axes:
            column = round(left + (right - left) * (time - start) / (end - start))
            image[top:bottom, max(column - 1, 0) : column + 2] = (200, 40, 90)
        return image


def _limits_in_reach(run: ViewedRun, k: int) -> PositionAndVelocityLimits | None:
    """The limits that joint k comes near to; others are infinite, because they would flatten the curve."""
    if run.limits is None:
        return None
    lower, upper, velocity = (x.copy() for x in run.limits)
    low, high = float(run.motion.position[:, k].min()), float(run.motion.position[:, k].max())
    reach = max(high - low, 1e-3)
    if low - lower[k] > reach:
        lower[k] = -np.inf
    if upper[k] - high > reach:
        upper[k] = np.inf
    if float(run.motion.velocity[:, k].abs().max()) < 0.5 * velocity[k]:
        velocity[k] = np.inf
    finite = np.isfinite([lower[k], upper[k], velocity[k]]).any()
    return (lower, upper, velocity) if finite else None
