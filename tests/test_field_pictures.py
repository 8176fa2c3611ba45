"""The contact sheet shows what it is given: directions as colours, scales in captions, one tile per joint and field."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import pytest
import torch
from written_poses import PixelPoseModel, encode_poses

from jidm.errors import InputError
from jidm.evaluation.field_metrics import FieldPrediction
from jidm.visualization import field_pictures
from jidm.visualization.field_pictures import field_sheet, plot_decoded, write_field_sheet

NAMES = ("slow", "fast")


@pytest.fixture
def seen() -> FieldPrediction:
    """Joint 1 moves everything right, joint 2 moves the left half down, on a robot that fills the middle."""
    jacobian = torch.zeros(1, 2, 2, 16, 16)
    jacobian[:, 0, 0], jacobian[:, 1, 1, :, :8] = 10.0, 40.0
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:12, 2:14] = 1.0
    flow = torch.zeros(1, 2, 16, 16)
    flow[:, 0] = 1.0
    return FieldPrediction(jacobian, mask, flow, mask, torch.tensor([[0.1, 0.0]]))


def hue(tile: np.ndarray, i: int, j: int) -> float:
    """Hue in degrees of a small patch around cell (i, j) of a 16 x 16 grid, arrows left out by the median."""
    side = tile.shape[0] / 16
    patch = tile[int(i * side) : int((i + 1) * side), int(j * side) : int((j + 1) * side)].reshape(-1, 3)
    return 360 * colorsys.rgb_to_hsv(*(np.median(patch, axis=0) / 255))[0]


def test_each_joint_has_the_colour_of_its_direction(seen: FieldPrediction):
    image = torch.rand(3, 64, 64)
    (right,), (down,) = field_pictures._joint_tiles(image, seen, NAMES, None, None)
    assert hue(right[0], 7, 4) == pytest.approx(0, abs=8) and hue(right[0], 7, 11) == pytest.approx(0, abs=8)
    assert hue(down[0], 7, 4) == pytest.approx(90, abs=8)
    assert right[1] == "slow  10 px/unit" and down[1] == "fast  40 px/unit"


def test_a_tile_is_grey_off_the_robot(seen: FieldPrediction):
    tile = field_pictures._field_tile(torch.rand(3, 64, 64), seen.jacobian[0, :, 0], seen.mask[0], 10.0)
    corner = tile[:20, :20].astype(int)
    assert (corner.max(-1) == corner.min(-1)).all()


def test_the_exact_field_stands_beside_with_the_error(seen: FieldPrediction):
    image, exact = torch.rand(3, 64, 64), seen.jacobian[0].double() / 0.8
    rows = field_pictures._joint_tiles(image, seen, NAMES, exact, seen.mask[0].double())
    assert [len(row) for row in rows] == [2, 2]
    assert rows[0][1][1] == "exact (20% off)"
    none = torch.zeros_like(exact)
    assert field_pictures._joint_tiles(image, seen, NAMES, none, seen.mask[0].double())[0][1][1] == "exact (no motion)"


def test_sheet_size_follows_its_tiles(seen: FieldPrediction):
    image = torch.rand(3, 64, 64)
    alone = field_sheet(image, seen, NAMES)
    beside = field_sheet(
        image, seen, NAMES, exact=seen.jacobian[0], exact_mask=seen.mask[0], exact_flow=seen.flow[0], title="episode 3"
    )
    assert alone.dtype == beside.dtype == np.uint8
    assert beside.shape[1] > alone.shape[1] and beside.shape[0] > alone.shape[0]
    assert len(np.unique(beside.reshape(-1, 3), axis=0)) > 50


def test_residual_is_what_the_step_leaves(seen: FieldPrediction):
    assert float(seen.residual.abs().max()) == pytest.approx(0.0, abs=1e-6)
    wrong = FieldPrediction(seen.jacobian, seen.mask, seen.flow, seen.weight, torch.tensor([[0.0, 0.0]]))
    assert float(wrong.residual.max()) == pytest.approx(1.0) and float(wrong.residual[0, 0, 0]) == 0.0


def test_wrong_names_and_wrong_suffix_are_refused(seen: FieldPrediction, tmp_path: Path):
    with pytest.raises(InputError, match="1 pairs of 2 joints and 1 names"):
        field_sheet(torch.rand(3, 64, 64), seen, ("one",))
    write_field_sheet(tmp_path / "sheet.png", torch.rand(3, 64, 64), seen, NAMES)
    assert [x.name for x in tmp_path.iterdir()] == ["sheet.png"]


def test_curves_of_several_models_in_one_picture(tmp_path: Path):
    q = np.cumsum(np.full((12, 2), 0.01), axis=0)
    video = torch.from_numpy(encode_poses(q, 16, 16)).movedim(-1, 1).float() / 255
    motions = {
        name: PixelPoseModel(NAMES, scale=scale).decode(video, q0=torch.from_numpy(q[0]), fps=10.0)
        for name, scale in (("good", 1.0), ("poor", 0.5))
    }
    plot_decoded(tmp_path / "curves.png", motions, q, joints=("fast",), title="episode 3")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    figure = field_pictures._draw_decoded(motions, q, NAMES, "")
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert np.allclose(lines["good"], 0.1, atol=1e-4) and np.allclose(lines["poor"], 0.05, atol=1e-4)
    assert np.allclose(lines["truth"], 0.1)
    with pytest.raises(InputError, match="of one video"):
        plot_decoded(tmp_path / "no.png", motions, q[:5])
