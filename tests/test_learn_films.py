"""Episodes as they are decoded, and the uncertainty of steps that is calibrated on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recorded import numbered_dataset
from step_fields import ExactStepField, LinearMotion, config, numbered_frames, random_images

from jidm.estimation.learned_tracker import LearnedTracker, LearnedTrackerOptions, training_limits
from jidm.flow import Flow
from jidm.training.data.clips import Clip, iter_clips
from jidm.training.data.flow_cache import EstimatedFlow
from jidm.training.data.frame_store import load_frame_store
from jidm.training.data.pairs import PairSource
from jidm.training.losses import TrainableField


def recorded(tmp_path: Path, lengths: dict[int, int]):
    dataset = numbered_dataset(tmp_path, lengths)
    return load_frame_store(dataset, dataset.episode_indices, height=16, width=16, cache=tmp_path / "cache")


@pytest.mark.parametrize(("total", "shown"), [(1000, {3: 9, 7: 5}), (29, {3: 9, 7: 5}), (2, {3: 8, 7: 5})])
def test_films_are_the_beginnings_of_episodes(tmp_path: Path, total: int, shown: dict[int, int]) -> None:
    recording = recorded(tmp_path, {3: 18, 7: 9, 8: 2})
    made = list(iter_clips(PairSource(recording), 2, total))  # the third is too short for a step
    assert [len(x.frames) for x in made] == list(shown.values())
    for film, (index, count) in zip(made, shown.items()):
        assert film.dt == pytest.approx(2 / recording.fps) and film.flows == ()
        t = 2 * torch.arange(count)
        torch.testing.assert_close(film.frames[:, 1, 0, 0] * 255, t.float())
        torch.testing.assert_close(film.q[:, 1], index + t / 100 + 1)


def test_films_bring_what_was_measured_between_their_frames(tmp_path: Path) -> None:
    recording = recorded(tmp_path, {0: 12})
    flow = torch.arange(12.0).reshape(12, 1, 1, 1, 1, 1).expand(12, 2, 2, 2, 4, 4).clone()
    flow[:, :, 1] *= -1
    flow[:, 1] += 100
    estimated = EstimatedFlow((1, 3), flow.half(), torch.full((12, 2, 2, 4, 4), 51, dtype=torch.uint8))
    (film,) = iter_clips(PairSource(recording, estimated_flow=estimated), 3, 1000)
    ahead, back = film.flows
    assert len(film.frames) == 4 and ahead.flow.shape == (3, 2, 4, 4)
    torch.testing.assert_close(ahead.flow[:, 0, 0, 0] * 4, torch.tensor([100.0, 103.0, 106.0]))  # told in cells
    torch.testing.assert_close(back.flow[:, 0, 0, 0] * 4, torch.tensor([100.0, 97.0, 94.0]))
    torch.testing.assert_close(ahead.weight, torch.full((3, 4, 4), 0.2))


# ---- uncertainty -----------------------------------------------------------------------------------------------------


def some_films(flows: bool = False) -> list[Clip]:
    """Of pictures that hardly change, while the joints move: whatever is followed is wrong."""
    made = []
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        q = 0.01 * torch.randn(16, 2, generator=random).cumsum(0) / 16
        flow = (Flow(0.02 * torch.randn(15, 2, 16, 16, generator=random), torch.ones(15, 16, 16)),) * 2 if flows else ()
        frames = random_images(1, seed) + 0.001 * torch.randn(16, 1, 1, 1, generator=random)
        made.append(Clip(frames, q, 0.1, flow))
    return made


def deviations(field: TrainableField, film: Clip) -> torch.Tensor:
    follower = LearnedTracker(field, training_limits(field.config, field.delta_std), LearnedTrackerOptions())
    follower.start(film.frames[0], film.q[0])
    found = []
    for t, delta_q in enumerate(film.q.diff(dim=0)):
        step = follower.step(film.frames[t + 1], film.dt, *(flow[t] for flow in film.flows))
        if step.valid:
            found.append((step.delta_q - delta_q).abs() / step.covariance.diagonal().sqrt())
    return torch.stack(found)


@pytest.mark.parametrize("flows", [False, True])
def test_calibrated_on_films_intervals_hold_as_often_as_they_say(flows: bool) -> None:
    torch.manual_seed(0)
    field = TrainableField(config()).eval()
    made = some_films(flows)
    with torch.no_grad():
        before = torch.cat([deviations(field, x) for x in made])
        field.video_std_scale.fill_(5.0)  # whatever was there before does not count
        field.calibrate_video_uncertainty(made)
        after = torch.cat([deviations(field, x) for x in made])
    torch.testing.assert_close(after, before / field.video_std_scale, rtol=1e-3, atol=1e-6)
    at_68, at_95 = (after.quantile(s, dim=0) / z for s, z in ((0.6827, 1.0), (0.95, 1.96)))
    torch.testing.assert_close((at_68 * at_95).sqrt(), torch.ones(2), rtol=0.02, atol=0)


def test_a_few_steps_calibrate_nothing() -> None:
    torch.manual_seed(0)
    field, film = TrainableField(config()).eval(), some_films()[0]
    field.calibrate_video_uncertainty([Clip(film.frames[:9], film.q[:9], film.dt)])
    assert torch.equal(field.video_std_scale, torch.ones(2))


def test_lasting_errors_widen_what_is_told_and_change_no_step() -> None:
    field, frames = ExactStepField(LinearMotion()), numbered_frames(torch.zeros(3, 2, dtype=torch.float64))

    def steps() -> list:
        follower = LearnedTracker(field, training_limits(field.config, field.delta_std), LearnedTrackerOptions())
        follower.start(frames[0], torch.zeros(2).double())
        return [follower.step(frame, 0.1) for frame in frames[1:]]

    narrow = steps()
    field.video_std_scale = torch.tensor([2.0, 5.0]).double()
    wide = steps()
    for a, b in zip(narrow, wide):
        assert torch.equal(a.delta_q, b.delta_q) and torch.equal(a.position_covariance, b.position_covariance)
        torch.testing.assert_close(b.covariance, a.covariance * torch.tensor([[4.0, 10.0], [10.0, 25.0]]).double())
