"""The field sheet: directions as colors, scales in captions, one tile per joint and field."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import pytest
import torch

from jidm.errors import InputError
from jidm.evaluation.field_metrics import FieldPrediction
from jidm.visualization import field_plots
from jidm.visualization.field_plots import field_sheet, write_field_sheet

NAMES = ("slow", "fast")


@pytest.fixture
def prediction() -> FieldPrediction:
    """Joint 1 moves everything right, joint 2 moves the left half down, on a robot that fills the middle."""
    jacobian = torch.zeros(1, 2, 2, 16, 16)
    jacobian[:, 0, 0], jacobian[:, 1, 1, :, :8] = 10.0, 40.0
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:12, 2:14] = 1.0
    flow = torch.zeros(1, 2, 16, 16)
    flow[:, 0] = 1.0
    return FieldPrediction(jacobian, mask, flow, mask, torch.tensor([[0.1, 0.0]]))


def hue(tile: np.ndarray, i: int, j: int) -> float:
    """Hue [deg] of a small patch around cell (i, j) of a 16 x 16 grid; the median excludes arrows."""
    side = tile.shape[0] / 16
    patch = tile[int(i * side) : int((i + 1) * side), int(j * side) : int((j + 1) * side)].reshape(-1, 3)
    return 360 * colorsys.rgb_to_hsv(*(np.median(patch, axis=0) / 255))[0]


def test_each_joint_has_the_color_of_its_direction(prediction: FieldPrediction):
    image = torch.rand(3, 64, 64)
    (right,), (down,) = field_plots._joint_tiles(image, prediction, NAMES, None, None)
    assert hue(right[0], 7, 4) == pytest.approx(0, abs=8) and hue(right[0], 7, 11) == pytest.approx(0, abs=8)
    assert hue(down[0], 7, 4) == pytest.approx(90, abs=8)
    assert right[1] == "slow  10 px/unit" and down[1] == "fast  40 px/unit"


def test_a_tile_is_gray_off_the_robot(prediction: FieldPrediction):
    tile = field_plots.draw_field(
        torch.rand(3, 64, 64), prediction.jacobian[0, :, 0], prediction.mask[0], 10.0, (200, 200)
    )
    corner = tile[:20, :20].astype(int)
    assert (corner.max(-1) == corner.min(-1)).all()


def test_the_exact_field_is_shown_with_the_error(prediction: FieldPrediction):
    image, exact = torch.rand(3, 64, 64), prediction.jacobian[0].double() / 0.8
    rows = field_plots._joint_tiles(image, prediction, NAMES, exact, prediction.mask[0].double())
    assert [len(row) for row in rows] == [2, 2]
    assert rows[0][1][1] == "exact (20% off)"
    none = torch.zeros_like(exact)
    assert (
        field_plots._joint_tiles(image, prediction, NAMES, none, prediction.mask[0].double())[0][1][1]
        == "exact (no motion)"
    )


def test_sheet_size_follows_its_tiles(prediction: FieldPrediction):
    image = torch.rand(3, 64, 64)
    alone = field_sheet(image, prediction, NAMES)
    beside = field_sheet(
        image,
        prediction,
        NAMES,
        exact=prediction.jacobian[0],
        exact_mask=prediction.mask[0],
        exact_flow=prediction.flow[0],
        title="episode 3",
    )
    assert alone.dtype == beside.dtype == np.uint8
    assert beside.shape[1] > alone.shape[1] and beside.shape[0] > alone.shape[0]
    assert len(np.unique(beside.reshape(-1, 3), axis=0)) > 50


def test_residual_is_the_flow_that_the_step_leaves(prediction: FieldPrediction):
    assert float(prediction.residual.abs().max()) == pytest.approx(0.0, abs=1e-6)
    wrong = FieldPrediction(
        prediction.jacobian, prediction.mask, prediction.flow, prediction.weight, torch.tensor([[0.0, 0.0]])
    )
    assert float(wrong.residual.max()) == pytest.approx(1.0) and float(wrong.residual[0, 0, 0]) == 0.0


def test_wrong_names_and_wrong_suffix_are_refused(prediction: FieldPrediction, tmp_path: Path):
    with pytest.raises(InputError, match="1 pairs of 2 joints and 1 names"):
        field_sheet(torch.rand(3, 64, 64), prediction, ("one",))
    write_field_sheet(tmp_path / "sheet.png", torch.rand(3, 64, 64), prediction, NAMES)
    with pytest.raises(InputError, match=r"use \.png or \.jpg"):
        write_field_sheet(tmp_path / "sheet.xyz", torch.rand(3, 64, 64), prediction, NAMES)
    assert [x.name for x in tmp_path.iterdir()] == ["sheet.png"]
