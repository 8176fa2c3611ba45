"""FlowSource: precomputed flow, an estimator, or none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jidm.errors import InputError
from jidm.flow import Flow, FlowSource, PrecomputedFlow, split_flow

FRAMES = torch.rand(4, 3, 24, 48, generator=torch.Generator().manual_seed(0))


class Constant:
    """Flow of one pixel to the right at any size; records the sizes."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, first: Tensor, second: Tensor) -> Flow:
        self.sizes.append((first.shape[-2], first.shape[-1]))
        flow = torch.zeros_like(first[:2])
        flow[0] = 1.0
        return Flow(flow, torch.ones_like(first[0]))


def test_flow_measured_at_lower_resolution_is_in_pixels_of_the_video() -> None:
    estimator = Constant()
    (flow,) = FlowSource(estimator, None, resolution=16).between(FRAMES[0], FRAMES[1], 0, 1)
    assert estimator.sizes == [(8, 16)]
    assert flow.flow.shape == (2, 24, 48)
    torch.testing.assert_close(flow.flow[0], torch.full((24, 48), 3.0))
    torch.testing.assert_close(flow.flow[1], torch.zeros(24, 48))


def test_frames_are_never_enlarged_to_measure_flow() -> None:
    estimator = Constant()
    FlowSource(estimator, None, resolution=100).between(FRAMES[0], FRAMES[1], 0, 1)
    assert estimator.sizes == [(24, 48)]


def test_precomputed_flow_serves_consecutive_frames_and_the_estimator_gaps() -> None:
    given = torch.arange(3.0)[:, None, None, None].expand(3, 2, 24, 48).clone()
    motion = FlowSource(Constant(), given)
    assert float(motion.between(FRAMES[1], FRAMES[2], 1, 2)[0].flow.mean()) == 1.0
    across = motion.between(FRAMES[0], FRAMES[2], 0, 2)[0]
    assert float(across.flow[0].mean()) == 1.0 and float(across.flow[1].mean()) == 0.0
    assert FlowSource(None, given).between(FRAMES[0], FRAMES[2], 0, 2) == ()
    (nothing,) = FlowSource(PrecomputedFlow(given), None).between(FRAMES[0], FRAMES[2], 0, 2)
    assert float(nothing.weight.sum()) == 0.0


def test_backward_flow_is_measured_on_request() -> None:
    estimator = Constant()
    assert len(FlowSource(estimator, None, bidirectional=True).between(FRAMES[0], FRAMES[1], 0, 1)) == 2
    assert FlowSource(None, None, bidirectional=True).between(FRAMES[0], FRAMES[1], 0, 1) == ()


def test_precomputed_flow_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"flow must be \(T-1, 2, 24, 48\)"):
        FlowSource(None, torch.zeros(3, 2, 24, 40)).between(FRAMES[0], FRAMES[1], 0, 1)
    with pytest.raises(InputError, match="at step 3"):
        FlowSource(None, torch.zeros(3, 2, 24, 48)).between(FRAMES[0], FRAMES[1], 3, 4)


def test_flow_of_a_batch_is_split_by_video() -> None:
    shape = torch.Size((2, 3, 4, 3, 24, 48))
    flow = torch.rand(2, 3, 3, 2, 24, 48, generator=torch.Generator().manual_seed(1))
    weighted = Flow(flow, flow[..., 0, :, :])
    for k, (plain, split) in enumerate(zip(split_flow(flow, shape), split_flow(weighted, shape), strict=True)):
        assert isinstance(plain, Tensor) and isinstance(split, Flow)
        assert torch.equal(plain, flow[k // 3, k % 3])
        assert torch.equal(split.weight, flow[k // 3, k % 3, :, 0])
    assert list(split_flow(None, shape)) == [None] * 6
    with pytest.raises(InputError, match=r"flow must be \(2, 3, 3, 2, 24, 48\)"):
        split_flow(flow[:, :, :2], shape)
