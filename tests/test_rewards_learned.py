"""The reward with a learned field: no initial pose, no camera, and gradients with respect to the pixels."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jidm import Camera, Embodiment, JacobianIDM, load_embodiment
from jidm.bundled import bundled_folder
from jidm.checkpoint import REWARD_SCALES, load_checkpoint
from jidm.errors import InputError
from jidm.rewards import ExecutabilityReward
from jidm.sim import Appearance, Scene
from jidm.sim.motion import random_motion

pytest.importorskip("pybullet", reason="renders the robot: extra sim")

NAME, FRAMES, FPS, GOOD = "finger-5", 6, 16.0, 5


def render_videos(robot: Embodiment, camera: Camera, count: int) -> Tensor:
    """(count, T, 3, H, W) of random motions."""
    motions = [random_motion(robot, FRAMES, 1 / FPS, seed) for seed in range(count)]
    with Scene(robot, appearance=Appearance.textured("picture"), exact=False) as renderer:
        videos = np.stack([renderer.render_video(q, camera).rgb for q in motions])
    return torch.from_numpy(videos).permute(0, 1, 4, 2, 3).double() / 255


@pytest.fixture(scope="module")
def videos() -> Tensor:
    checkpoint = load_checkpoint(NAME)
    camera = Camera.from_dict(checkpoint.training_camera())
    return render_videos(load_embodiment(checkpoint.training["recipe"]["embodiment"]), camera, GOOD)


@pytest.fixture(scope="module")
def differentiable(videos) -> ExecutabilityReward:
    idm = JacobianIDM.from_pretrained(NAME, limits="none")
    idm.field.double()  # for finite differences
    return ExecutabilityReward(idm, differentiable=True).fit_scales(videos, fps=FPS)


@pytest.fixture(scope="module")
def tracked(videos) -> ExecutabilityReward:
    idm = JacobianIDM.from_pretrained(NAME, limits="none")
    return ExecutabilityReward(idm).fit_scales(videos, fps=FPS)


def test_gradients_are_those_of_finite_differences(videos, differentiable):
    for video in videos[:2]:
        at = video.clone().requires_grad_()
        (slope,) = torch.autograd.grad(differentiable(at, fps=FPS).sum(), at)
        direction = slope / slope.norm()
        ahead, behind = (float(differentiable(video + h * direction, fps=FPS)) for h in (1e-4, -1e-4))
        assert (ahead - behind) / 2e-4 == pytest.approx(float(slope.norm()), rel=0.01)
        assert float(slope.norm()) > 0.1


def test_eight_threads_agree_with_one(videos, tracked):
    batched = tracked(videos, fps=FPS)
    with ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(lambda k: float(tracked(videos[k % GOOD], fps=FPS)), range(8)))
    assert alone == [float(batched[k % GOOD]) for k in range(8)]


def test_other_sizes_are_letterboxed(videos, tracked):
    wide = torch.nn.functional.pad(videos[0], (40, 40, 0, 0), mode="replicate")
    assert 0 < float(tracked(wide, fps=FPS)) <= 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_rewards(videos, tracked):
    on_gpu = JacobianIDM.from_pretrained(NAME, limits="none", device="cuda")
    rewards = ExecutabilityReward(on_gpu, tracked.scales)(videos.cuda(), fps=FPS).cpu()
    assert torch.allclose(rewards, tracked(videos, fps=FPS), atol=0.05)


def test_tracked_rewards_have_no_gradient(videos, tracked):
    at = videos[0].clone().requires_grad_()
    assert not tracked(at, fps=FPS).requires_grad


def test_gradients_are_refused_where_there_are_none():
    robot = load_embodiment("planar_finger_3")
    with pytest.raises(InputError, match="learned field"):
        ExecutabilityReward(JacobianIDM.from_embodiment(robot, limits="none"), differentiable=True)


def test_scales_of_another_mode_or_decoder_are_refused(tracked, differentiable):
    with pytest.raises(InputError, match="fit them again"):
        ExecutabilityReward(tracked.idm, tracked.scales, differentiable=True)
    one = tracked.scales
    partial = replace(one, terms={"residual": one.terms["residual"]})
    with pytest.raises(InputError, match="lack appearance, shape"):
        ExecutabilityReward(tracked.idm, partial)
    elsewhere = replace(one, provenance={**one.provenance, "checkpoint": "another"})
    with pytest.raises(InputError, match="fitted with checkpoint another"):
        ExecutabilityReward(tracked.idm, elsewhere)


def test_scales_are_found_in_the_checkpoints_folder(tracked, tmp_path: Path):
    folder = shutil.copytree(bundled_folder("checkpoints") / NAME, tmp_path / "mine")
    (folder / REWARD_SCALES).unlink(missing_ok=True)
    with pytest.raises(InputError, match="jidm fit-scales"):
        ExecutabilityReward.from_pretrained(folder)
    tracked.scales.save(folder / REWARD_SCALES)
    assert ExecutabilityReward.from_pretrained(folder).scales == tracked.scales


def test_what_is_not_this_robot_scores_below_every_good_video(videos, tracked):
    other = load_embodiment("planar_finger_2")
    camera = other.camera().resized(videos.shape[-1], videos.shape[-2])
    noise = torch.rand(videos[0].shape, generator=torch.Generator().manual_seed(0))
    wrong = {
        "noise": noise.double(),
        "gray": torch.full_like(videos[0], 0.5),
        "another robot": render_videos(other, camera, 1)[0],
        "mirrored": videos[0].flip(-1),
        "upside down": videos[0].flip(-2),
    }
    good = tracked(videos, fps=FPS)
    for name, video in wrong.items():
        score = next(tracked.score(video[None], fps=FPS))
        assert 0 < float(score.reward) < float(good.min()), name
        assert score.doubt > 0.9 and score.reasons[0] == "the pictures do not look like this robot", name
        assert all(penalty >= score.doubt - 1e-6 for penalty in score.penalties.values()), name


def test_the_doubt_does_not_come_from_the_length(videos, tracked):
    for frames in (4, FRAMES):
        assert all(score.doubt < 0.3 for score in tracked.score(videos[:, :frames], fps=FPS))
