"""Faster rendering: simplified meshes, and depth and links from the samples of one pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_robots import single_link, visual

from jidm.camera.model import Camera
from jidm.robot.registry import load_embodiment
from jidm.sim.camera_placement import fit_camera_to_robot
from jidm.sim.meshes import cluster_vertices
from jidm.sim.sampling import sample_at_centers
from jidm.sim.scene import Scene

CAMERA = Camera.look_at((2, 0, 0), (0, 0, 0), width=96, height=64)


@given(
    cell_size=st.floats(0.01, 0.5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_vertex_clustering_moves_vertices_little_and_drops_only_degenerate_faces(cell_size: float, seed: int):
    rng = np.random.default_rng(seed)
    vertices, faces = rng.uniform(-1, 1, (60, 3)), rng.integers(0, 60, (80, 3))
    moved, kept = cluster_vertices(vertices, faces, cell_size)
    nearest = np.linalg.norm(vertices[:, None] - moved[None], axis=-1).min(axis=1)
    assert nearest.max() <= np.sqrt(3) * cell_size + 1e-12 and len(kept) <= len(faces)
    corners = np.sort(kept, axis=1)
    assert (corners[:, 1:] > corners[:, :-1]).all()  # no face repeats a vertex
    same, all_faces = cluster_vertices(vertices, faces, 0.0)
    assert same is vertices and all_faces is faces


@pytest.mark.slow
def test_simplified_meshes_look_the_same():
    panda = load_embodiment("panda")
    camera = fit_camera_to_robot(panda, panda.camera("front"), 128, 128)
    tolerance = 0.5 * float(camera.project(torch.tensor([[0.0, 0.0, 0.4]]))[1] / camera.K[0, 0])
    with (
        Scene(panda, supersample=2) as fine,
        Scene(panda, supersample=2, mesh_tolerance=tolerance, exact=False) as fast,
    ):
        a, b = fine.render(panda.home, camera), fast.render(panda.home, camera)
    assert (a.link != b.link).sum() < 0.08 * a.on_robot.sum()
    both = (a.link == b.link) & a.on_robot
    assert (
        np.abs(a.depth[both] - b.depth[both]).mean() < 0.4 * tolerance
    )  # the side of the cubes in which vertices merge
    assert np.abs(a.rgb.astype(int) - b.rgb)[both].mean() < 5


def test_samples_around_centers_give_the_values_at_them(tmp_path: Path):
    tilt = '<origin rpy="0.5 0.3 0.7"/>'
    robot = single_link(tmp_path, visual('<box size="0.5 0.8 0.4"/>', tilt))
    for cell in (2, 3, 4):
        fine_camera = CAMERA.resized(CAMERA.width * cell, CAMERA.height * cell)
        with Scene(robot, supersample=1) as scene:
            exact, fine = scene.render([0.0], CAMERA), scene.render([0.0], fine_camera)
        depth, link = sample_at_centers(fine.depth, fine.link, cell)
        assert depth.shape == link.shape == (64, 96) and (np.isinf(depth) == (link < 0)).all()
        silhouette = sum((np.diff(exact.on_robot, axis=k) != 0).sum() for k in (0, 1))
        assert (link != exact.link).sum() < (1 if cell == 3 else 0.4 * silhouette)
        both = (link == exact.link) & exact.on_robot
        error = np.abs(depth[both] - exact.depth[both])
        assert np.median(error) < 1e-4 and error.mean() < 1e-3  # edges between two faces are slightly rounded


def test_sampling_takes_the_majority_and_among_ties_the_nearer():
    inf = np.inf
    depth = np.array([[1.0, 2.0], [2.2, inf]], np.float32)
    link = np.array([[4, 7], [7, -1]], np.int32)
    z, ids = sample_at_centers(depth, link, 2)
    assert ids.item() == 7 and z.item() == pytest.approx(2.1)
    z, ids = sample_at_centers(np.array([[1.0, 2.0], [2.2, 1.2]], np.float32), np.array([[4, 7], [7, 4]], np.int32), 2)
    assert ids.item() == 4 and z.item() == pytest.approx(1.1)
    z, ids = sample_at_centers(np.full((2, 2), inf, np.float32), np.full((2, 2), -1, np.int32), 2)
    assert ids.item() == -1 and np.isinf(z.item())
