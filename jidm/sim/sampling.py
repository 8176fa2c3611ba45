"""Downsampling of depth and link images, which must not be averaged."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BACKGROUND = -1
"""Link id of pixels that do not show the robot."""


def sample_at_centers(
    depth: NDArray[np.float32], link: NDArray[np.int32], cell: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Depth and link at the centers of cells of `cell` x `cell` samples.

    For an odd `cell` these are the values of the sample at the center. For an even one they come from the four samples
    around it: the link by majority vote (of tied links the nearest), the depth as the mean over the samples of that
    link. Where all four agree that is exact to first order.

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
    corners = [
        (..., slice(i, None, cell), slice(j, None, cell)) for i in (center - 1, center) for j in (center - 1, center)
    ]
    ids, z = np.stack([link[at] for at in corners]), np.stack([depth[at] for at in corners])
    best, mean = ids[0].copy(), z.mean(axis=0)
    mixed = (ids != ids[0]).any(axis=0)
    if mixed.any():  # along silhouettes only: counting everywhere would take longer than rendering
        candidates = ids[:, mixed]
        distance = np.where(candidates == BACKGROUND, np.float32(1e6), z[:, mixed])
        votes = (candidates[:, None] == candidates[None]).sum(axis=1) - distance * np.float32(1e-7)
        winner = np.take_along_axis(candidates, votes.argmax(axis=0)[None], 0)[0]
        voters = candidates == winner
        best[mixed] = winner
        mean[mixed] = np.where(voters, distance, 0).sum(axis=0) / voters.sum(axis=0)
    mean[best == BACKGROUND] = np.inf
    return mean, best
