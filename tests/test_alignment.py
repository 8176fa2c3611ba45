"""Coarse-to-fine alignment of one frame: a single moving link, and a start that blurred levels would lose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rendered import HEIGHT, WIDTH
from torch import Tensor

from jidm import AnalyticField, Camera, Embodiment, load_embodiment
from jidm.estimation.alignment import AlignOptions, align
from jidm.estimation.factors.contour import ContourMemory
from jidm.estimation.factors.photometric import SurfaceAppearance
from jidm.sim import Appearance, Scene
from jidm.video.pyramid import BrightnessPyramid


def camera_of(robot: Embodiment) -> Camera:
    return robot.camera().resized(WIDTH, HEIGHT)


def render(robot: Embodiment, q: np.ndarray) -> tuple[Tensor, Tensor]:
    """Frames (T, 3, H, W) in [0, 1] and the robot's masks (T, H, W)."""
    with Scene(robot, seed=0, appearance=Appearance.plain()) as scene:
        video = scene.render_video(q, camera_of(robot))
    return torch.from_numpy(video.rgb).movedim(-1, 1).double() / 255, torch.from_numpy(video.link >= 0)


def field_of(robot: Embodiment) -> AnalyticField:
    return AnalyticField(robot, camera_of(robot), points=1500, occluders=10000, contour_points=5000)


@pytest.mark.parametrize(("name", "size"), [("planar_finger_3", 0.2), ("planar_finger_5", 0.1)])
def test_one_link_that_moves_alone_is_tracked(name: str, size: float) -> None:
    """All other links fit perfectly, and on their residual scale every point of the moving link is an outlier."""
    robot = load_embodiment(name)
    q = np.stack([robot.home, robot.home])
    q[1, -1] += size
    frames, _ = render(robot, q)
    before, after = (BrightnessPyramid.from_frame(frame) for frame in frames)
    first, truth = torch.from_numpy(q)
    field = field_of(robot)
    pose, contours = field.at(first), ContourMemory(field)
    contours.update(pose, before, known_pose=True)
    at_rest = (first, torch.full_like(first, 0.05))
    found = align(
        after, [SurfaceAppearance.of(pose, before)], [first], contours=contours, bounds=(first - 1, first + 1),
        prior=at_rest, options=AlignOptions(),
    )  # fmt: skip
    assert float((found.q - truth).abs().max()) < 0.01


def test_a_start_that_is_right_is_kept_where_a_moving_background_misleads_blurred_levels() -> None:
    """Aligned on the blurred levels alone, the pose would end .97 rad away."""
    robot = load_embodiment("planar_finger_3")
    frames, mask = render(robot, robot.home[None])
    v, u = torch.meshgrid(torch.arange(HEIGHT).double(), torch.arange(WIDTH).double(), indexing="ij")

    def with_background(shift: float) -> BrightnessPyramid:
        background = 0.5 + 0.5 * torch.sin((u - shift) / 12) * torch.sin((v + shift) / 12)
        return BrightnessPyramid.from_frame(torch.where(mask[0], frames[0], background))

    q = torch.from_numpy(robot.home.copy())
    field, wide = field_of(robot), torch.ones(3).double()
    reference = SurfaceAppearance.of(field.at(q), with_background(0.0))
    found = align(
        with_background(18.0), [reference], [q], bounds=(q - wide, q + wide), prior=(q, wide), options=AlignOptions()
    )
    assert float((found.q - q).abs().max()) < 0.02
