"""Decoding a video: exact flow, pictures, broken frames, batches, files, limits."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from rendered import FPS, HEIGHT, WIDTH, Clip, clip
from torch import Tensor

from jidm import Camera, Embodiment, JacobianIDM, JointMotion, load_embodiment
from jidm.errors import InputError, VideoError
from jidm.estimation.analytic_measurement import AnalyticOptions
from jidm.flow import Flow
from jidm.video.io import write_video

BY_FLOW = AnalyticOptions(refine="none")


@pytest.fixture(scope="module")
def finger() -> Clip:
    return clip("planar_finger_3", frames=8, seed=1)


@pytest.fixture(scope="module")
def by_flow(finger: Clip) -> JacobianIDM:
    return JacobianIDM.from_embodiment(finger.robot, camera=finger.camera, options=BY_FLOW)


@pytest.fixture(scope="module")
def by_picture(finger: Clip) -> JacobianIDM:
    return JacobianIDM.from_embodiment(finger.robot, camera=finger.camera)


@pytest.fixture(scope="module", params=["flow", "picture"])
def idm(request: pytest.FixtureRequest, by_flow: JacobianIDM, by_picture: JacobianIDM) -> JacobianIDM:
    """Both ways of decoding, where a law holds for both."""
    return by_flow if request.param == "flow" else by_picture


@pytest.fixture(scope="module")
def decoded(finger: Clip, by_picture: JacobianIDM) -> JointMotion:
    return by_picture.decode(finger.frames, q0=finger.q[0], fps=FPS)


def nve(motion: JointMotion, steps: np.ndarray) -> float:
    """Mean error of the steps over their mean size: 1 for an answer of zero."""
    return float(np.abs(motion.delta_q.numpy() - steps).mean() / np.abs(steps).mean())


def all_finite(motion: JointMotion) -> bool:
    return all(np.isfinite(x).all() for x in motion.numpy().values())


# ---- how well --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["planar_finger_3", "panda", "allegro_right"])
def test_exact_flow_gives_exact_steps(name: str) -> None:
    truth = clip(name, frames=6)
    idm = JacobianIDM.from_embodiment(truth.robot, camera=truth.camera, options=BY_FLOW)
    motion = idm.decode(truth.frames, q0=truth.q[0], fps=FPS, flow=truth.flow)
    error = np.abs(motion.delta_q.numpy() - truth.steps)
    assert error[motion.observable.numpy()].mean() <= 2e-4
    assert error.mean() <= 2e-4
    assert np.abs(truth.steps).mean() > 5e-3  # there was something to measure
    assert motion.valid.all()
    np.testing.assert_allclose(motion.velocity.numpy(), motion.delta_q.numpy() * FPS, rtol=1e-9)
    sums = motion.position[0] + motion.delta_q.cumsum(0)
    torch.testing.assert_close(motion.position[1:], sums, rtol=0, atol=1e-9)


def test_pictures_beat_zero_widely_and_flow_alone(finger: Clip, by_flow: JacobianIDM, decoded: JointMotion) -> None:
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


def test_still_video_gives_no_motion(finger: Clip, idm: JacobianIDM) -> None:
    still = finger.frames[:1].expand(4, -1, -1, -1)
    motion = idm.decode(still, q0=finger.q[0], fps=FPS)
    assert float(motion.delta_q.abs().max()) < 2e-4
    assert motion.valid.all()


def test_reversed_video_negates_the_steps(finger: Clip, by_picture: JacobianIDM, decoded: JointMotion) -> None:
    back = by_picture.decode(finger.frames[:5].flip(0), q0=finger.q[4], fps=FPS)
    difference = (back.delta_q.flip(0) + decoded.delta_q[:4]).abs().mean()
    assert float(difference) < 0.25 * np.abs(finger.steps).mean()


# ---- frames that show nothing ----------------------------------------------------------------------------------------


def test_nan_frame_spoils_its_two_steps_alone(finger: Clip, idm: JacobianIDM) -> None:
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


def test_given_flow_across_a_nan_frame_is_not_taken_for_the_flow_of_both_steps(
    finger: Clip, by_flow: JacobianIDM
) -> None:
    frames = finger.frames
    frames[4] = torch.nan
    motion = by_flow.decode(frames, q0=finger.q[0], fps=FPS, flow=finger.flow)
    assert motion.valid.tolist() == [True, True, True, False, False, True, True]
    # Frame 5 is found again from the pictures 3 and 5, so it is a little off; the steps before and after are exact.
    assert np.abs(motion.position.numpy() - finger.q)[5:].max() < 0.012
    assert np.abs(motion.position.numpy() - finger.q)[:4].max() < 2e-4


def test_last_frame_nan(finger: Clip, by_flow: JacobianIDM) -> None:
    frames = finger.frames
    frames[-1] = torch.inf
    motion = by_flow.decode(frames, q0=finger.q[0], fps=FPS)
    assert motion.valid.tolist() == [True] * 6 + [False]
    assert all_finite(motion)


@pytest.mark.parametrize("kind", ["noise", "black", "leaves"])
def test_nonsense_stays_finite_and_inside_the_limits(finger: Clip, kind: str, idm: JacobianIDM) -> None:
    frames = finger.frames[:5]
    if kind == "noise":
        frames = torch.rand(frames.shape, generator=torch.Generator().manual_seed(0)).double()
    elif kind == "black":
        frames = torch.zeros_like(frames)
    else:  # the picture slides out of itself
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
def test_wild_flow_never_breaks_a_limit(finger: Clip, idm: JacobianIDM, sign: float) -> None:
    wild = Flow(sign * 300 * torch.ones_like(finger.flow.flow[:3]), torch.ones_like(finger.flow.weight[:3]))
    near_limit = np.array([finger.robot.upper[0] - 0.01, finger.q[0][1], finger.robot.lower[2]])
    motion = idm.decode(finger.frames[:4], q0=near_limit, fps=FPS, flow=wild)
    assert all_finite(motion)
    assert_inside_limits(motion, finger.robot)


def test_speed_limit_binds_and_can_be_lifted(finger: Clip, by_flow: JacobianIDM) -> None:
    """The same frames said to be shown 40 times faster would need more speed than the joints have."""
    fast = by_flow.decode(finger.frames, q0=finger.q[0], fps=40 * FPS, flow=finger.flow)
    assert_inside_limits(fast, finger.robot)
    assert np.abs(fast.velocity.numpy()).max() > 0.999 * finger.robot.velocity.max()
    free = JacobianIDM(finger.robot, by_flow.field, by_flow.flow, options=BY_FLOW, limits="position")
    motion = free.decode(finger.frames, q0=finger.q[0], fps=40 * FPS, flow=finger.flow)
    assert np.abs(motion.delta_q.numpy() - finger.steps).max() < 2e-4
    with pytest.raises(InputError, match="limits must be"):
        JacobianIDM(finger.robot, by_flow.field, by_flow.flow, limits="speed")


# ---- observability ---------------------------------------------------------------------------------------------------


def test_joint_seen_end_on_is_flagged(finger: Clip) -> None:
    """A far camera in the finger's plane sees the hinge turn the finger towards it and away: next to nothing."""
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


def test_hidden_joints_are_flagged_and_wide() -> None:
    """Seen past its palm and fingers, joints of a hand cover each other; those are the ones that are wrong."""
    truth = clip("allegro_right", frames=6)
    idm = JacobianIDM.from_embodiment(truth.robot, camera=truth.camera, options=BY_FLOW)
    motion = idm.decode(truth.frames, q0=truth.q[0], fps=FPS)
    seen = motion.observable.numpy()
    assert 0.2 < seen.mean() < 0.9
    error = np.abs(motion.delta_q.numpy() - truth.steps)
    assert error[seen].mean() < error[~seen].mean()
    std = motion.covariance.diagonal(dim1=-2, dim2=-1).sqrt().numpy()
    assert np.median(std[seen]) < np.median(std[~seen])


def test_robot_outside_the_picture_is_not_observable(finger: Clip) -> None:
    away = Camera.look_at((5.0, 5.0, 0.5), (10.0, 10.0, 0.0), width=WIDTH, height=HEIGHT)
    for options in (BY_FLOW, AnalyticOptions()):
        idm = JacobianIDM.from_embodiment(finger.robot, camera=away, options=options)
        motion = idm.decode(finger.frames[:4], q0=finger.q[0], fps=FPS)
        assert all_finite(motion)
        assert not motion.observable.any()
        assert not motion.valid.any()
        assert float(motion.delta_q.abs().max()) == 0.0


# ---- batches and layouts ---------------------------------------------------------------------------------------------


def test_a_batch_is_a_loop(finger: Clip, by_flow: JacobianIDM) -> None:
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


def test_one_start_serves_a_batch_and_flow_is_batched_too(finger: Clip, by_flow: JacobianIDM) -> None:
    videos = finger.frames[:4].expand(2, -1, -1, -1, -1)
    flow = Flow(finger.flow.flow[:3].expand(2, -1, -1, -1, -1), finger.flow.weight[:3].expand(2, -1, -1, -1))
    motion = by_flow.decode(videos, q0=finger.q[0], fps=FPS, flow=flow)
    assert torch.equal(motion.delta_q[0], motion.delta_q[1])
    np.testing.assert_allclose(motion.delta_q[0].numpy(), finger.steps[:3], atol=2e-4)


def test_uint8_array_is_the_same_video(finger: Clip, by_flow: JacobianIDM) -> None:
    a = by_flow.decode(finger.rgb, q0=finger.q[0].tolist(), fps=FPS)
    b = by_flow.decode(finger.frames.float(), q0=torch.from_numpy(finger.q[0]), fps=FPS)
    torch.testing.assert_close(a.delta_q, b.delta_q, rtol=0, atol=1e-6)


def test_nan_flow_of_a_tensor_counts_for_nothing(finger: Clip, by_flow: JacobianIDM) -> None:
    holes = finger.flow.flow.clone()
    holes[:, :, ::3] = torch.nan
    holes[:, :, ~finger.flow.weight.bool().any(0)] = torch.nan
    motion = by_flow.decode(finger.frames, q0=finger.q[0], fps=FPS, flow=holes)
    assert motion.valid.all()
    assert nve(motion, finger.steps) < 0.5


# ---- refusals --------------------------------------------------------------------------------------------------------


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
def test_one_clear_line(case: str, finger: Clip, by_flow: JacobianIDM) -> None:
    kind, words, arguments = refusals(finger)[case]
    with pytest.raises(kind, match=words) as caught:
        by_flow.decode(**arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_layout_that_must_be_told_can_be_told(finger: Clip, by_flow: JacobianIDM) -> None:
    three = finger.frames[:3]  # three frames of three channels: time and colour cannot be told apart
    with pytest.raises(VideoError, match="layout="):
        by_flow.decode(three, q0=finger.q[0], fps=FPS)
    told = by_flow.decode(three, q0=finger.q[0], fps=FPS, layout="TCHW")
    as_bytes = by_flow.decode(three * 255, q0=finger.q[0], fps=FPS, layout="TCHW", value_range=(0, 255))
    assert told.frames == 3
    torch.testing.assert_close(told.delta_q, as_bytes.delta_q, rtol=0, atol=1e-6)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'panda'"):
        JacobianIDM.from_embodiment("pnda")
    with pytest.raises(InputError, match="did you mean 'dis'"):
        JacobianIDM.from_embodiment("planar_finger_1", flow="diss")
    with pytest.raises(InputError, match="front"):
        JacobianIDM.from_embodiment("planar_finger_1", camera="frnt")


# ---- files -----------------------------------------------------------------------------------------------------------


def test_file_and_array_agree(finger: Clip, by_picture: JacobianIDM, decoded: JointMotion, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "clip.mp4"
    write_video(path, finger.rgb, FPS, crf=4)
    motion = by_picture.decode(path, q0=finger.q[0])
    assert motion.frames == 8
    np.testing.assert_allclose(motion.time.diff().numpy(), 1 / FPS, atol=1e-4)
    assert float((motion.delta_q - decoded.delta_q).abs().mean()) < 0.15 * np.abs(finger.steps).mean()
    assert nve(motion, finger.steps) < 0.2
    resampled = by_picture.decode(path, q0=finger.q[0], fps=2 * FPS)  # told to be faster: same steps, twice the speed
    # Not to the bit: how far a joint may stray from its expected step follows from its speed limit and the clock.
    torch.testing.assert_close(resampled.velocity, 2 * motion.velocity, rtol=0.05, atol=0.02)


def test_wrong_flow_for_a_file_is_refused(finger: Clip, by_flow: JacobianIDM, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "clip.mp4"
    write_video(path, finger.rgb, FPS)
    for wrong in (finger.flow[:3], torch.zeros(7, 2, 9, 9)):
        with pytest.raises(InputError, match="flow"):
            by_flow.decode(path, q0=finger.q[0], flow=wrong)
    with pytest.raises(InputError, match="q0"):
        by_flow.decode(path, q0=np.tile(finger.q[0], (2, 1)))


def test_one_frame_file_is_refused(finger: Clip, by_flow: JacobianIDM, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "one.mp4"
    write_video(path, finger.rgb[:1], FPS)
    with pytest.raises(VideoError, match="one frame"):
        by_flow.decode(path, q0=finger.q[0])


def test_streaming_holds_a_handful_of_frames(finger: Clip, idm: JacobianIDM, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Counts the frames alive while a long stream is decoded; a decoder that kept them would reach 10."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Source:
        fps, length = FPS, None

        def pixels(self):  # type: ignore[no-untyped-def]
            nonlocal most
            for k in range(10):
                frame = CountedFrame(torch.from_numpy(finger.rgb[k % 2]).permute(2, 0, 1), alive)
                if k % 4 == 3:
                    gc.collect()
                most = max(most, sum(r() is not None for r in alive))
                yield k / FPS, frame

    monkeypatch.setattr("jidm.video.io.open_video", lambda path, fps=None: Source())
    motion = idm.decode("stream", q0=finger.q[0])
    assert motion.frames == 10
    assert len(alive) == 10
    assert most <= 5


class CountedFrame:
    """Pixels whose float copy, the one a decoder could keep, is counted."""

    def __init__(self, pixels: Tensor, alive: list[weakref.ref[Tensor]]) -> None:
        self.pixels, self.alive = pixels, alive

    def to(self, dtype: torch.dtype) -> CountedFrame:
        return self

    def __truediv__(self, white: float) -> Tensor:
        frame = self.pixels.float() / white
        self.alive.append(weakref.ref(frame))
        return frame


# ---- repeatability ---------------------------------------------------------------------------------------------------


def test_same_seed_same_bits(finger: Clip, decoded: JointMotion) -> None:
    again = JacobianIDM.from_embodiment(finger.robot, camera=finger.camera).decode(
        finger.frames[:4], q0=finger.q[0], fps=FPS
    )
    for key, value in decoded[:4].numpy().items():
        np.testing.assert_array_equal(value, again.numpy()[key], err_msg=key)
    other = JacobianIDM.from_embodiment(finger.robot, camera=finger.camera, seed=5)
    assert not torch.equal(other.decode(finger.frames[:4], q0=finger.q[0], fps=FPS).delta_q, decoded.delta_q[:3])


def test_provenance_says_what_made_it(finger: Clip, decoded: JointMotion) -> None:
    made = decoded.provenance
    assert made["seed"] == 0
    assert made["embodiment"] == "planar_finger_3"
    assert made["embodiment_hash"] == finger.robot.content_hash
    assert made["options"]["refine"] == "photometric"
    assert made["options"]["align"]["iterations"] == AnalyticOptions().align.iterations
    assert made["flow"] == "DisFlow"
    assert made["camera"]["width"] == WIDTH
    assert made["jidm"]
