"""JacobianIDM.from_pretrained: from a folder, with and without a camera or an embodiment, on frames of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotations import unchecked
from step_fields import FINGER, SIDE, config, random_images
from torch import Tensor

from jidm import JacobianIDM, JointMotion, load_embodiment
from jidm.checkpoint import embodiment_record, load_checkpoint, save_checkpoint
from jidm.errors import CheckpointError, InputError, VideoError
from jidm.estimation.analytic_measurement import AnalyticOptions
from jidm.estimation.learned_measurement import LearnedOptions
from jidm.fields.free import LearnedField
from jidm.fields.hybrid import HybridField
from jidm.flow import Flow
from jidm.training.trainable_field import TrainableField
from jidm.video.io import write_video
from jidm.video.letterbox import Letterbox

FPS = 16.0
ALWAYS_VALID = LearnedOptions(max_unexplained=1.0)
"""An untrained network explains little of the motion."""


def saved(
    folder: Path, *, robot: str | None = "planar_finger_2", kind: str = "jacobian_field",
    training: dict[str, Any] | None = None, **record: Any,
) -> Path:  # fmt: skip
    """An untrained field, saved as training saves one."""
    torch.manual_seed(0)
    model = TrainableField(config())
    model.step_std_scale.copy_(torch.tensor([1.5, 2.5]))
    embodiment = None if robot is None else {**embodiment_record(load_embodiment(robot)), **record}
    return save_checkpoint(
        folder, kind=kind, config=asdict(model.config), tensors=model.state_dict(), embodiment=embodiment,
        training=training or {},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("checkpoints") / "finger")


@pytest.fixture(scope="module")
def idm(folder: Path) -> JacobianIDM:
    return JacobianIDM.from_pretrained(folder, options=ALWAYS_VALID)


def video(frames: int = 5, height: int = SIDE, width: int = SIDE, seed: int = 0) -> Tensor:
    """Crops that slide over a smooth pattern."""
    wide = random_images(1, seed, height, width + 64)[0]
    return torch.stack([wide[..., 2 * k : 2 * k + width] for k in range(frames)])


def assert_same(one: JointMotion, other: JointMotion, tolerance: float = 1e-5) -> None:
    for name in ("delta_q", "position", "position_std", "covariance", "residual", "explained_fraction"):
        a, b = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.equal(one.valid, other.valid)


def assert_sound(motion: JointMotion, lower: np.ndarray, upper: np.ndarray, velocity: float) -> None:
    assert all(np.isfinite(x).all() for x in motion.numpy().values())
    q = motion.position.numpy()
    assert (q >= lower - 1e-6).all() and (q <= upper + 1e-6).all()
    assert (motion.velocity.abs() <= velocity * (1 + 1e-5)).all()
    assert (motion.position_std >= 0).all()


# ---- decoding --------------------------------------------------------------------------------------------------------


def test_decoding_needs_only_the_checkpoint_folder(idm: JacobianIDM, folder: Path) -> None:
    motion = idm.decode(video(), fps=FPS)
    robot = load_embodiment("planar_finger_2")
    assert motion.joint_names == idm.joint_names == FINGER
    assert motion.position.shape == (5, 2) and motion.delta_q.shape == (4, 2) and motion.valid.shape == (4,)
    assert_sound(motion, robot.lower, robot.upper, robot.velocity.max())
    assert motion.delta_q.abs().max() > 1e-4
    torch.testing.assert_close(motion.velocity, motion.delta_q * FPS)
    provenance = motion.provenance
    assert provenance["checkpoint"] == {"source": str(folder), "content_hash": load_checkpoint(folder).content_hash}
    assert (
        provenance["field"] == "LearnedField"
        and provenance["embodiment"] == "planar_finger_2"
        and provenance["camera"] is None
    )
    assert provenance["embodiment_hash"] == robot.content_hash and provenance["options"]["max_unexplained"] == 1.0
    assert not any(p.requires_grad for p in idm.field.parameters()) and not idm.field.training
    torch.testing.assert_close(idm.field.step_std_scale, torch.tensor([1.5, 2.5]))  # the calibration was loaded


def test_the_first_pose_is_predicted_or_given(idm: JacobianIDM) -> None:
    frames = video()
    field = idm.field
    assert isinstance(field, LearnedField)
    q_predicted, std = field.predict_pose(field.encode(frames[:1]))
    predicted, given = idm.decode(frames, fps=FPS), idm.decode(frames, fps=FPS, q0=[0.4, -0.3])
    torch.testing.assert_close(predicted.position[0], q_predicted[0])
    torch.testing.assert_close(given.position[0], torch.tensor([0.4, -0.3]))
    # A given pose is certain, a predicted one is not.
    assert (given.position_std[1] < std[0]).all()
    assert not torch.equal(predicted.position[1:], given.position[1:])


def test_the_first_pose_has_the_predicted_std(idm: JacobianIDM) -> None:
    frames = video()
    assert isinstance(idm.field, LearnedField)
    _, std = idm.field.predict_pose(idm.field.encode(frames[:1]))
    torch.testing.assert_close(idm.decode(frames, fps=FPS).position_std[0], std[0])
    assert not idm.decode(frames, fps=FPS, q0=[0.4, -0.3]).position_std[0].any()


def test_videos_of_a_batch_are_independent(idm: JacobianIDM) -> None:
    clips = torch.stack([video(4, seed=1), video(4, seed=2)])
    q0 = torch.tensor([[0.1, 0.2], [-0.3, 0.4]])
    for start, each in ((None, (None, None)), (q0, q0), (q0[0], (q0[0], q0[0]))):
        batch = idm.decode(clips, fps=FPS, q0=start)
        assert batch.position.shape == (2, 4, 2) and batch.valid.shape == (2, 3)
        for i in range(2):
            one = idm.decode(clips[i], fps=FPS, q0=each[i])
            torch.testing.assert_close(batch.position[i], one.position, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(batch.delta_q[i], one.delta_q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [(128, 128), (48, 96), (100, 60)])
def test_frames_of_other_sizes_are_letterboxed(idm: JacobianIDM, size: tuple[int, int]) -> None:
    frames = video(4, *(16 * -(-s // 16) for s in size))[..., : size[0], : size[1]]
    boxed = Letterbox(*size, SIDE, SIDE).apply(frames)
    assert_same(idm.decode(frames, fps=FPS), idm.decode(boxed, fps=FPS))
    torch.testing.assert_close(idm.predict_steps(frames[:3], frames[1:]), idm.predict_steps(boxed[:3], boxed[1:]))


def test_external_flow_is_letterboxed_with_the_frames(idm: JacobianIDM) -> None:
    """Flow of a wide video becomes that of the image between the black bands, in its pixels."""
    frames = video(4, 48, 96)
    flow = torch.zeros(3, 2, 48, 96)
    flow[:, 0], flow[:, 1] = 6.0, 3.0
    weight = torch.ones(3, 48, 96)
    found = idm.decode(frames, fps=FPS, flow=Flow(flow, weight))
    # 96 -> 64 pixels; 16 black rows above and below.
    inside = torch.zeros(3, SIDE, SIDE)
    inside[:, 16:48] = 1
    expected = idm.decode(
        Letterbox(48, 96, SIDE, SIDE).apply(frames), fps=FPS,
        flow=Flow(torch.stack([4.0 * inside, 2.0 * inside], 1), inside),
    )  # fmt: skip
    torch.testing.assert_close(found.delta_q, expected.delta_q, rtol=0.02, atol=1e-3)
    assert found.delta_q.abs().max() > 5e-3
    assert_same(idm.decode(frames, fps=FPS, flow=flow), found)  # an array has weight 1 everywhere


def test_a_flow_estimator_replaces_the_networks_matching(idm: JacobianIDM, folder: Path) -> None:
    frames, uniform = video(4), torch.tensor([4.0, 2.0])[:, None, None]

    class Estimator:
        """Uniform flow with given weights of the forward and the backward direction."""

        def __init__(self, forward: float, backward: float) -> None:
            self.weights = (forward, backward)

        def __call__(self, first: torch.Tensor, second: torch.Tensor) -> Flow:
            return self.bidirectional(first, second)[0]

        def bidirectional(self, first: torch.Tensor, second: torch.Tensor) -> tuple[Flow, Flow]:
            size = first.shape[-2:]
            a, b = (Flow(s * uniform.expand(2, *size), w * torch.ones(size)) for s, w in zip((1, -1), self.weights))
            return a, b

    def decoded(forward: float, backward: float) -> JointMotion:
        return JacobianIDM.from_pretrained(folder, flow=Estimator(forward, backward)).decode(frames, fps=FPS)

    assert_same(decoded(1.0, 0.0), idm.decode(frames, fps=FPS, flow=uniform.expand(3, 2, *frames.shape[-2:])))
    assert decoded(1.0, 0.0).delta_q.abs().max() > 5e-3
    # Backward flow is used as well, with the field of the later frame.
    forward, backward, both = (decoded(*weights).delta_q for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)))
    assert backward.abs().max() > 5e-3 and (forward - backward).abs().max() > 1e-4
    assert ((both - forward).abs() > 1e-5).any() and ((both - backward).abs() > 1e-5).any()


def test_smoothing_uses_later_frames_and_one_pass_gives_both_motions(idm: JacobianIDM) -> None:
    frames = video(8)
    filtered, smoothed = idm.decode(frames, fps=FPS), idm.decode(frames, fps=FPS, smooth=True)
    assert smoothed.provenance["smoothed"] is True and "smoothed" not in filtered.provenance
    assert smoothed.delta_q.shape == filtered.delta_q.shape
    assert (smoothed.delta_q - filtered.delta_q).abs().max() > 1e-6
    for one, other in zip(idm.decode_both(frames, fps=FPS), (filtered, smoothed), strict=True):
        assert_same(one, other, 0.0)
    batch = idm.decode(torch.stack([frames, frames.flip(0)]), fps=FPS, smooth=True)
    torch.testing.assert_close(batch.delta_q[0], smoothed.delta_q)


def test_a_stream_decodes_as_the_whole_video_does(idm: JacobianIDM) -> None:
    frames = video(8)
    stream = idm.stream(frames[0], keep_history=True)
    steps = [stream.push(frame, t / FPS) for t, frame in enumerate(frames[1:], 1)]
    decoded = idm.decode(frames, fps=FPS)
    torch.testing.assert_close(torch.stack([s.position for s in steps]), decoded.position[1:])
    assert stream.time == 7 / FPS and torch.equal(stream.q, steps[-1].position)
    smoothed = stream.smooth(steps)
    assert (smoothed[0].delta_q - steps[0].delta_q).abs().max() > 1e-7
    torch.testing.assert_close(smoothed[-1].position, steps[-1].position)


def test_a_stream_is_corrected_by_reported_positions(idm: JacobianIDM) -> None:
    frames, reported = video(4), np.array([0.7, -0.6])
    stream = idm.stream(frames[0])
    stream.push(frames[1], 1 / FPS)
    before, std = stream.q, stream.position_covariance.diagonal().sqrt()
    assert (std > 0.05).all()
    stream.correct(reported, std=1e-6)
    torch.testing.assert_close(stream.q.double(), torch.from_numpy(reported), rtol=0, atol=5e-3)
    assert (stream.q - before).abs().min() > 0.1 and (stream.position_covariance.diagonal().sqrt() < 1.1e-3).all()
    stream.push(frames[2], 2 / FPS)
    assert (stream.q.double() - torch.from_numpy(reported)).abs().max() < 0.2
    for wrong in ([0.1], [0.1, np.nan]):
        with pytest.raises(InputError, match="2 finite joint positions"):
            stream.correct(wrong)
    for frame, time, complaint in ((frames[3][:, 1:], 3 / FPS, "the first is"), (frames[3], 0.0, "time must")):
        with pytest.raises(VideoError, match=complaint):
            stream.push(frame, time)


def test_the_data_type_of_frames_does_not_matter(idm: JacobianIDM) -> None:
    frames = video(4)
    expected = idm.decode(frames, fps=FPS)
    assert_same(idm.decode(frames.double(), fps=FPS), expected)
    torch.testing.assert_close(
        idm.predict_steps(frames[:3].double(), frames[1:].double()).float(), idm.predict_steps(frames[:3], frames[1:])
    )
    eight = (frames * 255).round().to(torch.uint8)
    assert_same(idm.decode(eight.permute(0, 2, 3, 1).numpy(), fps=FPS), idm.decode(eight.float() / 255, fps=FPS))


def test_a_video_file_is_decoded(idm: JacobianIDM, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, (video(4).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy(), fps=FPS)
    motion = idm.decode(path)
    assert motion.position.shape == (4, 2)
    torch.testing.assert_close(motion.time.diff(), torch.full((3,), 1 / FPS).double(), rtol=0, atol=1e-3)
    assert torch.isfinite(motion.position).all()


def test_a_nan_frame_makes_only_its_two_steps_invalid(idm: JacobianIDM) -> None:
    frames = video(7)
    clean = idm.decode(frames, fps=FPS)
    assert clean.valid.all()
    broken = frames.clone()
    broken[3, 1, 20, 20] = torch.nan
    motion = idm.decode(broken, fps=FPS)
    assert motion.valid.tolist() == [True, True, False, False, True, True]
    robot = load_embodiment("planar_finger_2")
    assert_sound(motion, robot.lower, robot.upper, robot.velocity.max())
    torch.testing.assert_close(motion.delta_q[:2], clean.delta_q[:2])
    assert not motion.delta_q[2:4].any() and torch.equal(motion.position[3], motion.position[2])
    assert (motion.position_std[3] > motion.position_std[2]).all()
    assert (motion.position_std[4] < motion.position_std[3]).all()  # measured again
    with pytest.raises(VideoError, match="first frame is not finite"):
        idm.decode(broken[3:], fps=FPS)


def test_nan_in_external_flow_is_ignored(idm: JacobianIDM) -> None:
    frames = video(4)
    flow = Flow(torch.full((3, 2, SIDE, SIDE), 2.0), torch.ones(3, SIDE, SIDE))
    flow.flow[0, :, 5, 5] = torch.nan
    motion = idm.decode(frames, fps=FPS, flow=flow)
    assert motion.valid.all() and torch.isfinite(motion.position).all()


@pytest.mark.parametrize("content", ["noise", "black"])
def test_meaningless_frames_stay_finite_and_inside_the_limits(idm: JacobianIDM, content: str) -> None:
    frames = torch.zeros(4, 3, SIDE, SIDE)
    if content == "noise":
        frames = torch.rand(frames.shape, generator=torch.Generator().manual_seed(0))
    robot = load_embodiment("planar_finger_2")
    assert_sound(idm.decode(frames, fps=FPS), robot.lower, robot.upper, robot.velocity.max())


def test_limits_hold_for_any_flow(idm: JacobianIDM) -> None:
    robot = load_embodiment("planar_finger_2")
    for size in (300.0, -300.0, 1e30):
        wild = Flow(torch.full((4, 2, SIDE, SIDE), size), torch.ones(4, SIDE, SIDE))
        motion = idm.decode(video(), fps=FPS, flow=wild, q0=robot.upper - 0.01)
        assert_sound(motion, robot.lower, robot.upper, robot.velocity.max())


# ---- with a camera ---------------------------------------------------------------------------------------------------


def test_with_a_camera_the_field_is_analytic_and_the_network_predicts_the_first_pose(folder: Path) -> None:
    robot = load_embodiment("planar_finger_2")
    camera = robot.camera("front").resized(160, 120)
    hybrid = JacobianIDM.from_pretrained(folder, camera=camera)
    assert isinstance(hybrid.field, HybridField) and isinstance(hybrid.options, AnalyticOptions)
    frames = video(4, 120, 160)
    motion = hybrid.decode(frames, fps=FPS)
    assert_sound(motion, robot.lower, robot.upper, robot.velocity.max())
    assert float(motion.position_std[0].min()) > 0
    given = hybrid.decode(frames, fps=FPS, q0=robot.home)
    assert torch.equal(given.position[0], torch.tensor(robot.home).to(given.position))
    assert float(given.position_std[0].max()) == 0
    provenance = motion.provenance
    assert (provenance["field"], provenance["flow"], provenance["camera"]["width"]) == ("HybridField", "DisFlow", 160)
    assert provenance["checkpoint"]["content_hash"] == load_checkpoint(folder).content_hash
    with pytest.raises(VideoError, match=r"the camera 160x120: pass camera=camera.resized\(64, 64\)"):
        hybrid.decode(video(), fps=FPS)
    with pytest.raises(InputError, match="unrelated pairs need a learned field"):
        hybrid.predict_steps(frames[:1], frames[1:2])


def test_the_camera_of_the_babbling_data_is_in_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="contain no camera; pass camera="):
        JacobianIDM.from_pretrained(folder, camera="trained")
    camera = load_embodiment("planar_finger_2").camera("front").resized(128, 96)
    data = {"image_key": "front", "data_recipe": {"cameras": {"front": camera.to_dict()}}}
    saved(tmp_path / "c", training={"data": data})
    idm = JacobianIDM.from_pretrained(tmp_path / "c", camera="trained")
    given = JacobianIDM.from_pretrained(tmp_path / "c", camera=camera)
    assert isinstance(idm.field, HybridField) and torch.equal(idm.field.camera.K, camera.K)
    frames = video(4, 96, 128)
    assert_same(idm.decode(frames, fps=FPS), given.decode(frames, fps=FPS))


def test_camera_and_embodiment_by_object_name_or_file(folder: Path, tmp_path: Path) -> None:
    robot = load_embodiment("planar_finger_2")
    camera = robot.camera().resized(SIDE, 48)
    path = tmp_path / "camera.json"
    camera.save(path)
    given = JacobianIDM.from_pretrained(folder, embodiment=robot, camera=camera)
    from_file = JacobianIDM.from_pretrained(folder, embodiment="planar_finger_2", camera=path)
    for other in (given, from_file):
        assert isinstance(other.field, HybridField)
        torch.testing.assert_close(other.field.camera.K[0, 0], camera.K[0, 0])


# ---- without an embodiment -------------------------------------------------------------------------------------------


def test_a_field_of_a_plain_recording_needs_no_embodiment(tmp_path: Path) -> None:
    idm = JacobianIDM.from_pretrained(saved(tmp_path / "plain", robot=None), options=ALWAYS_VALID)
    assert idm.embodiment is None
    motion = idm.decode(video(), fps=FPS)
    assert motion.joint_names == FINGER and motion.joint_types == ("revolute", "revolute")
    # The range of the training poses, widened by a quarter on both sides.
    assert_sound(motion, np.full(2, -1.8), np.full(2, 1.8), np.inf)
    assert motion.provenance["embodiment"] is None and motion.provenance["embodiment_hash"] is None
    assert motion.provenance["checkpoint"]["content_hash"]
    wild = Flow(torch.full((4, 2, SIDE, SIDE), 300.0), torch.ones(4, SIDE, SIDE))
    assert_sound(idm.decode(video(), fps=FPS, flow=wild), np.full(2, -1.8), np.full(2, 1.8), np.inf)
    with pytest.raises(InputError, match=r"needs the robot; pass embodiment="):
        JacobianIDM.from_pretrained(tmp_path / "plain", camera="front")
    with_robot = JacobianIDM.from_pretrained(tmp_path / "plain", embodiment="planar_finger_2", camera="front")
    assert isinstance(with_robot.field, HybridField)


def test_an_unregistered_robot_has_no_embodiment(tmp_path: Path) -> None:
    idm = JacobianIDM.from_pretrained(saved(tmp_path / "own", name="my_robot", content_hash="0" * 64))
    assert idm.embodiment is None


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "embodiment", "complaint"),
    [
        ({}, "planar_finger_3", r"trained for 'planar_finger_2', which is not this 'planar_finger_3'.*added: hinge3"),
        ({"content_hash": "0" * 64, "lower": [-1.0, -1.2]}, None, r"lower limit of hinge1 -1 -> -1\.2"),
        ({"content_hash": "0" * 64, "joint_names": ["hinge2", "hinge1"]}, None, "another order"),
        ({"content_hash": "0" * 64}, "planar_finger_2", "its shapes or its descriptor differ"),
    ],
)
def test_another_robot_raises_and_names_the_difference(
    tmp_path: Path, record: dict[str, Any], embodiment: str | None, complaint: str
) -> None:
    where = saved(tmp_path / "other", **record)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        JacobianIDM.from_pretrained(where, embodiment=embodiment)
    assert "\n" not in str(caught.value) and "train again" in str(caught.value)


def test_another_kind_of_model_raises_and_names_the_remedy(tmp_path: Path) -> None:
    where = saved(tmp_path / "direct", kind="direct")
    with pytest.raises(
        CheckpointError, match=r"kind 'direct', not a Jacobian field; load it with jidm\.model_registry"
    ):
        JacobianIDM.from_pretrained(where)
    with pytest.raises(CheckpointError, match="nowhere"):
        JacobianIDM.from_pretrained(tmp_path / "nowhere")


REFUSED: dict[str, tuple[Callable[[JacobianIDM], object], type[Exception], str]] = {
    "q0 of three joints": (lambda i: i.decode(video(4), fps=FPS, q0=[0, 0, 0]), InputError, r"2 joints \(hinge1"),
    "q0 unknown": (lambda i: i.decode(video(4), fps=FPS, q0=[0, np.nan]), InputError, "q0 holds NaN"),
    "no clock": (lambda i: i.decode(video(4)), VideoError, "pass fps="),
    "one frame": (lambda i: i.decode(video(1), fps=FPS), VideoError, "at least"),
    "flow too short": (
        lambda i: i.decode(video(4), fps=FPS, flow=torch.zeros(1, 2, SIDE, SIDE)), InputError, r"flow must be \(3, 2"
    ),
    "limits": (
        lambda i: unchecked(JacobianIDM.__init__)(object.__new__(JacobianIDM), i.embodiment, i.field, None, limits="some"),
        InputError, "limits must be",
    ),
    "options": (
        lambda i: JacobianIDM(i.embodiment, i.field, None, options=AnalyticOptions()), InputError, "takes LearnedOptions"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_raise(idm: JacobianIDM, case: str) -> None:
    call, error, complaint = REFUSED[case]
    with pytest.raises(error, match=complaint):
        call(idm)


def test_an_analytic_idm_does_not_predict_poses() -> None:
    exact = JacobianIDM.from_embodiment("planar_finger_2", points=500)
    with pytest.raises(InputError, match="q0, the 2 joint positions in the first frame, must be given"):
        exact.decode(torch.zeros(2, 3, 240, 320), fps=FPS)
    with pytest.raises(InputError, match="need a learned field"):
        exact.predict_steps(torch.zeros(1, 3, 240, 320), torch.zeros(1, 3, 240, 320))
    with pytest.raises(InputError, match="only a learned one does without"):
        JacobianIDM(None, exact.field, exact.flow)
    with pytest.raises(InputError, match="takes AnalyticOptions"):
        JacobianIDM(exact.embodiment, exact.field, exact.flow, options=LearnedOptions())


def test_speed_limits_can_be_lifted(idm: JacobianIDM) -> None:
    robot = load_embodiment("planar_finger_2")
    flow = Flow(torch.full((3, 2, SIDE, SIDE), 6.0), torch.ones(3, SIDE, SIDE))
    fast = idm.decode(video(4), fps=1000.0, flow=flow)
    assert_sound(fast, robot.lower, robot.upper, robot.velocity.max())
    free = JacobianIDM(idm.embodiment, idm.field, None, options=ALWAYS_VALID, limits="position")
    assert free.decode(video(4), fps=1000.0, flow=flow).velocity.abs().max() > 2 * robot.velocity.max()


# ---- from the command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("camera", [False, True])
def test_decoding_from_the_command_line_needs_only_the_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], camera: bool
) -> None:
    from jidm.cli import main

    frames = (video(7).permute(0, 2, 3, 1) * 255).byte().numpy()
    write_video(tmp_path / "v.mp4", iter(frames), 16.0)
    more = ["--embodiment", "planar_finger_2", "--camera", "front"] if camera else []
    if camera:  # frames of the aspect ratio of the robot's camera
        robot = load_embodiment("planar_finger_2").camera("front")
        wide = torch.nn.functional.interpolate(video(7), size=(robot.height // 8, robot.width // 8))
        write_video(tmp_path / "v.mp4", iter((wide.permute(0, 2, 3, 1) * 255).byte().numpy()), 16.0)
    line = ["decode", str(tmp_path / "v.mp4"), "--checkpoint", str(folder), "--out", str(tmp_path / "out"), *more]
    assert main([*line, "--smooth"]) == 0
    assert "steps valid" in capsys.readouterr().out
    motion = JointMotion.load(tmp_path / "out" / "motion.npz")
    assert motion.frames == 7 and motion.provenance["smoothed"] and (tmp_path / "out" / "plot.png").exists()
    assert (tmp_path / "out" / "overlay.mp4").exists() == camera
    assert main(line) == 0
    view = robot.resized(robot.width // 8, robot.height // 8) if camera else None
    direct = JacobianIDM.from_pretrained(folder, camera=view).decode(tmp_path / "v.mp4")
    if not camera:
        assert torch.equal(JointMotion.load(tmp_path / "out" / "motion.npz").delta_q, direct.delta_q)
