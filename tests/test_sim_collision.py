"""Collision checks: distances of known shapes, and against points of a real robot's surface."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from jidm.robot.embodiment import Embodiment
from jidm.robot.factory import embodiment_from_urdf
from jidm.robot.registry import load_embodiment
from jidm.sim.babble_motion import usable_range
from jidm.sim.collision import FreeSpace
from jidm.sim.workspace import floor_height, surface_points


@pytest.fixture(scope="module")
def panda() -> Embodiment:
    return load_embodiment("panda")


@pytest.fixture(scope="module")
def panda_free(panda: Embodiment):
    with FreeSpace(panda, clearance=0.01) as made:
        yield made


def crane(tmp_path: Path) -> Embodiment:
    """A ball on two prismatic joints (x, z) beside a ball on the base: every distance is known."""
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


def test_poses_are_free_down_to_the_clearance(tmp_path: Path):
    robot = crane(tmp_path)
    with FreeSpace(robot, clearance=0.02) as free:
        assert free(robot.home)
        # Balls of radius 0.1; the distance of their meshes is a little larger.
        assert free([0.225, 0.0]) and not free([0.21, 0.0]) and not free([0.0, 0.0])
        assert free([0.6, -0.375]) and not free([0.6, -0.385])


def test_free_poses_have_no_surface_points_near_others_or_below_the_floor(panda: Embodiment, panda_free: FreeSpace):
    """Against points of the visual surface, placed by the package's own kinematics."""
    low, high = usable_range(panda)
    q = np.random.default_rng(3).uniform(low, high, (150, panda.n))
    is_free = np.array([panda_free(row) for row in q])
    names = {child: panda.model.links[k].name for child, k in enumerate(panda_free.link_table, start=-1)} | {
        None: "floor"
    }
    pairs = [(names[a], names[b]) for a, b in panda_free._pairs]
    assert 0.5 < is_free.mean() < 0.95
    placed, link_of = surface_points(panda, q, 4000)
    points, of = placed.numpy(), {link.name: link_of == k for k, link in enumerate(panda.model.links)}
    lowest = np.array([min(p[of[a], 2].min() for a, b in pairs if b == "floor" and of[a].any()) for p in points])
    assert (lowest[is_free] > 0).all() and (~is_free[lowest < 0]).all() and (lowest < 0).any()

    def nearest(p: np.ndarray) -> float:
        trees = {name: cKDTree(p[mask]) for name, mask in of.items() if mask.any()}
        return min(
            trees[a].query(p[of[b]], distance_upper_bound=0.1)[0].min() for a, b in pairs if a in trees and b in trees
        )

    # The hulls are of the coarser collision shapes: the visual surface protrudes from them by a few millimeters.
    assert min(nearest(p) for p in points[is_free]) > 0.003


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
