"""Which points of a robot a camera sees, by a coarse z-buffer of the points themselves."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_MIN_DEPTH = 1e-3
"""Points nearer than this to the camera plane, or behind it, are outside the image [m]."""
_DEPTH_TOLERANCE = 0.006
"""Depth tolerance of the z-buffer, as a fraction of the distance: thin plates (3 mm at 1 m) still occlude."""
_MIN_COSINE = 0.05
"""Beyond this slant (87 degrees) a point moves along the silhouette and measures little."""
_OCCLUSION_MARGIN = 0.012
"""An occluder of an edge point must be nearer to the camera by this [m]."""
_SILHOUETTE_CELLS = 2.5
"""Cells by which the surface may recede within one cell at the silhouette of a link that is some cells thick."""


def visible_points(
    uv: Float[Tensor, "*batch N 2"],
    depth: Float[Tensor, "*batch N"],
    cosine: Float[Tensor, "*batch N"],
    *,
    width: int,
    height: int,
    focal: float,
    cell: float,
) -> Bool[Tensor, "*batch N"]:
    """Which points a camera sees: inside the image, facing the camera, and nearest in their cell of a coarse z-buffer.

    The points occlude each other, so they must be dense enough to cover every cell (about 8 per cell).

    Args:
        uv, depth: pixel position and camera z [m] of every point.
        cosine: cosine between outward normal and the direction to the camera.
        width, height: image size [px].
        focal: focal length [px]; it turns the slant of a surface into a depth tolerance within a cell.
        cell: edge of a z-buffer cell [px].
    """
    inside, index, cells = _buffer_index(uv, depth, width, height, cell)
    z = torch.where(inside, depth, torch.full_like(depth, torch.inf))
    buffer = z.new_full((*z.shape[:-1], cells + 1), torch.inf)
    nearest = buffer.scatter_reduce(-1, index, z, reduce="amin").gather(-1, index)
    slant = (1 / cosine.clamp(min=0.5) ** 2 - 1).sqrt()
    tolerance = depth * (_DEPTH_TOLERANCE + slant * cell / focal)
    return inside & (cosine > _MIN_COSINE) & (depth <= nearest + tolerance)


def unoccluded_points(
    uv: Float[Tensor, "K 2"],
    depth: Float[Tensor, " K"],
    link: Int[Tensor, " K"],
    occluder_uv: Float[Tensor, "N 2"],
    occluder_depth: Float[Tensor, " N"],
    occluder_link: Int[Tensor, " N"],
    *,
    width: int,
    height: int,
    focal: float,
    cell: float,
) -> Bool[Tensor, " K"]:
    """Which points lie inside the image with no occluder clearly in front of them in their cell of the z-buffer.

    Looser than `visible_points`, because edges have no single normal. A point's own link must be in front by more than
    other links: at the silhouette of a round link the surface recedes by more than the width of a cell.

    Args:
        uv, depth, link: pixel position, camera z [m] and link of every point.
        occluder_uv, occluder_depth, occluder_link: those of the points that may hide them.
        width, height, focal, cell: as for `visible_points`.
    """
    occludes, occluder_index, cells = _buffer_index(occluder_uv, occluder_depth, width, height, cell)
    z = torch.where(occludes, occluder_depth, torch.inf)
    size, links = cells + 1, int(torch.cat([link, occluder_link]).max()) + 1
    nearest = z.new_full((links * size,), torch.inf)
    nearest = nearest.scatter_reduce(0, occluder_link * size + occluder_index, z, reduce="amin").view(links, size)
    inside, index, _ = _buffer_index(uv, depth, width, height, cell)
    depth_gap = depth - nearest[:, index]  # (links, K) by how much each link is in front of each point
    same_link = torch.arange(links, device=link.device)[:, None] == link
    own_tolerance = _OCCLUSION_MARGIN + _SILHOUETTE_CELLS * cell * depth / focal
    tolerance = torch.where(same_link, own_tolerance, _OCCLUSION_MARGIN)
    return inside & (depth_gap <= tolerance).all(0)


def _buffer_index(
    uv: Float[Tensor, "*batch N 2"], depth: Float[Tensor, "*batch N"], width: int, height: int, cell: float
) -> tuple[Bool[Tensor, "*batch N"], Int[Tensor, "*batch N"], int]:
    """Whether points are inside the image, their cells (one past the last if outside), and the number of cells."""
    columns, rows = int(np.ceil(width / cell)), int(np.ceil(height / cell))
    inside = (depth > _MIN_DEPTH) & (uv > -0.5).all(-1) & (uv[..., 0] < width - 0.5) & (uv[..., 1] < height - 0.5)
    column = ((uv[..., 0] + 0.5) / cell).clamp(0, columns - 1).long()
    row = ((uv[..., 1] + 0.5) / cell).clamp(0, rows - 1).long()
    return inside, torch.where(inside, row * columns + column, rows * columns), rows * columns
