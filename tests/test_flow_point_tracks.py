"""Point tracks: sparse motion is exact, and its rasterization is confined to the points' pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jidm.errors import InputError
from jidm.flow import PointTrackFlow, SparseFlow, as_flow_estimator

H, W = 20, 30


def tracks(*batch: int, frames: int = 5, points: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    start = torch.rand(*batch, 1, points, 2, generator=g) * torch.tensor([W - 9.0, H - 9.0]) + 4
    steps = torch.randn(*batch, frames - 1, points, 2, generator=g) * 0.5
    return torch.cat([start, start + steps.cumsum(-3)], -3), torch.rand(*batch, frames, points, generator=g) > 0.2


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_sparse_motion_is_the_difference_of_tracks(batch: tuple[int, ...]) -> None:
    xy, seen = tracks(*batch)
    source = PointTrackFlow(xy, seen)
    for start, stop in [(0, 1), (1, 4), (3, 0)]:
        got = source.sparse(start, stop)
        assert torch.equal(got.points, xy[..., start, :, :])
        assert torch.equal(
            got.points + got.displacement, xy[..., start, :, :] + (xy[..., stop, :, :] - xy[..., start, :, :])
        )
        assert torch.equal(got.weight > 0, seen[..., start, :] & seen[..., stop, :])


def test_rasterized_pixels_hold_their_points_only() -> None:
    xy, seen = tracks(2)
    video = torch.rand(2, 5, 3, H, W)
    answer = PointTrackFlow(xy.numpy(), seen.numpy())(video[:, :-1], video[:, 1:])
    assert answer.flow.shape == (2, 4, 2, H, W)
    expected: dict[tuple[int, int, int, int], list[Tensor]] = {}
    for b in range(2):
        for t in range(4):
            for n in range(12):
                if seen[b, t, n] and seen[b, t + 1, n]:
                    u, v = xy[b, t, n].round().int().tolist()
                    if 0 <= u < W and 0 <= v < H:
                        expected.setdefault((b, t, v, u), []).append(xy[b, t + 1, n] - xy[b, t, n])
    assert int((answer.weight > 0).sum()) == len(expected) > 40
    for (b, t, v, u), moved in expected.items():
        torch.testing.assert_close(answer.flow[b, t, :, v, u], torch.stack(moved).mean(0))
    assert (answer.flow[(answer.weight == 0)[:, :, None].expand_as(answer.flow)] == 0).all()


def test_points_that_share_a_pixel_are_averaged_by_weight() -> None:
    sparse = SparseFlow(
        torch.tensor([[3.2, 4.4], [2.8, 3.6], [-1.0, 2.0], [29.6, 2.0], [5.0, 19.4]]),
        torch.tensor([[1.0, 0.0], [4.0, 2.0], [9.0, 9.0], [9.0, 9.0], [0.0, -1.0]]),
        torch.tensor([1.0, 0.5, 1.0, 1.0, 0.25]),
    )
    got = sparse.rasterize(H, W)
    torch.testing.assert_close(got.flow[:, 4, 3], torch.tensor([2.0, 2.0 / 3]))
    assert got.weight[4, 3] == 1 and got.weight[19, 5] == 0.25 and int((got.weight > 0).sum()) == 2


def test_gradients_through_rasterization_are_finite() -> None:
    points, moved, weight = torch.tensor([[3.0, 4.0]]), torch.ones(1, 2, requires_grad=True), torch.zeros(1)
    SparseFlow(points, moved, weight).rasterize(H, W).flow.sum().backward()
    assert moved.grad is not None and moved.grad.isfinite().all()


def test_lost_points_and_non_finite_frames() -> None:
    xy, seen = tracks()
    seen = torch.ones_like(seen)
    xy[2, 3] = torch.nan
    source = PointTrackFlow(xy, seen[..., None].float())  # some trackers keep an axis of 1
    for pair in [(1, 2), (2, 3)]:
        got = source.sparse(*pair)
        assert got.displacement.isfinite().all() and got.weight[3] == 0 and got.weight.sum() == 11
    video = torch.rand(5, 3, H, W)
    video[0, 0, 0, 0] = torch.nan
    weight = source(video[:-1], video[1:]).weight.sum((-1, -2))
    assert weight[0] == 0 and (weight[1:] > 0).all()


def test_a_tracker_runs_per_pair_or_once_per_video() -> None:
    xy, seen = tracks(2)
    calls = []

    def tracker(video: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(tuple(video.shape))
        assert video.isfinite().all()
        frames = video.shape[-4]
        return xy[:, :frames], seen[:, :frames]

    video = torch.rand(2, 5, 3, H, W)
    once = PointTrackFlow.from_video(tracker, video)
    assert torch.equal(once.sparse(0, 4).displacement, PointTrackFlow(xy, seen).sparse(0, 4).displacement)
    pairwise = PointTrackFlow(tracker)
    video[1, 0] = torch.nan
    answer = pairwise(video[:, 0], video[:, 1])
    assert calls == [(2, 5, 3, H, W), (2, 2, 3, H, W)] and answer.flow.shape == (2, 2, H, W)
    assert (answer.weight[1] == 0).all() and torch.equal(
        answer.flow[0], PointTrackFlow(xy, seen).sparse(0, 1).rasterize(H, W).flow[0]
    )
    assert torch.equal(pairwise.between(video[:, 0], video[:, 1], 3, 4).flow, answer.flow)
    with pytest.raises(InputError, match="from_video"):
        pairwise.sparse(0, 1)


def test_one_pair_by_number() -> None:
    xy, seen = tracks()
    video = torch.rand(5, 3, H, W, dtype=torch.float64)
    source = as_flow_estimator(PointTrackFlow(xy, seen))
    assert isinstance(source, PointTrackFlow)
    got = source.between(video[1], video[3], 1, 3)
    assert got.flow.dtype == torch.float64
    torch.testing.assert_close(got.flow.float(), PointTrackFlow(xy, seen).sparse(1, 3).rasterize(H, W).flow)
    two = PointTrackFlow(xy[:2], seen[:2])
    assert torch.equal(two(video[0], video[1]).flow, two.between(video[0], video[1], 0, 1).flow)


def test_wrong_shapes_are_refused() -> None:
    xy, seen = tracks(2)
    for bad in [(xy[..., :1], seen), (xy, seen[..., :-1]), (3.0, None)]:
        with pytest.raises((InputError, TypeError)):
            PointTrackFlow(*bad)  # type: ignore[arg-type]
    source = PointTrackFlow(xy, seen)
    with pytest.raises(InputError, match="all 4 pairs at once"):
        source(torch.rand(3, H, W), torch.rand(3, H, W))
    with pytest.raises(InputError, match="not among the 5"):
        source.sparse(0, 5)
    with pytest.raises(InputError, match="batch"):
        source.between(torch.rand(3, H, W), torch.rand(3, H, W), 0, 1)
