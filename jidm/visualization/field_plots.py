"""A model's prediction for one frame: optical flow, confidence, unexplained flow, and the Jacobian field of every joint.

Fields are drawn like flow: hue is the direction in which a pixel moves when the joint turns its positive way, saturation the
speed, with arrows on top. If the exact field is known, it is shown next to the model's in the same colors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError
from jidm.visualization.image import RgbImage, flow_to_color, heatmap, resize, to_image, write_image
from jidm.visualization.sheet import Tile, tile_sheet

if TYPE_CHECKING:
    from jidm.evaluation.field_metrics import FieldPrediction

_TILE = 200  # [px] longer side of a tile
_ARROWS = 14  # along the longer side
_MASK_LEVEL = 0.5
_MIN_FULL_SCALE = 0.5  # [px] lower bound of the full color, so that noise does not look like motion


def field_sheet(
    image: Float[Tensor, "3 H W"],
    prediction: FieldPrediction,
    joint_names: Sequence[str],
    *,
    exact: Float[Tensor, "2 n h w"] | None = None,
    exact_mask: Float[Tensor, "h w"] | None = None,
    exact_flow: Float[Tensor, "2 h w"] | None = None,
    title: str = "",
) -> RgbImage:
    """A contact sheet: the frame, its mask, flow, confidence and residual in the first row, then the field of each joint.

    Args:
        image: the frame, RGB in [0, 1].
        prediction: a model's prediction for one pair of frames, of which this is the first.
        joint_names: n names.
        exact: the exact field [px per unit], shown next to the model's.
        exact_mask: where the robot is, for `exact`.
        exact_flow: the exact flow [px], shown next to the measured one.
        title: a line on top.

    Raises:
        InputError: more than one pair, or another number of names.
    """
    if len(prediction.jacobian) != 1 or prediction.jacobian.shape[2] != len(joint_names):
        raise InputError(
            f"a sheet shows one pair of frames and needs a name per joint; got {len(prediction.jacobian)} pairs of "
            f"{prediction.jacobian.shape[2]} joints and {len(joint_names)} names"
        )
    top = _flow_tiles(image, prediction, exact_flow)
    joints = _joint_tiles(image, prediction, joint_names, exact, exact_mask)
    joints_per_row = max(len(top) // len(joints[0]), 1)
    rows = [
        [tile for joint in joints[i : i + joints_per_row] for tile in joint]
        for i in range(0, len(joints), joints_per_row)
    ]
    return tile_sheet([top, *rows], title=title)


def write_field_sheet(path: str | Path, *args: Any, **kwargs: Any) -> None:
    """Draw `field_sheet` (same arguments) into a PNG or JPEG; the file appears whole or not at all."""
    write_image(field_sheet(*args, **kwargs), path)


def _flow_tiles(image: Tensor, prediction: FieldPrediction, exact_flow: Tensor | None) -> list[Tile]:
    width, height = _tile_size(image)
    mask = _mask(prediction)
    tiles: list[Tile] = [(to_image(image), "frame")]
    if prediction.mask is not None:
        tiles.append((heatmap(mask, 1.0), "robot mask"))
    if prediction.flow is not None:
        # Flow off the robot is background and must not set the color scale.
        where = mask if exact_flow is None else exact_flow.norm(dim=0) > 0
        max_speed = max(_MIN_FULL_SCALE, robust_max(prediction.flow[0].norm(dim=0), where))
        tiles.append((flow_to_color(prediction.flow[0], max_speed), f"flow, full {max_speed:.1f} px"))
        if exact_flow is not None:
            tiles.append((flow_to_color(exact_flow, max_speed), "exact flow"))
        if prediction.weight is not None:
            tiles.append((heatmap(prediction.weight[0], 1.0), "confidence"))
        if prediction.residual is not None:
            half = max_speed / 2
            tiles.append((heatmap(prediction.residual[0], half), f"unexplained, to {half:.1f} px"))
    return [(resize(tile, width, height), caption) for tile, caption in tiles]


def _joint_tiles(
    image: Tensor,
    prediction: FieldPrediction,
    joint_names: Sequence[str],
    exact: Tensor | None,
    exact_mask: Tensor | None,
) -> list[list[Tile]]:
    """Per joint the model's field, and the exact one next to it if it is known."""
    rows = []
    for k, name in enumerate(joint_names):
        predicted, mask = prediction.jacobian[0, :, k], _mask(prediction)
        length = predicted.norm(dim=0) if exact is None else exact[:, k].norm(dim=0)
        # A small part such as a finger moves few pixels of the robot; only those set the scale of the exact field.
        max_length = robust_max(length, mask if exact_mask is None else exact_mask * (length > 1e-6))
        tiles = [
            (draw_field(image, predicted, mask, max_length, _tile_size(image)), f"{name}  {max_length:.0f} px/unit")
        ]
        if exact is not None and exact_mask is not None:
            difference = ((predicted.double() - exact[:, k]).norm(dim=0) * exact_mask).sum()
            size = (length * exact_mask).sum()
            error = f"{float(difference / size):.0%} off" if float(size) > 0 else "no motion"
            tiles.append(
                (draw_field(image, exact[:, k], exact_mask, max_length, _tile_size(image)), f"exact ({error})")
            )
        rows.append(tiles)
    return rows


def draw_field(
    image: Float[Tensor, "3 H W"],
    field: Float[Tensor, "2 h w"],
    mask: Float[Tensor, "h w"],
    max_length: float,
    size: tuple[int, int],
) -> RgbImage:
    """One joint's field over the dimmed image: colors on the robot, arrows on top.

    Args:
        image: the frame, RGB in [0, 1].
        field: motion per unit of the joint, on any grid over the image.
        mask: where the robot is, in [0, 1].
        max_length: of the field in full color.
        size: width and height of the drawing [px].
    """
    import cv2

    width, height = size
    gray = np.repeat(resize(to_image(image), width, height).mean(axis=-1, keepdims=True), 3, axis=-1) * 0.4 + 150
    colors = resize(flow_to_color(field, max_length), width, height, nearest=True).astype(np.float64)
    levels = (mask.double().clamp(0, 1) * 255).cpu().numpy().astype(np.uint8)
    alpha = resize(levels, width, height, nearest=True)[..., None] / 255
    tile = np.ascontiguousarray((gray * (1 - alpha) + colors * alpha).astype(np.uint8))
    h, w = mask.shape
    step = max(1, round(max(h, w) / _ARROWS))
    scale = np.array([tile.shape[1] / w, tile.shape[0] / h])
    for i in range(step // 2, h, step):
        for j in range(step // 2, w, step):
            move = field[:, i, j].double().cpu().numpy() / max(max_length, 1e-9)
            speed = float(np.hypot(*move))
            if float(mask[i, j]) < _MASK_LEVEL or speed < 0.05:
                continue
            start = (np.array([j, i]) + 0.5) * scale
            end = start + move / max(speed, 1.0) * step * scale * 0.9
            a, b = (tuple(int(x) for x in np.rint(p)) for p in (start, end))
            cv2.arrowedLine(tile, a, b, (20, 20, 20), 1, cv2.LINE_AA, tipLength=0.35)
    return tile


def _mask(prediction: FieldPrediction) -> Tensor:
    """The predicted robot mask; 1 everywhere for a model without one."""
    if prediction.mask is None:
        return prediction.jacobian.new_ones(prediction.jacobian.shape[-2:])
    return prediction.mask[0]


def _tile_size(image: Tensor) -> tuple[int, int]:
    """Width and height of a tile of this image [px]."""
    height, width = image.shape[-2:]
    scale = _TILE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def robust_max(length: Tensor, where: Tensor) -> float:
    """95th percentile of a length (h, w) over the robot's pixels, `where` (h, w) being its mask; the maximum without robot."""
    values = length.double()[where > _MASK_LEVEL]
    return max(float(values.quantile(0.95)), 1e-3) if len(values) else max(float(length.max()), 1e-3)
