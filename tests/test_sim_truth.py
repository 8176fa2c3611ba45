"""Exact flow against PyBullet's own link frames and against what the next picture shows."""

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

from jidm.sim import Appearance, Light, Scene, Texture, exact_flow, smooth_motion, stays_visible

EVEN_LIGHT = Light(ambient=1.0, diffuse=0.0, specular=0.0)


@pytest.fixture(scope="module", params=["panda", "allegro_right"])
def scene(request: pytest.FixtureRequest):
    """World, camera, two poses a frame apart and their pictures, textured and evenly lit."""
    embodiment = load_embodiment(request.param)
    look = replace(Appearance.textured(), light=EVEN_LIGHT, texture=Texture("noise", grain=0.02 * size_of(embodiment)))
    q = smooth_motion(embodiment, 12, 1 / 16, seed=3)[[2, 5]]
    with Scene(embodiment, appearance=look) as sim:
        yield sim, embodiment.camera(), q, sim.render_video(q, embodiment.camera())


def size_of(embodiment: Embodiment) -> float:
    return 0.1 if embodiment.name.startswith("allegro") else 1.0


def carried_by_pybullet(sim: Scene, camera, first, q, q_next) -> np.ndarray:
    """(2, H, W) where PyBullet's link frames take every robot pixel, in plain numpy."""
    before, after = sim.link_poses(q), sim.link_poses(q_next)
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


def test_flow_is_what_pybullets_frames_say(scene):
    sim, camera, q, video = scene
    flow, on_robot = exact_flow(sim.embodiment, camera, video.depth[0], video.link[0], q[0], q[1])
    truth = carried_by_pybullet(sim, camera, video[0], q[0], q[1])
    assert (on_robot.numpy() == video[0].on_robot).all() and flow.shape == (2, camera.height, camera.width)
    assert np.abs(truth).max() > 2, "the robot must move for this to mean anything"
    assert np.abs(flow.numpy() - truth).max() < 1e-3
    assert (flow.numpy()[:, ~video[0].on_robot] == 0).all()


def warp_back(picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """The next picture fetched to the first one's grid."""
    v, u = np.mgrid[: flow.shape[1], : flow.shape[2]]
    at = np.stack([v + flow[1], u + flow[0]])
    return np.stack([map_coordinates(picture[..., c].astype(float), at, order=3, mode="nearest") for c in range(3)], -1)


def test_the_next_picture_is_where_the_flow_says(scene):
    """A check that knows no kinematics: texture fetched along the flow matches; half a pixel beside, it does not."""
    sim, camera, q, video = scene
    flow, _ = exact_flow(sim.embodiment, camera, video.depth[0], video.link[0], q[0], q[1])
    seen = stays_visible(sim.embodiment, camera, video.depth[0], video.link[0], q[0], q[1], video.depth[1]).numpy()
    # Away from outlines, where one pixel mixes two surfaces.
    ids = np.pad(video.link[0], 2, mode="edge")
    h, w = video.link[0].shape
    inner = np.all(
        [ids[2 + y : 2 + y + h, 2 + x : 2 + x + w] == video.link[0] for y in range(-2, 3) for x in range(-2, 3)], axis=0
    )
    use = seen & inner
    assert use.sum() > 500

    def mismatch(shift) -> float:
        back = warp_back(video.rgb[1], flow.numpy() + np.reshape(shift, (2, 1, 1)))
        return float(np.median(np.abs(back - video.rgb[0])[use]))

    right = mismatch((0.0, 0.0))
    assert right < 6
    for shift in ((0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)):
        assert mismatch(shift) > 1.5 * right
    # Both halves of every axis are equally wrong: no constant offset is left.
    for axis in (0, 1):
        plus, minus = (mismatch(sign * 0.5 * np.eye(2)[axis]) for sign in (1, -1))
        assert abs(plus - minus) < 0.25 * (plus + minus)


def test_stays_visible_agrees_with_the_next_frames_surface(scene):
    """A visible point is found again, on the same spot of the same link, in the next frame's depth."""
    sim, camera, q, video = scene
    arguments = (sim.embodiment, camera, video.depth[0], video.link[0], q[0], q[1])
    flow, on_robot = (x.numpy() for x in exact_flow(*arguments))
    seen = stays_visible(*arguments, video.depth[1]).numpy()
    assert not (seen & ~on_robot).any() and seen.sum() > 0.8 * on_robot.sum()
    v, u = np.nonzero(on_robot)
    x = np.rint(u + flow[0, v, u]).astype(int).clip(0, camera.width - 1)
    y = np.rint(v + flow[1, v, u]).astype(int).clip(0, camera.height - 1)
    same_link = video.link[1][y, x] == video.link[0][v, u]
    assert same_link[seen[v, u]].mean() > 0.97
    assert same_link[~seen[v, u]].mean() < 0.7


def test_what_leaves_the_picture_or_is_covered_is_not_seen(scene):
    sim, camera, q, video = scene
    arguments = (sim.embodiment, camera, video.depth[0], video.link[0], q[0], q[1])
    covered = np.full_like(video.depth[1], 0.05)
    assert not stays_visible(*arguments, covered).any()
    gone = np.full_like(video.depth[1], np.inf)
    assert not stays_visible(*arguments, gone).any()
    still = stays_visible(*arguments[:5], q[0], video.depth[0])
    assert still.sum() == video[0].on_robot.sum()


def test_no_motion_no_flow(scene):
    sim, camera, q, video = scene
    flow, _ = exact_flow(sim.embodiment, camera, video.depth[0], video.link[0], q[0], q[0])
    assert flow.abs().max() < 1e-9
    there, _ = exact_flow(
        sim.embodiment, camera, torch.from_numpy(video.depth[0]), video.link[0], torch.from_numpy(q[0]), q[1]
    )
    assert there.dtype == torch.float64 and there.abs().max() > 2


def test_wrong_shapes_are_named(scene):
    sim, camera, q, video = scene
    with pytest.raises(InputError, match="must both be"):
        exact_flow(sim.embodiment, camera, video.depth[0][:-1], video.link[0], q[0], q[1])
    with pytest.raises(InputError, match="must both be"):
        exact_flow(sim.embodiment, camera, video.depth[0], video.link[0][:, :-1], q[0], q[1])
    with pytest.raises(InputError, match="depth_next"):
        stays_visible(sim.embodiment, camera, video.depth[0], video.link[0], q[0], q[1], video.depth[1][:-1])
