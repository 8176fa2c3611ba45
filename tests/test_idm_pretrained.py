"""A trained model used as an IDM: from a folder, with and without a camera or a robot, on any picture size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from step_fields import FINGER, SIDE, config, random_images
from torch import Tensor

from jidm import JacobianIDM, JointMotion, load_embodiment
from jidm.checkpoint import embodiment_record, load_checkpoint, save_checkpoint
from jidm.errors import CheckpointError, InputError, VideoError
from jidm.estimation.analytic_tracker import AnalyticTrackerOptions
from jidm.estimation.learned_tracker import LearnedTrackerOptions
from jidm.fields.free import LearnedField
from jidm.fields.hybrid import HybridField
from jidm.flow import Flow
from jidm.training.trainable_field import TrainableField
from jidm.video.io import write_video
from jidm.video.letterbox import Letterbox

FPS = 16.0
TRUSTING = LearnedTrackerOptions(max_unexplained=1.0)
"""Nothing is called confused: an untrained network explains little."""


def saved(
    folder: Path, *, robot: str | None = "planar_finger_2", kind: str = "jacobian_field",
    training: dict[str, Any] | None = None, **record: Any,
) -> Path:  # fmt: skip
    """An untrained field as training would have saved it."""
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
    return JacobianIDM.from_pretrained(folder, options=TRUSTING)


def video(frames: int = 5, height: int = SIDE, width: int = SIDE, seed: int = 0) -> Tensor:
    """Pictures that slide over a smooth pattern."""
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


def test_a_folder_is_enough(idm: JacobianIDM, folder: Path) -> None:
    motion = idm.decode(video(), fps=FPS)
    robot = load_embodiment("planar_finger_2")
    assert motion.joint_names == idm.joint_names == FINGER
    assert motion.position.shape == (5, 2) and motion.delta_q.shape == (4, 2) and motion.valid.shape == (4,)
    assert_sound(motion, robot.lower, robot.upper, robot.velocity.max())
    assert motion.delta_q.abs().max() > 1e-4
    torch.testing.assert_close(motion.velocity, motion.delta_q * FPS)
    said = motion.provenance
    assert said["checkpoint"] == {"source": str(folder), "content_hash": load_checkpoint(folder).content_hash}
    assert said["field"] == "LearnedField" and said["embodiment"] == "planar_finger_2" and said["camera"] is None
    assert said["embodiment_hash"] == robot.content_hash and said["options"]["max_unexplained"] == 1.0
    assert not any(p.requires_grad for p in idm.field.parameters()) and not idm.field.training
    torch.testing.assert_close(idm.field.step_std_scale, torch.tensor([1.5, 2.5]))  # what calibration found was loaded


def test_the_first_pose_is_read_or_given(idm: JacobianIDM) -> None:
    frames = video()
    field = idm.field
    assert isinstance(field, LearnedField)
    value, std = field.predict_pose(field.encode(frames[:1]))
    read, given = idm.decode(frames, fps=FPS), idm.decode(frames, fps=FPS, q0=[0.4, -0.3])
    torch.testing.assert_close(read.position[0], value[0])
    torch.testing.assert_close(given.position[0], torch.tensor([0.4, -0.3]))
    # NaN would be read as well as anything; the start of a known pose is certain, that of a read one is not.
    assert (given.position_std[1] < std[0]).all()
    assert not torch.equal(read.position[1:], given.position[1:])


def test_the_start_is_as_uncertain_as_it_was_read(idm: JacobianIDM) -> None:
    frames = video()
    assert isinstance(idm.field, LearnedField)
    _, std = idm.field.predict_pose(idm.field.encode(frames[:1]))
    torch.testing.assert_close(idm.decode(frames, fps=FPS).position_std[0], std[0])
    assert not idm.decode(frames, fps=FPS, q0=[0.4, -0.3]).position_std[0].any()


def test_a_batch_of_videos_is_its_videos(idm: JacobianIDM) -> None:
    clips = torch.stack([video(4, seed=1), video(4, seed=2)])
    q0 = torch.tensor([[0.1, 0.2], [-0.3, 0.4]])
    for start, each in ((None, (None, None)), (q0, q0), (q0[0], (q0[0], q0[0]))):
        whole = idm.decode(clips, fps=FPS, q0=start)
        assert whole.position.shape == (2, 4, 2) and whole.valid.shape == (2, 3)
        for i in range(2):
            one = idm.decode(clips[i], fps=FPS, q0=each[i])
            torch.testing.assert_close(whole.position[i], one.position, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(whole.delta_q[i], one.delta_q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [(128, 128), (48, 96), (100, 60)])
def test_pictures_of_other_sizes_are_fitted(idm: JacobianIDM, size: tuple[int, int]) -> None:
    frames = video(4, *(16 * -(-s // 16) for s in size))[..., : size[0], : size[1]]
    fitted = Letterbox(*size, SIDE, SIDE).apply(frames)
    assert_same(idm.decode(frames, fps=FPS), idm.decode(fitted, fps=FPS))
    torch.testing.assert_close(idm.predict_steps(frames[:3], frames[1:]), idm.predict_steps(fitted[:3], fitted[1:]))


def test_given_flow_is_fitted_with_the_pictures(idm: JacobianIDM) -> None:
    """Flow of a wide video is that of the picture between the black bands, in its pixels."""
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
    assert_same(idm.decode(frames, fps=FPS, flow=flow), found)  # a bare array counts everywhere


def test_an_estimator_takes_the_place_of_the_networks_matching(idm: JacobianIDM, folder: Path) -> None:
    frames, uniform = video(4), torch.tensor([4.0, 2.0])[:, None, None]

    class Estimator:
        """The same motion everywhere; so sure of it there and back."""

        def __init__(self, ahead: float, back: float) -> None:
            self.sure = (ahead, back)

        def __call__(self, first: torch.Tensor, second: torch.Tensor) -> Flow:
            return self.bidirectional(first, second)[0]

        def bidirectional(self, first: torch.Tensor, second: torch.Tensor) -> tuple[Flow, Flow]:
            size = first.shape[-2:]
            a, b = (Flow(s * uniform.expand(2, *size), w * torch.ones(size)) for s, w in zip((1, -1), self.sure))
            return a, b

    def decoded(ahead: float, back: float) -> JointMotion:
        return JacobianIDM.from_pretrained(folder, flow=Estimator(ahead, back)).decode(frames, fps=FPS)

    assert_same(decoded(1.0, 0.0), idm.decode(frames, fps=FPS, flow=uniform.expand(3, 2, *frames.shape[-2:])))
    assert decoded(1.0, 0.0).delta_q.abs().max() > 5e-3
    # What was measured on the way back counts as well, by the field of the later frame.
    there, back, both = (decoded(*sure).delta_q for sure in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)))
    assert back.abs().max() > 5e-3 and (there - back).abs().max() > 1e-4
    assert ((both - there).abs() > 1e-5).any() and ((both - back).abs() > 1e-5).any()


def test_a_whole_video_is_told_twice_as_it_came_and_by_all_frames(idm: JacobianIDM) -> None:
    frames = video(8)
    motion, later = idm.decode_whole(frames, fps=FPS)
    assert_same(motion, idm.decode(frames, fps=FPS))
    assert later.provenance["smoothed"] is True and "smoothed" not in motion.provenance
    assert later.delta_q.shape == motion.delta_q.shape and (later.delta_q - motion.delta_q).abs().max() > 1e-6
    both, told = idm.decode_whole(torch.stack([frames, frames.flip(0)]), fps=FPS)
    assert_same(both[:], idm.decode(torch.stack([frames, frames.flip(0)]), fps=FPS))
    torch.testing.assert_close(told.delta_q[0], later.delta_q)


def test_types_of_pictures_do_not_matter(idm: JacobianIDM) -> None:
    frames = video(4)
    expected = idm.decode(frames, fps=FPS)
    assert_same(idm.decode(frames.double(), fps=FPS), expected)
    torch.testing.assert_close(
        idm.predict_steps(frames[:3].double(), frames[1:].double()).float(), idm.predict_steps(frames[:3], frames[1:])
    )
    eight = (frames * 255).round().to(torch.uint8)
    assert_same(idm.decode(eight.permute(0, 2, 3, 1).numpy(), fps=FPS), idm.decode(eight.float() / 255, fps=FPS))


def test_a_file_is_its_frames(idm: JacobianIDM, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, (video(4).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy(), fps=FPS)
    motion = idm.decode(path)
    assert motion.position.shape == (4, 2)
    torch.testing.assert_close(motion.time.diff(), torch.full((3,), 1 / FPS).double(), rtol=0, atol=1e-3)
    assert torch.isfinite(motion.position).all()


def test_a_nan_frame_spoils_its_two_steps_alone(idm: JacobianIDM) -> None:
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
    assert (motion.position_std[4] < motion.position_std[3]).all()  # seen again
    with pytest.raises(VideoError, match="first frame is not finite"):
        idm.decode(broken[3:], fps=FPS)


def test_a_nan_in_given_flow_spoils_no_step(idm: JacobianIDM) -> None:
    frames = video(4)
    flow = Flow(torch.full((3, 2, SIDE, SIDE), 2.0), torch.ones(3, SIDE, SIDE))
    flow.flow[0, :, 5, 5] = torch.nan
    motion = idm.decode(frames, fps=FPS, flow=flow)
    assert motion.valid.all() and torch.isfinite(motion.position).all()


@pytest.mark.parametrize("picture", ["noise", "black"])
def test_nonsense_stays_finite_and_inside_the_limits(idm: JacobianIDM, picture: str) -> None:
    frames = torch.zeros(4, 3, SIDE, SIDE)
    if picture == "noise":
        frames = torch.rand(frames.shape, generator=torch.Generator().manual_seed(0))
    robot = load_embodiment("planar_finger_2")
    assert_sound(idm.decode(frames, fps=FPS), robot.lower, robot.upper, robot.velocity.max())


def test_wild_flow_never_breaks_a_limit(idm: JacobianIDM) -> None:
    robot = load_embodiment("planar_finger_2")
    for size in (300.0, -300.0, 1e30):
        wild = Flow(torch.full((4, 2, SIDE, SIDE), size), torch.ones(4, SIDE, SIDE))
        motion = idm.decode(video(), fps=FPS, flow=wild, q0=robot.upper - 0.01)
        assert_sound(motion, robot.lower, robot.upper, robot.velocity.max())


# ---- with a camera ---------------------------------------------------------------------------------------------------


def test_with_a_camera_the_exact_field_is_followed_and_the_network_reads_the_first_pose(folder: Path) -> None:
    robot = load_embodiment("planar_finger_2")
    camera = robot.camera("front").resized(160, 120)
    hybrid = JacobianIDM.from_pretrained(folder, camera=camera)
    assert isinstance(hybrid.field, HybridField) and isinstance(hybrid.options, AnalyticTrackerOptions)
    frames = video(4, 120, 160)
    motion = hybrid.decode(frames, fps=FPS)
    assert_sound(motion, robot.lower, robot.upper, robot.velocity.max())
    assert float(motion.position_std[0].min()) > 0
    told = hybrid.decode(frames, fps=FPS, q0=robot.home)
    assert torch.equal(told.position[0], torch.tensor(robot.home).to(told.position))
    assert float(told.position_std[0].max()) == 0
    provenance = motion.provenance
    assert (provenance["field"], provenance["flow"], provenance["camera"]["width"]) == ("HybridField", "DisFlow", 160)
    assert provenance["checkpoint"]["content_hash"] == load_checkpoint(folder).content_hash
    with pytest.raises(VideoError, match=r"the camera 160x120: pass camera=camera.resized\(64, 64\)"):
        hybrid.decode(video(), fps=FPS)
    with pytest.raises(InputError, match="unrelated pairs need a learned field"):
        hybrid.predict_steps(frames[:1], frames[1:2])


def test_the_camera_of_the_self_play_is_remembered(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="contain no camera; pass camera="):
        JacobianIDM.from_pretrained(folder, camera="trained")
    camera = load_embodiment("planar_finger_2").camera("front").resized(128, 96)
    data = {"image_key": "front", "data_recipe": {"cameras": {"front": camera.to_dict()}}}
    saved(tmp_path / "c", training={"data": data})
    idm = JacobianIDM.from_pretrained(tmp_path / "c", camera="trained")
    told = JacobianIDM.from_pretrained(tmp_path / "c", camera=camera)
    assert isinstance(idm.field, HybridField) and torch.equal(idm.field.camera.K, camera.K)
    frames = video(4, 96, 128)
    assert_same(idm.decode(frames, fps=FPS), told.decode(frames, fps=FPS))


def test_other_cameras_and_robots(folder: Path, tmp_path: Path) -> None:
    robot = load_embodiment("planar_finger_2")
    camera = robot.camera().resized(SIDE, 48)
    path = tmp_path / "camera.json"
    camera.save(path)
    given = JacobianIDM.from_pretrained(folder, embodiment=robot, camera=camera)
    from_file = JacobianIDM.from_pretrained(folder, embodiment="planar_finger_2", camera=path)
    for other in (given, from_file):
        assert isinstance(other.field, HybridField)
        torch.testing.assert_close(other.field.camera.K[0, 0], camera.K[0, 0])


# ---- without a robot -------------------------------------------------------------------------------------------------


def test_a_plain_recording_needs_no_robot(tmp_path: Path) -> None:
    idm = JacobianIDM.from_pretrained(saved(tmp_path / "plain", robot=None), options=TRUSTING)
    assert idm.embodiment is None
    motion = idm.decode(video(), fps=FPS)
    assert motion.joint_names == FINGER and motion.joint_types == ("revolute", "revolute")
    # The range of the training poses and a quarter of it on both sides.
    assert_sound(motion, np.full(2, -1.8), np.full(2, 1.8), np.inf)
    assert motion.provenance["embodiment"] is None and motion.provenance["embodiment_hash"] is None
    assert motion.provenance["checkpoint"]["content_hash"]
    wild = Flow(torch.full((4, 2, SIDE, SIDE), 300.0), torch.ones(4, SIDE, SIDE))
    assert_sound(idm.decode(video(), fps=FPS, flow=wild), np.full(2, -1.8), np.full(2, 1.8), np.inf)
    with pytest.raises(InputError, match=r"needs the robot; pass embodiment="):
        JacobianIDM.from_pretrained(tmp_path / "plain", camera="front")
    with_robot = JacobianIDM.from_pretrained(tmp_path / "plain", embodiment="planar_finger_2", camera="front")
    assert isinstance(with_robot.field, HybridField)


def test_a_robot_that_is_not_registered_is_no_robot(tmp_path: Path) -> None:
    idm = JacobianIDM.from_pretrained(saved(tmp_path / "own", name="my_robot", content_hash="0" * 64))
    assert idm.embodiment is None


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "embodiment", "complaint"),
    [
        ({}, "planar_finger_3", r"trained for 'planar_finger_2', which is not this 'planar_finger_3'.*added: hinge3"),
        ({"content_hash": "0" * 64, "lower": [-1.0, -1.2]}, None, r"lower limit of hinge1 -1 -> -1\.2"),
        ({"content_hash": "0" * 64, "joint_names": ["hinge2", "hinge1"]}, None, "another order"),
        ({"content_hash": "0" * 64}, "planar_finger_2", "its shapes or its descriptor differ"),
    ],
)
def test_another_robot_is_refused_with_the_difference(
    tmp_path: Path, record: dict[str, Any], embodiment: str | None, complaint: str
) -> None:
    where = saved(tmp_path / "other", **record)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        JacobianIDM.from_pretrained(where, embodiment=embodiment)
    assert "\n" not in str(caught.value) and "train again" in str(caught.value)


def test_another_kind_of_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    where = saved(tmp_path / "direct", kind="direct")
    with pytest.raises(CheckpointError, match=r"kind 'direct', not a Jacobian field; load it with jidm\.learn\.zoo"):
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
    "limits": (lambda i: JacobianIDM(i.embodiment, i.field, None, limits="some"), InputError, "limits must be"),
    "options": (
        lambda i: JacobianIDM(i.embodiment, i.field, None, options=AnalyticTrackerOptions()), InputError, "followed with LearnedTrackerOptions"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused(idm: JacobianIDM, case: str) -> None:
    call, error, complaint = REFUSED[case]
    with pytest.raises(error, match=complaint):
        call(idm)


def test_an_analytic_idm_does_not_read_poses() -> None:
    exact = JacobianIDM.from_embodiment("planar_finger_2", points=500)
    with pytest.raises(InputError, match="q0, the 2 joint positions in the first frame, must be given"):
        exact.decode(torch.zeros(2, 3, 240, 320), fps=FPS)
    with pytest.raises(InputError, match="need a learned field"):
        exact.predict_steps(torch.zeros(1, 3, 240, 320), torch.zeros(1, 3, 240, 320))
    with pytest.raises(InputError, match="only a learned one does without"):
        JacobianIDM(None, exact.field, exact.flow)
    with pytest.raises(InputError, match="followed with AnalyticTrackerOptions"):
        JacobianIDM(exact.embodiment, exact.field, exact.flow, options=LearnedTrackerOptions())


def test_speed_limits_can_be_lifted(idm: JacobianIDM) -> None:
    robot = load_embodiment("planar_finger_2")
    flow = Flow(torch.full((3, 2, SIDE, SIDE), 6.0), torch.ones(3, SIDE, SIDE))
    fast = idm.decode(video(4), fps=1000.0, flow=flow)
    assert_sound(fast, robot.lower, robot.upper, robot.velocity.max())
    free = JacobianIDM(idm.embodiment, idm.field, None, options=replace(TRUSTING), limits="position")
    assert free.decode(video(4), fps=1000.0, flow=flow).velocity.abs().max() > 2 * robot.velocity.max()


# ---- from the command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("camera", [False, True])
def test_decode_from_the_command_line_needs_the_checkpoint_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], camera: bool
) -> None:
    from jidm.cli import main

    frames = (video(7).permute(0, 2, 3, 1) * 255).byte().numpy()
    write_video(tmp_path / "v.mp4", iter(frames), 16.0)
    more = ["--embodiment", "planar_finger_2", "--camera", "front"] if camera else []
    if camera:  # of the robot's own shape of picture
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
