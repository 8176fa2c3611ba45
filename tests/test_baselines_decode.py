"""Decoding video with the baselines: ends, invalid frames, start pose, batches, files, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_baselines import VARIANTS, every_variant, make
from toy_arm import JOINTS, SIDE, arm_video

from jidm import JointMotion, load_embodiment
from jidm.baselines import BaselineIDM, DirectIDM, EvaIDM
from jidm.checkpoint import load_checkpoint
from jidm.errors import CheckpointError, InputError, VideoError
from jidm.flow.factory import CallableFlow
from jidm.model_registry import load_idm
from jidm.video.io import Video, read_video, write_video

FPS = 16.0
VIDEO, Q = arm_video(7)
STEPWISE = [v for v in VARIANTS if not v.startswith("eva")]
stepwise_variant = pytest.mark.parametrize("variant", STEPWISE)
absolute_variant = pytest.mark.parametrize("variant", ["eva", "eva_average_pool"])


def close(a: Any, b: Any) -> None:
    """Equal up to the differences of float32 convolutions in another batch size."""
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-3, atol=1e-6)


def all_finite(motion: JointMotion) -> bool:
    return all(np.isfinite(x).all() for x in motion.numpy().values())


@every_variant
def test_a_decoded_video_is_a_joint_motion(variant: str) -> None:
    motion = BaselineIDM(make(variant)).decode(VIDEO, q0=Q[0], fps=FPS)
    assert motion.joint_names == JOINTS and motion.position.shape == (7, 2) and motion.covariance.shape == (6, 2, 2)
    assert motion.valid.all() and all_finite(motion)
    close(motion.position[0], Q[0])
    close(motion.position[1:], motion.position[0] + motion.delta_q.cumsum(0))
    close(motion.velocity, motion.delta_q * FPS)


@stepwise_variant
def test_steps_are_those_of_the_pairs(variant: str) -> None:
    """Over several chunks."""
    idm, (video, _) = BaselineIDM(make(variant)), arm_video(37)
    pairs = torch.cat([idm.predict_steps(video[t : t + 1], video[t + 1 : t + 2]) for t in range(36)])
    close(idm.decode(video, fps=FPS).delta_q, pairs)


@absolute_variant
def test_positions_are_those_of_the_windows(variant: str) -> None:
    """At the ends the frame itself replaces the missing neighbor."""
    model, (video, _) = make(variant).eval(), arm_video(37)
    assert isinstance(model, EvaIDM)
    motion = BaselineIDM(model).decode(video, fps=FPS)
    with torch.no_grad():
        close(motion.position[:1], model.positions(video[:1], video[:1], video[1:2]))
        close(motion.position[1:-1], model.positions(video[:-2], video[1:-1], video[2:]))
        close(motion.position[-1:], model.positions(video[-2:-1], video[-1:], video[-1:]))
    assert motion.provenance["start"] == "absolute, by the model"


@absolute_variant
def test_a_known_start_shifts_absolute_positions_as_a_whole(variant: str) -> None:
    idm = BaselineIDM(make(variant))
    free, started = idm.decode(VIDEO, fps=FPS), idm.decode(VIDEO, q0=Q[0], fps=FPS)
    close(started.position - free.position, (Q[0] - free.position[0]).expand(7, 2))
    close(started.delta_q, free.delta_q)


@stepwise_variant
def test_without_a_start_positions_begin_at_zero_and_the_provenance_states_it(variant: str) -> None:
    motion = BaselineIDM(make(variant)).decode(VIDEO, fps=FPS)
    assert (motion.position[0] == 0).all() and motion.provenance["start"].startswith("zero")


# ---- frames that are not finite --------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("invalid", [0, 3, 6])
def test_an_invalid_frame_invalidates_its_own_steps_alone(variant: str, invalid: int) -> None:
    idm, video = BaselineIDM(make(variant)), VIDEO.clone()
    video[invalid, 1, 5, 5] = torch.nan
    whole, damaged = idm.decode(VIDEO, q0=Q[0], fps=FPS), idm.decode(video, q0=Q[0], fps=FPS)
    touched = {t for t in (invalid - 1, invalid) if 0 <= t < 6}
    assert damaged.valid.tolist() == [t not in touched for t in range(6)] and all_finite(damaged)
    assert (damaged.delta_q[sorted(touched)] == 0).all()
    away = [t for t in range(6) if t not in touched]
    if not variant.startswith("eva"):
        close(damaged.delta_q[away], whole.delta_q[away])
    else:  # the windows of the neighbors lack a frame as well
        far = [t for t in away if t not in (invalid - 2, invalid + 1)]
        close(damaged.delta_q[far], whole.delta_q[far])


@stepwise_variant
def test_after_an_invalid_frame_the_position_continues_from_the_last_valid_one(variant: str) -> None:
    idm, video = BaselineIDM(make(variant)), VIDEO.clone()
    video[3] = torch.inf
    motion = idm.decode(video, q0=Q[0], fps=FPS)
    close(motion.position[3], motion.position[2])
    close(motion.position[4] - motion.position[2], idm.predict_steps(video[2:3], video[4:5])[0])


@absolute_variant
def test_after_an_invalid_frame_absolute_positions_recover(variant: str) -> None:
    idm, video = BaselineIDM(make(variant)), VIDEO.clone()
    video[3] = torch.nan
    whole, damaged = idm.decode(VIDEO, fps=FPS), idm.decode(video, fps=FPS)
    close(damaged.position[3], damaged.position[2])
    close(damaged.position[5:], whole.position[5:])


@every_variant
def test_a_video_without_finite_frames(variant: str) -> None:
    motion = BaselineIDM(make(variant)).decode(torch.full_like(VIDEO, torch.nan), q0=Q[0], fps=FPS)
    assert not motion.valid.any() and all_finite(motion) and (motion.delta_q == 0).all()
    close(motion.position, Q[0].expand(7, 2))


# ---- video formats ---------------------------------------------------------------------------------------------------


@every_variant
def test_batches_are_decoded_item_by_item(variant: str) -> None:
    idm, (other, q_other) = BaselineIDM(make(variant)), arm_video(7, seed=5)
    both = idm.decode(torch.stack([VIDEO, other])[:, None], q0=torch.stack([Q[0], q_other[0]])[:, None], fps=FPS)
    assert both.position.shape == (2, 1, 7, 2) and both.valid.shape == (2, 1, 6)
    close(both.position[1, 0], idm.decode(other, q0=q_other[0], fps=FPS).position)


@pytest.mark.parametrize("variant", ["direct", "eva", "vera"])
def test_frames_of_another_size_are_letterboxed_as_in_training(variant: str) -> None:
    idm = BaselineIDM(make(variant))
    large = torch.nn.functional.interpolate(VIDEO, size=(90, 120), mode="bilinear")
    motion = idm.decode(large, fps=FPS)
    assert motion.valid.all()
    if variant == "direct":
        seen = idm._make_letterbox(large).apply(large)
        assert seen.shape == (7, 3, SIDE, SIDE)
        close(motion.delta_q, idm.decode(seen, fps=FPS).delta_q)


def test_flow_is_estimated_at_the_size_of_the_recorded_frames() -> None:
    sizes: list[tuple[int, ...]] = []

    def zero_flow(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(first.shape[-2:]))
        return torch.zeros(len(first), 2, *first.shape[-2:])

    idm = BaselineIDM(make("vera"), flow=CallableFlow(zero_flow))
    motion = idm.decode(torch.rand(4, 3, 90, 120), fps=FPS)
    assert set(sizes) == {(90, 120)} and (motion.delta_q == 0).all() and motion.valid.all()
    with pytest.raises(InputError, match="uses no flow"):
        BaselineIDM(make("direct"), flow="dis")


@pytest.mark.parametrize("variant", ["direct", "eva"])
def test_a_file_is_decoded_like_its_frames(variant: str, tmp_path: Path) -> None:
    write_video(tmp_path / "arm.mp4", VIDEO, fps=FPS)
    read: Video = read_video(tmp_path / "arm.mp4")
    idm = BaselineIDM(make(variant))
    file, frames = idm.decode(tmp_path / "arm.mp4", q0=Q[0]), idm.decode(read, q0=Q[0])
    close(file.position, frames.position)
    close(file.time, frames.time)
    with pytest.raises(InputError, match="for one file"):
        idm.decode(tmp_path / "arm.mp4", q0=Q[:2])


def test_float64_video_gives_float64_motion() -> None:
    idm = BaselineIDM(make("direct"))
    assert idm.decode(VIDEO.double(), fps=FPS).position.dtype == torch.float64
    assert idm.decode(VIDEO, fps=FPS).position.dtype == torch.float32


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"q0": [0.0]}, "shoulder, elbow"),
        ({"q0": [0.0, float("nan")]}, "NaN or infinity"),
        ({"q0": np.zeros((3, 2))}, "does not fit"),
        ({"fps": 0.0}, "fps must be positive"),
        ({"fps": None}, "pass fps="),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BaselineIDM(make("direct")).decode(VIDEO, **{"fps": FPS, **arguments})


def test_one_frame_has_no_motion() -> None:
    with pytest.raises(VideoError, match="motion lies between frames"):
        BaselineIDM(make("direct")).decode(VIDEO[:1], fps=FPS)


def test_the_provenance_states_what_was_not_measured() -> None:
    direct = BaselineIDM(make("direct")).decode(VIDEO, fps=FPS)
    assert "residual" in direct.provenance["not_measured"] and (direct.residual == 0).all()
    vera = BaselineIDM(make("vera")).decode(VIDEO, fps=FPS)
    assert "residual" not in vera.provenance["not_measured"] and (vera.residual > 0).any()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@every_variant
def test_a_restored_model_decodes_identically(variant: str, tmp_path: Path) -> None:
    idm = BaselineIDM(make(variant))
    idm.save_pretrained(tmp_path / "model", training={"seed": 0})
    again = load_idm(tmp_path / "model")
    one, two = (x.decode(VIDEO, q0=Q[0], fps=FPS) for x in (idm, again))
    assert isinstance(again, BaselineIDM) and again.model.config == idm.model.config
    assert all((a == b).all() for a, b in zip(one.numpy().values(), two.numpy().values(), strict=True))
    assert load_checkpoint(tmp_path / "model").training == {"seed": 0}


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    make("eva").save_pretrained(tmp_path / "model")
    assert isinstance(EvaIDM.from_pretrained(tmp_path / "model"), EvaIDM)
    with pytest.raises(CheckpointError, match="holds a model of kind 'eva', not 'direct'"):
        DirectIDM.from_pretrained(tmp_path / "model")


def test_a_checkpoint_for_another_robot_is_refused(tmp_path: Path) -> None:
    finger, longer = load_embodiment("planar_finger_2"), load_embodiment("planar_finger_3")
    make("direct").save_pretrained(tmp_path / "model", embodiment=finger)
    assert isinstance(load_idm(tmp_path / "model", embodiment=finger), BaselineIDM)
    load_idm(tmp_path / "model", embodiment="planar_finger_2")
    with pytest.raises(CheckpointError, match="joints added"):
        load_idm(tmp_path / "model", embodiment=longer)
