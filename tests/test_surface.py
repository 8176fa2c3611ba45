"""Surface points: on the shapes, on the outside only, exact in number, reproducible; and their visibility."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jidm.camera.model import Camera
from jidm.errors import EmbodimentError, InputError
from jidm.robot.registry import load_embodiment
from jidm.robot.shape_mesh import shape_mesh
from jidm.robot.surface import sample_surface
from jidm.robot.urdf.reader import parse_urdf
from jidm.robot.visibility import visible_points


def link(name: str, *shapes: str) -> str:
    return f'<link name="{name}">{"".join(shapes)}</link>'


def shape(geometry: str, xyz: str = "0 0 0", rpy: str = "0 0 0", tag: str = "visual") -> str:
    return f'<{tag}><origin xyz="{xyz}" rpy="{rpy}"/><geometry>{geometry}</geometry></{tag}>'


def joined(parent: str, child: str) -> str:
    return f'<joint name="{parent}_{child}" type="fixed"><parent link="{parent}"/><child link="{child}"/></joint>'


def robot(*elements: str):
    return parse_urdf(f'<robot name="shapes">{"".join(elements)}</robot>')


# ---- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 1000, 20_000])
def test_count_is_exact_and_the_seed_determines_the_points(count: int) -> None:
    model = load_embodiment("planar_finger_3").model
    a, b, other = (sample_surface(model, count, seed=s) for s in (0, 0, 1))
    assert len(a) == count == a.p_link.shape[0] == a.normal_link.shape[0]
    assert torch.equal(a.p_link, b.p_link) and torch.equal(a.link, b.link)
    assert not torch.equal(a.p_link, other.p_link)
    assert a.p_link.dtype == torch.float64 and a.link.dtype == torch.long
    torch.testing.assert_close(a.normal_link.norm(dim=-1), torch.ones(count).double())


@pytest.mark.parametrize("name", ["allegro_right", "piper", "planar_finger_2", "so100"])
def test_points_lie_on_the_meshes_of_their_link(name: str) -> None:
    import trimesh

    model = load_embodiment(name).model
    surface = sample_surface(model, 600)
    with_shapes = {k for k, x in enumerate(model.links) if x.visuals}
    assert set(surface.link.tolist()) == with_shapes, "every link with a shape gets points"
    for k in sorted(with_shapes)[:6]:
        mesh = trimesh.util.concatenate([shape_mesh(s, name) for s in model.links[k].visuals])
        p = surface.p_link[surface.link == k].numpy()[:25]
        assert on_triangles(p, mesh.triangles).all()


def on_triangles(p: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Which points (P, 3) lie in one of the triangles (F, 3, 3), by plane distance and barycentric coordinates."""
    a, b, c = np.swapaxes(triangles, 0, 1)
    u, v = b - a, c - a
    normal = np.cross(u, v)
    square = np.maximum((normal**2).sum(-1), 1e-300)
    d = p[:, None] - a
    off = np.abs((d * normal).sum(-1)) / np.sqrt(square)
    beta = (np.cross(d, v) * normal).sum(-1) / square
    gamma = (np.cross(u, d) * normal).sum(-1) / square
    return ((off < 1e-9) & (beta > -1e-6) & (gamma > -1e-6) & (beta + gamma < 1 + 1e-6)).any(axis=1)


def test_points_lie_on_primitives_by_their_formulas() -> None:
    """Half a turn about x puts z where -z was; chords of 64-sided round shapes lie 0.13 % inside the circle."""
    model = robot(
        link("box", shape('<box size="0.2 0.4 0.6"/>', "1 2 3")), link("ball", shape('<sphere radius="0.3"/>')),
        link("can", shape('<cylinder radius="0.1" length="0.5"/>', "0 0 1", "1.5707963267948966 0 0")),
        joined("box", "ball"), joined("ball", "can"),
    )  # fmt: skip
    surface = sample_surface(model, 3000)
    p, n = surface.p_link.numpy(), surface.normal_link.numpy()
    for name in ("box", "ball", "can"):
        on = surface.link.numpy() == model.link_index(name)
        q, m = p[on], n[on]
        assert on.sum() > 300
        if name == "box":
            scaled = np.abs(q - [1, 2, 3]) / [0.1, 0.2, 0.3]
            np.testing.assert_allclose(scaled.max(1), 1, atol=1e-12)
            assert ((np.abs(m) > 0.5) == (scaled > 1 - 1e-9)).all(), "the normal is that of the side the point lies on"
            assert (((q - [1, 2, 3]) * m).sum(1) > 0).all()
        elif name == "ball":
            assert (np.abs(np.linalg.norm(q, axis=1) / 0.3 - 1) < 0.002).all()
            assert ((q * m).sum(1) / np.linalg.norm(q, axis=1) > 0.998).all(), "normals point outwards"
        else:
            radius, along = np.hypot(q[:, 0], q[:, 2] - 1), np.abs(q[:, 1])
            side = np.abs(m[:, 1]) < 0.5
            assert (np.abs(radius[side] / 0.1 - 1) < 0.0013).all() and (along <= 0.25 + 1e-12).all()
            np.testing.assert_allclose(along[~side], 0.25, atol=1e-12)
            assert (q[~side, 1] * m[~side, 1] > 0).all()


def test_points_inside_a_closed_housing_are_dropped() -> None:
    inside = '<box size="0.5 0.4 0.3"/>'
    closed = robot(link("a", shape('<box size="1 1 1"/>'), shape(inside), shape('<sphere radius="0.3"/>')))
    p = sample_surface(closed, 4000).p_link
    assert (p.abs().amax(-1) > 0.49).all()
    # Without the housing the same shape is sampled.
    alone = sample_surface(robot(link("a", shape(inside))), 1000)
    assert len(alone) == 1000
    # A motor in a box without a lid is visible through the opening.
    walls = [shape('<box size="1 1 0.02"/>', "0 0 -0.5")]
    walls += [shape('<box size="0.02 1 1"/>', f"{x} 0 0") for x in (-0.5, 0.5)]
    walls += [shape('<box size="1 0.02 1"/>', f"0 {y} 0") for y in (-0.5, 0.5)]
    p = sample_surface(robot(link("a", *walls, shape(inside))), 4000).p_link
    assert ((p.abs().amax(-1) < 0.3) & (p[:, 2] > 0.149)).sum() > 20


def test_normals_of_reversed_triangles_point_outwards(tmp_path) -> None:
    import trimesh

    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.2)
    ball.invert()
    ball.export(tmp_path / "inverted.stl")
    model = parse_urdf(
        f'<robot name="r">{link("a", shape("""<mesh filename="inverted.stl"/>"""))}</robot>', directory=tmp_path
    )
    surface = sample_surface(model, 500)
    assert ((surface.p_link * surface.normal_link).sum(-1) > 0.19).all()


def test_uniform_on_a_link_and_by_root_of_area_between_links() -> None:
    """Uniform on a box: points per side by area; between links by the square root of the area."""
    model = robot(
        link("a", shape('<box size="1 1 3"/>')), link("b", shape('<box size="0.1 0.1 0.3"/>')), joined("a", "b")
    )
    surface = sample_surface(model, 6000)
    on_a = surface.link == 0
    assert abs(int(on_a.sum()) / 6000 - 10 / 11) < 0.01  # areas 14 and .14
    caps = (surface.normal_link[on_a][:, 2].abs() > 0.5).double().mean()
    assert abs(float(caps) - 2 / 14) < 0.02


def test_a_robot_without_visual_shapes_or_with_a_missing_mesh_is_refused() -> None:
    collision_only = robot(link("a", shape('<sphere radius="0.1"/>', tag="collision")))
    with pytest.raises(EmbodimentError, match="no visual shapes to sample"):
        sample_surface(collision_only, 50)
    with pytest.raises(InputError, match="at least 1"):
        sample_surface(robot(link("a", shape('<box size="1 1 1"/>'))), 0)
    missing = robot(link("a", shape('<mesh filename="package://nowhere/x.stl"/>')))
    with pytest.raises(EmbodimentError, match=r"nowhere/x\.stl.*mesh_roots"):
        sample_surface(missing, 10)


# ---- visibility -----------------------------------------------------------------------------------------------------


def seen(model, camera: Camera, count: int = 20_000):
    """Points of a robot whose links all lie in the base frame, and which of them the camera sees."""
    surface = sample_surface(model, count)
    uv, depth = camera.project(surface.p_link)
    to_camera = camera.position - surface.p_link
    cosine = (surface.normal_link * to_camera).sum(-1) / to_camera.norm(dim=-1)
    cell = max(camera.width, camera.height) / 120
    visible = visible_points(
        uv, depth, cosine, width=camera.width, height=camera.height, focal=float(camera.K[0, 0]), cell=cell
    )
    return surface, visible, cosine, uv


def test_a_ball_occludes_the_ball_behind_it() -> None:
    """Camera at x = 2 looking along -x: the far ball is fully occluded, and so is every point that faces away."""
    model = robot(
        link("near", shape('<sphere radius="0.3"/>')), link("far", shape('<sphere radius="0.2"/>', "-1 0 0")),
        link("beside", shape('<sphere radius="0.2"/>', "-1 0.8 0")), joined("near", "far"), joined("far", "beside"),
    )  # fmt: skip
    camera = Camera.look_at((2, 0, 0), (0, 0, 0))
    surface, visible, cosine, _ = seen(model, camera)
    share = [float(visible[surface.link == model.link_index(x)].double().mean()) for x in ("near", "far", "beside")]
    assert share[1] < 0.01
    facing = [float((cosine[surface.link == model.link_index(x)] > 0.05).double().mean()) for x in ("near", "beside")]
    assert share[0] > 0.9 * facing[0] and share[2] > 0.9 * facing[1], "unoccluded points are visible"
    assert not visible[cosine < 0].any()


def test_points_outside_the_image_or_behind_the_camera_are_not_visible() -> None:
    model = robot(link("ball", shape('<sphere radius="0.3"/>')))
    for target in ((4, 0, 0), (2, 3, 0)):
        _, visible, _, _ = seen(model, Camera.look_at((2, 0, 0), target))
        assert not visible.any()
    _, visible, _, uv = seen(model, Camera.look_at((2, 0, 0), (0, 0.4, 0)))
    assert visible.any() and ((uv[visible] > -0.5).all() and (uv[visible][:, 0] < 319.5).all())


@pytest.mark.parametrize("name", ["allegro_right", "piper", "planar_finger_5"])
def test_visible_points_show_the_link_that_the_simulator_renders(name: str) -> None:
    pytest.importorskip("pybullet")
    from jidm.fields.analytic import AnalyticField
    from jidm.sim import Scene

    e = load_embodiment(name)
    camera = e.camera()
    field = AnalyticField(e, camera)
    q = torch.as_tensor(np.array(e.home))
    with Scene(e, supersample=1) as world:
        drawn = world.render(q, camera)
    pose = field.at(q)
    points = pose.surface().points
    shown = torch.from_numpy(np.pad(drawn.link, 1, constant_values=-2)).long()
    u, v = points.clamp(-0.5, camera.width).unbind(-1)
    around = [(f(v).long() + 1, g(u).long() + 1) for f in (torch.floor, torch.ceil) for g in (torch.floor, torch.ceil)]
    h, w = shown.shape
    around = [(y.clamp(0, h - 1), x.clamp(0, w - 1)) for y, x in around]
    matches = torch.stack([shown[at] == pose.surface_points.link for at in around])
    right = matches.any(0)[pose.visible].double().mean()
    assert right > 0.9, f"{float(right):.3f} of the points reported visible show their own link within a pixel"
    # Of all points in front of which the simulator renders nothing nearer, most are reported visible.
    poses = field.kinematics.link_poses(q)
    _, depth = camera.project(
        field.kinematics.transform_points(poses, pose.surface_points.link, pose.surface_points.p_link)
    )
    z = torch.from_numpy(np.pad(drawn.depth, 1, constant_values=np.inf)).double()
    nearest = torch.stack([z[at] for at in around]).amin(0)
    truth = matches.all(0) & (depth < nearest + 0.002)
    found = pose.visible[truth].double().mean()
    assert found > 0.85, f"{float(found):.3f} of the points the simulator renders are found"
    print(f"{name}: right {float(right):.3f}, found {float(found):.3f}")
