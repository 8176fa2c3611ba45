"""Laws of the agreement of a video with robot, camera and pose."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from rendered import FPS, HEIGHT, WIDTH, Clip, clip
from torch import Tensor

from jidm import Camera, JacobianIDM, JointMotion, load_embodiment
from jidm.errors import JidmWarning
from jidm.estimation.agreement import MIN_SCORE, Agreement, RunningComparison, standard_score
from jidm.estimation.contour_agreement import ContourAgreement
from jidm.estimation.mask_agreement import MaskAgreement
from jidm.fields.analytic import AnalyticField
from jidm.video.pyramid import BrightnessPyramid

FRAMES = 10


def panda() -> Clip:
    return clip("panda", FRAMES)


@cache
def field() -> AnalyticField:
    return AnalyticField(panda().robot, panda().camera, points=1500, occluders=8000, contour_points=30000)


def agreement(on: AnalyticField, q: np.ndarray, frames: Tensor) -> Agreement:
    """Of a whole video with given positions."""
    found = ContourAgreement(on, WIDTH)
    for pose, frame in zip(torch.from_numpy(q), frames, strict=True):
        found.update(pose, on.visible_contour(pose), BrightnessPyramid.from_frame(frame))
    return found.value


def turned(camera: Camera, degrees: float) -> Camera:
    """A camera that is turned about its vertical axis."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]], dtype=torch.float64)
    return replace(camera, T_camera_base=turn @ camera.T_camera_base)


def test_the_right_setting_agrees() -> None:
    found = agreement(field(), panda().q, panda().frames)
    assert found.frames == FRAMES and found.score > MIN_SCORE and found.verdict == ""


@pytest.mark.parametrize("degrees", [-3.0, 3.0])
def test_a_camera_that_is_off_by_three_degrees_contradicts(degrees: float) -> None:
    found = agreement(field().with_camera(turned(panda().camera, degrees)), panda().q, panda().frames)
    assert found.unrelated and "camera" in found.verdict


def test_a_start_that_is_off_contradicts() -> None:
    off = 0.1 * np.array([1, -1, 1, -1, 1, -1, 1, 0])
    found = agreement(field(), panda().q + off, panda().frames)
    assert found.pose is not None and found.pose < MIN_SCORE and "q0" in found.verdict


def test_pictures_of_something_else_contradict() -> None:
    noise = torch.rand(FRAMES, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    sideways = torch.nn.functional.interpolate(panda().frames.rot90(1, (2, 3)), (HEIGHT, WIDTH), mode="area")
    for frames in (noise, sideways, torch.zeros_like(noise), torch.full_like(noise, 0.5)):
        assert agreement(field(), panda().q, frames).unrelated


def test_the_score_is_that_of_the_mean_frame_whatever_its_contrast() -> None:
    g = torch.Generator().manual_seed(1)
    slopes = 0.1 + torch.rand(5, 9, generator=g)
    slopes = slopes / slopes[:, 1:].mean(-1, keepdim=True)
    running = RunningComparison()
    for k, x in enumerate(slopes):
        assert running.update((k + 1) * x) == pytest.approx(standard_score(x), rel=1e-5)
    assert running.score == pytest.approx(standard_score(slopes.mean(0)), rel=1e-5) and running.frames == 5


def test_the_running_mean_forgets() -> None:
    running, good = RunningComparison(), torch.tensor([2.0, 0.9, 1.0, 1.1])
    for _ in range(100):
        running.update(good)
    assert running.score == pytest.approx(standard_score(good), rel=1e-4)
    for _ in range(100):
        running.update(torch.tensor([1.0, 0.9, 1.0, 1.1]))
    assert abs(running.score) < 0.1


def test_a_mask_agrees_where_its_border_lies_on_an_edge() -> None:
    column = torch.arange(32.0)
    mask = torch.where(column < 16, 6.0, -6.0).expand(1, 32, 32)
    image = torch.where(torch.arange(64) < 32, 0.8, 0.2).expand(1, 1, 64, 64)
    on, beside, flat = MaskAgreement(), MaskAgreement(), MaskAgreement()
    assert (on.update(image, mask) or 0) > 2 and not on.value.unrelated
    assert (beside.update(image, mask.roll(6, -1)) or 0) < 1 and beside.value.unrelated
    assert flat.update(torch.full_like(image, 0.5), mask) == 0 and flat.value.unrelated


def test_a_mask_without_border_or_knowledge_tells_nothing() -> None:
    found = MaskAgreement()
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert found.update(image, torch.full((1, 32, 32), 6.0)) is None  # the robot is everywhere
    assert found.update(image, torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0)) - 2) is None
    assert found.value.verdict == "" and not found.value.unrelated


# ---- decoding -------------------------------------------------------------------------------------------------------


def decode(idm: JacobianIDM, frames: Tensor, q0: np.ndarray) -> JointMotion:
    return idm.decode(frames.float(), q0=q0, fps=FPS, layout="TCHW", value_range=(0, 1))


@cache
def idm() -> JacobianIDM:
    return JacobianIDM.from_embodiment(panda().robot, camera=panda().camera, points=1500)


def test_a_right_video_has_no_verdict(recwarn: pytest.WarningsRecorder) -> None:
    motion = decode(idm(), panda().frames, panda().q[0])
    assert motion.verdict == "" and bool(motion.valid.all()) and float(motion.agreement[-1]) > MIN_SCORE
    assert not [x for x in recwarn if issubclass(x.category, JidmWarning)]


def test_another_robot_is_not_decoded_and_named() -> None:
    robot = load_embodiment("ur5")
    other = JacobianIDM.from_embodiment(robot, camera=robot.camera().resized(WIDTH, HEIGHT), points=1500)
    with pytest.warns(JidmWarning, match="does not look like this robot"):
        motion = decode(other, panda().frames[:4], np.array(robot.home))
    assert not bool(motion.valid.any()) and "check the robot" in motion.verdict
    assert float(motion.delta_q.abs().max()) == 0


def test_every_video_of_a_batch_has_its_own_verdict() -> None:
    frames = torch.stack([panda().frames[:3], panda().frames[:3].flip(-1)]).float()
    with pytest.warns(JidmWarning, match="^video 1: this does not look like"):
        motion = idm().decode(frames, q0=panda().q[0], fps=FPS, layout="BTCHW", value_range=(0, 1))
    assert motion.verdict[0] == "" and "mirrored" in motion.verdict[1]
    assert motion.valid.any(-1).tolist() == [True, False]


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_uniform_frames_move_nothing(level: float) -> None:
    frames = panda().frames.clone()
    frames[4:7] = level
    motion = decode(idm(), frames, panda().q[0])
    assert motion.valid.tolist() == [True, True, True, False, False, False, False, True, True]
    assert float((motion.position[4:7] - motion.position[3]).abs().max()) == 0
    assert float((motion.position[-1] - torch.from_numpy(panda().q[-1])).abs()[:7].max()) < 0.1
