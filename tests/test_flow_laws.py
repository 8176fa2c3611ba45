"""Laws of optical flow, for the default estimator and the shared arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import material
from torch import Tensor

from jidm.camera.model import Camera
from jidm.errors import InputError
from jidm.flow import (
    DisFlow,
    Flow,
    FlowEstimator,
    PrecomputedFlow,
    as_flow_estimator,
    forward_backward_weight,
    read_flow,
    resize_flow,
)
from jidm.flow.base import check_pair
from jidm.video.io import read_video


def texture(seed: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """A smooth random image as a function of continuous position: waves of 6 to 30 px, no interpolation."""
    g = torch.Generator().manual_seed(seed)
    angle, wave = torch.rand(40, generator=g) * 6.28, 6 + 24 * torch.rand(40, generator=g)
    phase, gain = torch.rand(3, 40, generator=g) * 6.28, torch.rand(3, 40, generator=g) * 0.05

    def look(u: Tensor, v: Tensor) -> Tensor:
        along = (u[..., None] * angle.cos() + v[..., None] * angle.sin()) * 6.2832 / wave
        return torch.stack([(0.5 + (gain[c] * (along + phase[c]).sin()).sum(-1)).clamp(0, 1) for c in range(3)], -3)

    return look


def grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    v, u = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    return u, v


def shifted_pair(
    shift: tuple[float, float], seed: int = 0, height: int = 96, width: int = 128
) -> tuple[Tensor, Tensor]:
    """Two frames between which everything moves by `shift` px (right, down)."""
    look, (u, v) = texture(seed), grid(height, width)
    return look(u, v), look(u - shift[0], v - shift[1])


def inner(x: Tensor, margin: int = 12) -> Tensor:
    return x[..., margin:-margin, margin:-margin]


SHIFTS = [(0.5, 0.0), (0.0, -0.5), (0.3, 0.7), (-2.4, 1.3), (5.6, -4.2)]


@pytest.mark.parametrize("shift", SHIFTS)
def test_known_translation_is_recovered(shift: tuple[float, float]) -> None:
    answer = DisFlow()(*shifted_pair(shift))
    error = (inner(answer.flow) - torch.tensor(shift)[:, None, None]).norm(dim=0)
    assert error.mean() < 0.1 and error.median() < 0.05
    assert inner(answer.weight).mean() > 0.2


def test_swapping_frames_negates() -> None:
    a, b = shifted_pair((1.6, -0.7))
    there, back = DisFlow()(a, b), DisFlow()(b, a)
    assert inner(there.flow + back.flow).norm(dim=0).mean() < 0.1


def test_still_frames_do_not_move() -> None:
    a, _ = shifted_pair((0, 0))
    answer = DisFlow()(a, a)
    assert answer.flow.abs().max() < 0.02 and inner(answer.weight).mean() > 0.2


def test_flat_pictures_tell_nothing() -> None:
    answer = DisFlow()(torch.full((3, 40, 50), 0.7), torch.full((3, 40, 50), 0.7))
    assert answer.weight.max() == 0 and answer.flow.isfinite().all()


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 2), (0,)])
def test_a_batch_is_a_loop_of_singles(batch: tuple[int, ...]) -> None:
    count = int(np.prod(batch))
    pairs = [shifted_pair((0.4 * k, 0.2), seed=k, height=41, width=53) for k in range(max(count, 1))]
    first, second = (torch.stack([p[i] for p in pairs])[:count].reshape(*batch, 3, 41, 53) for i in (0, 1))
    answer = DisFlow()(first, second)
    assert answer.flow.shape == (*batch, 2, 41, 53) and answer.weight.shape == (*batch, 41, 53)
    for k, (flow, weight) in enumerate(zip(answer.flow.reshape(-1, 2, 41, 53), answer.weight.reshape(-1, 41, 53))):
        single = DisFlow()(*pairs[k])
        assert torch.equal(flow, single.flow) and torch.equal(weight, single.weight)


def test_same_answer_every_time_and_from_any_number_of_threads() -> None:
    import cv2

    pair = shifted_pair((1.2, 0.8), height=120, width=160)
    threads = cv2.getNumThreads()
    try:
        answers = []
        for count in (1, 2, 4, 2):
            cv2.setNumThreads(count)
            answers.append(DisFlow()(*pair))
    finally:
        cv2.setNumThreads(threads)
    for other in answers[1:]:
        assert torch.equal(answers[0].flow, other.flow) and torch.equal(answers[0].weight, other.weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("estimator", [DisFlow(), DisFlow(texture=0)])
def test_a_non_finite_frame_affects_only_its_own_item(bad: float, estimator: DisFlow) -> None:
    pairs = [shifted_pair((0.5, 0.5), seed=k) for k in range(3)]
    first, second = (torch.stack([p[i] for p in pairs]) for i in (0, 1))
    whole = estimator(first, second)
    second[1, 0, 5, 5] = bad
    answer = estimator(first, second)
    assert (answer.flow[1] == 0).all() and (answer.weight[1] == 0).all()
    for k in (0, 2):
        assert torch.equal(answer.flow[k], whole.flow[k]) and torch.equal(answer.weight[k], whole.weight[k])


def test_type_is_kept_and_input_is_not_touched() -> None:
    a, b = (x.double() for x in shifted_pair((1, 0)))
    before = a.clone()
    answer = DisFlow()(a, b)
    assert answer.flow.dtype == answer.weight.dtype == torch.float64 and torch.equal(a, before)
    torch.testing.assert_close(answer.flow.float(), DisFlow()(a.float(), b.float()).flow, atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (9, 40), (40, 9), (17, 15)])
def test_small_and_odd_sizes(size: tuple[int, int]) -> None:
    a, b = shifted_pair((0.5, 0), height=size[0], width=size[1])
    answer = DisFlow()(a, b)
    assert answer.flow.shape == (2, *size) and answer.flow.isfinite().all()
    assert (answer.weight >= 0).all() and (answer.weight <= 1).all()


def test_low_contrast_still_moves() -> None:
    """White arms differ by a few gray levels: contrast is stretched before the conversion to 8 bits."""
    a, b = (0.8 + (x - 0.5) * 0.025 for x in shifted_pair((0.6, -0.4)))
    error = (inner(DisFlow()(a, b).flow) - torch.tensor([0.6, -0.4])[:, None, None]).norm(dim=0)
    assert error.mean() < 0.1


def test_what_leaves_or_hides_loses_weight() -> None:
    a, b = shifted_pair((9, 0))
    answer = DisFlow()(a, b)
    weight, (u, _) = answer.weight, grid(96, 128)
    assert (weight[u + answer.flow[0] > 127] == 0).all()
    seen = weight[12:-12, 40:80].mean()
    assert weight[:, -8:].mean() < 0.1 * seen
    covered = b.clone()
    covered[:, 30:60, 60:90] = torch.rand(3, 30, 30, generator=torch.Generator().manual_seed(0))
    hidden = DisFlow()(a, covered).weight[37:53, 58:74]
    assert hidden.mean() < 0.1 * weight[37:53, 58:74].mean()


def test_wrong_frames_are_refused() -> None:
    a, b = shifted_pair((0, 0))
    for first, second in [(a, b[..., :-1]), (a[:1], b[:1])]:
        with pytest.raises(InputError, match="two frames of one shape"):
            check_pair(first, second)
    with pytest.raises(InputError, match="patch_stride"):
        DisFlow(patch_stride=9)


# ---- shared arithmetic ----------------------------------------------------------------------------------------------


def test_forward_backward_weight_equals_its_formula() -> None:
    forward = torch.zeros(2, 6, 8)
    forward[0] = 2.0
    backward = -forward
    weight = forward_backward_weight(forward, backward)
    assert torch.equal(weight[:, :6], torch.ones(6, 6)) and (weight[:, 6:] == 0).all()
    backward[1] = 0.1 + 0.05 * 2.0  # an error equal to the floor has the weight one half
    torch.testing.assert_close(forward_backward_weight(forward, backward)[:, :6], torch.full((6, 6), 0.5))
    # The backward flow must be sampled where the forward flow ends, not where it starts.
    backward = torch.zeros(2, 6, 8)
    backward[0, :, 4:] = -2.0
    weight = forward_backward_weight(forward, backward)
    assert weight[3, 2] == 1 and weight[3, 0] < 0.01


@pytest.mark.parametrize("size", [(60, 90), (48, 32), (97, 33), (24, 64)])
def test_resized_flow_is_the_flow_of_the_resized_image(size: tuple[int, int]) -> None:
    """Points of a moving scene, projected by the resized camera, move by the resized flow."""
    height, width = 48, 64
    camera = Camera.look_at((0, 0, 2), (0, 0, 0), up=(0, 1, 0), width=width, height=height)
    smaller = camera.resized(size[1], size[0])

    def true_flow(view: Camera) -> Tensor:
        u, v = grid(view.height, view.width)
        points = view.unproject(torch.stack([u, v], -1), torch.full(u.shape, 2.0))
        turn = torch.tensor([[0.98, 0.05, 0], [-0.03, 1.02, 0], [0, 0, 1]])  # affine in the plane: exact under bilinear
        there, _ = view.project(points @ turn.T + torch.tensor([0.02, -0.01, 0.0]))
        return (there - torch.stack([u, v], -1)).permute(2, 0, 1)

    got = resize_flow(true_flow(camera), *size)
    margin = 4
    torch.testing.assert_close(inner(got, margin), inner(true_flow(smaller), margin), atol=2e-3, rtol=0)


def test_resizing_scales_each_channel_with_its_axis() -> None:
    flow = torch.stack([torch.full((10, 20), 3.0), torch.full((10, 20), -2.0)]).double()
    got = resize_flow(flow.expand(4, 1, 2, 10, 20), 30, 10)
    assert got.shape == (4, 1, 2, 30, 10) and got.dtype == torch.float64
    torch.testing.assert_close(got[..., 0, :, :], torch.full((4, 1, 30, 10), 1.5).double())
    torch.testing.assert_close(got[..., 1, :, :], torch.full((4, 1, 30, 10), -6.0).double())


def test_resizing_ignores_pixels_of_weight_zero() -> None:
    flow, weight = torch.ones(2, 8, 8), torch.ones(8, 8)
    flow[:, :, 4:], weight[:, 4:] = 1000.0, 0.0
    half = Flow(flow, weight).resized(4, 4)
    torch.testing.assert_close(half.flow[:, :, :2], torch.full((2, 4, 2), 0.5))
    assert (half.flow < 1).all() and (half.weight[:, 3] == 0).all() and half.weight.max() <= 1


def test_flow_refuses_inconsistent_shapes() -> None:
    with pytest.raises((InputError, TypeError)):
        Flow(torch.zeros(2, 4, 5), torch.zeros(4, 6))
    with pytest.raises((InputError, TypeError)):
        Flow(torch.zeros(3, 4, 5), torch.zeros(4, 5))


# ---- estimators from other objects ----------------------------------------------------------------------------------


def test_functions_become_estimators() -> None:
    a, b = torch.rand(2, 3, 6, 7), torch.rand(2, 3, 6, 7)
    answers = {
        "flow": lambda x, y: torch.ones(2, 2, 6, 7),
        "flow and weight": lambda x, y: (torch.ones(2, 2, 6, 7), torch.ones(2, 6, 7)),
        "Flow": lambda x, y: Flow(torch.ones(2, 2, 6, 7), torch.ones(2, 6, 7)),
        "numpy": lambda x, y: np.ones((2, 2, 6, 7), np.float32),
    }
    for name, function in answers.items():
        estimator = as_flow_estimator(function)
        assert isinstance(estimator, FlowEstimator), name
        answer = estimator(a, b)
        assert (answer.flow == 1).all() and (answer.weight == 1).all(), name
    broken = torch.ones(2, 2, 6, 7)
    broken[0, 1, 2, 3] = torch.nan
    answer = as_flow_estimator(lambda x, y: broken)(a, b)
    assert answer.weight[0, 2, 3] == 0 and answer.flow.isfinite().all() and answer.weight.sum() == 2 * 42 - 1
    a[1, 0, 0, 0] = torch.nan
    assert as_flow_estimator(answers["flow"])(a, b).weight.sum((-1, -2)).tolist() == [42, 0]
    with pytest.raises(InputError, match="expected"):
        as_flow_estimator(lambda x, y: torch.ones(2, 6, 7, 2))(a, b)


def test_estimators_by_name_and_unusable_sources() -> None:
    assert isinstance(as_flow_estimator("dis"), DisFlow)
    own = DisFlow(patch_stride=4)
    assert as_flow_estimator(own) is own
    assert isinstance(as_flow_estimator(torch.zeros(3, 2, 8, 8)), PrecomputedFlow)
    with pytest.raises(InputError, match="did you mean 'dis'"):
        as_flow_estimator("diss")
    with pytest.raises(InputError, match="float"):
        as_flow_estimator(3.0)


# ---- third-party images ---------------------------------------------------------------------------------------------


def test_dis_on_kitti_against_ground_truth() -> None:
    folder = material("flow_gt")
    truth = read_flow(folder / "KITTI_flow_gt.png")
    frames = [folder / "KITTI_frame1.png", folder / "KITTI_frame2.png"]
    import cv2

    first, second = (torch.from_numpy(cv2.imread(str(f))[..., ::-1].copy()).permute(2, 0, 1) / 255 for f in frames)
    answer = DisFlow()(first, second)
    known = truth.weight > 0
    error, still = (answer.flow - truth.flow).norm(dim=0), truth.flow.norm(dim=0)
    trusted = float((error * answer.weight)[known].sum() / answer.weight[known].sum())
    print(
        f"KITTI, end-point error of DIS: mean {error[known].mean():.1f}, median {error[known].median():.1f}, "
        f"by weight {trusted:.1f} px; of zero flow: mean {still[known].mean():.1f}, median {still[known].median():.1f} px"
    )
    assert error[known].mean() < 0.6 * still[known].mean()
    assert error[known].median() < 0.15 * still[known].median()
    assert trusted < 0.1 * still[known].mean()


def test_dis_on_robot_video_measures_the_arms_and_not_the_background() -> None:
    video = read_video(material("aloha_sim") / "aloha_sim_insertion_human.mp4")[100:103].frames
    answer = DisFlow()(video[0], video[2])
    moved = answer.flow.norm(dim=0) * (answer.weight > 0.05)
    assert moved[220:330].max() > 1 and moved[:60].max() == 0  # black above the table: no texture, no weight


def test_raft_by_name_is_raft_large_with_default_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Recorder(DisFlow):
        def __init__(self, model: str, *, weights: str) -> None:
            asked.append((model, weights))

    monkeypatch.setattr("jidm.flow.factory.RaftFlow", Recorder)
    for name in ("raft", "raft_large", "raft_small"):
        as_flow_estimator(name)
    assert asked == [("raft_large", "DEFAULT"), ("raft_large", "DEFAULT"), ("raft_small", "DEFAULT")]
