"""What self-play is recorded in: free space, things around, framing, and pictures drawn faster than exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from test_sim_world import LIT_EVENLY, single_link, visual

from jidm.camera.model import Camera
from jidm.errors import InputError
from jidm.robot.embodiment import Embodiment
from jidm.robot.factory import embodiment_from_urdf
from jidm.robot.registry import load_embodiment
from jidm.sim.appearance import Background
from jidm.sim.babble import BabbleConfig
from jidm.sim.babble_motion import usable_range
from jidm.sim.camera_placement import fit_camera_to_robot
from jidm.sim.collision import FreeSpace
from jidm.sim.meshes import cluster_vertices
from jidm.sim.objects import SHAPES, SceneObject, random_objects
from jidm.sim.sampling import sample_at_centers
from jidm.sim.scene import Scene
from jidm.sim.textures import patches
from jidm.sim.workspace import floor_height, surface_points

CAMERA = Camera.look_at((2, 0, 0), (0, 0, 0), width=96, height=64)


@pytest.fixture(scope="module")
def panda() -> Embodiment:
    return load_embodiment("panda")


@pytest.fixture(scope="module")
def panda_free(panda: Embodiment):
    with FreeSpace(panda, clearance=0.01) as made:
        yield made


# ---- free space -------------------------------------------------------------------------------------------------


def crane(tmp_path: Path) -> Embodiment:
    """A ball on a lift on a slide, beside a ball on the base: every distance is known."""
    ball = '<visual><origin xyz="0 0 0.5"/><geometry><sphere radius="0.1"/></geometry></visual>'
    stand = '<visual><origin xyz="0 0 0.3"/><geometry><box size="0.02 0.02 0.6"/></geometry></visual>'
    limit = '<limit lower="-1" upper="1" velocity="1" effort="1"/>'
    path = tmp_path / "crane.urdf"
    path.write_text(
        f"""<robot name="crane"><link name="base">{stand}{ball}</link><link name="slide"/><link name="hook">{ball}</link>
        <joint name="x" type="prismatic"><parent link="base"/><child link="slide"/><axis xyz="1 0 0"/>{limit}</joint>
        <joint name="z" type="prismatic"><parent link="slide"/><child link="hook"/><axis xyz="0 0 1"/>{limit}</joint>
        </robot>"""
    )
    return embodiment_from_urdf(path, name="crane", home=[0.6, 0.0])


def test_distances_decide(tmp_path: Path):
    robot = crane(tmp_path)
    with FreeSpace(robot, clearance=0.02) as free:
        assert free(robot.home) and free.colliding_pairs(robot.home) == []
        # Balls of radius 0.1, and a hair less between their corners.
        assert free([0.225, 0.0]) and not free([0.21, 0.0]) and not free([0.0, 0.0])
        assert free.colliding_pairs([0.21, 0.0]) == [("base", "hook")]
        assert free([0.6, -0.375]) and not free([0.6, -0.385])
        assert free.colliding_pairs([0.6, -0.39]) == [("hook", "floor")]
    with FreeSpace(robot, clearance=0.02, floor=-np.inf) as free:
        assert free([0.6, -0.9])
    with FreeSpace(robot, clearance=0.02, floor=0.2) as free:
        assert not free([0.6, -0.2])


def test_free_poses_have_no_points_near_others_or_below_the_floor(panda: Embodiment, panda_free: FreeSpace):
    """Against points of the drawn surface, carried by the package's own kinematics."""
    low, high = usable_range(panda)
    q = np.random.default_rng(3).uniform(low, high, (150, panda.n))
    kept = np.array([panda_free(row) for row in q])
    pairs = [(panda_free._link_names[a], panda_free._link_names[b]) for a, b in panda_free._pairs]
    assert 0.5 < kept.mean() < 0.95
    carried, link_of = surface_points(panda, q, 4000)
    points, of = carried.numpy(), {link.name: link_of == k for k, link in enumerate(panda.model.links)}
    lowest = np.array([min(p[of[a], 2].min() for a, b in pairs if b == "floor" and of[a].any()) for p in points])
    assert (lowest[kept] > 0).all() and (~kept[lowest < 0]).all() and (lowest < 0).any()

    def nearest(p: np.ndarray) -> float:
        trees = {name: cKDTree(p[mask]) for name, mask in of.items() if mask.any()}
        return min(
            trees[a].query(p[of[b]], distance_upper_bound=0.1)[0].min() for a, b in pairs if a in trees and b in trees
        )

    # The hulls are of the coarser collision shapes: the drawn surface stands out of them by a few millimetres.
    assert min(nearest(p) for p in points[kept]) > 0.003


@pytest.mark.parametrize(
    ("name", "stands"),
    [("panda", True), ("so100", True), ("allegro_right", False), ("planar_finger_5", False)],
)
def test_arms_stand_on_the_floor_and_hands_and_planar_fingers_do_not(name: str, stands: bool):
    robot = load_embodiment(name)
    assert floor_height(robot) == (0 if stands else -np.inf)


def test_fingers_of_a_gripper_may_touch(panda: Embodiment, panda_free: FreeSpace):
    closed = np.array(panda.home)
    closed[panda.joint_index("panda_finger_joint1")] = 0.0
    assert panda_free(closed)


# ---- things -----------------------------------------------------------------------------------------------------


def test_things_hide_what_is_behind_and_are_hidden_by_what_is_before(tmp_path: Path):
    robot = single_link(tmp_path, visual('<box size="0.02 0.8 0.4"/>'))
    with Scene(robot, appearance=LIT_EVENLY) as sim:
        alone = sim.render([0.0], CAMERA)
        for kind in SHAPES:
            size, colour = (0.2, 0.2, 0.2), (0.9, 0.1, 0.2)
            sim.objects = [SceneObject(kind, size, colour, (0.6, 0.0, 0.0))]
            hidden = sim.render([0.0], CAMERA)
            gone = alone.on_robot & ~hidden.on_robot
            assert gone[32, 48] and 50 < gone.sum() < 400 and not (hidden.on_robot & ~alone.on_robot).any()
            assert np.isinf(hidden.depth[gone]).all()
            assert np.abs(hidden.rgb[32, 48].astype(int) - np.multiply(colour, 255)).max() < 6
            sim.objects = [SceneObject(kind, size, colour, (-0.6, 0.0, 0.0))]
            behind = sim.render([0.0], CAMERA)
            assert (behind.link == alone.link).all() and (behind.rgb == alone.rgb).all()
            sim.objects = [SceneObject(kind, size, colour, (0.0, 0.6, 0.0))]
            beside = sim.render([0.0], CAMERA)
            assert (beside.link == alone.link).all() and (beside.rgb != alone.rgb).any()
        sim.objects = []
        assert (sim.render([0.0], CAMERA).rgb == alone.rgb).all()


def test_things_have_their_size_turn_and_speed(tmp_path: Path):
    robot = single_link(tmp_path, visual('<box size="0.01 0.01 0.01"/>'))
    red = (1.0, 0.0, 0.0)
    turned = SceneObject("box", (0.2, 0.6, 0.1), red, (0.0, 0.0, 0.0), (np.pi / 2, 0.0, 0.0))
    drifting = SceneObject("sphere", (0.3, 0.3, 0.3), red, (0.0, -0.3, 0.0), velocity=(0.0, 0.02, 0.0))
    with Scene(robot, appearance=LIT_EVENLY) as sim:
        sim.objects = [turned]
        seen = sim.render([0.9], CAMERA).rgb[..., 0] > 128
        v, u = np.nonzero(seen)
        pixels = float(CAMERA.K[0, 0]) / (2 - 0.1)
        assert np.ptp(u) + 1 == pytest.approx(0.1 * pixels, abs=1.5)  # seen along x, turned about x: 0.6 stands up
        assert np.ptp(v) + 1 == pytest.approx(0.6 * pixels, abs=1.5)
        sim.objects = [drifting]
        middles = [np.nonzero(sim.render([0.9], CAMERA, frame=k).rgb[..., 0] > 128)[1].mean() for k in (0, 10)]
        assert middles[1] - middles[0] == pytest.approx(0.2 * float(CAMERA.K[0, 0]) / 2, abs=1)


def test_random_things_follow_the_seed_and_are_seen(panda: Embodiment):
    camera = fit_camera_to_robot(panda, panda.camera("front"), 64, 64)
    middle = np.array([0.0, 0.0, 0.45])
    some = [random_objects(camera, middle, 0.7, seed, 5) for seed in range(60)]
    assert some[3] == random_objects(camera, middle, 0.7, 3, 5) != some[4]
    assert {len(s) for s in some} == set(range(6)) and random_objects(camera, middle, 0.7, 3, 0) == ()
    uv, depth = camera.project(torch.tensor([t.position for s in some for t in s]))
    assert (depth > 0.3).all() and (uv > -1).all() and (uv < 65).all()
    distance = float(camera.project(torch.from_numpy(middle))[1])
    assert (depth > distance + 0.7).float().mean() > 0.3 and 0.1 < (depth < distance - 0.7).float().mean() < 0.35
    assert {t.shape for s in some for t in s} == set(SHAPES)
    assert 0.2 < np.mean([any(t.velocity) for s in some for t in s]) < 0.6


def test_things_without_sense_are_refused():
    one = (1.0, 1.0, 1.0)
    with pytest.raises(InputError, match="unknown thing 'teapot'"):
        SceneObject("teapot", one, one, one)
    with pytest.raises(InputError, match="positive lengths"):
        SceneObject("box", (1.0, 0.0, 1.0), one, one)


# ---- backgrounds ------------------------------------------------------------------------------------------------


def test_patches_have_edges_and_slide_as_a_whole():
    still = Background("patches", velocity=(0.0, 0.0))
    sliding = Background("patches", velocity=(4 / 64, -2 / 64))
    assert (
        not still.is_moving
        and sliding.is_moving
        and not Background("picture").is_moving
        and Background("moving").is_moving
    )
    for seed in range(5):
        a, b = (sliding.image(96, 64, seed=seed, frame=k) for k in (0, 1))
        assert np.allclose(b[:-2, 4:], a[2:, :-4], atol=1e-5)
        assert (still.image(96, 64, seed=seed, frame=7) == a).all()
    steps = np.abs(np.diff(still.image(96, 64, seed=1), axis=1)).max(-1)
    assert np.quantile(steps, 0.99) > 10 * np.median(steps)  # even areas, sharp edges
    u, v = np.meshgrid(np.linspace(-0.5, 0.5, 80), np.linspace(-0.5, 0.5, 80))
    many = np.stack([patches(u, v, seed, 1 / 80) for seed in range(30)])
    assert abs(many.mean()) < 0.3 and 0.5 < many.std() < 2


# ---- drawn faster -----------------------------------------------------------------------------------------------


@given(
    detail=st.floats(0.01, 0.5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_coarser_meshes_stay_near_and_lose_only_what_vanished(detail: float, seed: int):
    rng = np.random.default_rng(seed)
    vertices, faces = rng.uniform(-1, 1, (60, 3)), rng.integers(0, 60, (80, 3))
    moved, kept = cluster_vertices(vertices, faces, detail)
    nearest = np.linalg.norm(vertices[:, None] - moved[None], axis=-1).min(axis=1)
    assert nearest.max() <= np.sqrt(3) * detail + 1e-12 and len(kept) <= len(faces)
    corners = np.sort(kept, axis=1)
    assert (corners[:, 1:] > corners[:, :-1]).all()  # no face without area by index
    same, all_faces = cluster_vertices(vertices, faces, 0.0)
    assert same is vertices and all_faces is faces


@pytest.mark.slow
def test_coarser_meshes_look_the_same(panda: Embodiment):
    camera = fit_camera_to_robot(panda, panda.camera("front"), 128, 128)
    detail = 0.5 * float(camera.project(torch.tensor([[0.0, 0.0, 0.4]]))[1] / camera.K[0, 0])
    with Scene(panda, supersample=2) as fine, Scene(panda, supersample=2, mesh_tolerance=detail, exact=False) as fast:
        a, b = fine.render(panda.home, camera), fast.render(panda.home, camera)
    assert (a.link != b.link).sum() < 0.08 * a.on_robot.sum()
    both = (a.link == b.link) & a.on_robot
    assert np.abs(a.depth[both] - b.depth[both]).mean() < 0.4 * detail  # the side of the cubes in which vertices merge
    assert np.abs(a.rgb.astype(int) - b.rgb)[both].mean() < 5


def test_samples_around_centres_tell_what_is_at_them(tmp_path: Path):
    tilt = '<origin rpy="0.5 0.3 0.7"/>'
    robot = single_link(tmp_path, visual('<box size="0.5 0.8 0.4"/>', tilt))
    for cell in (2, 3, 4):
        fine_camera = CAMERA.resized(CAMERA.width * cell, CAMERA.height * cell)
        with Scene(robot, supersample=1) as sim:
            exact, fine = sim.render([0.0], CAMERA), sim.render([0.0], fine_camera)
        depth, link = sample_at_centers(fine.depth, fine.link, cell)
        assert depth.shape == link.shape == (64, 96) and (np.isinf(depth) == (link < 0)).all()
        outline = sum((np.diff(exact.on_robot, axis=k) != 0).sum() for k in (0, 1))
        assert (link != exact.link).sum() < (1 if cell == 3 else 0.4 * outline)
        both = (link == exact.link) & exact.on_robot
        error = np.abs(depth[both] - exact.depth[both])
        assert np.median(error) < 1e-4 and error.mean() < 1e-3  # edges between two faces are a little round


def test_at_centres_votes_and_prefers_the_nearer():
    inf = np.inf
    depth = np.array([[1.0, 2.0], [2.2, inf]], np.float32)
    link = np.array([[4, 7], [7, -1]], np.int32)
    z, ids = sample_at_centers(depth, link, 2)
    assert ids.item() == 7 and z.item() == pytest.approx(2.1)
    z, ids = sample_at_centers(np.array([[1.0, 2.0], [2.2, 1.2]], np.float32), np.array([[4, 7], [7, 4]], np.int32), 2)
    assert ids.item() == 4 and z.item() == pytest.approx(1.1)
    z, ids = sample_at_centers(np.full((2, 2), inf, np.float32), np.full((2, 2), -1, np.int32), 2)
    assert ids.item() == -1 and np.isinf(z.item())


# ---- framing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), [("panda", (128, 128)), ("planar_finger_5", (96, 96)), ("planar_finger_5", (160, 96))]
)
def test_the_working_range_fills_the_picture(name: str, size: tuple[int, int]):
    robot = load_embodiment(name)
    given = robot.camera("front")
    camera = fit_camera_to_robot(robot, given, *size)
    assert (camera.width, camera.height) == size
    assert torch.equal(camera.T_camera_base.double(), given.T_camera_base.double())
    assert float(camera.K[0, 0] / camera.K[1, 1]) == pytest.approx(float(given.K[0, 0] / given.K[1, 1]))
    q = np.random.default_rng(9).uniform(*usable_range(robot), (200, robot.n))
    p, _ = surface_points(robot, q, 400)
    above = p[..., 2].amin(dim=-1) >= floor_height(robot) - 0.02
    uv, _ = replace(camera, K=camera.K.double()).project(p[above])
    whole = ((uv > -0.5) & (uv < torch.tensor(size) - 0.5)).all(-1).all(-1)
    assert whole.double().mean() > 0.88
    # As large as that allows: towards one pair of borders it nearly fills the frame.
    reach = (uv.amax(1).quantile(0.98, dim=0) - uv.amin(1).quantile(0.02, dim=0)) / torch.tensor(size)
    assert 0.85 < reach.max() < 1.1


def test_a_robot_that_may_reach_out_of_the_picture_is_shown_larger(panda: Embodiment) -> None:
    whole, cropped = (fit_camera_to_robot(panda, panda.camera("front"), 64, 64, crop_fraction=x) for x in (0.02, 0.15))
    assert cropped.K[0, 0] > 1.3 * whole.K[0, 0]
    assert torch.equal(cropped.T_camera_base, whole.T_camera_base)
    with pytest.raises(InputError, match="cropped is a share"):
        BabbleConfig(embodiment="panda", crop_fraction=0.5)
