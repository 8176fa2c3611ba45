"""Clips of episodes, and the uncertainty of steps in videos that is calibrated on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recorded import numbered_dataset
from step_fields import ExactStepField, LinearMotion, config, numbered_frames, random_images

from jidm.estimation.learned_measurement import LearnedMeasurement, LearnedOptions, training_limits
from jidm.estimation.tracker import Tracker
from jidm.flow import Flow
from jidm.training.data.clips import Clip, iter_clips
from jidm.training.data.flow_cache import EstimatedFlow
from jidm.training.data.frame_store import load_frame_store
from jidm.training.data.pairs import PairSource
from jidm.training.trainable_field import TrainableField


def recorded(tmp_path: Path, lengths: dict[int, int]):
    dataset = numbered_dataset(tmp_path, lengths)
    return load_frame_store(dataset, dataset.episode_indices, height=16, width=16, cache=tmp_path / "cache")


@pytest.mark.parametrize(("total", "shown"), [(1000, {3: 9, 7: 5}), (29, {3: 9, 7: 5}), (2, {3: 8, 7: 5})])
def test_clips_are_the_beginnings_of_episodes(tmp_path: Path, total: int, shown: dict[int, int]) -> None:
    store = recorded(tmp_path, {3: 18, 7: 9, 8: 2})
    clips = list(iter_clips(PairSource(store), 2, total))  # the third episode is too short for a step
    assert [len(x.frames) for x in clips] == list(shown.values())
    for clip, (index, count) in zip(clips, shown.items()):
        assert clip.dt == pytest.approx(2 / store.fps) and clip.flows == ()
        t = 2 * torch.arange(count)
        torch.testing.assert_close(clip.frames[:, 1, 0, 0] * 255, t.float())
        torch.testing.assert_close(clip.q[:, 1], index + t / 100 + 1)


def test_clips_have_the_flow_estimated_between_their_frames(tmp_path: Path) -> None:
    store = recorded(tmp_path, {0: 12})
    flow = torch.arange(12.0).reshape(12, 1, 1, 1, 1, 1).expand(12, 2, 2, 2, 4, 4).clone()
    flow[:, :, 1] *= -1
    flow[:, 1] += 100
    estimated = EstimatedFlow((1, 3), flow.half(), torch.full((12, 2, 2, 4, 4), 51, dtype=torch.uint8))
    (clip,) = iter_clips(PairSource(store, estimated_flow=estimated), 3, 1000)
    forward, backward = clip.flows
    assert len(clip.frames) == 4 and forward.flow.shape == (3, 2, 4, 4)
    torch.testing.assert_close(forward.flow[:, 0, 0, 0] * 4, torch.tensor([100.0, 103.0, 106.0]))  # in cells
    torch.testing.assert_close(backward.flow[:, 0, 0, 0] * 4, torch.tensor([100.0, 97.0, 94.0]))
    torch.testing.assert_close(forward.weight, torch.full((3, 4, 4), 0.2))


# ---- uncertainty -----------------------------------------------------------------------------------------------------


def static_clips(flows: bool = False) -> list[Clip]:
    """Clips whose images hardly change while the joints move: every tracked step is wrong."""
    clips = []
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        q = 0.01 * torch.randn(16, 2, generator=random).cumsum(0) / 16
        flow = (Flow(0.02 * torch.randn(15, 2, 16, 16, generator=random), torch.ones(15, 16, 16)),) * 2 if flows else ()
        frames = random_images(1, seed) + 0.001 * torch.randn(16, 1, 1, 1, generator=random)
        clips.append(Clip(frames, q, 0.1, flow))
    return clips


def deviations(field: TrainableField, clip: Clip) -> torch.Tensor:
    tracker = Tracker(LearnedMeasurement(field, LearnedOptions()), training_limits(field.config, field.delta_std))
    tracker.start(clip.frames[0], clip.q[0])
    found = []
    for t, delta_q in enumerate(clip.q.diff(dim=0)):
        step = tracker.step(clip.frames[t + 1], clip.dt, *(flow[t] for flow in clip.flows))
        if step.valid:
            found.append((step.delta_q - delta_q).abs() / step.covariance.diagonal().sqrt())
    return torch.stack(found)


@pytest.mark.parametrize("flows", [False, True])
def test_after_calibration_on_clips_intervals_have_their_coverage(flows: bool) -> None:
    torch.manual_seed(0)
    field = TrainableField(config()).eval()
    clips = static_clips(flows)
    with torch.no_grad():
        before = torch.cat([deviations(field, x) for x in clips])
        field.video_std_scale.fill_(5.0)  # the previous value does not matter
        field.calibrate_video_uncertainty(clips)
        after = torch.cat([deviations(field, x) for x in clips])
    torch.testing.assert_close(after, before / field.video_std_scale, rtol=1e-3, atol=1e-6)
    at_68, at_95 = (after.quantile(s, dim=0) / z for s, z in ((0.6827, 1.0), (0.95, 1.96)))
    torch.testing.assert_close((at_68 * at_95).sqrt(), torch.ones(2), rtol=0.02, atol=0)


def test_too_few_steps_leave_the_scale_at_one() -> None:
    torch.manual_seed(0)
    field, clip = TrainableField(config()).eval(), static_clips()[0]
    field.calibrate_video_uncertainty([Clip(clip.frames[:9], clip.q[:9], clip.dt)])
    assert torch.equal(field.video_std_scale, torch.ones(2))


def test_the_video_scale_widens_the_covariance_and_changes_no_step() -> None:
    field, frames = ExactStepField(LinearMotion()), numbered_frames(torch.zeros(3, 2, dtype=torch.float64))

    def steps() -> list:
        tracker = Tracker(LearnedMeasurement(field, LearnedOptions()), training_limits(field.config, field.delta_std))
        tracker.start(frames[0], torch.zeros(2).double())
        return [tracker.step(frame, 0.1) for frame in frames[1:]]

    narrow = steps()
    field.video_std_scale = torch.tensor([2.0, 5.0]).double()
    wide = steps()
    for a, b in zip(narrow, wide):
        assert torch.equal(a.delta_q, b.delta_q) and torch.equal(a.position_covariance, b.position_covariance)
        torch.testing.assert_close(b.covariance, a.covariance * torch.tensor([[4.0, 10.0], [10.0, 25.0]]).double())
