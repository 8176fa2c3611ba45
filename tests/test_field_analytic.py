"""The analytic field: points moved by forward kinematics, exact Jacobians, dense grids against the simulator, contours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from jidm.camera.model import Camera
from jidm.errors import InputError
from jidm.fields.analytic import AnalyticField
from jidm.fields.base import ContourField, FieldAtPose, JacobianField
from jidm.robot.embodiment import Embodiment
from jidm.robot.factory import embodiment_from_urdf
from jidm.robot.mesh_edges import feature_edges, sample_mesh_edges
from jidm.robot.registry import embodiment_names, load_embodiment
from jidm.robot.shape_mesh import shape_mesh

# Mimic gripper on a slide, four fingers, two arms, the toy.
KINDS = ("panda", "allegro_right", "cobot_magic", "planar_finger_4")
_fields: dict[str, AnalyticField] = {}


def field_of(name: str) -> AnalyticField:
    if name not in _fields:
        e = load_embodiment(name)
        _fields[name] = AnalyticField(e, e.camera(), points=500, occluders=8000, contour_points=4000)
    return _fields[name]


def near_home(e: Embodiment, *batch: int, seed: int = 0, share: float = 0.5) -> Tensor:
    rng = np.random.default_rng(seed)
    q = e.home + share * e.exploration_range * rng.uniform(-1, 1, (*batch, e.n))
    return torch.as_tensor(np.clip(q, e.lower, e.upper))


def slopes(function, q: Tensor, h: float = 1e-6) -> Tensor:
    """Central differences of a function of q (n,), the joints last."""
    steps = h * torch.eye(q.shape[-1], dtype=q.dtype)
    return torch.stack([(function(q + s) - function(q - s)) / (2 * h) for s in steps], dim=-1)


# ---- points ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", embodiment_names())
def test_image_jacobians_are_the_derivatives_of_the_points(name: str) -> None:
    e = load_embodiment(name)
    if name in KINDS:
        field = field_of(name)
    else:
        field = AnalyticField(e, e.camera(), points=100, occluders=500)
    q = near_home(e, seed=3)
    pose = field.at(q)
    ours = pose.surface().jacobian
    truth = slopes(lambda x: pose.surface(x - q).points, q)
    assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max()
    in_front = field.camera.project(truth.new_zeros(1, 3))[1] > 0
    assert in_front and truth.abs().max() > 10, "the joints must move the image"


@pytest.mark.parametrize("name", KINDS)
def test_a_step_moves_the_points_by_forward_kinematics(name: str) -> None:
    field = field_of(name)
    e = field.embodiment
    q, delta = near_home(e, 2), 0.2 * torch.as_tensor(np.array(e.exploration_range))
    pose = field.at(q)
    moved = pose.surface(delta.expand(2, -1))
    there = field.at(q + delta)
    torch.testing.assert_close(moved.points, there.surface().points, rtol=0, atol=1e-9)
    torch.testing.assert_close(moved.jacobian, there.surface().jacobian, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved.normals, there.surface().normals, rtol=0, atol=1e-12)
    assert torch.equal(moved.visible, pose.visible), "visibility stays that at q"
    assert (moved.points - pose.surface().points).abs().max() > 1


def test_items_of_a_batch_of_any_shape_are_independent() -> None:
    field = field_of("allegro_right")
    q = near_home(field.embodiment, 2, 2)
    whole, (jacobian, mask) = field.at(q).surface(), field.dense(q, 30, 40)
    assert whole.points.shape == (2, 2, 500, 2) and whole.jacobian.shape == (2, 2, 500, 2, 16)
    assert jacobian.shape == (2, 2, 2, 16, 30, 40) and mask.shape == (2, 2, 30, 40)
    for i in range(2):
        for j in range(2):
            one = field.at(q[i, j]).surface()
            torch.testing.assert_close(one.points, whole.points[i, j], rtol=0, atol=1e-10)
            torch.testing.assert_close(one.jacobian, whole.jacobian[i, j], rtol=0, atol=1e-9)
            assert torch.equal(one.visible, whole.visible[i, j])
            one_jacobian, one_mask = field.dense(q[i, j], 30, 40)
            torch.testing.assert_close(one_jacobian, jacobian[i, j], rtol=0, atol=1e-9)
            assert torch.equal(one_mask, mask[i, j])
    empty = field.at(q[:0]).surface()
    assert empty.points.shape == (0, 2, 500, 2) and field.dense(q[:0], 30, 40)[0].shape == (0, 2, 2, 16, 30, 40)


def test_kept_points_are_the_same_points() -> None:
    field = field_of("planar_finger_4")
    pose = field.at(near_home(field.embodiment))
    index = torch.tensor([400, 3, 77])
    kept, whole = pose.keep(index).surface(), pose.surface()
    assert torch.equal(kept.points, whole.points[index]) and torch.equal(kept.visible, whole.visible[index])
    assert torch.equal(kept.jacobian, whole.jacobian[index])


def test_precision_gradients_and_protocols() -> None:
    field = field_of("panda")
    q = near_home(field.embodiment)
    single = field.at(q.float())
    assert single.surface().jacobian.dtype == torch.float32
    torch.testing.assert_close(single.surface().points.double(), field.at(q).surface().points, rtol=0, atol=2e-3)
    assert field.dense(q.float(), 20, 30)[0].dtype == torch.float32
    pose = field.at(q).keep(torch.arange(5))
    step = torch.zeros_like(q).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: pose.surface(d).points, (step,))
    assert torch.autograd.gradcheck(lambda d: pose.surface(d).jacobian, (step,), fast_mode=True)
    assert isinstance(field, JacobianField) and isinstance(field, ContourField) and isinstance(pose, FieldAtPose)


def test_points_must_be_among_the_occluders() -> None:
    e = load_embodiment("planar_finger_1")
    for points, occluders in ((0, 10), (11, 10)):
        with pytest.raises(InputError, match=r"1\.\.occluders"):
            AnalyticField(e, e.camera(), points=points, occluders=occluders)


# ---- dense against the simulator ------------------------------------------------------------------------------------


# Measured: overlap .922, .855, .800; error .022, .015, .003; good .796, .942, .969. What is missing is coverage: the
# grid's cells at outlines that hold none of the surface points, or points of two links.
@pytest.mark.parametrize(
    ("name", "least_overlap", "most_error", "least_good"),
    [("allegro_right", 0.90, 0.03, 0.75), ("piper", 0.83, 0.02, 0.92), ("planar_finger_5", 0.78, 0.005, 0.95)],
)
def test_the_dense_field_explains_the_flow_of_the_simulator(
    name: str, least_overlap: float, most_error: float, least_good: float
) -> None:
    pytest.importorskip("pybullet")
    from jidm.sim import Scene, exact_flow

    e = load_embodiment(name)
    camera = e.camera().resized(160, 120)
    field = AnalyticField(e, camera)
    q = near_home(e, seed=1)
    delta = 0.01 * torch.as_tensor(np.array(e.exploration_range)) * (-1.0) ** torch.arange(e.n)
    with Scene(e, supersample=1) as world:
        drawn = world.render(q, camera)
    truth, on_robot = exact_flow(e, camera, drawn.depth, drawn.link, q, q + delta)
    jacobian, mask = field.dense(q, 120, 160)
    assert ((mask == 0) | (mask == 1)).all() and (jacobian.movedim((-2, -1), (0, 1))[mask == 0] == 0).all()
    both = on_robot & (mask > 0)
    overlap = float(both.sum() / (on_robot | (mask > 0)).sum())
    flow = torch.einsum("anhw,n->ahw", jacobian, delta)
    error = (flow - truth)[:, both].norm(dim=0)
    relative = float(error.median() / truth[:, both].norm(dim=0).median())
    good = float((error < 0.1 * truth[:, both].norm(dim=0).median()).double().mean())
    print(f"{name}: overlap {overlap:.3f}, median relative error {relative:.4f}, within a tenth {good:.3f}")
    assert overlap > least_overlap and relative < most_error and good > least_good


def test_the_dense_field_is_in_pixels_of_its_grid() -> None:
    field = field_of("planar_finger_4")
    q = near_home(field.embodiment)
    fine, _ = field.dense(q, 120, 160)
    coarse, _ = field.dense(q, 30, 40)
    assert float(fine.abs().max() / coarse.abs().max()) == pytest.approx(4, rel=0.15)


# ---- contours -------------------------------------------------------------------------------------------------------


def test_contour_points_lie_on_mesh_edges() -> None:
    import trimesh

    model = load_embodiment("allegro_right").model
    contour = sample_mesh_edges(model, 400, seed=1)
    again = sample_mesh_edges(model, 400, seed=1)
    assert len(contour) == 400 and torch.equal(contour.p_link, again.p_link)
    torch.testing.assert_close(contour.tangent_link.norm(dim=-1), torch.ones(400).double())
    for k in sorted(set(contour.link.tolist()))[:5]:
        mesh = trimesh.util.concatenate([shape_mesh(s, "r") for s in model.links[k].visuals])
        a, b = np.swapaxes(mesh.vertices[mesh.edges_unique], 0, 1)
        here = contour.link == k
        p = contour.p_link[here].numpy()[:20, None]
        t = (((p - a) * (b - a)).sum(-1) / np.maximum(((b - a) ** 2).sum(-1), 1e-30)).clip(0, 1)
        distance = np.linalg.norm(a + t[..., None] * (b - a) - p, axis=-1)
        assert distance.min(axis=1).max() < 1e-7
        along = (b - a)[distance.argmin(1)] / np.linalg.norm((b - a)[distance.argmin(1)], axis=-1, keepdims=True)
        cosine = np.abs((along * contour.tangent_link[here].numpy()[:20]).sum(-1))
        assert (cosine > 1 - 1e-6).mean() > 0.9  # a point near a corner may be as near to another edge


def test_no_two_contour_points_share_a_cell_of_the_image() -> None:
    """So the small edges of a gripper do not dominate, and the number of candidates hardly matters."""
    e = load_embodiment("panda")
    q = torch.zeros(e.n).double()
    q[3], q[5] = -1.5, 1.5
    found = {}
    for count in (20000, 80000):
        field = AnalyticField(e, e.camera(), points=500, occluders=8000, contour_points=count)
        index = field.visible_contour(q)
        assert torch.equal(index, index.sort().values)
        cells = (field.contour(q, index).points / 1.5).floor().long()
        assert len(cells.unique(dim=0)) == len(cells) > 100
        found[count] = len(cells)
    assert found[80000] < 3 * found[20000]


def one_shape(tmp_path, geometry: str) -> AnalyticField:
    """A shape that slides along y, and a camera in front of it and a little above."""
    path = tmp_path / "one.urdf"
    path.write_text(
        '<robot name="one"><link name="base"/><link name="body"><visual><geometry>'
        f'{geometry}</geometry></visual></link><joint name="slide" type="prismatic"><parent link="base"/>'
        '<child link="body"/><axis xyz="0 1 0"/><limit lower="-1" upper="1" effort="1" velocity="1"/></joint></robot>'
    )
    e = embodiment_from_urdf(path)
    return AnalyticField(e, Camera.look_at((1.5, 0, 0.6), (0, 0, 0)), points=100, contour_points=6000)


def test_the_contour_of_a_round_link_is_not_hidden_by_the_link_itself(tmp_path) -> None:
    """Far away, where one cell of the z-buffer covers much of it."""
    near = one_shape(tmp_path, '<sphere radius="0.06"/>')
    camera = Camera.look_at((2.4, 0, 1.0), (0, 0, 0))
    field = AnalyticField(near.embodiment, camera, points=100, contour_points=6000)
    q = torch.zeros(1).double()
    points = field.contour(q, field.visible_contour(q)).points
    center, _ = camera.project(torch.zeros(1, 3).double())
    off = points - center
    radius = float(off.norm(dim=-1).median())
    assert 0.5 * field._cell < radius < 6 * field._cell
    angle = torch.atan2(off[:, 1], off[:, 0])
    assert len(((angle + torch.pi) / (2 * torch.pi) * 16).long().clamp(max=15).unique()) == 16


@pytest.mark.parametrize("geometry", ['<sphere radius="0.25"/>', '<cylinder radius="0.15" length="0.5"/>'])
def test_the_contour_of_a_round_body_is_its_silhouette(geometry: str, tmp_path) -> None:
    pytest.importorskip("pybullet")
    from scipy.ndimage import binary_erosion, distance_transform_edt

    from jidm.sim import Scene

    field = one_shape(tmp_path, geometry)
    q = torch.tensor([0.1], dtype=torch.float64)
    with Scene(field.embodiment, supersample=1) as world:
        mask = world.render(q, field.camera).on_robot
    boundary = mask & ~binary_erosion(mask)
    poses = field.kinematics.link_poses(q)
    to_camera = field.camera.position - field.kinematics.transform_points(poses, field.edges.link, field.edges.p_link)
    # A convex body hides none of its own contour, so the z-buffer is not needed.
    index = feature_edges(field.edges, poses[field.edges.link, :3, :3], to_camera).nonzero()[:, 0]
    assert len(index) > 50
    lines = field.contour(q, index)
    contour = field.edges[index]
    if "cylinder" in geometry:  # the edge of the upper face is a crease in front of the body, not of the silhouette
        lines_at, keep = lines.points, ~(contour.crease & (contour.p_link[:, 2] > 0))
    else:
        lines_at, keep = lines.points, torch.ones(len(index), dtype=torch.bool)
    column, row = lines_at[keep].round().long().unbind(-1)
    distance = torch.from_numpy(distance_transform_edt(~boundary))[row, column]
    assert keep.sum() > 30 and distance.max() <= 1.5, f"farthest {float(distance.max()):.2f} px"
    # And the whole silhouette is covered.
    found = np.ones_like(mask)
    column, row = lines.points.round().long().unbind(-1)
    found[row, column] = False
    assert np.percentile(distance_transform_edt(found)[boundary], 95) < 6


@pytest.mark.parametrize("name", ["panda", "planar_finger_4"])
def test_the_normal_jacobian_is_the_derivative_of_the_points(name: str) -> None:
    field = field_of(name)
    q = near_home(field.embodiment, seed=2)
    index = field.visible_contour(q)[:200]
    lines = field.contour(q, index)
    assert torch.equal(lines.index, index) and lines.jacobian.shape == (len(index), field.embodiment.n)
    truth = slopes(lambda x: (field.contour(x, index).points * lines.normals).sum(-1), q)
    assert (lines.jacobian - truth).abs().max() <= 1e-5 * truth.abs().max()
    torch.testing.assert_close(lines.normals.norm(dim=-1), torch.ones(len(index)).double())
    # A small step along the edge is orthogonal to the normal.
    edges, h = field.edges[index], 1e-5
    poses = field.kinematics.link_poses(q)
    ends = [
        field.camera.project(
            field.kinematics.transform_points(poses, edges.link, edges.p_link + s * edges.tangent_link)
        )[0]
        for s in (h, -h)
    ]
    assert (((ends[0] - ends[1]) / (2 * h)) * lines.normals).sum(-1).abs().max() < 1e-3


def test_a_robot_without_edges_has_an_empty_contour(tmp_path) -> None:
    path = tmp_path / "bare.urdf"
    path.write_text('<robot name="bare"><link name="base"/></robot>')
    from jidm.robot.urdf.reader import read_urdf

    assert len(sample_mesh_edges(read_urdf(path), 100)) == 0


@pytest.mark.gpu
def test_the_same_on_a_gpu() -> None:
    field = field_of("panda")
    q = near_home(field.embodiment, 3)
    here, there = field.at(q).surface(), field.at(q.cuda()).surface()
    assert there.jacobian.is_cuda
    torch.testing.assert_close(there.points.cpu(), here.points, rtol=0, atol=1e-8)
    torch.testing.assert_close(there.jacobian.cpu(), here.jacobian, rtol=0, atol=1e-7)
    (a, _), (b, _) = field.dense(q, 30, 40), field.dense(q.cuda(), 30, 40)
    assert ((a - b.cpu()).abs() > 1e-6).double().mean() < 0.01  # two points as near as each other may change places
