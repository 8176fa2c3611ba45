"""Decoded joint motion as curves: velocity and position of every joint, with two-sigma bands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jidm.atomic_io import atomic_write
from jidm.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jidm.estimation.result import JointMotion

_DECODED, _TRUTH, _INVALID, _UNOBSERVABLE = "#1f5fbf", "#111111", "#999999", "#e0a030"
_UNITS = {"prismatic": ("m", "m/s")}


def plot_motion(
    motion: JointMotion, path: str | Path, *, truth: ArrayLike | None = None, title: str = "", dpi: int = 110
) -> None:
    """Draw one row per joint, velocity on the left and position on the right, into a PNG, PDF or SVG.

    Bands are two standard deviations. Grey: frames that are not valid; amber: steps in which the camera cannot see
    the joint move. The file appears whole or not at all.

    Args:
        motion: one decoded video (no batch axes).
        path: where to; the suffix chooses the format.
        truth: (T, n) true joint positions [rad or m], drawn dashed if given.

    Raises:
        InputError: the motion is a batch, or the truth has another shape.
    """
    figure = draw_motion(motion, truth=truth, title=title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def draw_motion(motion: JointMotion, *, truth: ArrayLike | None = None, title: str = "") -> Figure:
    """The figure that `plot_motion` writes; drawn without pyplot, so no state and no window is left behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = _MotionCurves(motion, truth)
    n = len(curves.joint_names)
    figure = Figure(figsize=(11, 1.0 + 1.25 * n), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n, 2, sharex=True, squeeze=False)
    for k, name in enumerate(curves.joint_names):
        position, velocity = _UNITS.get(curves.joint_types[k], ("rad", "rad/s"))
        _draw_row(axes[k, 0], axes[k, 1], curves, k)
        axes[k, 0].set_ylabel(f"{name}\n[{velocity}]", fontsize=8)
        axes[k, 1].set_ylabel(f"[{position}]", fontsize=8)
    axes[0, 0].set_title("velocity", fontsize=10)
    axes[0, 1].set_title("position", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("time [s]", fontsize=9)
    figure.legend(*_legend(curves), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


class _MotionCurves:
    """The motion as arrays, and where it must not be trusted."""

    def __init__(self, motion: JointMotion, truth: ArrayLike | None) -> None:
        self.joint_names, self.joint_types = tuple(motion.joint_names), tuple(motion.joint_types)
        self.time = _array(motion.time)
        self.position = _array(motion.position)
        if self.position.ndim != 2:
            raise InputError(
                f"one video is drawn at a time, this motion is a batch of shape {self.position.shape[:-2]}; index it first"
            )
        self.velocity, self.position_std = _array(motion.velocity), _array(motion.position_std)
        self.valid, self.observable = _array(motion.valid).astype(bool), _array(motion.observable).astype(bool)
        dt = np.diff(self.time)
        variance = np.diagonal(_array(motion.covariance), axis1=-2, axis2=-1)
        self.velocity_std = np.sqrt(np.clip(variance, 0.0, None)) / dt[:, None]
        self.mid_time = (self.time[1:] + self.time[:-1]) / 2
        self.truth: NDArray[np.float64] | None = None
        if truth is not None:
            self.truth = np.asarray(truth, dtype=np.float64)
            if self.truth.shape != self.position.shape:
                raise InputError(f"truth must have the shape of position {self.position.shape}, got {self.truth.shape}")
        self.true_velocity = None if self.truth is None else np.diff(self.truth, axis=0) / dt[:, None]


def _draw_row(left: Axes, right: Axes, curves: _MotionCurves, k: int) -> None:
    for axis, x, y, std, true in (
        (left, curves.mid_time, curves.velocity, curves.velocity_std, curves.true_velocity),
        (right, curves.time, curves.position, curves.position_std, curves.truth),
    ):
        line, low, high = y[:, k], y[:, k] - 2 * std[:, k], y[:, k] + 2 * std[:, k]
        axis.fill_between(x, low, high, color=_DECODED, alpha=0.25, linewidth=0)
        axis.plot(x, line, color=_DECODED, linewidth=1.1)
        shown = [line]
        if true is not None:
            axis.plot(x, true[:, k], color=_TRUTH, linewidth=0.9, linestyle=(0, (4, 3)))
            shown.append(true[:, k])
        _set_ylim(axis, shown, (low, high))
        _shade(axis, curves.time, ~curves.valid, _INVALID, 0.35)
        _shade(axis, curves.time, curves.valid & ~curves.observable[:, k], _UNOBSERVABLE, 0.3)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.set_xlim(curves.time[0], curves.time[-1])


def _set_ylim(
    axis: Axes, shown: list[NDArray[np.float64]], band: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> None:
    """Fit the curves; the band only up to three times their height, or one blind joint would flatten its curve."""
    values = np.concatenate(shown)
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    height = max(high - low, 1e-3)
    edges = np.concatenate(band)
    edges = edges[np.isfinite(edges)]
    if len(edges):
        low, high = max(low - height, min(low, edges.min())), min(high + height, max(high, edges.max()))
    margin = 0.06 * max(high - low, 1e-3)
    axis.set_ylim(low - margin, high + margin)


def _shade(axis: Axes, time: NDArray[np.float64], steps: NDArray[np.bool_], color: str, alpha: float) -> None:
    """Shade runs of steps: step t lies between frames t and t + 1."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], steps, [False]])))
    for start, stop in edges.reshape(-1, 2):
        axis.axvspan(time[start], time[stop], color=color, alpha=alpha, linewidth=0)


def _legend(curves: _MotionCurves) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[tuple[Any, str]] = [
        (Line2D([], [], color=_DECODED), "decoded"),
        (Patch(color=_DECODED, alpha=0.25), "two standard deviations"),
    ]
    if curves.truth is not None:
        entries.append((Line2D([], [], color=_TRUTH, linestyle=(0, (4, 3))), "truth"))
    if not curves.valid.all():
        entries.append((Patch(color=_INVALID, alpha=0.35), "frame not valid"))
    if not curves.observable[curves.valid].all():
        entries.append((Patch(color=_UNOBSERVABLE, alpha=0.3), "joint not observable"))
    return [handle for handle, _ in entries], [label for _, label in entries]


def _array(x: Any) -> NDArray[np.float64]:
    return x.detach().cpu().double().numpy() if hasattr(x, "detach") else np.asarray(x, dtype=np.float64)
