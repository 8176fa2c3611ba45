"""Frame stores, pairs sampled from them, and the flow between the frames of a pair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded import numbered_dataset, rendered_dataset
from rendered import clip

from jidm import Camera
from jidm.datasets.episode_selection import select_episodes
from jidm.errors import DatasetError, InputError
from jidm.flow import DisFlow, Flow
from jidm.robot.kinematics import Kinematics
from jidm.sim import exact_flow
from jidm.sim.ground_truth import stays_visible
from jidm.training.data.batch import PairBatch
from jidm.training.data.flow_cache import EstimatedFlow, estimate_flow, letterbox_flow
from jidm.training.data.frame_store import load_frame_store
from jidm.training.data.pairs import PairSampler, PairSource
from jidm.training.data.recorded_geometry import letterbox_geometry
from jidm.video.letterbox import Letterbox, scaled_size

LENGTHS = {3: 9, 7: 5, 20: 12}


@pytest.fixture
def counted(tmp_path: Path):
    return numbered_dataset(tmp_path / "counted", LENGTHS)


def read(dataset, tmp_path: Path, **options):
    options = {"height": 16, "width": 16, "cache": tmp_path / "cache", **options}
    return load_frame_store(dataset, options.pop("episodes", dataset.episode_indices), **options)


# ---- which episodes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("all", [1, 2, 6, 11, 16, 20]),
        ("none", []),
        ("2, 20", [2, 20]),
        ("0-6,16", [1, 2, 6, 16]),
        ("last-digit:1,6", [1, 6, 11, 16]),
        ("not last-digit:1,6", [2, 20]),
        ("every:10+1", [1, 11]),
        ("every:5", [20]),
        ("2;last-digit:0", [2, 20]),
    ],
)
def test_episodes_are_selected_by_list_and_rule(expression: str, expected: list[int]) -> None:
    assert list(select_episodes(expression, [20, 1, 2, 6, 11, 16])) == expected


@pytest.mark.parametrize(
    ("expression", "complaint"), [("5", "no episode 5"), ("odd", "not understood"), ("every:0", "not understood")]
)
def test_wrong_episodes_are_refused(expression: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        select_episodes(expression, [1, 2])


# ---- frame stores ----------------------------------------------------------------------------------------------------


def test_a_store_holds_every_frame_and_is_cached(counted, tmp_path: Path) -> None:
    first = read(counted, tmp_path)
    opened = counted.videos_opened
    again = read(counted, tmp_path)
    assert counted.videos_opened == opened  # from the cache
    assert torch.equal(first.frames, again.frames) and len(first) == sum(LENGTHS.values())
    assert first.frames[first.first, 0, 0, 0].tolist() == list(LENGTHS)
    assert first.joint_names == ("joint_0", "joint_1")
    other = read(counted, tmp_path, episodes=(7,))
    assert len(other) == 5 and other.cache_key != first.cache_key


def test_joints_and_order_are_chosen_by_name(counted, tmp_path: Path) -> None:
    swapped = read(counted, tmp_path, order=("joint_1", "joint_0"))
    torch.testing.assert_close(swapped.q.flip(1), read(counted, tmp_path).q)
    one = read(counted, tmp_path, joints=("joint_1",))
    assert one.joint_names == ("joint_1",) and one.q.shape == (26, 1)
    with pytest.raises(DatasetError, match="did you mean 'joint_1'"):
        read(counted, tmp_path, joints=("joint1",))
    with pytest.raises(DatasetError, match="has no camera 'side'"):
        read(counted, tmp_path, image_key="side")


def test_geometry_of_some_episodes_alone_is_refused(tmp_path: Path) -> None:
    geometry = {"depth": np.zeros((3, 8, 8)), "links": np.full((3, 8, 8), -1), "camera": np.zeros((3, 16))}
    for with_geometry in (0, 1):
        dataset = numbered_dataset(tmp_path / str(with_geometry), {0: 3, 1: 3})
        dataset.episode(with_geometry).extras = {f"observation.{k}.front": x for k, x in geometry.items()}
        with pytest.raises(DatasetError, match="some episodes have T_camera_base, depth, intrinsics, link and some"):
            read(dataset, tmp_path)


def test_statistics_of_the_joints(counted, tmp_path: Path) -> None:
    store = read(counted, tmp_path)
    stats = store.stats((1, 2))
    steps = np.array([0.01] * (8 + 4 + 11) + [0.02] * (7 + 3 + 10))
    np.testing.assert_allclose(stats.delta_std, np.sqrt((steps**2).mean()), rtol=1e-9)
    np.testing.assert_allclose(stats.q_mean, store.q.mean(0), rtol=1e-12)
    assert stats.q_lower == (3.0, 4.0)
    assert store.static_joints() == ()
    # These two joints always move together, but the correlation is shrunk below one.
    np.testing.assert_allclose(stats.delta_correlation, [[1.0, 0.95], [0.95, 1.0]], atol=1e-4)
    steps = (
        torch.randn(26, 2, generator=torch.Generator().manual_seed(0)).double()
        @ torch.tensor([[1, 0.5], [0, 1]]).double()
    )
    mixed = replace(store, state=steps.cumsum(0)).stats()
    inside = torch.cat([steps[a + 1 : a + n] for a, n in zip(store.first.tolist(), store.length.tolist())])
    expected = torch.corrcoef(inside.mT)[0, 1]  # about the mean of the steps, which is nearly zero
    assert mixed.delta_correlation[0][1] == pytest.approx(0.95 * float(expected), abs=0.1)
    still = replace(store, state=torch.stack([steps.cumsum(0)[:, 0], torch.zeros(26).double()], 1)).stats()
    assert still.delta_correlation == ((1.0, 0.0), (0.0, 1.0))


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_pairs_stay_within_their_episode_and_are_uniformly_distributed(counted, tmp_path: Path) -> None:
    store = read(counted, tmp_path)
    draw = PairSampler(store, (1, 3), seed=0).sample(0, 6000)
    first, last = store.first[draw.episode], (store.first + store.length)[draw.episode]
    assert (draw.before >= first).all() and (draw.second < last).all()
    assert (draw.second - draw.first == draw.stride).all() and set(draw.stride.tolist()) == {1, 3}
    assert (draw.before == torch.maximum(draw.first - draw.stride, first)).all()
    # With stride 1 there are 8 + 4 + 11 positions, each as likely as the others.
    short = draw.first[draw.stride == 1]
    counts = torch.bincount(short, minlength=26)
    assert (counts > 0).sum() == 23
    expected = len(short) / 23
    assert ((counts[counts > 0] - expected).square().sum() / expected) < 55  # chi^2 of 22: .9999 lie below


def test_samples_depend_on_seed_and_step_alone_and_shard_without_overlap(counted, tmp_path: Path) -> None:
    store = read(counted, tmp_path)
    one, same, other = (PairSampler(store, (1, 2), seed=s) for s in (4, 4, 5))
    one.sample(0, 8)
    assert torch.equal(one.sample(17, 8).first, same.sample(17, 8).first)
    assert not torch.equal(one.sample(17, 64).first, other.sample(17, 64).first)
    assert not torch.equal(one.sample(17, 64).first, one.sample(18, 64).first)
    whole = one.sample(3, 7)
    parts = [whole.shard(rank, 2) for rank in (0, 1)]
    assert sorted(torch.cat([p.first for p in parts]).tolist()) == sorted(whole.first.tolist())


def test_batches_hold_the_sampled_frames_and_states(counted, tmp_path: Path) -> None:
    store = read(counted, tmp_path, joints=("joint_1",))
    batch = PairSource(store).batch(PairSampler(store, (1, 2), seed=1).sample(0, 50))
    assert isinstance(batch, PairBatch) and batch.first.dtype == torch.float32
    t = batch.frame.float()
    torch.testing.assert_close(batch.first[:, 1, 5, 5] * 255, t)
    torch.testing.assert_close(batch.first[:, 0, 5, 5] * 255, batch.episode.float())
    assert set(batch.episode.tolist()) == set(LENGTHS)
    for image, q in ((batch.first, batch.q), (batch.second, batch.q_next)):
        expected = image[:, 0, 0, 0] * 255 + image[:, 1, 0, 0] * 255 / 100 + 1
        torch.testing.assert_close(q[:, 0], expected, rtol=0, atol=2e-5)
    assert batch.flow is None and batch.mask is None
    assert batch.before is None
    more = PairSource(store, before=True).batch(PairSampler(store, (1,), seed=1).sample(0, 50))
    torch.testing.assert_close(more.before[:, 1, 5, 5] * 255, (more.frame - 1).clamp(min=0).float())


def test_too_short_episodes_are_refused_with_the_remedy(tmp_path: Path) -> None:
    store = read(numbered_dataset(tmp_path / "short", {0: 3, 1: 4}), tmp_path)
    assert len(PairSampler(store, (3,), seed=0).sample(0, 4)) == 4
    with pytest.raises(DatasetError, match=r"longest episode has 4 frames, 5 are needed.*smaller --strides"):
        PairSampler(store, (4, 5), seed=0)


# ---- exact flow ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["panda", "planar_finger_3"])
def rendered(request, tmp_path_factory):
    clips = {4: clip(request.param, frames=6, seed=1)}
    if request.param != "panda":  # which is slow to render
        clips[0] = clip(request.param, frames=8)
    return clips, rendered_dataset(tmp_path_factory.mktemp("rendered"), clips)


def exact_batch(rendered, tmp_path: Path, height: int = 120, width: int = 160, input_scale: int = 1, **options):
    clips, dataset = rendered
    robot, size = clips[4].robot, {"height": height, "width": width, "input_scale": input_scale}
    store = load_frame_store(dataset, dataset.episode_indices, **size, cache=tmp_path)
    source = PairSource(store, kinematics=Kinematics.from_embodiment(robot), **options)
    return store, source.batch(PairSampler(store, (1, 2, 4), seed=0).sample(0, 12))


def test_exact_flow_is_that_of_the_simulator(rendered, tmp_path: Path) -> None:
    clips, dataset = rendered
    robot = clips[4].robot
    _, batch = exact_batch(rendered, tmp_path, 60, 80)  # the grid of the field is then the recorded one
    coarse = clips[4].camera.resized(40, 30)

    def pooled(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x, 2)

    moving = 0.0
    for i in range(len(batch)):
        extras = dataset.episode(int(batch.episode[i])).extras
        t = int(batch.frame[i])
        q_next = batch.q_next[i].double()
        rows = clips[int(batch.episode[i])].q
        k = int(np.abs(rows - q_next.numpy()).max(1).argmin()) - t
        assert k in (1, 2, 4)
        depth, link = extras["observation.depth.front"], extras["observation.links.front"]
        truth = exact_flow(robot, coarse, depth[t], link[t], rows[t], rows[t + k])
        assert torch.equal(batch.mask[i] > 0, truth.on_robot)
        back = exact_flow(robot, coarse, depth[t + k], link[t + k], rows[t + k], rows[t])
        for flow, weight, exact in ((batch.flow, batch.weight, truth), (batch.flow_back, batch.weight_back, back)):
            whole = weight[i] == 1  # where all four cells of the finer grid are visible in both frames
            assert whole.any()
            expected = pooled(exact.flow * 2)[:, whole]
            torch.testing.assert_close(flow[i].double()[:, whole], expected, rtol=0, atol=2e-3)
        far = np.where(link[t + k] >= 0, depth[t + k], np.inf)
        visible = stays_visible(robot, coarse, depth[t], link[t], rows[t], rows[t + k], far)
        assert (batch.weight[i] <= pooled(truth.on_robot[None].double())[0]).all()
        # The simulator's visibility at full resolution, which is stricter at contours, agrees but for a few cells.
        strict = pooled(visible[None].double())[0]
        assert batch.weight[i].double().minimum(strict).sum() >= 0.97 * strict.sum()
        moving = max(moving, float(truth.flow.abs().max()) * 2)
    assert moving > 1.5


def test_occluded_points_have_no_weight(rendered, tmp_path: Path) -> None:
    clips, dataset = rendered
    robot = clips[4].robot
    episode = dataset.episode(4)
    saved = {key: x.copy() for key, x in episode.extras.items()}
    try:
        episode.extras["observation.links.front"][1:, :, 20:] = -1  # an object in front of the right half
        dataset.content_hash += "-covered"
        store = load_frame_store(dataset, (4,), height=120, width=160, cache=tmp_path)
        source = PairSource(store, kinematics=Kinematics.from_embodiment(robot))
        draw = PairSampler(store, (1,), seed=0).sample(0, 64)
        keep = (draw.first == 0).nonzero()[:1, 0]
        batch = source.batch(draw[keep])
    finally:
        episode.extras = saved
        dataset.content_hash = dataset.content_hash.removesuffix("-covered")
    u = torch.arange(40) + batch.flow[0, 0] / 4
    shown = torch.nn.functional.avg_pool2d(batch.mask, 2)[0]
    assert (shown[:, 22:].sum() > 0) and (shown[:, :18].sum() > 0)
    assert batch.weight[0][(u > 20.5)].sum() == 0
    left = (shown == 1) & (u < 18)
    assert batch.weight[0][left].mean() > 0.8  # less than 1 where links occlude each other within a cell


def test_flow_in_smaller_letterboxed_images_is_the_same_motion(rendered, tmp_path: Path) -> None:
    """At each coarse cell the letterboxed flow is the full one, scaled."""
    _, full = exact_batch(rendered, tmp_path)
    store, small = exact_batch(rendered, tmp_path, 96, 96)
    letterbox = store.letterbox
    assert (letterbox.inner_height, letterbox.inner_width, letterbox.top) == (72, 96, 12)
    assert small.mask[:, :6].sum() == 0 and small.mask[:, 42:].sum() == 0
    inner = torch.nn.functional.interpolate(full.flow, size=(18, 24), mode="bilinear") * 0.6
    solid = torch.nn.functional.interpolate(full.mask[:, None], size=(18, 24), mode="area")[:, 0] == 1
    error = (small.flow[:, :, 3:21] - inner).norm(dim=1)[solid & (small.weight[:, 3:21] == 1)]
    size = inner.norm(dim=1)[solid]
    assert error.mean() < 0.05 * size.mean() and size.mean() > 0.3  # measured below .02: links meet within cells


def test_input_scale_enlarges_the_images_and_changes_nothing_else(rendered, tmp_path: Path) -> None:
    _, plain = exact_batch(rendered, tmp_path, 48, 64)
    store, close = exact_batch(rendered, tmp_path, 48, 64, input_scale=2)
    assert store.size == (48, 64) and close.first.shape[-2:] == (96, 128)
    smaller = torch.nn.functional.avg_pool2d(
        close.first, 2
    )  # at edges the weights differ from those of a single reduction
    assert (smaller - plain.first).abs().mean() < 0.004
    for (name, a), (other, b) in zip(plain.tensors(), close.tensors(), strict=True):
        assert name == other
        if name not in ("first", "second"):
            torch.testing.assert_close(a, b)


def test_downsampled_frames_are_those_the_model_computes_from_the_large_ones(rendered, tmp_path: Path) -> None:
    size = {"height": 48, "width": 64, "input_scale": 2, "cache": tmp_path}
    large, small = (load_frame_store(rendered[1], (4,), **size, downsampled=x) for x in (False, True))
    assert (
        (large.input_scale, small.input_scale) == (2, 1)
        and large.cache_key != small.cache_key
        and large.source_hash == small.source_hash
    )
    pooled = torch.nn.functional.avg_pool2d(large.frames.float(), 2)
    assert small.frames.dtype == torch.uint8 and (small.frames - pooled).abs().max() <= 0.5
    for a, b in ((large.state, small.state), (large.geometry.depth, small.geometry.depth)):
        assert torch.equal(a, b)


def test_a_pair_can_get_the_background_of_another_frame(rendered, tmp_path: Path) -> None:
    store = load_frame_store(rendered[1], rendered[1].episode_indices, height=120, width=160, cache=tmp_path)
    store.frames[:6] = store.frames[:6] // 2  # one episode is darker, so that backgrounds differ
    sampler, source = PairSampler(store, (1,), seed=0), PairSource(store)
    draw = sampler.sample(0, 8)
    own = source.batch(draw)
    background = torch.where(torch.arange(8) % 2 == 0, (draw.first + len(store) // 2) % len(store), -1)
    got = source.batch(replace(draw, background=background))
    for name, rows in (("first", draw.first), ("second", draw.second)):
        a, b = getattr(own, name), getattr(got, name)
        assert torch.equal(a[1::2], b[1::2])
        shown = [
            torch.nn.functional.max_pool2d((store.geometry.link[r] >= 0).float()[:, None], 3, 1, 1)
            for r in (rows, background.clamp(min=0))
        ]
        near, other = (torch.nn.functional.interpolate(x, scale_factor=2).bool().expand_as(a) for x in shown)
        robot = torch.nn.functional.interpolate(
            1 - torch.nn.functional.max_pool2d((store.geometry.link[rows] < 0).float()[:, None], 3, 1, 1), scale_factor=2
        ).bool().expand_as(a)  # fmt: skip
        expected = store.frames[background.clamp(min=0)].float() / 255
        swapped, off_robot = torch.arange(8) % 2 == 0, ~near & ~other
        torch.testing.assert_close(b[robot], a[robot], atol=1e-6, rtol=0)
        torch.testing.assert_close(b[swapped][off_robot[swapped]], expected[swapped][off_robot[swapped]])
    assert torch.equal(own.q, got.q)
    # Flow estimated from the images is that of their own backgrounds.
    flow = torch.zeros(len(store), 1, 2, 2, 30, 40, dtype=torch.float16)
    measured = PairSource(store, estimated_flow=EstimatedFlow((1,), flow, torch.zeros_like(flow[:, :, :, 0]).byte()))
    assert torch.equal(measured.batch(replace(draw, background=background)).first, own.first)


def test_backgrounds_depend_on_seed_and_step_and_are_sharded_with_the_pairs(tmp_path: Path) -> None:
    dataset = numbered_dataset(tmp_path, {0: 9, 1: 30})
    store = load_frame_store(dataset, (0, 1), height=16, width=16, cache=tmp_path)
    sampler = PairSampler(store, (1,), seed=3)
    rows = sampler.sample_backgrounds(5, 400, 0.25)
    assert torch.equal(rows, PairSampler(store, (1,), seed=3).sample_backgrounds(5, 400, 0.25))
    assert not torch.equal(rows, sampler.sample_backgrounds(6, 400, 0.25))
    assert rows.max() == 38 and rows.min() == -1 and 0.15 < (rows >= 0).float().mean() < 0.35
    draw = replace(sampler.sample(5, 8), background=rows[:8])
    assert torch.equal(draw.shard(1, 2).background, rows[1:8:2]) and sampler.sample(5, 8).shard(1, 2).background is None
    # Without a mask of the robot the images are not changed.
    source = PairSource(store)
    assert torch.equal(source.batch(draw).first, source.batch(sampler.sample(5, 8)).first)


def test_zero_flow_off_the_robot_has_weight_only_where_the_background_is_static(rendered, tmp_path: Path) -> None:
    _, unknown = exact_batch(rendered, tmp_path)
    _, static = exact_batch(rendered, tmp_path, static_background=True)
    shown = torch.nn.functional.max_pool2d(unknown.mask[:, None], 2)
    off = (shown[:, 0] == 0) & (torch.nn.functional.max_pool2d(shown, 3, 1, 1)[:, 0] == 0)
    assert unknown.weight[off].sum() == 0
    assert (
        static.weight[off].mean() > 0.8 and static.flow.mT[off[:, None].mT.expand_as(static.flow.mT)].abs().sum() == 0
    )
    torch.testing.assert_close(static.weight * ~off, unknown.weight)


def test_recorded_geometry_is_resampled_to_another_size() -> None:
    """The depth of a tilted plane, resampled to another grid, is the one it would have been rendered with."""
    camera = Camera.look_at([0.0, -1.0, 0.7], [0.0, 0.0, 0.0], width=128, height=96)

    def plane(on: Camera) -> np.ndarray:
        v, u = torch.meshgrid(torch.arange(on.height), torch.arange(on.width), indexing="ij")
        ray = torch.stack([(u - on.K[0, 2]) / on.K[0, 0], (v - on.K[1, 2]) / on.K[1, 1], torch.ones(u.shape)], -1)
        normal = on.T_camera_base[:3, 2]  # the floor's, in the camera's frame
        return ((normal @ on.T_camera_base[:3, 3]) / (ray.double() @ normal)).numpy()[None]

    pose = np.concatenate([camera.K[[0, 1, 0, 1], [0, 1, 2, 2]].numpy(), camera.T_camera_base[:3].reshape(-1).numpy()])
    depth = plane(camera.resized(64, 48))
    link = np.zeros(depth.shape, dtype=np.int16)
    letterbox = Letterbox(96, 128, 96, 96)
    found = letterbox_geometry(depth, link, pose[None], letterbox)
    inner = camera.resized(96, 72)
    shift = torch.tensor([[1, 0, 0], [0, 1, 12], [0, 0, 1]], dtype=torch.float64)
    boxed = replace(inner, height=96, K=shift @ inner.K)
    np.testing.assert_allclose(found["intrinsics"][0], boxed.K[[0, 1, 0, 1], [0, 1, 2, 2]].numpy())
    np.testing.assert_allclose(found["T_camera_base"][0], camera.T_camera_base.numpy())
    truth, shown = plane(boxed.resized(48, 48)), np.zeros((1, 48, 48), dtype=bool)
    shown[:, 6:42] = True
    assert (found["link"] == np.where(shown, 0, -1)).all() and (found["depth"][~shown] == 0).all()
    inside = np.s_[:, 8:40, 2:46]  # the outermost cells lie outside the old grid's centers
    np.testing.assert_allclose(found["depth"][inside], truth[inside], rtol=1e-6)


# ---- letterboxed images, estimated flow ------------------------------------------------------------------------------


def test_letterbox_keeps_positions() -> None:
    letterbox = Letterbox(48, 96, 64, 64)
    assert (letterbox.inner_height, letterbox.inner_width, letterbox.top, letterbox.left) == (32, 64, 16, 0)
    ramp = (torch.arange(96) / 95).expand(3, 48, 96)
    out = letterbox.apply(ramp)
    assert out[:, :16].sum() == 0 and out[:, 48:].sum() == 0
    u = 40
    expected = ((u + 0.5 - letterbox.left) / letterbox.scale_u - 0.5) / 95
    assert abs(float(out[0, 30, u]) - expected) < 1e-3
    pixels = (torch.rand(2, 3, 48, 96) * 255).to(torch.uint8)
    assert (
        letterbox.apply_to_uint8(pixels).dtype == torch.uint8
        and Letterbox(48, 96, 48, 96).apply_to_uint8(pixels) is pixels
    )
    assert scaled_size(480, 640, max_side=128, multiple=16) == (96, 128)
    assert scaled_size(96, 96, max_side=128, multiple=16) == (96, 96)
    assert scaled_size(192, 256, max_side=100, multiple=16) == (80, 96)


def test_estimated_flow_is_letterboxed_like_the_image() -> None:
    flow = torch.zeros(1, 2, 48, 96)
    flow[:, 0], flow[:, 1] = 3.0, -1.5
    found = letterbox_flow(Flow(flow, torch.ones(1, 48, 96)), Letterbox(48, 96, 64, 64))
    assert found.flow.shape == (1, 2, 16, 16)
    torch.testing.assert_close(found.flow[:, :, 4:12].mean((0, 2, 3)), torch.tensor([2.0, -1.0]))
    assert found.weight[:, :4].sum() == 0 and found.weight[:, 12:].sum() == 0
    assert found.weight[:, 5:11].min() == 1


class GreenShift:
    """An estimator that returns a shift to the right by (green of second) - (green of first) px."""

    def __repr__(self) -> str:
        return "GreenShift()"

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> Flow:
        flow = torch.zeros(len(first), 2, *first.shape[-2:])
        flow[:, 0] = (second - first)[:, 1] * 255
        return Flow(flow, torch.full_like(flow[:, 0], 0.4))


def test_estimated_flow_belongs_to_its_pairs(counted, tmp_path: Path) -> None:
    store = read(counted, tmp_path)
    estimated = estimate_flow(counted, store, "front", (1, 3), GreenShift(), cache=tmp_path / "cache")
    opened = counted.videos_opened
    again = estimate_flow(counted, store, "front", (3, 1), GreenShift(), cache=tmp_path / "cache")
    assert counted.videos_opened == opened and torch.equal(estimated.flow, again.flow)
    draw = PairSampler(store, (1, 3), seed=0).sample(0, 40)
    batch = PairSource(store, estimated_flow=estimated).batch(draw)
    stride = draw.stride.float()[:, None, None].expand(-1, 4, 4)
    torch.testing.assert_close(batch.flow[:, 0], stride)
    torch.testing.assert_close(batch.flow_back[:, 0], -stride)
    torch.testing.assert_close(batch.weight, torch.full_like(batch.weight, 0.4))
    assert batch.mask is None
    with pytest.raises(InputError, match="does not state its settings"):
        estimate_flow(counted, store, "front", (1,), lambda a, b: None, cache=tmp_path)


def test_an_interrupted_estimation_is_resumed_and_shared(counted, tmp_path: Path) -> None:
    class Counted(GreenShift):
        """Counts its calls; is interrupted at one of them."""

        calls, interrupted_at = 0, 0

        def __call__(self, first: torch.Tensor, second: torch.Tensor) -> Flow:
            self.calls += 1
            if self.calls == self.interrupted_at:
                raise KeyboardInterrupt
            return super().__call__(first, second)

    store, cache = read(counted, tmp_path), tmp_path / "cache"
    whole = Counted()
    expected = estimate_flow(counted, store, "front", (1, 3), whole, cache=tmp_path / "other")
    broken, rest = Counted(), Counted()
    broken.interrupted_at = whole.calls - 1
    with pytest.raises(KeyboardInterrupt):
        estimate_flow(counted, store, "front", (1, 3), broken, cache=cache)
    found = estimate_flow(counted, store, "front", (1, 3), rest, cache=cache)
    assert torch.equal(found.flow, expected.flow) and torch.equal(found.weight, expected.weight)
    assert 0 < rest.calls < whole.calls / 2
    # Fewer episodes, other strides: cached flow is not computed again.
    fewer, less = load_frame_store(counted, (7,), height=16, width=16, cache=tmp_path), Counted()
    part = estimate_flow(counted, fewer, "front", (3,), less, cache=cache)
    assert less.calls == 0
    where = store.episode.tolist().index(7)
    first, length = int(store.first[where]), int(store.length[where])
    assert torch.equal(part.flow[:, 0], found.flow[first : first + length, 1])


def test_bidirectional_flow_is_the_flow_of_each_direction() -> None:
    smooth = torch.nn.functional.avg_pool2d(torch.rand(2, 3, 44, 68, generator=torch.Generator().manual_seed(0)), 5, 1)
    first, second = smooth, smooth.roll(1, -1)
    second[1] = float("nan")
    for both, single in zip(
        DisFlow().bidirectional(first, second), (DisFlow()(first, second), DisFlow()(second, first))
    ):
        assert torch.equal(both.flow, single.flow) and torch.equal(both.weight, single.weight)
        assert both.weight[0].max() > 0 and both.weight[1].max() == 0
