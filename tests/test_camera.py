"""The camera: projection and its inverse, conventions, files, PyBullet's matrices, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jidm.camera.model import Camera
from jidm.errors import CameraError

coordinate = st.floats(-2, 2, allow_subnormal=False)
point = st.tuples(coordinate, coordinate, coordinate)


def vector(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def skewed() -> Camera:
    """Nothing about it is symmetric."""
    camera = Camera.look_at((1.1, -0.7, 0.9), (0.1, 0.2, 0.3), up=(0.2, 0.1, 1.0), fov_y=50, width=321, height=197)
    K = camera.K.clone()
    K[0, 1], K[0, 0], K[0, 2] = 3.7, 1.3 * K[0, 0], 140.0
    return replace(camera, K=K)


@settings(max_examples=60, deadline=None)
@given(eye=point, target=point, uv=st.tuples(st.floats(-50, 400), st.floats(-50, 300)), z=st.floats(0.05, 20))
def test_unproject_and_project_undo_each_other(eye, target, uv, z) -> None:
    if np.linalg.norm(np.subtract(eye, target)[:2]) < 1e-3:
        return  # straight up or down: the default up has no meaning
    camera = Camera.look_at(eye, target)
    camera = replace(camera, K=skewed().K)
    p = camera.unproject(vector(*uv), vector(z)[0])
    back, depth = camera.project(p)
    torch.testing.assert_close(back, vector(*uv), rtol=0, atol=1e-7)
    torch.testing.assert_close(depth, vector(z)[0], rtol=1e-9, atol=0)


def test_a_point_on_the_axis_lands_in_the_middle_of_the_picture() -> None:
    """Pixel centres are at whole numbers: of 4 x 3 pixels the middle is (1.5, 1)."""
    camera = Camera.look_at((2.0, 0.0, 1.0), (0.0, 0.0, 1.0), width=4, height=3, fov_y=90)
    uv, depth = camera.project(vector(0.5, 0, 1))
    torch.testing.assert_close(uv, vector(1.5, 1.0))
    assert float(depth) == pytest.approx(1.5)
    # 45 degrees up from the axis is the upper edge of the picture, half a pixel above the first row's centres.
    uv, _ = camera.project(vector(1.0, 0, 2.0))
    torch.testing.assert_close(uv, vector(1.5, -0.5))


def test_look_at_keeps_right_right_and_up_up() -> None:
    camera = Camera.look_at((0.0, -2.0, 0.5), (0.0, 0.0, 0.5))  # looks along +y, so x is to the right
    middle, right, up = (camera.project(vector(*p))[0] for p in ((0, 0, 0.5), (0.1, 0, 0.5), (0, 0, 0.6)))
    assert right[0] > middle[0] and abs(right[1] - middle[1]) < 1e-9
    assert up[1] < middle[1] and abs(up[0] - middle[0]) < 1e-9
    torch.testing.assert_close(camera.position, vector(0, -2, 0.5))
    R = camera.T_camera_base[:3, :3]
    torch.testing.assert_close(R @ R.T, torch.eye(3).double())
    assert float(torch.linalg.det(R)) == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 900), height=st.integers(1, 900), p=point)
def test_resizing_the_camera_is_resizing_the_picture(width: int, height: int, p) -> None:
    camera = skewed()
    uv, _ = camera.project(vector(*p))
    ours, _ = camera.resized(width, height).project(vector(*p))
    scale = vector(width / camera.width, height / camera.height)
    torch.testing.assert_close(ours, (uv + 0.5) * scale - 0.5, rtol=1e-9, atol=1e-6)


def test_the_projections_slope_is_that_of_finite_differences() -> None:
    camera, h = skewed(), 1e-6
    p = 0.3 * torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = camera.projection_jacobian(camera.transform(p))
    assert ours.shape == (4, 5, 2, 3)
    steps = h * torch.eye(3, dtype=torch.float64)
    slope = (camera.project(p[..., None, :] + steps)[0] - camera.project(p[..., None, :] - steps)[0]) / (2 * h)
    truth = slope.mT
    assert ((ours - truth).abs().amax((-2, -1)) <= 1e-5 * truth.abs().amax((-2, -1))).all()
    assert torch.autograd.gradcheck(lambda p: camera.projection_jacobian(camera.transform(p)), p[0].requires_grad_())
    assert torch.autograd.gradcheck(lambda p: camera.project(p), p[0].detach().requires_grad_())


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_batch_shape_and_either_precision(shape, dtype) -> None:
    p = torch.rand(*shape, 3, dtype=dtype)
    for camera in (skewed(), skewed().to(torch.float32)):
        uv, depth = camera.project(p)
        assert uv.shape == (*shape, 2) and depth.shape == shape and uv.dtype == depth.dtype == dtype
        torch.testing.assert_close(
            camera.unproject(uv, depth), p, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-5
        )
    assert skewed().to(torch.float32).K.dtype == torch.float32


# ---- torch.func -----------------------------------------------------------------------------------------------------

P_BASE = 0.3 * torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
FUNCTIONS = {
    "project": lambda camera: camera.project(P_BASE)[0],
    "depth": lambda camera: camera.project(P_BASE)[1],
    "unproject": lambda camera: camera.unproject(P_BASE[:, :2] * 100, P_BASE[:, 2]),
    "projection_jacobian": lambda camera: camera.projection_jacobian(P_BASE + 1),
    "resized": lambda camera: camera.resized(64, 48).to(torch.float64).project(P_BASE)[0],
    "position": lambda camera: camera.position,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("field", ["K", "T_camera_base"])
def test_slopes_in_intrinsics_and_pose_are_those_of_finite_differences(field: str, name: str) -> None:
    """jacfwd and jacrev with respect to all entries, also those that no rigid pose or pinhole camera would have."""
    camera, h = skewed(), 1e-6

    def function(value: Tensor) -> Tensor:
        return FUNCTIONS[name](replace(camera, **{field: value}))

    at = getattr(camera, field)
    steps = h * torch.eye(at.numel(), dtype=torch.float64).unflatten(-1, at.shape)
    slope = torch.stack([(function(at + s) - function(at - s)) / (2 * h) for s in steps], dim=-1).unflatten(
        -1, at.shape
    )
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(transform(function)(at), slope, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_many_cameras_by_vmap_are_a_loop(name: str) -> None:
    eyes = ((1.1, -0.7, 0.9), (0.8, 0.9, 0.4), (-1.0, 0.3, 1.2))
    cameras = [replace(Camera.look_at(eye, (0, 0, 0.3), width=321, height=197), K=skewed().K * s)
               for eye, s in zip(eyes, (1.0, 1.1, 0.9), strict=True)]  # fmt: skip
    K, T = torch.stack([c.K for c in cameras]), torch.stack([c.T_camera_base for c in cameras])
    ours = torch.func.vmap(lambda K, T: FUNCTIONS[name](Camera(321, 197, K, T)))(K, T)
    torch.testing.assert_close(ours, torch.stack([FUNCTIONS[name](c) for c in cameras]), rtol=0, atol=1e-9)


def test_a_camera_made_by_hand_is_checked_when_asked() -> None:
    camera = skewed()
    assert camera.validated() is camera
    for wrong in (replace(camera, K=-camera.K), replace(camera, T_camera_base=2 * camera.T_camera_base)):
        with pytest.raises(CameraError):
            wrong.validated()


# ---- PyBullet -------------------------------------------------------------------------------------------------------


def test_matrices_are_pybullets_own() -> None:
    bullet = pytest.importorskip("pybullet")
    eye, target, up, fov, width, height = [1.2, -0.4, 0.8], [0.1, 0.0, 0.3], [0, 0, 1], 37.0, 317, 241
    view = bullet.computeViewMatrix(eye, target, up)
    projection = bullet.computeProjectionMatrixFOV(fov, width / height, 0.02, 7.0)
    camera = Camera.look_at(eye, target, up=up, fov_y=fov, width=width, height=height)
    ours_view, ours_projection = camera.to_pybullet(near=0.02, far=7.0)
    np.testing.assert_allclose(ours_view, view, atol=2e-6)  # PyBullet computes in single precision
    np.testing.assert_allclose(ours_projection, projection, atol=2e-6)
    theirs = Camera.from_pybullet(view, projection, width=width, height=height)
    torch.testing.assert_close(theirs.K, camera.K, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(theirs.T_camera_base, camera.T_camera_base, rtol=0, atol=2e-6)


def test_pybullets_matrices_and_back() -> None:
    camera = replace(skewed(), K=vector(300, 0, 140, 0, 280, 99, 0, 0, 1).reshape(3, 3))
    T_world_base = Camera.look_at((1, 2, 3), (0.3, 0.2, 0.1)).T_camera_base
    for pose in (None, T_world_base):
        view, projection = camera.to_pybullet(T_world_base=pose)
        again = Camera.from_pybullet(view, projection, width=camera.width, height=camera.height, T_world_base=pose)
        torch.testing.assert_close(again.K, camera.K, rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(again.T_camera_base, camera.T_camera_base, rtol=0, atol=1e-12)
    # The clip coordinates of a point say the same as our projection: x in [-1, 1] spans the picture.
    view, projection = (np.reshape(m, (4, 4)).T for m in camera.to_pybullet())
    clip = projection @ view @ [0.1, 0.2, 0.3, 1]
    uv, _ = camera.project(vector(0.1, 0.2, 0.3))
    expected = [2 * (uv[0] + 0.5) / camera.width - 1, 1 - 2 * (uv[1] + 0.5) / camera.height]
    np.testing.assert_allclose(clip[:2] / clip[3], expected, atol=1e-12)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_file_gives_the_camera_back(tmp_path: Path) -> None:
    camera = skewed()
    camera.save(tmp_path / "camera.json")
    again = Camera.load(tmp_path / "camera.json")
    assert torch.equal(again.K, camera.K) and torch.equal(again.T_camera_base, camera.T_camera_base)
    assert (again.width, again.height) == (321, 197)
    assert [f.name for f in tmp_path.iterdir()] == ["camera.json"]


def test_the_look_at_form_and_four_numbers_for_K(tmp_path: Path) -> None:
    form = {"width": 64, "height": 48, "eye": [1, 0, 1], "target": [0, 0, 0.5], "up": [0, 1, 0], "fov_y": 60}
    (tmp_path / "a.json").write_text(json.dumps(form))
    a, b = (
        Camera.load(tmp_path / "a.json"),
        Camera.look_at((1, 0, 1), (0, 0, 0.5), up=(0, 1, 0), fov_y=60, width=64, height=48),
    )
    assert torch.equal(a.K, b.K) and torch.equal(a.T_camera_base, b.T_camera_base)
    K = a.K
    short = [float(x) for x in (K[0, 0], K[1, 1], K[0, 2], K[1, 2])]
    c = Camera.from_dict({"width": 64, "height": 48, "K": short, "T_camera_base": a.T_camera_base.tolist()})
    assert torch.equal(c.K, K)


GOOD = {"width": 64, "height": 48, "K": [50, 50, 31.5, 23.5], "T_camera_base": np.eye(4).tolist()}
LOOK = {"width": 64, "height": 48, "eye": [1, 0, 0], "target": [0, 0, 0]}
MIRROR = np.diag([-1.0, 1, 1, 1]).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "must be positive"),
        ({"width": 64.5}, "whole number"),
        ({"height": "many"}, "must be numbers"),
        ({"height": None}, "must be numbers"),
        ({"fx": 3}, r"unknown camera keys \['fx'\]; known"),
        ({"K": np.eye(2).tolist()}, "3x3 or"),
        ({"K": [[1, 2], [3]]}, "must be numbers"),
        ({"K": None}, "must be numbers"),
        ({"K": [50, -50, 31, 23]}, "focal lengths"),
        ({"K": [50, float("nan"), 31, 23]}, "finite"),
        ({"K": [[50, 0, 31], [1, 50, 23], [0, 0, 1]]}, "upper triangular"),
        ({"K": [[50, 0, 31], [0, 50, 23], [0, 0, 2]]}, "upper triangular"),
        ({"T_camera_base": MIRROR}, "rigid"),
        ({"T_camera_base": (2 * np.eye(4)).tolist()}, "rigid"),
        ({"T_camera_base": np.vstack([np.eye(4)[:3], [[0, 0, 1, 1]]]).tolist()}, "last row"),
        ({"T_camera_base": None}, "must be numbers"),
    ],
)
def test_a_wrong_camera_is_refused_by_name(change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "camera.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(CameraError, match=message) as error:
        Camera.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": [1, 0, 0]}, "coincide"),
        ({"up": [1, 0, 0]}, "parallel"),
        ({"up": [0, 0, 0]}, "up is zero"),
        ({"eye": [1, 0]}, "eye must be three finite numbers"),
        ({"target": [0, 0, float("inf")]}, "target must be three finite numbers"),
        ({"eye": ["a", 0, 0]}, "must be numbers"),
        ({"eye": 3}, "must be numbers"),
        ({"fov_y": 180}, r"\(0, 180\)"),
        ({"fov_y": "wide"}, "must be numbers"),
    ],
)
def test_a_wrong_look_at_form_is_refused_by_name(change, message: str) -> None:
    with pytest.raises(CameraError, match=message):
        Camera.from_dict({**LOOK, **change})


@pytest.mark.parametrize("key", ["width", "height", "K", "T_camera_base"])
def test_what_is_missing_is_named(key: str) -> None:
    with pytest.raises(CameraError, match=f"camera lacks '{key}'; give width"):
        Camera.from_dict({k: v for k, v in GOOD.items() if k != key})
    with pytest.raises(CameraError, match="camera lacks 'target'"):
        Camera.from_dict({k: v for k, v in LOOK.items() if k != "target"})


def test_files_that_are_no_camera(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=r"cannot read camera file .*nowhere\.json"):
        Camera.load(tmp_path / "nowhere.json")
    for text, message in (("{", "not JSON"), ("[]", "one JSON object"), ("", "not JSON")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(CameraError, match=message):
            Camera.load(tmp_path / "x.json")


def test_what_pybullet_cannot_do_is_refused() -> None:
    with pytest.raises(CameraError, match="skewed"):
        skewed().to_pybullet()
    camera = Camera.from_dict(GOOD)
    with pytest.raises(CameraError, match="0 < near < far"):
        camera.to_pybullet(near=2.0, far=1.0)
    with pytest.raises(CameraError, match="16 numbers each, got 15 and 16"):
        Camera.from_pybullet([0.0] * 15, [0.0] * 16, width=3, height=3)
    with pytest.raises(CameraError, match="must be positive"):
        camera.resized(0, 10)


@pytest.mark.gpu
def test_the_same_on_a_gpu() -> None:
    p = torch.rand(10, 3, dtype=torch.float64)
    here, there = skewed().project(p)[0], skewed().to("cuda").project(p.cuda())[0]
    assert there.is_cuda and skewed().project(p.cuda())[0].is_cuda
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-9)
