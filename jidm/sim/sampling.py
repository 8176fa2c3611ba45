"""Depth and link of a coarse picture from the samples of a finer one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BACKGROUND = -1
"""Link id of pixels that do not show the robot."""


def sample_at_centers(
    depth: NDArray[np.float32], link: NDArray[np.int32], cell: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Depth and link at the centres of cells of `cell` x `cell` samples.

    For an odd `cell` they are those of the sample there. For an even one a cell shows the link that most of the four
    samples around its centre show (of equally many the nearest), at their mean depth; where all four agree that is
    exact to first order.

    Args:
        depth: (*batch, h cell, w cell) [m], anything off the robot.
        link: (*batch, h cell, w cell), -1 off the robot.

    Returns:
        depth (*batch, h, w), inf off the robot, and link (*batch, h, w).
    """
    center = cell // 2
    if cell % 2:
        at = (..., slice(center, None, cell), slice(center, None, cell))
        return depth[at].copy(), link[at].copy()
    near = [
        (..., slice(i, None, cell), slice(j, None, cell)) for i in (center - 1, center) for j in (center - 1, center)
    ]
    ids, z = np.stack([link[at] for at in near]), np.stack([depth[at] for at in near])
    best, mean = ids[0].copy(), z.mean(axis=0)
    mixed = (ids != ids[0]).any(axis=0)
    if mixed.any():  # along outlines only: counting everywhere would take longer than drawing
        some, far = ids[:, mixed], np.where(ids[:, mixed] == BACKGROUND, np.float32(1e6), z[:, mixed])
        votes = (some[:, None] == some[None]).sum(axis=1) - far * np.float32(1e-7)
        winner = np.take_along_axis(some, votes.argmax(axis=0)[None], 0)[0]
        same = some == winner
        best[mixed] = winner
        mean[mixed] = np.where(same, far, 0).sum(axis=0) / same.sum(axis=0)
    mean[best == BACKGROUND] = np.inf
    return mean, best
