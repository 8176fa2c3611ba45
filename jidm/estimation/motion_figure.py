"""Decoded joint motion as a figure: velocity and position of every joint, drawn without pyplot and its global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jidm.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jidm.estimation.result import JointMotion

_COLORS = ("#1f5fbf", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e")
_TRUTH, _INVALID, _UNOBSERVABLE, _LIMIT = "#111111", "#999999", "#e0a030", "#c03030"
_DASHED = (0, (4, 3))

PositionAndVelocityLimits = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""(n,) lower and upper positions [rad or m] and velocities [rad/s or m/s]; infinite where there is no limit."""


def draw_motion(
    motion: JointMotion | Mapping[str, JointMotion],
    *,
    truth: ArrayLike | None = None,
    limits: PositionAndVelocityLimits | None = None,
    joints: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """A figure with one row per joint, velocity on the left and position on the right.

    One motion is drawn with bands of two standard deviations. Gray: frames that are not valid; amber: steps in which the
    joint's motion is not observable. Several motions are drawn as curves of different colors.

    Args:
        motion: one decoded video (no batch axes), or model name -> its decoded motion, all of the same video and joints.
        truth: (T, n) true joint positions [rad or m].
        limits: position and velocity limits, drawn as dashed lines.
        joints: which to draw; all if not given.
        title: a line on top.

    Raises:
        InputError: a motion is a batch, or the shapes or joints differ.
    """
    curves, true = _collect(motion, truth)
    first = next(iter(curves.values()))
    if unknown := [name for name in joints or () if name not in first.joint_names]:
        raise InputError(f"no joint '{unknown[0]}': {did_you_mean(unknown[0], first.joint_names)}")
    shown = [k for k, name in enumerate(first.joint_names) if joints is None or name in joints]
    figure = new_figure(11, 1.0 + 1.25 * len(shown))
    axes = figure.subplots(len(shown), 2, sharex=True, squeeze=False)
    for row, k in zip(axes, shown, strict=True):
        unit = _draw_joint(row[0], row[1], curves, true, k, limits)
        row[0].set_ylabel(f"{first.joint_names[k]}\n[{unit}/s]", fontsize=8)
        row[1].set_ylabel(f"[{unit}]", fontsize=8)
    axes[0, 0].set_title("velocity", fontsize=10)
    axes[0, 1].set_title("position", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("time [s]", fontsize=9)
    figure.legend(
        *_legend(curves, true, limits is not None), loc="outside lower center", ncols=7, fontsize=8, frameon=False
    )
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def draw_joint(
    motion: JointMotion | Mapping[str, JointMotion],
    joint: str,
    *,
    truth: ArrayLike | None = None,
    limits: PositionAndVelocityLimits | None = None,
    size: tuple[float, float] = (5.0, 3.5),
) -> Figure:
    """One joint as `draw_motion` draws it, the position above the velocity, for narrow places.

    Args:
        motion, truth, limits: as for `draw_motion`.
        joint: its name.
        size: width and height [inch].

    Raises:
        InputError: there is no such joint, a motion is a batch, or the shapes or joints differ.
    """
    curves, true = _collect(motion, truth)
    first = next(iter(curves.values()))
    if joint not in first.joint_names:
        raise InputError(f"no joint '{joint}': {did_you_mean(joint, first.joint_names)}")
    figure = new_figure(*size)
    position, velocity = figure.subplots(2, 1, sharex=True)
    unit = _draw_joint(velocity, position, curves, true, first.joint_names.index(joint), limits)
    position.set_title(joint, fontsize=9)
    position.set_ylabel(f"position [{unit}]", fontsize=8)
    velocity.set_ylabel(f"velocity [{unit}/s]", fontsize=8)
    velocity.set_xlabel("time [s]", fontsize=8)
    figure.legend(
        *_legend(curves, true, limits is not None), loc="outside lower center", ncols=3, fontsize=7, frameon=False
    )
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size [inch], without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@dataclass(frozen=True, eq=False)
class _Curves:
    """One motion as arrays of T frames and S = T - 1 steps."""

    joint_names: tuple[str, ...]
    joint_types: tuple[str, ...]
    time: NDArray[np.float64]
    position: NDArray[np.float64]
    position_std: NDArray[np.float64]
    velocity: NDArray[np.float64]
    velocity_std: NDArray[np.float64]
    valid: NDArray[np.bool_]
    observable: NDArray[np.bool_]

    @classmethod
    def of(cls, motion: JointMotion) -> _Curves:
        position, time = _array(motion.position), _array(motion.time)
        if position.ndim != 2:
            raise InputError(
                f"one video is drawn at a time, this motion is a batch of shape {position.shape[:-2]}; index it first"
            )
        variance = np.diagonal(_array(motion.covariance), axis1=-2, axis2=-1)
        return cls(
            tuple(motion.joint_names), tuple(motion.joint_types), time, position, _array(motion.position_std),
            _array(motion.velocity), np.sqrt(np.clip(variance, 0.0, None)) / np.diff(time)[:, None],
            _array(motion.valid).astype(bool), _array(motion.observable).astype(bool),
        )  # fmt: skip

    @property
    def mid_time(self) -> NDArray[np.float64]:
        """(S,) [s]."""
        return (self.time[1:] + self.time[:-1]) / 2


@dataclass(frozen=True, eq=False)
class _Truth:
    position: NDArray[np.float64]
    velocity: NDArray[np.float64]

    @classmethod
    def of(cls, truth: ArrayLike, like: _Curves) -> _Truth:
        position = np.asarray(truth, dtype=np.float64)
        if position.shape != like.position.shape:
            raise InputError(f"truth must have the shape of position {like.position.shape}, got {position.shape}")
        return cls(position, np.diff(position, axis=0) / np.diff(like.time)[:, None])


def _collect(
    motion: JointMotion | Mapping[str, JointMotion], truth: ArrayLike | None
) -> tuple[dict[str, _Curves], _Truth | None]:
    """The curves of all motions, checked to be of the same joints and length, and the truth."""
    named = dict(motion) if isinstance(motion, Mapping) else {"decoded": motion}
    curves = {label: _Curves.of(value) for label, value in named.items()}
    first = next(iter(curves.values()))
    true = None if truth is None else _Truth.of(truth, first)
    for label, other in curves.items():
        if other.joint_names != first.joint_names or other.position.shape != first.position.shape:
            raise InputError(
                f"'{label}' has other joints or another length; plot motions of one video and the same joints"
            )
    return curves, true


def _draw_joint(
    left: Axes, right: Axes, curves: Mapping[str, _Curves], true: _Truth | None, k: int,
    limits: PositionAndVelocityLimits | None,
) -> str:  # fmt: skip
    """Draw the velocity of joint k on the left axis and its position on the right one; returns its unit."""
    first = next(iter(curves.values()))
    single = len(curves) == 1
    for axis, x, name in ((left, first.mid_time, "velocity"), (right, first.time, "position")):
        if true is not None:
            style: dict[str, Any] = (
                {"linewidth": 0.9, "linestyle": _DASHED, "zorder": 3} if single else {"linewidth": 2.2, "alpha": 0.35}
            )
            axis.plot(x, getattr(true, name)[:, k], color=_TRUTH, **style)
        for color, motion in zip(_COLORS * len(curves), curves.values(), strict=False):
            axis.plot(x, getattr(motion, name)[:, k], color=color, linewidth=1.1 if single else 0.9)
        if single:
            _draw_band(axis, x, getattr(first, name)[:, k], 2 * getattr(first, f"{name}_std")[:, k])
            _shade(axis, first.time, ~first.valid, _INVALID, 0.35)
            _shade(axis, first.time, first.valid & ~first.observable[:, k], _UNOBSERVABLE, 0.3)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.set_xlim(first.time[0], first.time[-1])
    if limits is not None:
        lower, upper, speed = (float(x[k]) for x in limits)
        _draw_limits(left, -speed, speed)
        _draw_limits(right, lower, upper)
    return "m" if first.joint_types[k] == "prismatic" else "rad"


def _draw_band(axis: Axes, x: NDArray[np.float64], y: NDArray[np.float64], half: NDArray[np.float64]) -> None:
    """Draw y +- half, and show it up to three times the height of the curves: a blind joint must not flatten its curve."""
    low, high = y - half, y + half
    axis.fill_between(x, low, high, color=_COLORS[0], alpha=0.25, linewidth=0)
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axis.get_lines()])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    bottom, top = float(values.min()), float(values.max())
    height = max(top - bottom, 1e-3)
    edges = np.concatenate([low, high])
    edges = edges[np.isfinite(edges)]
    if len(edges):
        bottom, top = max(bottom - height, min(bottom, edges.min())), min(top + height, max(top, edges.max()))
    margin = 0.06 * max(top - bottom, 1e-3)
    axis.set_ylim(bottom - margin, top + margin)


def _draw_limits(axis: Axes, lower: float, upper: float) -> None:
    """Draw the finite ones, and extend the axis to them."""
    for limit in (lower, upper):
        if np.isfinite(limit):
            axis.axhline(limit, color=_LIMIT, linewidth=0.8, linestyle="--")
            low, high = axis.get_ylim()
            margin = 0.05 * (max(high, limit) - min(low, limit))
            axis.set_ylim(min(low, limit - margin), max(high, limit + margin))


def _shade(axis: Axes, time: NDArray[np.float64], steps: NDArray[np.bool_], color: str, alpha: float) -> None:
    """Shade runs of steps: step t lies between frames t and t + 1."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], steps, [False]])))
    for start, stop in edges.reshape(-1, 2):
        axis.axvspan(time[start], time[stop], color=color, alpha=alpha, linewidth=0)


def _legend(curves: Mapping[str, _Curves], true: _Truth | None, limits: bool) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    first, single = next(iter(curves.values())), len(curves) == 1
    entries: list[tuple[Any, str]] = [
        (Line2D([], [], color=color), label) for color, label in zip(_COLORS * len(curves), curves, strict=False)
    ]
    if single:
        entries.append((Patch(color=_COLORS[0], alpha=0.25), "two standard deviations"))
    if true is not None:
        style: dict[str, Any] = {"linestyle": _DASHED} if single else {"linewidth": 2.2, "alpha": 0.35}
        entries.append((Line2D([], [], color=_TRUTH, **style), "truth"))
    if single and not first.valid.all():
        entries.append((Patch(color=_INVALID, alpha=0.35), "frame not valid"))
    if single and not first.observable[first.valid].all():
        entries.append((Patch(color=_UNOBSERVABLE, alpha=0.3), "joint not observable"))
    if limits:
        entries.append((Line2D([], [], color=_LIMIT, linestyle="--"), "limit"))
    return [handle for handle, _ in entries], [label for _, label in entries]


def _array(x: Any) -> NDArray[np.float64]:
    return x.detach().cpu().double().numpy() if hasattr(x, "detach") else np.asarray(x, dtype=np.float64)
