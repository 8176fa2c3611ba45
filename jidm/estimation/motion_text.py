"""A joint motion in one line, and as the table that a notebook shows."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from jidm.estimation.result import JointMotion


def as_line(motion: JointMotion) -> str:
    """Frames, duration, joints, valid steps, explained motion, and the joint that is observable least often."""
    T, n, batch = motion.frames, len(motion.joint_names), tuple(motion.position.shape[:-2])
    duration = float(motion.time[-1] - motion.time[0])
    parts = [f"{T} frames in {duration:.3g} s", f"{n} joint{'s' * (n != 1)}"]
    if batch:
        parts.insert(0, f"batch {batch}")
    if motion.valid.numel():
        parts.append(f"{_share(motion.valid)} of the steps valid")
    if bool(motion.valid.any()):
        parts.append(f"{_share(motion.explained_fraction[motion.valid])} of the motion explained")
        worst, share = least_observable(motion)
        parts.append(f"least observable {motion.joint_names[worst]} ({share:.0%} of the steps)")
    return f"JointMotion({', '.join(parts)})"


def as_html(motion: JointMotion) -> str:
    """The line of `as_line`, and a row per joint: mean speed and observable steps, of one video also the last position."""
    single = motion.position.dim() == 2
    head = ["joint", "mean speed", "observable", *(["at the end", "\u00b1 2 std"] if single else [])]
    rows = []
    for k, name in enumerate(motion.joint_names):
        unit = "m" if motion.joint_types[k] == "prismatic" else "rad"
        speed, observable = motion.velocity[..., k][motion.valid].abs(), motion.observable[..., k][motion.valid]
        row = [name, f"{float(speed.mean()):.4f} {unit}/s", _share(observable)] if len(speed) else [name, "", ""]
        if single:
            row += [f"{float(motion.position[-1, k]):.4f} {unit}", f"{2 * float(motion.position_std[-1, k]):.4f}"]
        rows.append(row)
    table = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    names = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f"<p>{escape(as_line(motion))}</p><table><tr>{names}</tr>{table}</table>"


def least_observable(motion: JointMotion) -> tuple[int, float]:
    """The joint that is observable in the fewest valid steps, of equals the one with the largest standard deviation, and
    the share of these steps; there must be a valid step."""
    shares = motion.observable[motion.valid].double().mean(0)
    std = motion.position_std.double().flatten(0, -2).mean(0)
    worst = min(range(len(shares)), key=lambda k: (float(shares[k]), -float(std[k])))
    return worst, float(shares[worst])


def _share(values: Tensor) -> str:
    return f"{float(values.double().mean()):.0%}"
