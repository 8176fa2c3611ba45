"""Forward warping of frames by a Jacobian field, against PyBullet images after the motion."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jidm import JacobianIDM, load_embodiment
from jidm.errors import InputError
from jidm.fields.analytic import AnalyticField
from jidm.fields.warp import warp_frame

pytest.importorskip("pybullet", reason="renders: extra sim")

ROBOT = load_embodiment("panda")


@pytest.fixture(scope="module")
def rendered_steps() -> tuple[torch.Tensor, torch.Tensor, AnalyticField]:
    """Frames before and after each of four steps, their joint positions, and the exact field."""
    from jidm.sim import Scene

    camera = ROBOT.camera().resized(160, 120)
    step = np.array([0.05, 0.04, 0.05, 0.06, 0.05, 0.05, 0.05, 0.0])
    q = ROBOT.home + np.arange(5)[:, None] * step
    with Scene(ROBOT, supersample=2) as world:
        frames = np.stack([world.render(x, camera).rgb for x in q])
    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return pictures, torch.from_numpy(q), AnalyticField(ROBOT, camera, points=4000, occluders=40000)


def _error(picture: torch.Tensor, true: torch.Tensor, stale: torch.Tensor) -> float:
    """Mean error where the frame changed."""
    changed = (true - stale).abs().amax(0) > 0.05
    return float((picture - true)[:, changed].abs().mean())


def test_an_exact_field_predicts_the_next_frames(
    rendered_steps: tuple[torch.Tensor, torch.Tensor, AnalyticField],
) -> None:
    frames, q, field = rendered_steps
    for count in (1, 4):
        warped = warp_frame(field, frames[0], q[0], q[: count + 1].diff(dim=0))
        stale = _error(frames[0], frames[count], frames[0])
        error = _error(warped, frames[count], frames[0])
        assert error < 0.5 * stale
        backwards = warp_frame(field, frames[0], q[0], -q[: count + 1].diff(dim=0))
        assert _error(backwards, frames[count], frames[0]) > 2 * error


def test_a_learned_field_predicts_the_next_frame() -> None:
    from jidm.sim import Scene
    from jidm.sim.babble import BabbleConfig, Recorder

    stage = Recorder(
        BabbleConfig(
            embodiment="panda", episodes=1, frames=8, fps=16.0, seed=5, width=128, height=128, crop_fraction=0.15
        )
    )
    q = stage.motion(3)
    with Scene(ROBOT, supersample=2) as world:
        frames = np.stack([world.render(x, stage.cameras["front"]).rgb for x in q])
    pictures, joints = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(q).float()
    field = JacobianIDM.from_pretrained("panda-sim").field
    warped = warp_frame(field, pictures[0], joints[0], joints.diff(dim=0))
    assert _error(warped, pictures[-1], pictures[0]) < 0.8 * _error(pictures[0], pictures[-1], pictures[0])


def test_zero_steps_change_nothing_and_the_rest_of_the_image_stays(
    rendered_steps: tuple[torch.Tensor, torch.Tensor, AnalyticField],
) -> None:
    frames, q, field = rendered_steps
    assert torch.equal(warp_frame(field, frames[0], q[0], torch.zeros(3, ROBOT.n).double()), frames[0])
    warped = warp_frame(field, frames[0], q[0], q[:2].diff(dim=0))
    assert torch.equal(warped[:, :10, :20], frames[0][:, :10, :20]) and bool(((warped >= 0) & (warped <= 1)).all())
    assert warped.shape == frames[0].shape and warped.dtype == frames[0].dtype


def test_several_steps_equal_their_sum(rendered_steps: tuple[torch.Tensor, torch.Tensor, AnalyticField]) -> None:
    frames, q, field = rendered_steps
    one, many = (warp_frame(field, frames[0], q[0], steps) for steps in ((q[4] - q[0])[None], q.diff(dim=0)))
    torch.testing.assert_close(one, many)


def test_pixels_are_fixed_to_links(rendered_steps: tuple[torch.Tensor, torch.Tensor, AnalyticField]) -> None:
    _, q, field = rendered_steps
    number, skin = field.visible_surface(q[0], 60, 80)
    uv, depth = field.project_surface(q[0], skin, 60, 80)
    row, column = torch.nonzero(number >= 0, as_tuple=True)
    torch.testing.assert_close(uv[number[number >= 0]], torch.stack([column, row], -1).double(), atol=1e-6, rtol=0)
    assert bool((depth > 0).all())


def test_bad_steps_raise(rendered_steps: tuple[torch.Tensor, torch.Tensor, AnalyticField]) -> None:
    frames, q, field = rendered_steps
    for steps in (q[0][None, :7], q[0], q[:1] * torch.nan):
        with pytest.raises(InputError):
            warp_frame(field, frames[0], q[0], steps)
