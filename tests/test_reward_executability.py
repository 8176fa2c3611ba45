"""The executability reward: what it makes of good and bad videos, bad input, and as other software calls it."""

from __future__ import annotations

import gc
import inspect
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
from jidm.estimation.analytic_tracker import AnalyticTrackerOptions
from jidm.rewards import TERMS, ExecutabilityReward, TermScales, eva_reward
from jidm.rewards.integrations import VideoAlignReward, flow_grpo, trl
from jidm.rewards.terms import TermScale
from jidm.sim import Appearance, Scene
from jidm.sim.motion import smooth_motion
from jidm.video.io import write_video

pytest.importorskip("pybullet", reason="renders the robot: extra sim")

NAME, FRAMES, FPS, SIZE = "planar_finger_3", 8, 16.0, 96
GOOD = 5


@pytest.fixture(scope="module")
def scene():
    """Videos (N, T, 3, H, W), their true positions (N, T, n), and an uncalibrated reward."""
    robot = load_embodiment(NAME)
    camera = robot.camera().resized(SIZE, SIZE * 10 // 7)
    motions = [smooth_motion(robot, FRAMES, 1 / FPS, seed) for seed in range(GOOD)]
    with Scene(robot, appearance=Appearance.textured(), exact=False) as world:
        videos = [world.render_video(q, camera).rgb for q in motions]
    idm = JacobianIDM.from_embodiment(
        robot, camera=camera, limits="none", points=800, options=AnalyticTrackerOptions(refine="none")
    )
    frames = torch.from_numpy(np.stack(videos)).permute(0, 1, 4, 2, 3).float() / 255
    return frames, np.stack(motions), ExecutabilityReward(idm)


@pytest.fixture(scope="module")
def reward(scene) -> ExecutabilityReward:
    frames, q, bare = scene
    return bare.calibrated(frames, q0=q[:, 0], fps=FPS)


def swapped(video: Tensor) -> Tensor:
    """With a piece of the robot's half of the picture somewhere else from the middle on."""
    out = video.clone()
    out[FRAMES // 2 :] = out[FRAMES // 2 :].roll(SIZE // 4, -1)
    return out


def test_a_video_that_breaks_scores_below_every_good_one(scene, reward):
    frames, q, _ = scene
    good = reward(frames, q0=q[:, 0], fps=FPS)
    broken = list(reward.judge(torch.stack([swapped(v) for v in frames]), q0=q[:, 0], fps=FPS))
    assert good.shape == (GOOD,) and bool(good.isfinite().all())
    assert max(float(s.reward) for s in broken) < float(good.min())
    for score in broken:
        assert score.reasons and score.reasons[0].startswith(f"frame {FRAMES // 2}")
        assert 0 <= float(score.by_joint.sum()) <= 1 + 1e-9 and bool((score.by_joint >= 0).all())
        assert set(score.by_step) == set(reward.weights) == set(TERMS)


def test_without_terms_it_is_evas_reward(scene, reward):
    frames, q, bare = scene
    plain = ExecutabilityReward(bare.idm, reward.calibration, weights=dict.fromkeys(TERMS, 0.0))
    score = next(plain.score(frames[:1], q0=q[0, 0], fps=FPS))
    expected = eva_reward(score.motion.position, NAME, 1 / FPS).reward
    assert float(score.reward) == pytest.approx(float(expected), abs=1e-9) and score.reasons == ()


def test_the_same_video_scores_the_same_alone_in_a_batch_and_from_threads(scene, reward):
    frames, q, _ = scene
    together = reward(frames, q0=q[:, 0], fps=FPS)
    with ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(lambda k: float(reward(frames[k], q0=q[k, 0], fps=FPS)), range(GOOD)))
    assert alone == together.tolist()


def test_memory_does_not_grow_with_the_batch(scene, reward, monkeypatch):
    frames, q, _ = scene
    readings: list[weakref.ref] = []
    read = ExecutabilityReward._analyze

    def remembered(self, *args):
        assert sum(ref() is not None for ref in readings) <= 1
        reading, motion = read(self, *args)
        readings.append(weakref.ref(reading.residuals))
        return reading, motion

    monkeypatch.setattr(ExecutabilityReward, "_read", remembered)
    scores = list(reward.judge(frames, q0=q[:, 0], fps=FPS))
    del scores[:-1]
    gc.collect()
    assert len(readings) == GOOD and sum(ref() is not None for ref in readings) <= 1


def test_one_bad_video_spoils_no_other(scene, reward, tmp_path: Path):
    frames, q, _ = scene
    nan, short, other = frames[0].clone(), frames[0][:1], frames[0][..., : SIZE // 2]
    nan[3, 0, 0, 0] = math.nan
    videos = [frames[1], nan, short, other, str(tmp_path / "absent.mp4"), frames[2]]
    starts = [q[1, 0], q[0, 0], q[0, 0], q[0, 0], q[0, 0], q[2, 0]]
    scores = list(reward.judge(videos, q0=starts, fps=FPS))
    assert [s.problem is None for s in scores] == [True, False, False, False, False, True]
    assert "frames 3" in scores[1].problem and "1 frame" in scores[2].problem
    assert "camera" in scores[3].problem and "absent.mp4" in scores[4].problem
    assert [float(s.reward) for s in scores[1:5]] == [0.0] * 4
    assert [float(scores[0].reward), float(scores[5].reward)] == reward(frames[1:3], q0=q[1:3, 0], fps=FPS).tolist()


def test_calls_that_cannot_be_meant_are_refused(scene, reward):
    frames, q, bare = scene
    with pytest.raises(InputError, match="no scales yet"):
        bare.judge(frames, fps=FPS)
    with pytest.raises(VideoError, match="fps="):
        reward.judge(frames, q0=q[:, 0])
    with pytest.raises(InputError, match="2 poses for 5 videos"):
        reward.judge(frames, q0=q[:2, 0], fps=FPS)
    with pytest.raises(InputError, match="limits='none'"):
        ExecutabilityReward(JacobianIDM.from_embodiment(NAME))
    with pytest.raises(InputError, match="did you mean 'residual'"):
        ExecutabilityReward(bare.idm, weights={"residul": 1.0})
    with pytest.raises(InputError, match="at least 5 good videos"):
        bare.calibrated(frames[:4], q0=q[:4, 0], fps=FPS)


def test_a_calibration_can_be_kept(reward, tmp_path: Path):
    reward.calibration.save(tmp_path / "scales.json")
    again = TermScales.load(tmp_path / "scales.json")
    assert again == reward.calibration and again.num_videos == GOOD
    (tmp_path / "scales.json").write_text("{}")
    with pytest.raises(InputError, match="no calibration"):
        TermScales.load(tmp_path / "scales.json")
    with pytest.raises(InputError, match="jidm calibrate"):
        TermScales.load(tmp_path / "absent.json")


def test_a_scale_forgives_what_good_videos_do():
    scale = TermScale.from_tail_means([1.0, 2.0, 3.0, 4.0, 5.0], min_spread=0.1)
    assert (scale.median, scale.spread) == (3.0, pytest.approx(1.6))
    penalty = scale.penalty(torch.tensor([0.0, 3.0, 3.0 + 1.6, 3.0 + 3 * 1.6, 1e9]))
    assert penalty.tolist() == pytest.approx([0, 0, 1 - math.exp(-1 / 9), 1 - math.exp(-1), 1])
    assert TermScale.from_tail_means([0.0] * 5, min_spread=0.1).spread == 0.1


# ---- faces ----------------------------------------------------------------------------------------------------------


def as_flow_grpo_calls(factory, images, prompts, metadata):
    """flow_grpo's `multi_score`: how it makes a reward function, calls it and adds up what it gets."""
    code = inspect.unwrap(factory).__code__  # type checks of this test run wrap it
    fn = factory("cpu") if "device" in code.co_varnames else factory()
    scores, _ = fn(images, prompts, metadata)
    return [0.5 * score for score in scores]


def test_flow_grpo(scene, reward):
    frames, q, _ = scene
    expected = reward(frames, q0=q[:, 0], fps=FPS)
    prompts, metadata = ["reach"] * GOOD, [{"q0": x.tolist()} for x in q[:, 0]]
    got = as_flow_grpo_calls(flow_grpo(reward, fps=FPS), frames, prompts, metadata)
    assert got == pytest.approx((0.5 * expected).tolist())
    details, _ = flow_grpo(reward, fps=FPS, detailed=True)("cpu")(frames, prompts, metadata)
    assert details["avg"] == pytest.approx(expected.tolist()) and set(TERMS) < set(details)
    assert all(len(values) == GOOD and np.isfinite(values).all() for values in details.values())


def test_evas_fork(scene, reward):
    frames, q, _ = scene
    fn = flow_grpo(reward, fps=FPS, layout="BCTHW", value_range=(-1, 1))("cpu")
    scores, more = fn(frames.transpose(1, 2) * 2 - 1, ["reach"] * GOOD, [{"q0": x} for x in q[:, 0]])
    assert scores == pytest.approx(reward(frames, q0=q[:, 0], fps=FPS).tolist(), abs=1e-3) and more == {}


def test_group_with_a_bad_video_stays_finite(scene, reward):
    frames, q, _ = scene
    bad = frames.clone()
    bad[2] = math.nan
    scores, _ = flow_grpo(reward, fps=FPS)("cpu")(bad, ["reach"] * GOOD, [{"q0": x} for x in q[:, 0]])
    assert scores[2] == 0.0 and min(scores[:2] + scores[3:]) > 0


def test_flow_grpo_with_nothing_or_with_other_lengths(scene, reward):
    frames, *_ = scene
    fn = flow_grpo(reward, fps=FPS)("cpu")
    assert fn(frames[:0], [], []) == ([], {})
    with pytest.raises(InputError, match="5 videos came with 2 prompts"):
        fn(frames, ["a", "b"], [])
    with pytest.raises(InputError, match="1 entries of metadata"):
        fn(frames, ["reach"] * GOOD, [{}])


def test_dance_grpo(scene, tmp_path: Path):
    frames, q, bare = scene
    paths = []
    for k in range(GOOD):
        paths.append(str(tmp_path / f"{k}.mp4"))
        write_video(paths[-1], frames[k], fps=FPS)

    class ReadsFirst(JacobianIDM):  # the face passes no poses: its users' models read them off the picture
        def decode(self, video, *, q0=None, **how):
            return super().decode(video, q0=q[0, 0] if q0 is None else q0, **how)

    idm = ReadsFirst(bare.idm.embodiment, bare.idm.field, bare.idm.flow, limits="none", options=bare.idm.options)
    face = VideoAlignReward(ExecutabilityReward(idm).fit_scales(paths))
    out = face.reward([*paths[:1], str(tmp_path / "none.mp4")], ["a", "b"], use_norm=True)
    assert [set(x) >= {"VQ", "MQ", "TA", "Overall", "reasons", "problem"} for x in out] == [True, True]
    assert 0 < out[0]["MQ"] <= 10 and out[0]["problem"] is None
    assert out[1]["MQ"] == 0 and "none.mp4" in out[1]["problem"]


def test_trl(scene, reward):
    frames, q, _ = scene
    completions = [*frames[:2].numpy(), np.full_like(frames[0].numpy(), np.nan)]
    fn = trl(reward, fps=FPS)
    got = fn(prompts=["a"] * 3, completions=completions, q0=[q[0, 0], q[1, 0], q[2, 0]], trainer_state=None)
    assert got[:2] == pytest.approx(reward(frames[:2], q0=q[:2, 0], fps=FPS).tolist()) and got[2] is None
