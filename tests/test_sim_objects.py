"""Objects around the robot and procedural backgrounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sim_robots import LIT_EVENLY, single_link, visual

from jidm.camera.model import Camera
from jidm.errors import InputError
from jidm.robot.registry import load_embodiment
from jidm.sim.appearance import Background
from jidm.sim.camera_placement import fit_camera_to_robot
from jidm.sim.objects import SHAPES, SceneObject, random_objects
from jidm.sim.scene import Scene
from jidm.sim.textures import patches

CAMERA = Camera.look_at((2, 0, 0), (0, 0, 0), width=96, height=64)


def test_objects_and_robot_occlude_each_other(tmp_path: Path):
    robot = single_link(tmp_path, visual('<box size="0.02 0.8 0.4"/>'))
    with Scene(robot, appearance=LIT_EVENLY) as scene:
        alone = scene.render([0.0], CAMERA)
        for shape in SHAPES:
            size, color = (0.2, 0.2, 0.2), (0.9, 0.1, 0.2)
            scene.objects = [SceneObject(shape, size, color, (0.6, 0.0, 0.0))]
            hidden = scene.render([0.0], CAMERA)
            gone = alone.on_robot & ~hidden.on_robot
            assert gone[32, 48] and 50 < gone.sum() < 400 and not (hidden.on_robot & ~alone.on_robot).any()
            assert np.isinf(hidden.depth[gone]).all()
            assert np.abs(hidden.rgb[32, 48].astype(int) - np.multiply(color, 255)).max() < 6
            scene.objects = [SceneObject(shape, size, color, (-0.6, 0.0, 0.0))]
            behind = scene.render([0.0], CAMERA)
            assert (behind.link == alone.link).all() and (behind.rgb == alone.rgb).all()
            scene.objects = [SceneObject(shape, size, color, (0.0, 0.6, 0.0))]
            beside = scene.render([0.0], CAMERA)
            assert (beside.link == alone.link).all() and (beside.rgb != alone.rgb).any()
        scene.objects = []
        assert (scene.render([0.0], CAMERA).rgb == alone.rgb).all()


def test_objects_have_their_size_rotation_and_velocity(tmp_path: Path):
    robot = single_link(tmp_path, visual('<box size="0.01 0.01 0.01"/>'))
    red = (1.0, 0.0, 0.0)
    rotated = SceneObject("box", (0.2, 0.6, 0.1), red, (0.0, 0.0, 0.0), (np.pi / 2, 0.0, 0.0))
    moving = SceneObject("sphere", (0.3, 0.3, 0.3), red, (0.0, -0.3, 0.0), velocity=(0.0, 0.02, 0.0))
    with Scene(robot, appearance=LIT_EVENLY) as scene:
        scene.objects = [rotated]
        seen = scene.render([0.9], CAMERA).rgb[..., 0] > 128
        v, u = np.nonzero(seen)
        pixels = float(CAMERA.K[0, 0]) / (2 - 0.1)
        assert np.ptp(u) + 1 == pytest.approx(
            0.1 * pixels, abs=1.5
        )  # seen along x, rotated about x: the side of 0.6 is vertical
        assert np.ptp(v) + 1 == pytest.approx(0.6 * pixels, abs=1.5)
        scene.objects = [moving]
        centers = [np.nonzero(scene.render([0.9], CAMERA, frame=k).rgb[..., 0] > 128)[1].mean() for k in (0, 10)]
        assert centers[1] - centers[0] == pytest.approx(0.2 * float(CAMERA.K[0, 0]) / 2, abs=1)


def test_random_objects_follow_the_seed_and_are_in_view():
    panda = load_embodiment("panda")
    camera = fit_camera_to_robot(panda, panda.camera("front"), 64, 64)
    center = np.array([0.0, 0.0, 0.45])
    some = [random_objects(camera, center, 0.7, seed, 5) for seed in range(60)]
    assert some[3] == random_objects(camera, center, 0.7, 3, 5) != some[4]
    assert {len(s) for s in some} == set(range(6)) and random_objects(camera, center, 0.7, 3, 0) == ()
    uv, depth = camera.project(torch.tensor([t.position for s in some for t in s]))
    assert (depth > 0.3).all() and (uv > -1).all() and (uv < 65).all()
    distance = float(camera.project(torch.from_numpy(center))[1])
    assert (depth > distance + 0.7).float().mean() > 0.3 and 0.1 < (depth < distance - 0.7).float().mean() < 0.35
    assert {t.shape for s in some for t in s} == set(SHAPES)
    assert 0.2 < np.mean([any(t.velocity) for s in some for t in s]) < 0.6


def test_invalid_objects_are_rejected():
    one = (1.0, 1.0, 1.0)
    with pytest.raises(InputError, match="unknown shape 'teapot'"):
        SceneObject("teapot", one, one, one)
    with pytest.raises(InputError, match="positive lengths"):
        SceneObject("box", (1.0, 0.0, 1.0), one, one)


def test_patches_have_edges_and_translate_as_a_whole():
    still = Background("patches", velocity=(0.0, 0.0))
    translating = Background("patches", velocity=(4 / 64, -2 / 64))
    assert (
        not still.is_moving
        and translating.is_moving
        and not Background("picture").is_moving
        and Background("moving").is_moving
    )
    for seed in range(5):
        a, b = (translating.image(96, 64, seed=seed, frame=k) for k in (0, 1))
        assert np.allclose(b[:-2, 4:], a[2:, :-4], atol=1e-5)
        assert (still.image(96, 64, seed=seed, frame=7) == a).all()
    steps = np.abs(np.diff(still.image(96, 64, seed=1), axis=1)).max(-1)
    assert np.quantile(steps, 0.99) > 10 * np.median(steps)  # even areas, sharp edges
    u, v = np.meshgrid(np.linspace(-0.5, 0.5, 80), np.linspace(-0.5, 0.5, 80))
    many = np.stack([patches(u, v, seed, 1 / 80) for seed in range(30)])
    assert abs(many.mean()) < 0.3 and 0.5 < many.std() < 2
