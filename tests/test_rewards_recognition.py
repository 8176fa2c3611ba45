"""Recognition of the robot by keypoints, and scales of the reward for each length of video."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis

from jidm.errors import InputError
from jidm.rewards import TermScales
from jidm.rewards.recognition import Recognition
from jidm.rewards.term_scales import fitted_lengths, not_tighter_when_shorter
from jidm.rewards.terms import TermScale

M = 6


def clips(count: int, frames: int, seed: int, shift: float = 0.0) -> list[torch.Tensor]:
    """Keypoints of videos: correlated, and each coordinate at another place and of another size."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(M, M)) * np.linspace(0.01, 0.3, M)[:, None]
    return [
        torch.from_numpy(np.linspace(-0.5, 0.5, M) + rng.normal(shift, 1, (frames, M)) @ mixing.T) for _ in range(count)
    ]


def test_the_distance_is_that_of_mahalanobis() -> None:
    good, video = clips(40, 200, seed=0), clips(1, 5, seed=1, shift=1.5)[0]
    frames = torch.cat(good).numpy()
    inverse = np.linalg.inv(np.cov(frames.T, bias=True))
    expected = np.mean([mahalanobis(x, frames.mean(0), inverse) for x in video.numpy()]) / M**0.5
    assert float(Recognition.fit(good).distance(video)) == pytest.approx(expected, rel=0.05)


def test_good_videos_are_recognized_at_any_length_and_others_are_not() -> None:
    recognition = Recognition.fit(clips(20, 25, seed=0))
    for frames in (6, 25, 100):
        assert max(float(recognition.doubt(x)) for x in clips(10, frames, seed=1)) < 0.3
        assert min(float(recognition.doubt(x)) for x in clips(10, frames, seed=2, shift=3)) > 0.99


@settings(max_examples=10, deadline=None)
@given(st.floats(0.5, 20), st.floats(-3, 3))
def test_units_and_origin_of_the_coordinates_do_not_matter(factor: float, offset: float) -> None:
    good, video = clips(8, 50, seed=3), clips(1, 5, seed=4, shift=1)[0]
    scale = torch.linspace(1, factor, M, dtype=torch.float64)
    moved = Recognition.fit([x * scale + offset for x in good])
    assert float(moved.distance(video * scale + offset)) == pytest.approx(
        float(Recognition.fit(good).distance(video)), rel=0.1
    )


def test_fewer_frames_than_coordinates_still_give_a_finite_distance() -> None:
    recognition = Recognition.fit(clips(5, 1, seed=0))
    assert np.isfinite(float(recognition.distance(clips(1, 5, seed=1)[0])))
    with pytest.raises(InputError, match="at least 5 good videos"):
        Recognition.fit(clips(4, 25, seed=0))


def test_the_doubt_has_gradients() -> None:
    recognition = Recognition.fit(clips(20, 25, seed=0))
    video = clips(1, 5, seed=1, shift=1.5)[0].requires_grad_()
    assert torch.autograd.gradcheck(recognition.doubt, video)


def test_lengths_ascend_by_two_up_to_that_of_the_videos() -> None:
    assert fitted_lengths(25) == (6, 12, 25) and fitted_lengths(50) == (6, 12, 24, 50)
    assert fitted_lengths(8) == (8,) and fitted_lengths(4) == (4,)


def test_scales_between_lengths_are_interpolated() -> None:
    terms = {"jump": (TermScale(1.0, 0.1), TermScale(3.0, 0.5))}
    scales = TermScales((6, 24), terms, (10.0, 20.0), None, 5, "tracked", {})
    assert scales.term_scale("jump", 6) == terms["jump"][0] == scales.term_scale("jump", 4)
    assert scales.term_scale("jump", 24) == terms["jump"][1] == scales.term_scale("jump", 100)
    middle = scales.term_scale("jump", 12)  # half way in the logarithm
    assert (middle.median, middle.spread) == (pytest.approx(2.0), pytest.approx(0.3))
    assert scales.median_eva_penalty(12) == pytest.approx(15.0)


def test_a_short_video_is_held_to_no_tighter_a_spread_than_a_longer_one() -> None:
    fitted = [TermScale(0.0, 0.1), TermScale(1.0, 0.5), TermScale(2.0, 0.3)]
    assert not_tighter_when_shorter(fitted) == (TermScale(0.0, 0.5), TermScale(1.0, 0.5), TermScale(2.0, 0.3))
