"""Output files of `decode` and `demo`: numbers, a plot, an overlay video and a summary."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jidm.atomic_io import atomic_write

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from jidm.camera.model import Camera
    from jidm.estimation.result import JointMotion
    from jidm.robot.embodiment import Embodiment
    from jidm.video.preparation import FrameSource


@dataclass(frozen=True)
class DecodeResult:
    """A decoded video and its decoder.

    Attributes:
        motion: the joint motion.
        robot: None if a trained field needed none.
        camera: of an exact field; None for a learned one.
        video: its frames as they were decoded.
        fps: its frame rate [1/s].
        method: the checkpoint, or the flow estimator.
        seconds: decoding time, reading the file included [s].
        links: that the exact field samples; all if None.
        embodiment_file: the robot's URDF or descriptor, if it is not known by its name alone.
    """

    motion: JointMotion
    robot: Embodiment | None
    camera: Camera | None
    video: FrameSource
    fps: float
    method: str
    seconds: float
    links: Sequence[str] | None = None
    embodiment_file: str | None = None


RESULT_FILES = ("motion.npz", "motion.csv", "plot.png", "summary.json", "overlay.mp4")
"""Files of one decoded video; not all need be there."""


def write_results(
    decoded: DecodeResult,
    out: Path,
    *,
    overlay: bool = True,
    truth: NDArray[Any] | None = None,
    render: Callable[[int], tuple[NDArray[Any], NDArray[Any]]] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write motion.npz, motion.csv, plot.png, summary.json and overlay.mp4 into an existing folder.

    Args:
        decoded: the result.
        out: the folder.
        overlay: write overlay.mp4; needs a camera.
        truth: (T, n) true positions for the plot [rad or m].
        render: draws the robot at frame t in the overlay; surface points if not given.
        extra: further entries of summary.json.
    """
    from jidm.visualization import plot_motion

    motion = decoded.motion
    motion.save(out / "motion.npz")
    motion.to_csv(out / "motion.csv")
    robot_title = decoded.robot.title if decoded.robot else decoded.method
    plot_motion(motion, out / "plot.png", truth=truth, title=f"{decoded.video.path.name}, {robot_title}")
    write_json(out / "summary.json", {**summary(decoded), **(extra or {})})
    if overlay and decoded.camera is not None:
        _write_overlay(decoded, out / "overlay.mp4", render)


def summary(decoded: DecodeResult) -> dict[str, Any]:
    """Summary of the decoding as JSON values."""
    from jidm import __version__

    motion, robot = decoded.motion, decoded.robot
    valid = motion.valid.bool()
    residual = motion.residual[valid]
    speed = motion.velocity[valid].abs()
    joints = {
        name: {
            "unit": "m" if motion.joint_types[k] == "prismatic" else "rad",
            "observable_share": _mean(motion.observable[valid][:, k]),
            "mean_speed": _mean(speed[:, k]),
            "end_position": _number(motion.position[-1, k]),
            "end_position_std": _number(motion.position_std[-1, k]),
        }
        for k, name in enumerate(motion.joint_names)
    }
    return {
        "jidm": __version__,
        "video": str(Path(decoded.video.path).absolute()),
        "frames": int(motion.position.shape[0]),
        "fps": decoded.fps,
        "embodiment": None if robot is None else robot.name,
        "embodiment_hash": None if robot is None else robot.content_hash,
        "embodiment_file": decoded.embodiment_file,
        "camera": None if decoded.camera is None else decoded.camera.to_dict(),
        "frame_size": motion.provenance.get("frame_size"),
        "method": decoded.method,
        "valid_share": _mean(valid),
        "mean_residual_px": _mean(residual),
        "agreement": _number(motion.agreement[-1]),
        "verdict": motion.verdict,
        "seconds": round(decoded.seconds, 3),
        "joints": joints,
        "provenance": dict(motion.provenance),
    }


def summary_text(decoded: DecodeResult) -> str:
    """The summary as text, one joint per line."""
    from jidm.cli.text import columns

    data = summary(decoded)
    rows = [("JOINT", "MEAN SPEED", "END", "+- 2 STD", "OBSERVABLE")]
    for name, joint in data["joints"].items():
        unit, std = joint["unit"], joint["end_position_std"]
        rows.append(
            (
                name,
                _text(joint["mean_speed"], f" {unit}/s"),
                _text(joint["end_position"], f" {unit}"),
                _text(None if std is None else 2 * std),
                _text(joint["observable_share"], "", ".0%"),
            )
        )
    return f"{columns(rows)}\n{status_text(decoded)}"


def status_text(decoded: DecodeResult) -> str:
    """The measures of the whole video in one line."""
    data = summary(decoded)
    rate = data["frames"] / decoded.seconds if decoded.seconds else float("nan")
    return (
        f"{data['frames']} frames in {decoded.seconds:.1f} s ({rate:.1f} frames/s), "
        f"{_text(data['valid_share'], '', '.0%')} of the steps valid, "
        f"motion that no joint explains {_text(data['mean_residual_px'], ' px')}, "
        f"agreement with the setting {_text(data['agreement'], '', '.1f')}"
    )


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Strict JSON (no NaN); the file appears whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8")


def _write_overlay(decoded: DecodeResult, path: Path, render: Any) -> None:
    assert decoded.robot is not None and decoded.camera is not None
    from jidm.fields.analytic import AnalyticField
    from jidm.flow import DisFlow
    from jidm.visualization import write_overlay

    field = AnalyticField(decoded.robot, decoded.camera, points=12000, links=decoded.links)
    write_overlay(
        path, decoded.video, decoded.motion, field, DisFlow(), fps=decoded.fps, render_robot=render, progress=True
    )


def _mean(x: Any) -> float | None:
    return _number(x.double().mean()) if x.numel() else None


def _number(x: Any) -> float | None:
    value = float(x)
    return value if math.isfinite(value) else None


def _text(value: float | None, unit: str = "", spec: str = ".4f") -> str:
    return "unknown" if value is None else f"{value:{spec}}{unit}"
