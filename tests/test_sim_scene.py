"""Rendered images against geometry that is known by other means."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial import cKDTree
from sim_robots import LIT_EVENLY, single_link, visual

from jidm.camera.model import Camera
from jidm.errors import EmbodimentError, InputError
from jidm.robot.composition import compose
from jidm.robot.embodiment import Embodiment
from jidm.robot.kinematics import Kinematics
from jidm.robot.model import Shape
from jidm.robot.registry import embodiment_names, load_embodiment
from jidm.robot.shape_mesh import shape_mesh

pytest.importorskip("pybullet")

from jidm.sim import Appearance, Background, Light, Scene, Texture, renderer, textures

BOX = (0.4, 0.6, 0.2)


@pytest.fixture(scope="module")
def panda() -> Embodiment:
    return load_embodiment("panda")


@pytest.fixture(scope="module")
def panda_scene(panda: Embodiment):
    with Scene(panda) as made:
        yield made


def surface_points(rendering, camera: Camera) -> np.ndarray:
    """(N, 3) every robot pixel unprojected to the base frame."""
    v, u = np.nonzero(rendering.on_robot)
    return camera.unproject(
        torch.from_numpy(np.stack([u, v], -1).astype(float)), torch.from_numpy(rendering.depth[v, u].astype(float))
    ).numpy()


# ---- pixel positions --------------------------------------------------------------------------------------------


def distance_to_box(p: np.ndarray, size=BOX) -> np.ndarray:
    return np.max(np.abs(p) - np.array(size) / 2, axis=1)


@pytest.mark.parametrize("supersample", [1, 2, 3])
@pytest.mark.parametrize("off_center", [(0.0, 0.0), (13.3, -7.7)])
def test_depth_lies_on_a_box(tmp_path: Path, supersample: int, off_center: tuple[float, float]):
    camera = Camera.look_at((1.2, 0.3, 0.9), (0, 0, 0), width=160, height=120)
    K = camera.K.clone()
    K[0, 2] += off_center[0]
    K[1, 2] += off_center[1]
    camera = replace(camera, K=K)
    box = single_link(tmp_path, visual('<box size="0.4 0.6 0.2"/>'))
    with Scene(box, supersample=supersample) as scene:
        seen = scene.render([0.0], camera)
    assert seen.on_robot.sum() > 2000
    assert np.isinf(seen.depth[~seen.on_robot]).all() and (seen.link[seen.on_robot] == 1).all()
    assert np.abs(distance_to_box(surface_points(seen, camera))).max() < 5e-6


def test_the_box_test_detects_an_offset_of_half_a_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(renderer, "_SAMPLE_SHIFT", (0.0, 0.0))
    camera = Camera.look_at((1.2, 0.3, 0.9), (0, 0, 0), width=160, height=120)
    with Scene(single_link(tmp_path, visual('<box size="0.4 0.6 0.2"/>'))) as scene:
        seen = scene.render([0.0], camera)
    assert np.abs(distance_to_box(surface_points(seen, camera))).max() > 5e-4


@pytest.mark.parametrize("supersample", [1, 2, 3])
def test_a_small_sphere_appears_where_it_is(tmp_path: Path, supersample: int):
    """The centroid of a sphere's image, against rays through a fine grid of the same image."""
    rng = np.random.default_rng(3)
    radius, fine, shifts = 0.05, 6, []
    ball = single_link(tmp_path, visual(f'<sphere radius="{radius}"/>'))
    u, v = np.meshgrid((np.arange(80 * fine) + 0.5) / fine - 0.5, (np.arange(60 * fine) + 0.5) / fine - 0.5)
    with Scene(ball, appearance=LIT_EVENLY, supersample=supersample) as scene:
        for _ in range(24):
            camera = Camera.look_at(
                np.add([1, 0.2, 0.3], rng.normal(size=3) * 0.1).tolist(), (rng.normal(size=3) * 0.02).tolist(),
                fov_y=30, width=80, height=60,
            )  # fmt: skip
            rays = np.stack([u.ravel(), v.ravel(), np.ones(u.size)], -1) @ np.linalg.inv(camera.K.numpy()).T
            rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
            center = camera.T_camera_base[:3, 3].numpy()
            hit = (center @ center - (rays @ center) ** 2 < radius**2).reshape(u.shape)
            alpha = scene.render([0.0], camera).rgb[..., 0].astype(float)
            rows, columns = np.mgrid[:60, :80]
            mean = (alpha * columns).sum() / alpha.sum(), (alpha * rows).sum() / alpha.sum()
            shifts.append([mean[0] - u[hit].mean(), mean[1] - v[hit].mean()])
    scatter = np.std(shifts, axis=0)
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.01 + 2 * scatter.max() / len(shifts) ** 0.5
    assert scatter.max() < 0.1 / supersample


def test_edges_are_smoothed(tmp_path: Path):
    """Supersampling gives edge pixels the share that the box covers."""
    camera = Camera.look_at((1.2, 0.3, 0.9), (0, 0, 0), width=160, height=120)
    box = single_link(tmp_path, visual('<box size="0.4 0.6 0.2"/>'))
    images = {}
    for k in (1, 3, 9):
        with Scene(box, appearance=LIT_EVENLY, supersample=k) as scene:
            images[k] = scene.render([0.0], camera).rgb[..., 0].astype(float)
    assert len(np.unique(images[1])) == 2
    assert np.abs(images[3] - images[9]).mean() < 0.4 * np.abs(images[1] - images[9]).mean()


# ---- robots -----------------------------------------------------------------------------------------------------


def distance_to_mesh(p: np.ndarray, mesh: trimesh.Trimesh) -> np.ndarray:
    """(N,) distance [m] to a mesh: exact to the nearest of a few candidates among its triangles, cut small."""
    millimeters = 1000.0  # trimesh's tolerances are absolute and too coarse for small triangles in meters
    p = p * millimeters
    triangles = mesh.subdivide_to_size(0.04 * mesh.scale).triangles * millimeters
    _, near = cKDTree(triangles.mean(axis=1)).query(p, k=24)
    nearest = trimesh.triangles.closest_point(triangles[near.ravel()], np.repeat(p, 24, axis=0))
    distance = np.linalg.norm(nearest.reshape(len(p), 24, 3) - p[:, None], axis=-1) / millimeters
    return np.nanmin(distance, axis=1)  # triangles of no area give NaN


def distance_to_shape(p_link: np.ndarray, shape: Shape, robot: str) -> np.ndarray:
    """(N,) distance [m] of points in the link's frame to one visual: primitives by formula, meshes by trimesh."""
    geometry, T = shape.geometry, shape.T_link_shape
    if geometry.kind == "mesh":
        return distance_to_mesh(p_link, shape_mesh(shape, robot))
    x, y, z = ((p_link - T[:3, 3]) @ T[:3, :3]).T
    size = geometry.size
    if geometry.kind == "box":
        return np.abs(np.max(np.abs([x, y, z]) - np.reshape(size, (3, 1)) / 2, axis=0))
    if geometry.kind == "sphere":
        return np.abs(np.sqrt(x**2 + y**2 + z**2) - size[0])
    if geometry.kind == "cylinder":
        return np.abs(np.maximum(np.hypot(x, y) - size[0], np.abs(z) - size[1] / 2))
    return np.abs(np.sqrt(x**2 + y**2 + np.maximum(np.abs(z) - size[1] / 2, 0) ** 2) - size[0])


@pytest.mark.parametrize("name", embodiment_names())
def test_every_robot_is_drawn_where_its_meshes_are(name: str):
    """Every pixel's depth lies on the meshes of the link it names, placed by our own kinematics at a random pose."""
    embodiment = load_embodiment(name)
    rng = np.random.default_rng(11)
    q = np.clip(embodiment.home + rng.uniform(-0.3, 0.3, embodiment.n), embodiment.lower, embodiment.upper)
    camera = embodiment.camera()
    poses = Kinematics.from_embodiment(embodiment).link_poses(torch.from_numpy(q)).numpy()
    with Scene(embodiment) as scene:
        seen = scene.render(q, camera)
    assert seen.on_robot.sum() > 300, f"{name} is hardly in view"
    p_base, labels = surface_points(seen, camera), seen.link[seen.on_robot]
    distance = np.zeros(len(labels))
    for k in np.unique(labels):
        p_link = (p_base[labels == k] - poses[k, :3, 3]) @ poses[k, :3, :3]
        visuals = embodiment.model.links[k].visuals
        distance[labels == k] = np.min([distance_to_shape(p_link, shape, name) for shape in visuals], axis=0)
        radii = [shape.geometry.size[0] for shape in visuals if shape.geometry.kind in ("cylinder", "sphere")]
        slack = 1e-5 + 0.002 * max(radii, default=0.0)  # round shapes are drawn as many flat pieces
        assert np.median(distance[labels == k]) < slack, f"{embodiment.model.links[k].name} is displaced"
    # The nearest triangle is not always among the candidates, hence a quantile.
    assert np.quantile(distance, 0.95) < 6e-5 and distance.max() < 5e-3


@pytest.mark.parametrize("name", ["panda", "allegro_right", "so100"])
def test_two_oracles_agree_on_link_poses(name: str):
    embodiment = load_embodiment(name)
    rng = np.random.default_rng(5)
    kinematics = Kinematics.from_embodiment(embodiment)
    with Scene(embodiment) as scene:
        for _ in range(10):
            q = rng.uniform(embodiment.lower, embodiment.upper)
            theirs, ours = scene.link_poses(q), kinematics.link_poses(torch.from_numpy(q)).numpy()
            assert np.abs(theirs[:, :3, 3] - ours[:, :3, 3]).max() < 1e-6
            assert np.abs(theirs[:, :3, :3] - ours[:, :3, :3]).max() < 2e-6


def test_mimic_joints_follow(panda: Embodiment, panda_scene: Scene):
    gap = []
    left, right = (panda.model.link_index(f"panda_{side}finger") for side in ("left", "right"))
    for opening in (0.0, 0.03):
        q = panda.home.copy()
        q[panda.joint_index("panda_finger_joint1")] = opening
        poses = panda_scene.link_poses(q)
        gap.append(np.linalg.norm(poses[left, :3, 3] - poses[right, :3, 3]))
    assert gap[1] - gap[0] == pytest.approx(0.06, abs=1e-6)


def test_composed_robots_are_drawn_as_one(panda: Embodiment):
    shift = np.eye(4)
    shift[1, 3] = 0.8
    pair = compose("pair", left=(panda, np.eye(4)), right=(panda, shift))
    camera = Camera.look_at((2.4, 0.4, 0.9), (0.2, 0.4, 0.4), width=160, height=120)
    with Scene(pair) as scene:
        seen = scene.render(pair.home, camera)
    names = {pair.model.links[k].name.split("_")[0] for k in np.unique(seen.link) if k >= 0}
    assert names == {"left", "right"}
    p = surface_points(seen, camera)
    mount = np.array([pair.model.links[k].name.startswith("right") for k in seen.link[seen.on_robot]])
    assert p[mount, 1].mean() - p[~mount, 1].mean() == pytest.approx(0.8, abs=0.1)


# ---- appearance -------------------------------------------------------------------------------------------------


def test_same_seed_same_pixels(panda: Embodiment):
    camera = panda.camera().resized(160, 120)
    images = []
    for seed in (4, 4, 5):
        textures._noise_block.cache_clear()
        with Scene(panda, seed=seed, appearance=Appearance.textured("moving")) as scene:
            images.append(scene.render(panda.home, camera, frame=3))
    same, again, other = images
    assert (same.rgb == again.rgb).all() and (same.depth == again.depth).all()
    assert (same.rgb[same.on_robot] != other.rgb[same.on_robot]).mean() > 0.5
    assert (same.rgb[~same.on_robot] != other.rgb[~same.on_robot]).mean() > 0.5
    assert (same.link == other.link).all()


def test_the_appearance_changes_colors_only(panda: Embodiment, panda_scene: Scene):
    camera = panda.camera().resized(160, 120)
    plain = panda_scene.render(panda.home, camera)
    try:
        for seed in range(4):
            panda_scene.appearance = Appearance.random(seed)
            assert Appearance.random(seed) == Appearance.random(seed)
            other = panda_scene.render(panda.home, camera)
            assert (other.link == plain.link).all() and (other.depth == plain.depth).all()
            assert (other.rgb != plain.rgb).any()
    finally:
        panda_scene.appearance = Appearance.plain()
    assert (panda_scene.render(panda.home, camera).rgb == plain.rgb).all()


def test_texture_is_fixed_to_the_link(tmp_path: Path):
    """The pattern of a box that slides by three pixels moves with it."""
    box = single_link(tmp_path, visual('<box size="0.02 0.6 0.4"/>'))
    camera = Camera.look_at((2, 0, 0), (0, 0, 0), width=160, height=120)
    even = replace(Appearance.textured(), light=Light(ambient=1.0, diffuse=0.0, specular=0.0))
    step = 3 * (2 - 0.01) / float(camera.K[0, 0])
    with Scene(box, appearance=even) as scene:
        first, second = scene.render([0.0], camera), scene.render([step], camera)
    a, b = first.rgb[40:80, 60:90].astype(int), second.rgb[40:80, 63:93].astype(int)
    assert a.std() > 15 and np.abs(a - b).max() <= 2
    assert np.abs(a - second.rgb[40:80, 60:90]).mean() > 10


def test_colors_come_from_mesh_and_urdf(tmp_path: Path, panda: Embodiment, panda_scene: Scene):
    panda_scene.appearance = LIT_EVENLY
    rgb = panda_scene.render(panda.home, panda.camera()).rgb
    panda_scene.appearance = Appearance.plain()
    brightness = rgb.max(axis=-1).astype(int)
    assert (brightness > 230).sum() > 1000 and (
        (brightness > 40) & (brightness < 90)
    ).sum() > 50  # white arm, dark rings
    material = '<material name="m"><color rgba="0.9 0.2 0.1 1"/></material>'
    red = single_link(tmp_path, f'<visual><geometry><sphere radius="0.2"/></geometry>{material}</visual>')
    with Scene(red, appearance=LIT_EVENLY) as scene:
        center = scene.render([0.0], Camera.look_at((1, 0, 0), (0, 0, 0), width=64, height=48)).rgb[24, 32]
    assert np.abs(center.astype(int) - [229, 51, 25]).max() <= 3


@pytest.mark.parametrize(("name", "expected"), [("paint", (25, 76, 204)), ("None", (229, 51, 25))])
def test_a_material_in_the_mesh_takes_precedence_over_the_urdfs(
    tmp_path: Path, name: str, expected: tuple[int, int, int]
):
    """Blender calls the absence of a material 'None'; that is no color."""
    (tmp_path / "sheet.mtl").write_text(f"newmtl {name}\nKd 0.1 0.3 0.8\n")
    (tmp_path / "sheet.obj").write_text(
        f"mtllib sheet.mtl\nv 0 -.2 -.2\nv 0 .2 -.2\nv 0 .2 .2\nv 0 -.2 .2\nusemtl {name}\nf 1 2 3\nf 1 3 4\n"
    )
    material = '<material name="m"><color rgba="0.9 0.2 0.1 1"/></material>'
    sheet = single_link(tmp_path, f'<visual><geometry><mesh filename="sheet.obj"/></geometry>{material}</visual>')
    with Scene(sheet, appearance=LIT_EVENLY) as scene:
        center = scene.render([0.0], Camera.look_at((1, 0, 0), (0, 0, 0), width=64, height=48)).rgb[24, 32]
    assert np.abs(center.astype(int) - expected).max() <= 3


def test_light_comes_from_its_direction(tmp_path: Path):
    ball = single_link(tmp_path, visual('<sphere radius="0.2"/>'))
    camera = Camera.look_at((1, 0, 0), (0, 0, 0), width=64, height=48)
    brightness = {}
    with Scene(ball) as scene:
        for side in (-1.0, 1.0):
            scene.appearance = Appearance(light=Light(direction=(0.2, side, 0.0), color=(1.0, 1.0, 0.5)))
            brightness[side] = scene.render([0.0], camera).rgb[24].astype(float)
    # +y of the base is to the right for a camera that looks along -x.
    assert brightness[1.0][38, 0] > brightness[1.0][26, 0] + 30
    assert brightness[-1.0][26, 0] > brightness[-1.0][38, 0] + 30
    assert brightness[1.0][38, 2] < brightness[1.0][38, 0] - 20


def test_both_sides_of_an_open_mesh_are_drawn(tmp_path: Path):
    (tmp_path / "sheet.obj").write_text("v 0 -.2 -.2\nv 0 .2 -.2\nv 0 .2 .2\nv 0 -.2 .2\nf 1 2 3\nf 1 3 4\n")
    sheet = single_link(tmp_path, visual('<mesh filename="sheet.obj"/>'))
    with Scene(sheet) as scene:
        counts = [
            scene.render([0.0], Camera.look_at((x, 0, 0), (0, 0, 0), width=64, height=48)).on_robot.sum()
            for x in (1, -1)
        ]
    assert counts[0] == counts[1] > 300


@pytest.mark.parametrize("scale", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.5), (1.0, -1.0, 1.0)])
def test_meshes_are_scaled_and_mirrored(tmp_path: Path, scale: tuple[float, float, float]):
    """A closed corner of a cube: the visible face spans the scaled edges, and mirroring leaves no hole."""
    (tmp_path / "corner.obj").write_text("v 0 0 0\nv .2 0 0\nv 0 .2 0\nv 0 0 .2\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n")
    text = " ".join(map(str, scale))
    corner = single_link(tmp_path, visual(f'<mesh filename="corner.obj" scale="{text}"/>'))
    camera = Camera.look_at((1, 0.3 * scale[1], 0.8), (0, 0, 0), width=160, height=120)
    with Scene(corner) as scene:
        seen = scene.render([0.0], camera)
    p = surface_points(seen, camera) / scale
    assert (
        len(p) > 100 and np.abs(p.sum(axis=-1) - 0.2).max() < 1e-5
    )  # all on the slanted face: no pixel shows the inside
    assert p.min() > -1e-6 and np.abs(p.max(axis=0) - 0.2).max() < 0.02


def test_a_mesh_inside_out_has_no_holes(tmp_path: Path):
    corner = "v 0 0 0\nv .2 0 0\nv 0 .2 0\nv 0 0 .2\n"
    (tmp_path / "right.obj").write_text(corner + "f 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n")
    (tmp_path / "wrong.obj").write_text(corner + "f 1 2 3\nf 1 4 2\nf 1 3 4\nf 2 4 3\n")
    (tmp_path / "mixed.obj").write_text(corner + "f 1 3 2\nf 1 2 4\nf 1 3 4\nf 2 4 3\n")
    camera, depth = Camera.look_at((1, 0.3, 0.8), (0, 0, 0), width=160, height=120), {}
    for name in ("right", "wrong", "mixed"):
        with Scene(single_link(tmp_path, visual(f'<mesh filename="{name}.obj"/>'))) as scene:
            depth[name] = scene.render([0.0], camera).depth
    assert (depth["right"] == depth["wrong"]).all() and (depth["right"] == depth["mixed"]).all()


def test_backgrounds(panda: Embodiment):
    still, moving = Background("picture"), Background("moving", velocity=(2 / 120, -1 / 120))
    assert (still.image(160, 120, frame=0) == still.image(160, 120, frame=9)).all()
    a, b = moving.image(160, 120, seed=1, frame=0), moving.image(160, 120, seed=1, frame=3)
    assert np.abs(b[:-3, 6:] - a[3:, :-6]).max() < 1e-4  # 6 px right and 3 px up after three frames
    assert np.abs(b - a).mean() > 0.01
    assert (still.image(160, 120, seed=1) != still.image(160, 120, seed=2)).any()


# ---- use --------------------------------------------------------------------------------------------------------


def test_a_video_is_its_frames(panda: Embodiment, panda_scene: Scene):
    camera = panda.camera().resized(80, 60)
    q = np.stack([panda.home, panda.home + 0.05])
    video = panda_scene.render_video(q, camera)
    assert video.rgb.shape == (2, 60, 80, 3) and video.depth.dtype == np.float32 and video.link.dtype == np.int32
    assert (video[1].rgb == panda_scene.render(torch.from_numpy(q[1]), camera, frame=1).rgb).all()
    assert len(list(panda_scene.frames(q, camera))) == len(video) == 2


def test_scenes_are_independent(panda: Embodiment, panda_scene: Scene):
    camera = panda.camera().resized(80, 60)
    before = panda_scene.render(panda.home, camera)
    with Scene(panda, appearance=Appearance.textured()) as other:
        other.render(panda.home + 0.2, camera)
        assert (panda_scene.render(panda.home, camera).rgb == before.rgb).all()
    assert (panda_scene.render(panda.home, camera).rgb == before.rgb).all()


def test_no_files_or_output_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    ball = single_link(tmp_path, visual('<sphere radius="0.2"/>'))
    empty = tmp_path / "scratch"
    empty.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(empty))
    with Scene(ball) as scene:
        assert list(empty.iterdir()) == []
    scene.close()
    assert capfd.readouterr() == ("", "")
    with pytest.raises(InputError, match="closed"):
        scene.render([0.0], Camera.look_at((1, 0, 0), (0, 0, 0)))


def test_invalid_input_is_rejected(panda: Embodiment, panda_scene: Scene, tmp_path: Path):
    camera = panda.camera()
    with pytest.raises(InputError, match=r"'panda' has n = 8 joints, got shape \(3,\)"):
        panda_scene.render([0.0, 0.0, 0.0], camera)
    with pytest.raises(InputError, match="finite"):
        panda_scene.render(np.full(8, np.nan), camera)
    with pytest.raises(InputError, match="at least one row"):
        panda_scene.render_video(np.zeros((0, 8)), camera)
    with pytest.raises(InputError, match="supersample"):
        Scene(panda, supersample=0)
    with pytest.raises(InputError, match="known: plain, noise"):
        Texture("tartan")
    with pytest.raises(InputError, match="known: plain, picture, moving"):
        Background("sky")
    with pytest.raises(InputError, match="direction"):
        Light(direction=(0.0, 0.0, 0.0))
    with pytest.raises(EmbodimentError, match="no visual shapes"):
        Scene(single_link(tmp_path, ""))
    with pytest.raises(EmbodimentError, match=r"'gone\.stl' was not found .*pass mesh_roots="):
        Scene(single_link(tmp_path, visual('<mesh filename="gone.stl"/>')))
    (tmp_path / "broken.dae").write_text("<COLLADA")
    with pytest.raises(EmbodimentError, match=r"broken\.dae"):
        Scene(single_link(tmp_path, visual('<mesh filename="broken.dae"/>')))
