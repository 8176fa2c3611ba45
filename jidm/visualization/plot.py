"""Files of decoded joint motion as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from jidm.atomic_io import atomic_write
from jidm.estimation.motion_figure import PositionAndVelocityLimits, draw_joint, draw_motion, new_figure

if TYPE_CHECKING:
    from jidm.estimation.result import JointMotion

__all__ = ["PositionAndVelocityLimits", "draw_joint", "draw_motion", "new_figure", "plot_motion"]


def plot_motion(
    motion: JointMotion | Mapping[str, JointMotion],
    path: str | Path,
    *,
    truth: ArrayLike | None = None,
    limits: PositionAndVelocityLimits | None = None,
    joints: Sequence[str] | None = None,
    title: str = "",
    dpi: int = 110,
) -> None:
    """Write the figure of `draw_motion`: one row per joint, velocity on the left and position on the right.

    Args:
        motion, truth, limits, joints, title: as for `draw_motion`.
        path: PNG, PDF or SVG; appears whole or not at all.
        dpi: resolution.

    Raises:
        InputError: a motion is a batch, or the shapes or joints differ.
    """
    figure = draw_motion(motion, truth=truth, limits=limits, joints=joints, title=title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
