"""The executability reward: good and bad videos, and bad input."""

from __future__ import annotations

import gc
import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jidm import JacobianIDM, load_embodiment
from jidm.errors import InputError, VideoError
from jidm.estimation.analytic_measurement import AnalyticOptions
from jidm.rewards import TERMS, ExecutabilityReward, TermScales, eva_reward
from jidm.rewards.terms import TermScale
from jidm.sim import Appearance, Scene
from jidm.sim.motion import random_motion

pytest.importorskip("pybullet", reason="renders the robot: extra sim")

NAME, FRAMES, FPS, SIZE = "planar_finger_3", 8, 16.0, 96
GOOD = 5


@pytest.fixture(scope="module")
def scene():
    """Videos (N, T, 3, H, W), their true positions (N, T, n), and a reward without scales."""
    robot = load_embodiment(NAME)
    camera = robot.camera().resized(SIZE, SIZE * 10 // 7)
    motions = [random_motion(robot, FRAMES, 1 / FPS, seed) for seed in range(GOOD)]
    with Scene(robot, appearance=Appearance.textured(), exact=False) as renderer:
        videos = [renderer.render_video(q, camera).rgb for q in motions]
    idm = JacobianIDM.from_embodiment(
        robot, camera=camera, limits="none", points=800, options=AnalyticOptions(refine="none")
    )
    frames = torch.from_numpy(np.stack(videos)).permute(0, 1, 4, 2, 3).float() / 255
    return frames, np.stack(motions), ExecutabilityReward(idm)


@pytest.fixture(scope="module")
def reward(scene) -> ExecutabilityReward:
    frames, q, unscaled = scene
    return unscaled.fit_scales(frames, q0=q[:, 0], fps=FPS)


def with_jump(video: Tensor) -> Tensor:
    """The video, shifted sideways from its middle frame on."""
    out = video.clone()
    out[FRAMES // 2 :] = out[FRAMES // 2 :].roll(SIZE // 4, -1)
    return out


def test_a_video_with_a_jump_scores_below_every_good_one(scene, reward):
    frames, q, _ = scene
    good = reward(frames, q0=q[:, 0], fps=FPS)
    broken = list(reward.score(torch.stack([with_jump(v) for v in frames]), q0=q[:, 0], fps=FPS))
    assert good.shape == (GOOD,) and bool(good.isfinite().all())
    assert max(float(s.reward) for s in broken) < float(good.min())
    for score in broken:
        assert score.reasons and score.reasons[0].startswith(f"frame {FRAMES // 2}")
        assert 0 <= float(score.by_joint.sum()) <= 1 + 1e-9 and bool((score.by_joint >= 0).all())
        assert set(score.by_step) == set(reward.weights) == set(TERMS)


def test_without_terms_it_is_evas_reward(scene, reward):
    frames, q, unscaled = scene
    plain = ExecutabilityReward(unscaled.idm, reward.scales, weights=dict.fromkeys(TERMS, 0.0))
    score = next(plain.score(frames[:1], q0=q[0, 0], fps=FPS))
    expected = eva_reward(score.motion.position, NAME, 1 / FPS).reward
    assert float(score.reward) == pytest.approx(float(expected), abs=1e-9) and score.reasons == ()


def test_a_video_scores_the_same_alone_in_a_batch_and_in_threads(scene, reward):
    frames, q, _ = scene
    batched = reward(frames, q0=q[:, 0], fps=FPS)
    with ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(lambda k: float(reward(frames[k], q0=q[k, 0], fps=FPS)), range(GOOD)))
    assert alone == batched.tolist()


def test_memory_does_not_grow_with_the_batch(scene, reward, monkeypatch):
    frames, q, _ = scene
    residuals: list[weakref.ref] = []
    analyze = ExecutabilityReward.analyze

    def tracked(self, video, **options):
        assert sum(ref() is not None for ref in residuals) <= 1
        analysis = analyze(self, video, **options)
        residuals.append(weakref.ref(analysis.residuals))
        return analysis

    monkeypatch.setattr(ExecutabilityReward, "analyze", tracked)
    scores = list(reward.score(frames, q0=q[:, 0], fps=FPS))
    del scores[:-1]
    gc.collect()
    assert len(residuals) == GOOD and sum(ref() is not None for ref in residuals) <= 1


def test_a_bad_video_affects_no_other(scene, reward, tmp_path: Path):
    frames, q, _ = scene
    nan, short, other = frames[0].clone(), frames[0][:1], frames[0][..., : SIZE // 2]
    nan[3, 0, 0, 0] = math.nan
    videos = [frames[1], nan, short, other, str(tmp_path / "absent.mp4"), frames[2]]
    starts = [q[1, 0], q[0, 0], q[0, 0], q[0, 0], q[0, 0], q[2, 0]]
    scores = list(reward.score(videos, q0=starts, fps=FPS))
    assert [s.problem is None for s in scores] == [True, False, False, False, False, True]
    assert "frames 3" in scores[1].problem and "1 frame" in scores[2].problem
    assert "camera" in scores[3].problem and "absent.mp4" in scores[4].problem
    assert [float(s.reward) for s in scores[1:5]] == [0.0] * 4
    assert [float(scores[0].reward), float(scores[5].reward)] == reward(frames[1:3], q0=q[1:3, 0], fps=FPS).tolist()


def test_wrong_calls_are_refused(scene, reward):
    frames, q, unscaled = scene
    with pytest.raises(InputError, match="no scales yet"):
        unscaled.score(frames, fps=FPS)
    with pytest.raises(VideoError, match="fps="):
        reward.score(frames, q0=q[:, 0])
    with pytest.raises(InputError, match="2 poses for 5 videos"):
        reward.score(frames, q0=q[:2, 0], fps=FPS)
    with pytest.raises(InputError, match="limits='none'"):
        ExecutabilityReward(JacobianIDM.from_embodiment(NAME))
    with pytest.raises(InputError, match="did you mean 'residual'"):
        ExecutabilityReward(unscaled.idm, weights={"residul": 1.0})
    with pytest.raises(InputError, match="at least 5 good videos"):
        unscaled.fit_scales(frames[:4], q0=q[:4, 0], fps=FPS)


def test_scales_round_trip(reward, tmp_path: Path):
    reward.scales.save(tmp_path / "scales.json")
    again = TermScales.load(tmp_path / "scales.json")
    assert again == reward.scales and again.num_videos == GOOD
    (tmp_path / "scales.json").write_text("{}")
    with pytest.raises(InputError, match="no scales"):
        TermScales.load(tmp_path / "scales.json")
    with pytest.raises(InputError, match="jidm fit-scales"):
        TermScales.load(tmp_path / "absent.json")


def test_a_scale_gives_good_videos_no_penalty():
    scale = TermScale.from_tail_means([1.0, 2.0, 3.0, 4.0, 5.0], min_spread=0.1)
    assert (scale.median, scale.spread) == (3.0, pytest.approx(1.6))
    penalty = scale.penalty(torch.tensor([0.0, 3.0, 3.0 + 1.6, 3.0 + 3 * 1.6, 1e9]))
    assert penalty.tolist() == pytest.approx([0, 0, 1 - math.exp(-1 / 9), 1 - math.exp(-1), 1])
    assert TermScale.from_tail_means([0.0] * 5, min_spread=0.1).spread == 0.1
