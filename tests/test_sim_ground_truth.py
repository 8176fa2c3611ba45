"""Exact flow against PyBullet's own link frames and against the next image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from jidm.errors import InputError
from jidm.robot.embodiment import Embodiment
from jidm.robot.registry import load_embodiment

pytest.importorskip("pybullet")

from jidm.sim import Appearance, Light, Scene, Texture, exact_flow, random_motion, stays_visible

EVEN_LIGHT = Light(ambient=1.0, diffuse=0.0, specular=0.0)


@pytest.fixture(scope="module", params=["panda", "allegro_right"])
def rendered(request: pytest.FixtureRequest):
    """Scene, camera, joint positions of two frames and their images, textured and evenly lit."""
    embodiment = load_embodiment(request.param)
    appearance = replace(
        Appearance.textured(), light=EVEN_LIGHT, texture=Texture("noise", grain=0.02 * size_of(embodiment))
    )
    q = random_motion(embodiment, 12, 1 / 16, seed=3)[[2, 5]]
    with Scene(embodiment, appearance=appearance) as scene:
        yield scene, embodiment.camera(), q, scene.render_video(q, embodiment.camera())


def size_of(embodiment: Embodiment) -> float:
    return 0.1 if embodiment.name.startswith("allegro") else 1.0


def flow_by_pybullet(scene: Scene, camera, first, q, q_next) -> np.ndarray:
    """(2, H, W) flow of every robot pixel by PyBullet's link frames, in plain numpy."""
    before, after = scene.link_poses(q), scene.link_poses(q_next)
    K, T = camera.K.numpy(), camera.T_camera_base.numpy()
    flow = np.zeros((2, *first.link.shape))
    for v, u in zip(*np.nonzero(first.on_robot), strict=True):
        p_camera = np.linalg.inv(K) @ [u, v, 1] * float(first.depth[v, u])
        p_base = np.linalg.inv(T) @ [*p_camera, 1]
        k = first.link[v, u]
        moved = T @ after[k] @ np.linalg.inv(before[k]) @ p_base
        uvw = K @ moved[:3]
        flow[:, v, u] = uvw[:2] / uvw[2] - [u, v]
    return flow


def test_flow_agrees_with_pybullets_link_frames(rendered):
    scene, camera, q, video = rendered
    flow, on_robot = exact_flow(scene.embodiment, camera, video.depth[0], video.link[0], q[0], q[1])
    truth = flow_by_pybullet(scene, camera, video[0], q[0], q[1])
    assert (on_robot.numpy() == video[0].on_robot).all() and flow.shape == (2, camera.height, camera.width)
    assert np.abs(truth).max() > 2, "the robot must move for this to mean anything"
    assert np.abs(flow.numpy() - truth).max() < 1e-3
    assert (flow.numpy()[:, ~video[0].on_robot] == 0).all()


def warp_back(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """The next image sampled on the first one's grid."""
    v, u = np.mgrid[: flow.shape[1], : flow.shape[2]]
    at = np.stack([v + flow[1], u + flow[0]])
    return np.stack([map_coordinates(image[..., c].astype(float), at, order=3, mode="nearest") for c in range(3)], -1)


def test_the_next_image_warped_by_the_flow_is_the_first(rendered):
    """A check without kinematics: texture sampled along the flow matches; half a pixel off, it does not."""
    scene, camera, q, video = rendered
    flow, _ = exact_flow(scene.embodiment, camera, video.depth[0], video.link[0], q[0], q[1])
    visible = stays_visible(scene.embodiment, camera, video.depth[0], video.link[0], q[0], q[1], video.depth[1]).numpy()
    # Away from silhouettes, where one pixel mixes two surfaces.
    ids = np.pad(video.link[0], 2, mode="edge")
    h, w = video.link[0].shape
    inner = np.all(
        [ids[2 + y : 2 + y + h, 2 + x : 2 + x + w] == video.link[0] for y in range(-2, 3) for x in range(-2, 3)], axis=0
    )
    use = visible & inner
    assert use.sum() > 500

    def mismatch(shift) -> float:
        back = warp_back(video.rgb[1], flow.numpy() + np.reshape(shift, (2, 1, 1)))
        return float(np.median(np.abs(back - video.rgb[0])[use]))

    right = mismatch((0.0, 0.0))
    assert right < 6
    for shift in ((0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)):
        assert mismatch(shift) > 1.5 * right
    # Shifts of either sign are equally wrong: there is no constant offset.
    for axis in (0, 1):
        plus, minus = (mismatch(sign * 0.5 * np.eye(2)[axis]) for sign in (1, -1))
        assert abs(plus - minus) < 0.25 * (plus + minus)


def test_stays_visible_agrees_with_the_next_frames_surface(rendered):
    """A visible point is found again, on the same spot of the same link, in the next frame's depth."""
    scene, camera, q, video = rendered
    arguments = (scene.embodiment, camera, video.depth[0], video.link[0], q[0], q[1])
    flow, on_robot = (x.numpy() for x in exact_flow(*arguments))
    seen = stays_visible(*arguments, video.depth[1]).numpy()
    assert not (seen & ~on_robot).any() and seen.sum() > 0.8 * on_robot.sum()
    v, u = np.nonzero(on_robot)
    x = np.rint(u + flow[0, v, u]).astype(int).clip(0, camera.width - 1)
    y = np.rint(v + flow[1, v, u]).astype(int).clip(0, camera.height - 1)
    same_link = video.link[1][y, x] == video.link[0][v, u]
    assert same_link[seen[v, u]].mean() > 0.97
    assert same_link[~seen[v, u]].mean() < 0.7


def test_points_outside_the_image_or_occluded_are_not_visible(rendered):
    scene, camera, q, video = rendered
    arguments = (scene.embodiment, camera, video.depth[0], video.link[0], q[0], q[1])
    covered = np.full_like(video.depth[1], 0.05)
    assert not stays_visible(*arguments, covered).any()
    gone = np.full_like(video.depth[1], np.inf)
    assert not stays_visible(*arguments, gone).any()
    still = stays_visible(*arguments[:5], q[0], video.depth[0])
    assert still.sum() == video[0].on_robot.sum()


def test_without_motion_the_flow_is_zero(rendered):
    scene, camera, q, video = rendered
    flow, _ = exact_flow(scene.embodiment, camera, video.depth[0], video.link[0], q[0], q[0])
    assert flow.abs().max() < 1e-9
    moved, _ = exact_flow(
        scene.embodiment, camera, torch.from_numpy(video.depth[0]), video.link[0], torch.from_numpy(q[0]), q[1]
    )
    assert moved.dtype == torch.float64 and moved.abs().max() > 2


def test_wrong_shapes_are_rejected(rendered):
    scene, camera, q, video = rendered
    with pytest.raises(InputError, match="must both be"):
        exact_flow(scene.embodiment, camera, video.depth[0][:-1], video.link[0], q[0], q[1])
    with pytest.raises(InputError, match="must both be"):
        exact_flow(scene.embodiment, camera, video.depth[0], video.link[0][:, :-1], q[0], q[1])
    with pytest.raises(InputError, match="depth_next"):
        stays_visible(scene.embodiment, camera, video.depth[0], video.link[0], q[0], q[1], video.depth[1][:-1])
