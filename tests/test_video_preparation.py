"""Frames prepared for decoding: rotation, lens distortion, reduction, and what becomes of the camera."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jidm import Camera, JacobianIDM, load_embodiment, write_video
from jidm.cli.decode import Decode
from jidm.errors import VideoError
from jidm.flow import Flow
from jidm.video.io import open_video
from jidm.video.preparation import MAX_SIZE, area_average, reduced, reduced_size, rotated, undistorted


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Two images 6 high and 8 wide, each pixel with a value of its own."""
    import cv2

    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(2):
        values = (np.arange(48).reshape(6, 8) * 5 + k).astype(np.uint8)
        cv2.imwrite(str(folder / f"{k}.png"), np.repeat(values[..., None], 3, -1))
    return folder


def test_rotation_is_clockwise(clip: Path) -> None:
    plain = open_video(clip, fps=10)
    first = next(plain.pixels())[1]
    quarter = rotated(plain, 90)
    assert (quarter.width, quarter.height, quarter.fps, quarter.length) == (6, 8, 10, 2)
    time, turned = list(quarter.pixels())[1]
    assert time == pytest.approx(0.1)
    second = list(plain.pixels())[1][1]
    assert torch.equal(turned[:, 0, -1], second[:, 0, 0])  # top left goes to the top right
    assert torch.equal(turned[:, -1, -1], second[:, 0, -1])  # top right to the bottom right
    assert torch.equal(next(rotated(quarter, 270).pixels())[1], first)
    assert torch.equal(next(rotated(plain, 180).pixels())[1], first.flip(-1, -2))
    assert rotated(plain, 0) is plain
    with pytest.raises(VideoError, match="90, 180 or 270"):
        rotated(plain, 45)


def test_area_average_is_the_mean_of_the_covered_area() -> None:
    frame = torch.rand(3, 7, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def overlap(old: int, new: int) -> np.ndarray:
        """(new, old) share of each old pixel in each new one, from interval lengths."""
        edges = np.arange(new + 1) * old / new
        low, high = np.maximum(edges[:-1, None], np.arange(old)), np.minimum(edges[1:, None], np.arange(1, old + 1))
        return np.clip(high - low, 0, None) * new / old

    expected = np.einsum("ij,cjk,lk->cil", overlap(7, 3), frame.numpy(), overlap(10, 4))
    np.testing.assert_allclose(area_average(frame, 3, 4).numpy(), expected, atol=1e-6)
    assert area_average(torch.full((3, 8, 8), 200, dtype=torch.uint8), 4, 2).unique().tolist() == [200]


def test_reduced_size_keeps_the_shape_and_never_enlarges(clip: Path) -> None:
    assert reduced_size(2160, 3840, 1280) == (720, 1280)
    assert reduced_size(3840, 2160, 1280) == (1280, 720)
    assert reduced_size(480, 640, 1280) == (480, 640)
    assert reduced_size(2160, 3840, 0) == (2160, 3840)
    assert reduced_size(1, 4000, 1000) == (1, 1000)
    assert Decode.max_size == MAX_SIZE  # stated twice: the command line loads no torch
    with pytest.raises(VideoError, match="max_size"):
        reduced_size(10, 10, -1)
    small = reduced(open_video(clip, fps=10), 4)
    assert (small.width, small.height) == (4, 3) and next(iter(small)).shape == (3, 3, 4)


def blob(width: int, height: int, u: float, v: float) -> torch.Tensor:
    """(3, H, W) float32 image of a soft spot at pixel (u, v)."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return torch.exp(-((columns - u) ** 2 + (rows - v) ** 2) / 18).expand(3, -1, -1).contiguous()


def center(image: torch.Tensor) -> np.ndarray:
    """(u, v) center of mass [px]."""
    mass = image[0].double()
    rows, columns = torch.arange(mass.shape[0]).double(), torch.arange(mass.shape[1]).double()
    return np.array([float((mass.sum(0) * columns).sum()), float((mass.sum(1) * rows).sum())]) / float(mass.sum())


def test_the_scaled_camera_sees_the_reduced_frames() -> None:
    camera = Camera.look_at((1, 1, 1), (0, 0, 0), width=200, height=150)
    p = torch.tensor([0.1, -0.15, 0.05], dtype=torch.float64)
    uv, _ = camera.project(p)
    small = area_average(blob(200, 150, *uv.tolist()), 45, 60)
    expected, _ = camera.resized(60, 45).project(p)
    np.testing.assert_allclose(center(small), expected.numpy(), atol=0.02)


def test_undistorted_frames_are_those_of_the_pinhole_camera(tmp_path: Path) -> None:
    import cv2

    camera = Camera.look_at((1, 1, 1), (0, 0, 0), width=320, height=240)
    distortion = [-0.3, 0.1, 0.002, -0.001, 0.02]
    folder = tmp_path / "images"
    folder.mkdir()
    p = np.array([0.4, -0.4, 0.0])
    T = camera.T_camera_base.numpy()
    r, _ = cv2.Rodrigues(T[:3, :3])
    seen, _ = cv2.projectPoints(p[None], r, T[:3, 3], camera.K.numpy(), np.array(distortion))
    image = (blob(320, 240, *seen[0, 0]).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    cv2.imwrite(str(folder / "0.png"), image)
    straight, _ = camera.project(torch.from_numpy(p))
    assert np.linalg.norm(seen[0, 0] - straight.numpy()) > 2  # the lens bends the view
    video = undistorted(open_video(folder, fps=1), camera.K, distortion)
    np.testing.assert_allclose(center(next(iter(video))), straight.numpy(), atol=0.15)
    for wrong in ([0.1], [0.1] * 6, [np.nan] * 4):
        with pytest.raises(VideoError, match="k1 k2 p1 p2"):
            undistorted(open_video(folder, fps=1), camera.K, wrong)


# ---- in decode -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moving() -> torch.Tensor:
    """(4, 3, 192, 256) smooth noise that shifts by a pixel per frame."""
    noise = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    wide = torch.nn.functional.interpolate(noise, size=(192, 320), mode="bicubic").clamp(0, 1)[0]
    return torch.stack([wide[..., k : k + 256] for k in range(4)])


def idm_at(width: int, height: int) -> JacobianIDM:
    robot = load_embodiment("planar_finger_2")
    camera = replace(robot.camera(), width=256, height=192).resized(width, height)
    return JacobianIDM.from_embodiment(robot, camera=camera, points=500)


def test_decode_reduces_frames_and_camera_together(moving: torch.Tensor) -> None:
    q0 = [0.2, -0.3]
    motion = idm_at(256, 192).decode(moving, q0=q0, fps=10, max_size=128)
    small = torch.stack([area_average(frame, 96, 128) for frame in moving])
    expected = idm_at(128, 96).decode(small, q0=q0, fps=10)
    assert torch.equal(motion.position, expected.position) and torch.equal(motion.residual, expected.residual)
    assert motion.provenance["video_size"] == [256, 192] and motion.provenance["frame_size"] == [128, 96]
    assert motion.provenance["camera"]["width"] == 128
    full = idm_at(256, 192).decode(moving, q0=q0, fps=10)
    assert full.provenance["frame_size"] == [256, 192] and not torch.equal(full.position, motion.position)


def test_a_camera_of_another_size_is_refused_as_ever(moving: torch.Tensor) -> None:
    with pytest.raises(VideoError, match="the camera 64x48"):
        idm_at(64, 48).decode(moving, q0=[0.0, 0.0], fps=10, max_size=128)


def test_external_flow_keeps_the_full_size(moving: torch.Tensor) -> None:
    flow = Flow(torch.zeros(3, 2, 192, 256), torch.ones(3, 192, 256))
    motion = idm_at(256, 192).decode(moving, q0=[0.0, 0.0], fps=10, flow=flow, max_size=64)
    assert motion.provenance["frame_size"] == [256, 192]


def test_a_stream_is_decoded_like_its_file(moving: torch.Tensor, tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", moving, 10)
    idm = idm_at(256, 192)
    by_path = idm.decode(tmp_path / "v.mp4", q0=[0.0, 0.0], max_size=128)
    by_stream = idm.decode(open_video(tmp_path / "v.mp4"), q0=[0.0, 0.0], max_size=128)
    assert torch.equal(by_path.position, by_stream.position)
    turned = rotated(rotated(open_video(tmp_path / "v.mp4"), 90), 270)
    assert torch.equal(idm.decode(turned, q0=[0.0, 0.0], max_size=128).position, by_path.position)
