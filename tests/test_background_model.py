"""The background model: known where the robot was ever absent, and a foreground score from color and its variance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jidm.estimation.background_model import BackgroundModel, dilated_robot_mask
from jidm.video.pyramid import BrightnessPyramid


def edge_image(at: float, contrast: float = 0.6) -> BrightnessPyramid:
    """Dark left of u = at [px], bright right of it, with a slightly blurred edge."""
    row = 0.2 + contrast * ((torch.arange(100).double() - at) / 0.8).sigmoid()
    return BrightnessPyramid.from_frame(row.expand(3, 80, 100))


def robot_between(left: float, right: float) -> Tensor:
    """Points of a robot that covers the columns left to right of an image of 80 x 100 pixels."""
    return torch.cartesian_prod(torch.arange(left, right + 0.5), torch.arange(80.0)).double()


def uniform(level: float) -> Tensor:
    return torch.full((3, 80, 100), level).double()


def model_of(frames: list[Tensor]) -> BackgroundModel:
    background = BackgroundModel()
    for frame in frames:
        background.update(robot_between(45, 54), BrightnessPyramid.from_frame(frame))
    return background


def score(background: BackgroundModel, frame: Tensor) -> Tensor:
    found = background.foreground_score(BrightnessPyramid.from_frame(frame))
    assert found is not None
    return found


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradient(background: BackgroundModel, uv: Tensor) -> tuple[Tensor, Tensor]:
    found = background.gradient(uv)
    assert found is not None
    return found


def test_background_is_known_where_the_robot_was_ever_absent_and_adapts_to_the_light() -> None:
    frame, uv = edge_image(70.0), torch.tensor([[30.0, 40.0], [45.0, 40.0], [71.0, 40.0]]).double()
    background = BackgroundModel()
    assert background.gradient(uv) is None
    background.update(robot_between(20, 50), frame)
    _, known = gradient(background, uv)
    assert known.tolist() == [0, 0, 1]
    background.update(robot_between(40, 50), frame)
    before, known = gradient(background, uv)
    assert known.tolist() == [1, 0, 1]  # the robot left the first position
    torch.testing.assert_close(before[2], frame.sample(0, uv)[1][2])
    darker = edge_image(70.0, 0.3)
    for _ in range(20):
        background.update(robot_between(0, 99), darker)  # everything is covered, so nothing is updated
    torch.testing.assert_close(gradient(background, uv)[0], before)
    for _ in range(20):
        background.update(robot_between(40, 50), darker)
    torch.testing.assert_close(gradient(background, uv)[0][2], darker.sample(0, uv)[1][2], atol=1e-3, rtol=0)


def test_the_robot_mask_is_dilated_and_ignores_points_outside_the_image() -> None:
    points = torch.tensor([[50.2, 40.4], [-3.0, 10.0], [99.0, 79.0]]).double()
    mask = dilated_robot_mask(points, 80, 100)
    assert mask.shape == (80, 100)
    assert mask[40, 50] and mask[40, 52] and not mask[40, 55]
    assert mask[78, 98]
    assert not mask[10, :20].any()


# ---- foreground score ------------------------------------------------------------------------------------------------


def test_foreground_differs_in_color_from_a_known_background() -> None:
    assert BackgroundModel().foreground_score(BrightnessPyramid.from_frame(uniform(0.4))) is None
    background = model_of([uniform(0.4)])
    frame = uniform(0.4)
    frame[:, :, 10:20] = torch.tensor([0.4, 0.6, 0.3]).double()[:, None, None]
    found = score(background, frame)
    assert float(found[:, 11:19].min()) > 0.95
    assert float(found[:, 25:40].max()) < -0.7
    assert float(found[:, 46:54].abs().max()) == 0.0  # covered by the robot from the first frame on


def test_color_separates_what_has_equal_brightness() -> None:
    green, red = torch.tensor([0.2, 0.5, 0.2]).double(), torch.tensor([0.2, 0.5, 0.2]).double()
    red[0] += 0.114 / 0.299 * 0.4
    red[2] -= 0.4 * 0.5
    red[1] += (0.114 * 0.2 - 0.299 * (red[0] - 0.2)) / 0.587  # both have the same luma
    luma = torch.tensor([0.299, 0.587, 0.114]).double()
    assert float((luma * (red - green)).sum()) == pytest.approx(0.0, abs=1e-6)
    background = model_of([green[:, None, None].expand(3, 80, 100)])
    found = score(background, red[:, None, None].expand(3, 80, 100))
    assert float(found[:, :30].min()) > 0.8


def test_pixels_that_always_change_have_no_foreground() -> None:
    flickering = [uniform(0.4 + 0.15 * (-1) ** k) for k in range(12)]
    assert float(score(model_of(flickering), uniform(0.55))[:, :30].max()) < 0
    assert float(score(model_of([uniform(0.4)] * 12), uniform(0.55))[:, :30].min()) > 0.95
