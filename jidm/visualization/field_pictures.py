"""One frame as a model sees it: motion, confidence, what stays unexplained, and the field of every joint.

Fields are drawn like flow: hue is the direction a pixel moves when the joint turns its positive way, saturation how far,
with arrows over it. Where the exact field is known it stands beside the learned one, in the same colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from jidm.atomic_io import atomic_write
from jidm.errors import InputError
from jidm.visualization.overlay import RgbImage, flow_to_color, heatmap

if TYPE_CHECKING:
    from jidm.estimation.result import JointMotion
    from jidm.evaluation.field_metrics import FieldPrediction

_TILE = 200  # [px] longer side of a tile
_CAPTION = 18
_GAP = 6
_ARROWS = 14  # along the longer side
_BACKGROUND, _TEXT_COLOR = 250, (40, 40, 40)
_MASK_LEVEL = 0.5
_MIN_FULL_SCALE = 0.5  # [px] in full colour: less would show noise as motion
_CURVE_COLORS = ("#1f5fbf", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e")


def field_sheet(
    image: Float[Tensor, "3 H W"],
    probe: FieldPrediction,
    joint_names: Sequence[str],
    *,
    exact: Float[Tensor, "2 n h w"] | None = None,
    exact_mask: Float[Tensor, "h w"] | None = None,
    exact_flow: Float[Tensor, "2 h w"] | None = None,
    title: str = "",
) -> RgbImage:
    """A contact sheet: first the frame, its mask, flow, confidence and residual, then the field of each joint.

    Args:
        image: the frame, RGB in [0, 1].
        probe: what a model saw at one pair that starts with this frame.
        joint_names: n names.
        exact: the exact field [px per unit], and `exact_mask` where the robot is; drawn beside the model's.
        exact_flow: the exact motion [px], likewise.
        title: a line on top.

    Raises:
        InputError: more than one pair, or the names do not fit.
    """
    if len(probe.jacobian) != 1 or probe.jacobian.shape[2] != len(joint_names):
        raise InputError(
            f"a sheet shows one pair of frames and names every joint; got {len(probe.jacobian)} pairs of "
            f"{probe.jacobian.shape[2]} joints and {len(joint_names)} names"
        )
    top = [_motion_tiles(image, probe, exact_flow)]
    joints = _joint_tiles(image, probe, joint_names, exact, exact_mask)
    joints_per_row = max(len(top[0]) // len(joints[0]), 1)
    rows = [
        [tile for joint in joints[i : i + joints_per_row] for tile in joint]
        for i in range(0, len(joints), joints_per_row)
    ]
    return _page([*top, *rows], title)


def write_field_sheet(path: str | Path, *args: Any, **kwargs: Any) -> None:
    """Draw `field_sheet` (same arguments) into a PNG or JPEG that appears whole or not at all."""
    import cv2

    sheet = field_sheet(*args, **kwargs)
    with atomic_write(path) as temporary:
        if not cv2.imwrite(str(temporary), np.ascontiguousarray(sheet[..., ::-1])):
            raise InputError(f"{path}: cannot be written as a picture; use .png or .jpg")


def plot_decoded(
    path: str | Path,
    motions: Mapping[str, JointMotion],
    truth: ArrayLike,
    *,
    joints: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Decoded positions and velocities of several models over one video, against the truth, one row per joint.

    Args:
        path: PNG, PDF or SVG; appears whole or not at all.
        motions: model name -> what it decoded; all of the same joints in the same order.
        truth: (T, n) true positions [rad or m].
        joints: which to draw; all if not given.

    Raises:
        InputError: a motion is of other joints or another length than the truth.
    """
    true = np.asarray(truth, dtype=np.float64)
    names = next(iter(motions.values())).joint_names
    for name, motion in motions.items():
        if tuple(motion.position.shape) != true.shape or motion.joint_names != names:
            raise InputError(
                f"'{name}' decoded {tuple(motion.position.shape)} positions, the truth has {true.shape}; "
                "draw motions of one video and the same joints"
            )
    figure = _draw_decoded(motions, true, [n for n in names if joints is None or n in joints], title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)


def _draw_decoded(motions: Mapping[str, JointMotion], true: Any, joints: Sequence[str], title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(motions.values()))
    time = first.time.double().numpy()
    middle, dt = (time[1:] + time[:-1]) / 2, np.diff(time)
    figure = Figure(figsize=(12, 1.0 + 1.3 * len(joints)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(joints), 2, sharex=True, squeeze=False)
    for row, name in zip(axes, joints, strict=True):
        k = first.joint_names.index(name)
        unit = "m" if first.joint_types[k] == "prismatic" else "rad"
        row[0].plot(middle, np.diff(true[:, k]) / dt, color="#111111", linewidth=2.2, alpha=0.35, label="truth")
        row[1].plot(time, true[:, k], color="#111111", linewidth=2.2, alpha=0.35)
        for color, (label, motion) in zip(_CURVE_COLORS * len(motions), motions.items(), strict=False):
            row[0].plot(middle, motion.velocity[:, k].double().numpy(), color=color, linewidth=0.9, label=label)
            row[1].plot(time, motion.position[:, k].double().numpy(), color=color, linewidth=0.9)
        row[0].set_ylabel(f"{name}\n[{unit}/s]", fontsize=8)
        row[1].set_ylabel(f"[{unit}]", fontsize=8)
        for axis in row:
            axis.grid(alpha=0.25, linewidth=0.5)
            axis.tick_params(labelsize=7)
            axis.set_xlim(time[0], time[-1])
    axes[0, 0].set_title("velocity", fontsize=10)
    axes[0, 1].set_title("position", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("time [s]", fontsize=9)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8, frameon=False
    )
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


# ---- tiles ----------------------------------------------------------------------------------------------------------

Tile = tuple[RgbImage, str]


def _motion_tiles(image: Tensor, probe: FieldPrediction, exact_flow: Tensor | None) -> list[Tile]:
    size = _tile_size(image)
    mask = _mask(probe)
    tiles: list[Tile] = [(_resize(_to_uint8(image), size), "frame")]
    if probe.mask is not None:
        tiles.append((_resize(heatmap(mask, 1.0), size), "robot, as seen"))
    if probe.flow is None:
        return tiles
    # Motion off the robot is background; it would set the scale of a picture about the robot.
    where = mask if exact_flow is None else exact_flow.norm(dim=0) > 0
    max_speed = max(_MIN_FULL_SCALE, _robust_max(probe.flow[0].norm(dim=0), where))
    tiles.append((_resize(flow_to_color(probe.flow[0], max_speed), size), f"flow, full {max_speed:.1f} px"))
    if exact_flow is not None:
        tiles.append((_resize(flow_to_color(exact_flow, max_speed), size), "exact flow"))
    if probe.weight is not None:
        tiles.append((_resize(heatmap(probe.weight[0], 1.0), size), "confidence"))
    if probe.residual is not None:
        tiles.append(
            (_resize(heatmap(probe.residual[0], max_speed / 2), size), f"unexplained, to {max_speed / 2:.1f} px")
        )
    return tiles


def _joint_tiles(
    image: Tensor, probe: FieldPrediction, joint_names: Sequence[str], exact: Tensor | None, exact_mask: Tensor | None
) -> list[list[Tile]]:
    """Per joint: the model's field, and beside it the exact one where it is known."""
    rows = []
    for k, name in enumerate(joint_names):
        learned, mask = probe.jacobian[0, :, k], _mask(probe)
        length = learned.norm(dim=0) if exact is None else exact[:, k].norm(dim=0)
        # A small part, a gripper's finger say, moves few pixels of the robot; those set the scale of the exact field.
        max_length = _robust_max(length, mask if exact_mask is None else exact_mask * (length > 1e-6))
        tiles = [(_field_tile(image, learned, mask, max_length), f"{name}  {max_length:.0f} px/unit")]
        if exact is not None and exact_mask is not None:
            difference = ((learned.double() - exact[:, k]).norm(dim=0) * exact_mask).sum()
            size = (length * exact_mask).sum()
            error = f"{float(difference / size):.0%} off" if float(size) > 0 else "no motion"
            tiles.append((_field_tile(image, exact[:, k], exact_mask, max_length), f"exact ({error})"))
        rows.append(tiles)
    return rows


def _field_tile(image: Tensor, field: Tensor, mask: Tensor, max_length: float) -> RgbImage:
    """One joint's field over the dimmed picture: colours on the robot, arrows on top."""
    import cv2

    size = _tile_size(image)
    gray = np.repeat(_resize(_to_uint8(image), size).mean(axis=-1, keepdims=True), 3, axis=-1) * 0.4 + 150
    colors = _resize(flow_to_color(field, max_length), size, smooth=False).astype(np.float64)
    alpha = (
        _resize((mask.double().clamp(0, 1) * 255).cpu().numpy().astype(np.uint8), size, smooth=False)[..., None] / 255
    )
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


def _page(rows: Sequence[Sequence[Tile]], title: str) -> RgbImage:
    """Rows of captioned tiles on one sheet."""
    import cv2

    height, width = rows[0][0][0].shape[:2]
    columns = max(len(row) for row in rows)
    top = 28 if title else _GAP
    page = np.full(
        (top + len(rows) * (height + _CAPTION + _GAP), _GAP + columns * (width + _GAP), 3), _BACKGROUND, np.uint8
    )
    if title:
        cv2.putText(page, _ascii(title), (_GAP, 19), cv2.FONT_HERSHEY_SIMPLEX, 0.5, _TEXT_COLOR, 1, cv2.LINE_AA)
    for r, row in enumerate(rows):
        for c, (tile, caption) in enumerate(row):
            y, x = top + r * (height + _CAPTION + _GAP), _GAP + c * (width + _GAP)
            size = 0.38
            while size > 0.2 and cv2.getTextSize(_ascii(caption), cv2.FONT_HERSHEY_SIMPLEX, size, 1)[0][0] > width:
                size -= 0.02
            cv2.putText(page, _ascii(caption), (x, y + 12), cv2.FONT_HERSHEY_SIMPLEX, size, _TEXT_COLOR, 1, cv2.LINE_AA)
            page[y + _CAPTION : y + _CAPTION + height, x : x + width] = tile
    return page


# ---- small parts ----------------------------------------------------------------------------------------------------


def _mask(probe: FieldPrediction) -> Tensor:
    """Where the model sees the robot; everywhere for one that does not tell."""
    return probe.jacobian.new_ones(probe.jacobian.shape[-2:]) if probe.mask is None else probe.mask[0]


def _tile_size(image: Tensor) -> tuple[int, int]:
    """(width, height) of a tile of this picture [px]."""
    height, width = image.shape[-2:]
    scale = _TILE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resize(picture: Any, size: tuple[int, int], *, smooth: bool = True) -> Any:
    import cv2

    return cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST)


def _robust_max(length: Tensor, where: Tensor) -> float:
    """A length that few pixels of the robot exceed."""
    values = length.double()[where > _MASK_LEVEL]
    return max(float(values.quantile(0.95)), 1e-3) if len(values) else max(float(length.max()), 1e-3)


def _to_uint8(image: Tensor) -> RgbImage:
    return (image.detach().cpu().double().nan_to_num(0.0).clamp(0, 1).permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def _ascii(text: str) -> str:
    """The drawing font knows no other letters."""
    return text.encode("ascii", "replace").decode()
