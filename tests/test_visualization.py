"""Plots and overlays show the numbers: curves, bands, shades, flow colors, unexplained flow and the robot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jidm.errors import InputError
from jidm.estimation.result import JointMotion, stack
from jidm.fields.analytic import AnalyticField
from jidm.flow import Flow
from jidm.robot.registry import load_embodiment
from jidm.video.io import read_video
from jidm.visualization import image as images
from jidm.visualization import overlay, plot_motion, write_overlay
from jidm.visualization.plot import draw_motion
from jidm.visualization.sheet import tile_sheet

FRAMES, HEIGHT, WIDTH = 6, 48, 64


@pytest.fixture(scope="module")
def field() -> AnalyticField:
    robot = load_embodiment("planar_finger_2")
    return AnalyticField(robot, robot.camera().resized(WIDTH, HEIGHT), points=1500, occluders=6000)


@pytest.fixture
def motion(field: AnalyticField) -> JointMotion:
    """Two joints, step 2 not valid, joint 2 not observable in step 4."""
    n, steps = 2, FRAMES - 1
    time = torch.arange(FRAMES, dtype=torch.float64) / 10
    delta_q = torch.linspace(0.01, 0.05, steps * n, dtype=torch.float64).reshape(steps, n)
    position = torch.cat([torch.zeros(1, n, dtype=torch.float64), delta_q.cumsum(0)])
    valid = torch.ones(steps, dtype=torch.bool)
    valid[2] = False
    observable = torch.ones(steps, n, dtype=torch.bool)
    observable[4, 1] = False
    std = torch.tensor([0.002, 0.004], dtype=torch.float64)
    return JointMotion(
        joint_names=field.joint_names,
        joint_types=("revolute", "revolute"),
        time=time,
        delta_q=delta_q,
        velocity=delta_q * 10,
        position=position,
        position_std=std.expand(FRAMES, n),
        covariance=torch.diag(std**2).expand(steps, n, n),
        residual=torch.zeros(steps, dtype=torch.float64),
        explained_fraction=torch.ones(steps, dtype=torch.float64),
        agreement=torch.zeros(steps, dtype=torch.float64),
        observable=observable,
        valid=valid,
    )


class StillFlow:
    """Measures no motion, everywhere with full confidence."""

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> Flow:
        return Flow(torch.zeros(2, *first.shape[-2:]), torch.ones(first.shape[-2:]))


# ---- the plot ---------------------------------------------------------------------------------------------------------


def test_plot_draws_the_numbers(motion: JointMotion):
    truth = motion.position.numpy() + 0.01
    axes = np.array(draw_motion(motion, truth=truth).axes).reshape(2, 2)
    for k in range(2):
        for axis, x, y, true, std in (
            (axes[k, 0], (motion.time[1:] + motion.time[:-1]) / 2, motion.velocity, motion.velocity, (0.02, 0.04)),
            (axes[k, 1], motion.time, motion.position, motion.position + 0.01, (0.002, 0.004)),
        ):
            dashed, decoded = axis.get_lines()
            np.testing.assert_allclose(decoded.get_xydata(), torch.stack([x, y[:, k]], -1), atol=1e-12)
            np.testing.assert_allclose(dashed.get_ydata(), true[:, k], atol=1e-12)
            band = axis.collections[0].get_paths()[0].vertices
            at_start = band[np.isclose(band[:, 0], float(x[0])), 1]
            assert np.ptp(at_start) == pytest.approx(4 * std[k], rel=1e-6)  # two standard deviations to either side


def test_plot_shades_invalid_and_unobservable_steps(motion: JointMotion):
    axes = np.array(draw_motion(motion).axes).reshape(2, 2)
    shades = [[sorted(round(p.get_x(), 6) for p in axis.patches) for axis in row] for row in axes]
    assert shades == [[[0.2], [0.2]], [[0.2, 0.4], [0.2, 0.4]]]  # step 2 for all, step 4 for the second joint
    assert not any(
        axis.patches
        for axis in draw_motion(replace(motion, valid=motion.valid | True, observable=motion.observable | True)).axes
    )


def test_a_blind_joint_does_not_flatten_its_curve(motion: JointMotion):
    blind = replace(motion, position_std=motion.position_std * 1e4)
    low, high = draw_motion(blind).axes[1].get_ylim()
    assert high - low < 4 * float(np.ptp(motion.position[:, 0].numpy()))


def test_plot_is_a_valid_image_file(motion: JointMotion, tmp_path: Path):
    from PIL import Image

    plot_motion(motion, tmp_path / "plot.png", title="title")
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]
    with Image.open(tmp_path / "plot.png") as image:
        image.verify()
    plot_motion(motion, tmp_path / "plot.svg")


def test_plot_survives_infinite_deviation(motion: JointMotion, tmp_path: Path):
    wild = replace(motion, position_std=torch.full_like(motion.position_std, torch.inf))
    plot_motion(wild, tmp_path / "plot.png")


def test_batches_and_wrong_truth_are_refused(motion: JointMotion, field: AnalyticField, tmp_path: Path):
    with pytest.raises(InputError, match="one video is drawn at a time"):
        plot_motion(stack([motion, motion], torch.Size((2,))), tmp_path / "plot.png")
    with pytest.raises(InputError, match="one video is drawn at a time"):
        write_overlay(tmp_path / "o.mp4", [], stack([motion, motion], torch.Size((2,))), field, StillFlow(), fps=10)
    with pytest.raises(InputError, match="truth must have the shape"):
        plot_motion(motion, tmp_path / "plot.png", truth=np.zeros((3, 2)))


def test_several_motions_share_a_plot(motion: JointMotion, tmp_path: Path):
    poor = replace(motion, velocity=0.5 * motion.velocity)
    figure = draw_motion({"good": motion, "poor": poor}, truth=motion.position, joints=motion.joint_names[1:])
    assert len(figure.axes) == 2
    truth, good, half = figure.axes[0].get_lines()
    np.testing.assert_allclose(good.get_ydata(), motion.velocity[:, 1])
    np.testing.assert_allclose(half.get_ydata(), motion.velocity[:, 1] / 2)
    np.testing.assert_allclose(truth.get_ydata(), motion.velocity[:, 1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["good", "poor", "truth"]
    plot_motion({"good": motion, "poor": poor}, tmp_path / "curves.png", truth=motion.position, title="episode 3")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    with pytest.raises(InputError, match="of one video"):
        draw_motion({"good": motion, "short": motion[:3]})


def test_limits_are_drawn_and_visible(motion: JointMotion):
    lower, upper, speed = np.array([-2.0, -np.inf]), np.array([2.0, np.inf]), np.array([3.0, 4.0])
    axes = np.array(draw_motion(motion, limits=(lower, upper, speed)).axes).reshape(2, 2)
    for axis, levels in ((axes[0, 0], [-3, 3]), (axes[0, 1], [-2, 2]), (axes[1, 0], [-4, 4]), (axes[1, 1], [])):
        drawn = [line.get_ydata()[0] for line in axis.get_lines()[1:]]
        assert drawn == levels
        assert all(axis.get_ylim()[0] < level < axis.get_ylim()[1] for level in levels)


# ---- sheets -----------------------------------------------------------------------------------------------------------


def test_a_sheet_places_tiles_and_shrinks_captions():
    tile = np.full((20, 30, 3), 100, np.uint8)
    sheet = tile_sheet([[(tile, "a caption that is much too long for a tile"), (tile, "b")], [(tile, "")]])
    assert sheet.shape == (6 + 2 * (18 + 20 + 6), 6 + 2 * (30 + 6), 3)
    assert (
        (sheet[24:44, 6:36] == 100).all() and (sheet[24:44, 42:72] == 100).all() and (sheet[68:88, 6:36] == 100).all()
    )
    assert (sheet[6:24, :40] < 200).any() and (sheet[50:68] == 250).all()
    with pytest.raises(InputError, match="at least one image"):
        tile_sheet([])


# ---- the panels -------------------------------------------------------------------------------------------------------


def test_flow_colors_show_direction_and_speed():
    def color(u: float, v: float) -> np.ndarray:
        return images.flow_to_color(torch.tensor([float(u), float(v)])[:, None, None].expand(2, 3, 3), 4.0)[
            1, 1
        ].astype(int)

    np.testing.assert_array_equal(color(0, 0), [255, 255, 255])
    np.testing.assert_array_equal(color(4, 0), [255, 0, 0])
    np.testing.assert_array_equal(color(-4, 0), [0, 255, 255])
    assert np.abs(color(0, 4) - color(0, -4)).max() > 200
    half, full, double = color(2, 0), color(4, 0), color(8, 0)
    assert half[1] > full[1] and double[0] < full[0]  # paler when slow, darker beyond the scale
    np.testing.assert_array_equal(color(float("nan"), 0), [255, 255, 255])


def test_heatmap_gets_brighter_with_the_value():
    levels = images.heatmap(torch.tensor([[0.0, 0.5, 1.0, 5.0, float("nan")]]), 1.0).astype(int).sum(-1)[0]
    assert levels[0] < 20 and levels[0] < levels[1] < levels[2] == levels[3] and levels[4] == levels[0]


def test_explained_flow_is_removed_and_background_flow_stays(field: AnalyticField):
    q = torch.tensor(load_embodiment("planar_finger_2").home).float()
    delta_q = torch.tensor([0.03, -0.02])
    jacobian, mask = field.dense(q, HEIGHT, WIDTH)
    flow = torch.einsum("cnhw,n->chw", jacobian, delta_q)
    on = mask > 0
    assert flow.norm(dim=0)[on].max() > 0.3  # not trivial
    full = torch.ones(HEIGHT, WIDTH)
    assert overlay.unexplained_flow(flow, full, field, q, delta_q).max() < 1e-4
    moving = flow + torch.tensor([0.6, 0.8])[:, None, None] * ~on
    rest = overlay.unexplained_flow(moving, full, field, q, delta_q)
    torch.testing.assert_close(rest, (~on).float())
    assert overlay.unexplained_flow(moving, 0 * full, field, q, delta_q).max() == 0


def test_unexplained_is_in_pixels_of_the_video(field: AnalyticField):
    """The same motion at eight times the resolution, above the resolution of the residual grid."""
    q, delta_q = torch.zeros(2), torch.zeros(2)
    flow = torch.ones(2, 8 * HEIGHT, 8 * WIDTH)
    torch.testing.assert_close(overlay.unexplained_flow(flow, flow[0], field, q, delta_q), 2**0.5 * flow[0])
    big = AnalyticField(field.embodiment, field.camera.resized(8 * WIDTH, 8 * HEIGHT), points=1500)
    step = torch.tensor([0.02, 0.0])
    rows, columns = overlay.residual_grid(8 * HEIGHT, 8 * WIDTH)
    assert columns < 8 * WIDTH and rows / columns == HEIGHT / WIDTH
    jacobian, mask = big.dense(q, rows, columns)
    explained = torch.einsum("cnhw,n->chw", jacobian, step) * (8 * WIDTH / columns)
    explained = torch.nn.functional.interpolate(explained[None], size=flow.shape[-2:], mode="nearest")[0]
    assert mask.sum() > 100
    assert overlay.unexplained_flow(explained, flow[0], big, q, step).max() < 1e-3


def test_points_are_drawn_on_the_robot(field: AnalyticField):
    q = torch.tensor(load_embodiment("planar_finger_2").home).float()
    black = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    drawn = overlay.draw_points(black, field, q).any(axis=-1)
    _, mask = field.dense(q, HEIGHT, WIDTH)
    robot = mask.numpy() > 0
    grown = torch.nn.functional.max_pool2d(mask[None, None], 3, 1, 1)[0, 0].numpy() > 0
    assert (drawn & ~grown).sum() == 0
    assert (drawn & robot).sum() > 0.6 * robot.sum()  # dots
    assert not overlay.draw_points(black, field, q * torch.nan).any()


def test_blend_shows_the_robot_and_its_outline():
    image = np.full((20, 30, 3), 100, np.uint8)
    drawn, mask = np.full((20, 30, 3), 255, np.uint8), np.zeros((20, 30), bool)
    mask[5:15, 10:20] = True
    blended = overlay.blend(image, drawn, mask)
    assert (blended[0, 0] == 45).all() and (blended[10, 15] > 100).all()
    assert (blended == (255, 170, 40)).all(-1).sum() >= 36
    twice = overlay.blend(image, drawn.repeat(2, 0).repeat(2, 1), mask.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(twice[10, 15], blended[10, 15])


def test_overlay_video_has_four_panels_for_every_step(motion: JointMotion, field: AnalyticField, tmp_path: Path):
    frames = torch.rand(FRAMES, 3, HEIGHT, WIDTH)
    frames[3, :, 5] = torch.nan  # a frame with NaN is drawn
    write_overlay(tmp_path / "o.mp4", iter(frames), motion, field, StillFlow(), fps=10)
    video = read_video(tmp_path / "o.mp4")
    assert (len(video), video.fps) == (FRAMES - 1, pytest.approx(10))
    panels = list(overlay.overlay_frames(frames, motion, field, StillFlow()))
    height, width = panels[0].shape[:2]
    assert width == 640 and height == 2 * (240 + 20)
    assert not np.array_equal(panels[0][:20], panels[2][:20])  # the caption says that step 2 is not valid
    requested = []

    def draw(t: int) -> tuple[np.ndarray, np.ndarray]:
        requested.append(t)
        return np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.zeros((HEIGHT, WIDTH), bool)

    list(overlay.overlay_frames(frames, motion, field, StillFlow(), render_robot=draw))
    assert requested == list(range(FRAMES - 1))


def test_video_longer_than_the_motion_is_refused(motion: JointMotion, field: AnalyticField):
    with pytest.raises(InputError, match="more frames than the 6"):
        list(overlay.overlay_frames(torch.rand(FRAMES + 1, 3, HEIGHT, WIDTH), motion, field, StillFlow()))
