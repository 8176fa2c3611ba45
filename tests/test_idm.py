"""Decoding a video with an exact field: accuracy, corrupt frames, limits, observability, batches, files, errors."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from annotations import unchecked
from rendered import FPS, HEIGHT, WIDTH, Clip, clip
from torch import Tensor

from jidm import Camera, Embodiment, JacobianIDM, JointMotion, compose, load_embodiment
from jidm.errors import InputError, VideoError
from jidm.estimation.analytic_measurement import AnalyticOptions
from jidm.estimation.smoother import smooth_motion
from jidm.flow import Flow
from jidm.sim import Appearance, Scene, random_motion
from jidm.video.io import write_video

BY_FLOW = AnalyticOptions(refine="none")


@pytest.fixture(scope="module")
def finger() -> Clip:
    return clip("planar_finger_3", frames=8, seed=1)


@pytest.fixture(scope="module")
def by_flow(finger: Clip) -> JacobianIDM:
    return JacobianIDM.from_embodiment(finger.robot, camera=finger.camera, options=BY_FLOW)


@pytest.fixture(scope="module")
def by_alignment(finger: Clip) -> JacobianIDM:
    return JacobianIDM.from_embodiment(finger.robot, camera=finger.camera)


@pytest.fixture(scope="module", params=["flow", "alignment"])
def idm(request: pytest.FixtureRequest, by_flow: JacobianIDM, by_alignment: JacobianIDM) -> JacobianIDM:
    """Decoding by flow alone and by alignment, where a law holds for both."""
    return by_flow if request.param == "flow" else by_alignment


@pytest.fixture(scope="module")
def decoded(finger: Clip, by_alignment: JacobianIDM) -> JointMotion:
    return by_alignment.decode(finger.frames, q0=finger.q[0], fps=FPS)


def nve(motion: JointMotion, steps: np.ndarray) -> float:
    """Mean error of the steps over their mean size: 1 for an answer of zero."""
    return float(np.abs(motion.delta_q.numpy() - steps).mean() / np.abs(steps).mean())


def all_finite(motion: JointMotion) -> bool:
    return all(np.isfinite(x).all() for x in motion.numpy().values())


# ---- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["planar_finger_3", "panda", "allegro_right"])
def test_exact_flow_gives_exact_steps(name: str) -> None:
    truth = clip(name, frames=6)
    idm = JacobianIDM.from_embodiment(truth.robot, camera=truth.camera, options=BY_FLOW)
    motion = idm.decode(truth.frames, q0=truth.q[0], fps=FPS, flow=truth.flow)
    error = np.abs(motion.delta_q.numpy() - truth.steps)
    assert error[motion.observable.numpy()].mean() <= 2e-4
    assert error.mean() <= 2e-4
    assert np.abs(truth.steps).mean() > 5e-3  # there is motion to measure
    assert motion.valid.all()
    np.testing.assert_allclose(motion.velocity.numpy(), motion.delta_q.numpy() * FPS, rtol=1e-9)
    # A filtered step is final, a position also takes what later steps say about earlier ones: the two differ a little.
    sums = motion.position[0] + motion.delta_q.cumsum(0)
    torch.testing.assert_close(motion.position[1:], sums, rtol=0, atol=1e-8)


def test_alignment_is_more_accurate_than_flow_alone_and_far_more_than_zero(
    finger: Clip, by_flow: JacobianIDM, decoded: JointMotion
) -> None:
    flow_alone = nve(by_flow.decode(finger.frames, q0=finger.q[0], fps=FPS), finger.steps)
    assert nve(decoded, finger.steps) <= 0.2  # measured .09
    assert nve(decoded, finger.steps) < flow_alone < 0.5  # measured .13
    assert decoded.valid.all()
    assert decoded.observable.all()
    assert float(decoded.explained_fraction.min()) > 0.5


def test_position_std_covers_the_error(finger: Clip, decoded: JointMotion) -> None:
    error = np.abs(decoded.position.numpy() - finger.q)[1:]
    assert (error <= 4 * decoded.position_std.numpy()[1:]).mean() >= 0.7
    assert float(decoded.position_std[0].max()) == 0.0  # the start was given


def test_smoothing_works_on_the_measured_steps(finger: Clip, by_alignment: JacobianIDM) -> None:
    filtered, smoothed = by_alignment.decode_both(finger.frames, q0=finger.q[0], fps=FPS)
    stream = by_alignment.stream(finger.frames[0], q0=torch.from_numpy(finger.q[0]), keep_history=True)
    steps = [stream.push(frame, t / FPS) for t, frame in enumerate(finger.frames[1:], 1)]
    measured = replace(
        filtered,
        delta_q=torch.stack([s.measured.mean for s in steps]),
        velocity=torch.stack([s.measured.mean for s in steps]) * FPS,
        covariance=torch.stack([s.measured.covariance for s in steps]),
    )
    torch.testing.assert_close(smoothed.delta_q, smooth_motion(measured).delta_q)
    assert (smoothed.delta_q - smooth_motion(filtered).delta_q).abs().max() > 1e-5


def test_still_video_gives_no_motion(finger: Clip, idm: JacobianIDM) -> None:
    still = finger.frames[:1].expand(4, -1, -1, -1)
    motion = idm.decode(still, q0=finger.q[0], fps=FPS)
    assert float(motion.delta_q.abs().max()) < 2e-4
    assert motion.valid.all()


def test_a_reversed_video_negates_the_steps(finger: Clip, by_alignment: JacobianIDM, decoded: JointMotion) -> None:
    back = by_alignment.decode(finger.frames[:5].flip(0), q0=finger.q[4], fps=FPS)
    difference = (back.delta_q.flip(0) + decoded.delta_q[:4]).abs().mean()
    assert float(difference) < 0.25 * np.abs(finger.steps).mean()


# ---- corrupt frames --------------------------------------------------------------------------------------------------


def test_a_nan_frame_makes_only_its_two_steps_invalid(finger: Clip, idm: JacobianIDM) -> None:
    frames = finger.frames
    frames[4, :, 30, 40] = torch.nan
    motion = idm.decode(frames, q0=finger.q[0], fps=FPS)
    assert motion.valid.tolist() == [True, True, True, False, False, True, True]
    assert all_finite(motion)
    assert float(motion.delta_q[3:5].abs().max()) == 0.0
    assert torch.equal(motion.position[4], motion.position[3])  # held
    assert (motion.position_std[4] > motion.position_std[3]).all()
    elsewhere = [t for t in range(8) if t != 4]
    error = np.abs(motion.position.numpy() - finger.q)[elsewhere]
    assert error.max() < 0.012
    assert np.abs(motion.delta_q.numpy() - finger.steps)[5:].mean() < 0.35 * np.abs(finger.steps).mean()


def test_external_flow_is_not_used_across_a_nan_frame(finger: Clip, by_flow: JacobianIDM) -> None:
    frames = finger.frames
    frames[4] = torch.nan
    motion = by_flow.decode(frames, q0=finger.q[0], fps=FPS, flow=finger.flow)
    assert motion.valid.tolist() == [True, True, True, False, False, True, True]
    # Frame 5 is measured from frame 3 by the estimator, so it is less accurate; the steps before and after are exact.
    assert np.abs(motion.position.numpy() - finger.q)[5:].max() < 0.012
    assert np.abs(motion.position.numpy() - finger.q)[:4].max() < 2e-4


def test_a_last_frame_that_is_not_finite(finger: Clip, by_flow: JacobianIDM) -> None:
    frames = finger.frames
    frames[-1] = torch.inf
    motion = by_flow.decode(frames, q0=finger.q[0], fps=FPS)
    assert motion.valid.tolist() == [True] * 6 + [False]
    assert all_finite(motion)


@pytest.mark.parametrize("kind", ["noise", "black", "leaves"])
def test_meaningless_frames_stay_finite_and_inside_the_limits(finger: Clip, kind: str, idm: JacobianIDM) -> None:
    frames = finger.frames[:5]
    if kind == "noise":
        frames = torch.rand(frames.shape, generator=torch.Generator().manual_seed(0)).double()
    elif kind == "black":
        frames = torch.zeros_like(frames)
    else:  # the image slides out of view
        frames = torch.stack([torch.roll(f, 60 * k, dims=-1) * (k < 3) for k, f in enumerate(frames)])
    motion = idm.decode(frames, q0=finger.q[0], fps=FPS)
    assert all_finite(motion)
    assert_inside_limits(motion, finger.robot)
    if kind == "black":
        assert not motion.observable.any() or float(motion.delta_q.abs().max()) < 1e-3


# ---- limits ----------------------------------------------------------------------------------------------------------


def assert_inside_limits(motion: JointMotion, robot: Embodiment) -> None:
    q, v = motion.position.numpy(), motion.velocity.numpy()
    assert (q >= robot.lower - 1e-6).all()
    assert (q <= robot.upper + 1e-6).all()
    assert (np.abs(v) <= robot.velocity * (1 + 1e-5)).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_limits_hold_for_any_flow(finger: Clip, idm: JacobianIDM, sign: float) -> None:
    wild = Flow(sign * 300 * torch.ones_like(finger.flow.flow[:3]), torch.ones_like(finger.flow.weight[:3]))
    near_limit = np.array([finger.robot.upper[0] - 0.01, finger.q[0][1], finger.robot.lower[2]])
    motion = idm.decode(finger.frames[:4], q0=near_limit, fps=FPS, flow=wild)
    assert all_finite(motion)
    assert_inside_limits(motion, finger.robot)


def test_the_speed_limit_holds_and_can_be_switched_off(finger: Clip, by_flow: JacobianIDM) -> None:
    """The same frames at a 40 times higher rate would need more speed than the joints have."""
    fast = by_flow.decode(finger.frames, q0=finger.q[0], fps=40 * FPS, flow=finger.flow)
    assert_inside_limits(fast, finger.robot)
    assert np.abs(fast.velocity.numpy()).max() > 0.999 * finger.robot.velocity.max()
    free = JacobianIDM(finger.robot, by_flow.field, by_flow.flow, options=BY_FLOW, limits="position")
    motion = free.decode(finger.frames, q0=finger.q[0], fps=40 * FPS, flow=finger.flow)
    assert np.abs(motion.delta_q.numpy() - finger.steps).max() < 2e-4
    with pytest.raises(InputError, match="limits must be"):
        unchecked(JacobianIDM.__init__)(
            object.__new__(JacobianIDM), finger.robot, by_flow.field, by_flow.flow, limits="speed"
        )


# ---- observability ---------------------------------------------------------------------------------------------------


def test_a_joint_that_moves_along_the_view_is_not_observable(finger: Clip) -> None:
    """For a far camera in the finger's plane, the hinge moves the finger nearly along the line of sight."""
    robot = load_embodiment("planar_finger_1")
    size = {"fov_y": 2.0, "width": WIDTH, "height": HEIGHT}
    along = Camera.look_at((0.05, -10.0, 0.0), (0.05, 0.0, 0.0), **size)
    above = Camera.look_at((0.05, 0.0, 10.0), (0.05, 0.0, 0.0), up=(0.0, 1.0, 0.0), **size)
    frames = torch.zeros(2, 3, HEIGHT, WIDTH)
    still = Flow(torch.zeros(1, 2, HEIGHT, WIDTH), torch.ones(1, HEIGHT, WIDTH))
    flags = {}
    for name, camera in (("along", along), ("above", above)):
        idm = JacobianIDM.from_embodiment(robot, camera=camera, options=replace(BY_FLOW, min_motion=12.0))
        flags[name] = bool(idm.decode(frames, q0=[0.0], fps=FPS, flow=still).observable)
    assert flags == {"along": False, "above": True}


def test_hidden_joints_are_not_observable_and_uncertain() -> None:
    """The fingers of a hand hide each other; the hidden joints have the large errors."""
    truth = clip("allegro_right", frames=6)
    idm = JacobianIDM.from_embodiment(truth.robot, camera=truth.camera, options=BY_FLOW)
    motion = idm.decode(truth.frames, q0=truth.q[0], fps=FPS)
    observable = motion.observable.numpy()
    assert 0.2 < observable.mean() < 0.9
    error = np.abs(motion.delta_q.numpy() - truth.steps)
    assert error[observable].mean() < error[~observable].mean()
    std = motion.covariance.diagonal(dim1=-2, dim2=-1).sqrt().numpy()
    assert np.median(std[observable]) < np.median(std[~observable])


def test_joints_that_move_no_sampled_link_are_held_and_the_others_decoded() -> None:
    one, T_base_right = load_embodiment("planar_finger_2"), np.eye(4)
    T_base_right[1, 3] = 0.6
    robot = compose(left=one, right=(one, T_base_right))
    camera = robot.camera("front").resized(WIDTH, HEIGHT)
    q = random_motion(robot, 8, 1 / FPS, 0)
    with Scene(robot, appearance=Appearance.textured()) as scene:
        rgb = scene.render_video(q, camera).rgb
    error = {}
    for name, links in (("all", None), ("left", ["left_*"])):
        idm = JacobianIDM.from_embodiment(robot, camera=camera, links=links)
        for motion in (motions := idm.decode_both(rgb, q0=q[0], fps=FPS)):
            assert bool(motion.valid.all())
            error[name] = np.abs(motion.position.numpy() - q).max(axis=0)
            if links is not None:
                np.testing.assert_allclose(motion.position[:, 2:], np.tile(q[0, 2:], (len(q), 1)), atol=1e-6)
                assert not motion.observable[:, 2:].any()
        std = motions[0].covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert (np.ptp(q[:, 2:], axis=0) > 0.1).all(), "the joints that are held moved"
    assert (std[:, 2:] > 5 * std[:, :2]).all()
    assert (error["left"][:2] < error["all"][:2] + 0.01).all()


def test_a_robot_outside_the_image_is_not_observable(finger: Clip) -> None:
    away = Camera.look_at((5.0, 5.0, 0.5), (10.0, 10.0, 0.0), width=WIDTH, height=HEIGHT)
    for options in (BY_FLOW, AnalyticOptions()):
        idm = JacobianIDM.from_embodiment(finger.robot, camera=away, options=options)
        motion = idm.decode(finger.frames[:4], q0=finger.q[0], fps=FPS)
        assert all_finite(motion)
        assert not motion.observable.any()
        assert not motion.valid.any()
        assert float(motion.delta_q.abs().max()) == 0.0


# ---- batches and layouts ---------------------------------------------------------------------------------------------


def test_videos_of_a_batch_are_independent(finger: Clip, by_flow: JacobianIDM) -> None:
    f, q = finger.frames, finger.q
    videos = torch.stack([torch.stack([f[0:4], f[1:5]]), torch.stack([f[3:7], f[4:8]])])  # (2, 2, 4, ...)
    starts = np.stack([np.stack([q[0], q[1]]), np.stack([q[3], q[4]])])
    together = by_flow.decode(videos, q0=starts, fps=FPS)
    assert together.delta_q.shape == (2, 2, 3, 3)
    assert together.covariance.shape == (2, 2, 3, 3, 3)
    assert together.time.shape == (4,)
    for i in range(2):
        for j in range(2):
            alone = by_flow.decode(videos[i, j], q0=starts[i, j], fps=FPS)
            for key, value in alone.numpy().items():
                expected = together.numpy()[key] if key == "time" else together.numpy()[key][i, j]
                np.testing.assert_array_equal(value, expected, err_msg=key)


def test_one_q0_is_broadcast_and_flow_is_batched(finger: Clip, by_flow: JacobianIDM) -> None:
    videos = finger.frames[:4].expand(2, -1, -1, -1, -1)
    flow = Flow(finger.flow.flow[:3].expand(2, -1, -1, -1, -1), finger.flow.weight[:3].expand(2, -1, -1, -1))
    motion = by_flow.decode(videos, q0=finger.q[0], fps=FPS, flow=flow)
    assert torch.equal(motion.delta_q[0], motion.delta_q[1])
    np.testing.assert_allclose(motion.delta_q[0].numpy(), finger.steps[:3], atol=2e-4)


def test_a_uint8_array_is_the_same_video(finger: Clip, by_flow: JacobianIDM) -> None:
    a = by_flow.decode(finger.rgb, q0=finger.q[0].tolist(), fps=FPS)
    b = by_flow.decode(finger.frames.float(), q0=torch.from_numpy(finger.q[0]), fps=FPS)
    torch.testing.assert_close(a.delta_q, b.delta_q, rtol=0, atol=1e-6)


def test_nan_in_external_flow_has_no_weight(finger: Clip, by_flow: JacobianIDM) -> None:
    holes = finger.flow.flow.clone()
    holes[:, :, ::3] = torch.nan
    holes[:, :, ~finger.flow.weight.bool().any(0)] = torch.nan
    motion = by_flow.decode(finger.frames, q0=finger.q[0], fps=FPS, flow=holes)
    assert motion.valid.all()
    assert nve(motion, finger.steps) < 0.5


# ---- errors ----------------------------------------------------------------------------------------------------------


def refusals(c: Clip) -> dict[str, tuple[type[Exception], str, dict]]:
    frames = c.frames[:4]
    good = {"video": frames, "q0": c.q[0], "fps": FPS}
    nan_q = c.q[0].copy()
    nan_q[1] = np.nan
    first_nan = frames.clone()
    first_nan[0] = torch.nan
    return {
        "one frame": (VideoError, "1 frame", {**good, "video": frames[:1]}),
        "q0 length": (InputError, "hinge1, hinge2, hinge3", {**good, "q0": c.q[0][:2]}),
        "q0 nan": (InputError, "NaN", {**good, "q0": nan_q}),
        "q0 batch": (InputError, "q0", {**good, "q0": np.tile(c.q[0], (5, 1))}),
        "size": (VideoError, "resized", {**good, "video": frames[..., :100, :100]}),
        "no clock": (VideoError, "fps", {**good, "fps": None}),
        "fps zero": (InputError, "fps", {**good, "fps": 0.0}),
        "fps nan": (InputError, "fps", {**good, "fps": float("nan")}),
        "flow shape": (InputError, "flow must be", {**good, "flow": c.flow}),
        "flow size": (InputError, "flow must be", {**good, "flow": torch.zeros(3, 2, 5, 5)}),
        "first frame": (VideoError, "first frame", {**good, "video": first_nan}),
        "no file": (VideoError, "no such file", {**good, "video": "missing.mp4"}),
    }


@pytest.mark.parametrize("case", list(refusals(clip("planar_finger_3", frames=8, seed=1))))
def test_an_error_is_one_line(case: str, finger: Clip, by_flow: JacobianIDM) -> None:
    kind, words, arguments = refusals(finger)[case]
    with pytest.raises(kind, match=words) as caught:
        by_flow.decode(**arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_ambiguous_layout_can_be_given(finger: Clip, by_flow: JacobianIDM) -> None:
    three = finger.frames[:3]  # three frames of three channels: time and color are ambiguous
    with pytest.raises(VideoError, match="layout="):
        by_flow.decode(three, q0=finger.q[0], fps=FPS)
    explicit = by_flow.decode(three, q0=finger.q[0], fps=FPS, layout="TCHW")
    as_bytes = by_flow.decode(three * 255, q0=finger.q[0], fps=FPS, layout="TCHW", value_range=(0, 255))
    assert explicit.frames == 3
    torch.testing.assert_close(explicit.delta_q, as_bytes.delta_q, rtol=0, atol=1e-6)


def test_unknown_names_raise() -> None:
    with pytest.raises(InputError, match="did you mean 'panda'"):
        JacobianIDM.from_embodiment("pnda")
    with pytest.raises(InputError, match="did you mean 'dis'"):
        JacobianIDM.from_embodiment("planar_finger_1", flow="diss")
    with pytest.raises(InputError, match="front"):
        JacobianIDM.from_embodiment("planar_finger_1", camera="frnt")


# ---- files -----------------------------------------------------------------------------------------------------------


def test_file_and_array_agree(finger: Clip, by_alignment: JacobianIDM, decoded: JointMotion, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "clip.mp4"
    write_video(path, finger.rgb, FPS, crf=4)
    motion = by_alignment.decode(path, q0=finger.q[0])
    assert motion.frames == 8
    np.testing.assert_allclose(motion.time.diff().numpy(), 1 / FPS, atol=1e-4)
    assert float((motion.delta_q - decoded.delta_q).abs().mean()) < 0.15 * np.abs(finger.steps).mean()
    assert nve(motion, finger.steps) < 0.2
    resampled = by_alignment.decode(path, q0=finger.q[0], fps=2 * FPS)  # the same steps at twice the speed
    # Not exactly: the prior of a step depends on the speed limits and the frame rate.
    torch.testing.assert_close(resampled.velocity, 2 * motion.velocity, rtol=0.05, atol=0.02)


def test_flow_that_does_not_fit_a_file_raises(finger: Clip, by_flow: JacobianIDM, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "clip.mp4"
    write_video(path, finger.rgb, FPS)
    for wrong in (finger.flow[:3], torch.zeros(7, 2, 9, 9)):
        with pytest.raises(InputError, match="flow"):
            by_flow.decode(path, q0=finger.q[0], flow=wrong)
    with pytest.raises(InputError, match="q0"):
        by_flow.decode(path, q0=np.tile(finger.q[0], (2, 1)))


def test_a_file_of_one_frame_raises(finger: Clip, by_flow: JacobianIDM, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "one.mp4"
    write_video(path, finger.rgb[:1], FPS)
    with pytest.raises(VideoError, match="one frame"):
        by_flow.decode(path, q0=finger.q[0])


def test_streaming_keeps_few_frames_in_memory(finger: Clip, idm: JacobianIDM, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Counts the frames alive while a stream of 10 is decoded."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Source:
        path, fps, length = Path("stream"), FPS, None
        height, width = finger.rgb.shape[1:3]

        def __iter__(self):  # type: ignore[no-untyped-def]
            raise AssertionError("decoding reads pixels")

        def pixels(self):  # type: ignore[no-untyped-def]
            nonlocal most
            for k in range(10):
                frame = CountedFrame(torch.from_numpy(finger.rgb[k % 2]).permute(2, 0, 1), alive)
                if k % 4 == 3:
                    gc.collect()
                most = max(most, sum(r() is not None for r in alive))
                yield k / FPS, frame

    monkeypatch.setattr("jidm.video.timestamps.open_video", lambda path, fps=None: Source())
    motion = idm.decode("stream", q0=finger.q[0])
    assert motion.frames == 10
    assert len(alive) == 10
    assert most <= 5


class CountedFrame:
    """Pixels whose float copy is counted while it is alive."""

    def __init__(self, pixels: Tensor, alive: list[weakref.ref[Tensor]]) -> None:
        self.pixels, self.alive = pixels, alive

    def to(self, dtype: torch.dtype) -> CountedFrame:
        return self

    def __truediv__(self, white: float) -> Tensor:
        frame = self.pixels.float() / white
        self.alive.append(weakref.ref(frame))
        return frame


# ---- reproducibility -------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_equal_bits(finger: Clip, decoded: JointMotion) -> None:
    again = JacobianIDM.from_embodiment(finger.robot, camera=finger.camera).decode(
        finger.frames[:4], q0=finger.q[0], fps=FPS
    )
    for key, value in decoded[:4].numpy().items():
        np.testing.assert_array_equal(value, again.numpy()[key], err_msg=key)
    other = JacobianIDM.from_embodiment(finger.robot, camera=finger.camera, seed=5)
    assert not torch.equal(other.decode(finger.frames[:4], q0=finger.q[0], fps=FPS).delta_q, decoded.delta_q[:3])


def test_provenance_records_how_a_motion_was_decoded(finger: Clip, decoded: JointMotion) -> None:
    provenance = decoded.provenance
    assert provenance["seed"] == 0
    assert provenance["embodiment"] == "planar_finger_3"
    assert provenance["embodiment_hash"] == finger.robot.content_hash
    assert provenance["options"]["refine"] == "photometric"
    assert provenance["options"]["align"]["iterations"] == AnalyticOptions().align.iterations
    assert provenance["flow"] == "DisFlow"
    assert provenance["camera"]["width"] == WIDTH
    assert provenance["jidm"]
