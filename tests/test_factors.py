"""Laws of every factor: its gradient is that of its cost with weights held, H is symmetric positive semi-definite, and it
works under torch.func transforms from its first call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rendered import Clip, clip
from step_fields import ExactStepField, LinearMotion, cell_centers, numbered_frames, random_images, untrained
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev, vmap

from jidm import AnalyticField
from jidm.estimation.background_model import BackgroundModel
from jidm.estimation.factors import contour, dense_photometric, photometric, prior
from jidm.estimation.factors.contour import ContourFactor
from jidm.estimation.factors.flow import FlowFactor
from jidm.estimation.factors.learned import ImageAlignmentFactor, MatchedFlowFactor
from jidm.estimation.factors.photometric import PhotometricFactor, SurfaceAppearance
from jidm.estimation.factors.prior import StudentTPrior
from jidm.estimation.factors.silhouette import SilhouetteFactor
from jidm.estimation.problem import POSITION, STEP, Factor, NormalEquations
from jidm.estimation.refinement import Crop, FieldEvaluation, FlowMeasurement, RefinementStage
from jidm.fields.base import ContourJacobian, SurfaceJacobian
from jidm.fields.free import LearnedField
from jidm.video.pyramid import BrightnessPyramid


@pytest.fixture
def frozen_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every robust weight keeps the value of its first call, so that the cost is that of plain weighted least squares."""

    def freeze(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        held: list[Tensor] = []

        def first_value(*args: object) -> Tensor:
            if not held:
                held.append(function(*args).detach())
            return held[0]

        return first_value

    for module, name in (
        (prior, "cauchy"),
        (photometric, "tukey_weight"),
        (contour, "tukey_weight"),
        (dense_photometric, "cauchy"),
    ):
        monkeypatch.setattr(module, name, freeze(getattr(module, name)))


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def equations_of(factor: Factor, state: dict[str, Tensor]) -> NormalEquations:
    equations = factor.linearize(state)
    assert equations is not None
    return equations


def assert_gradient_of_cost(
    factor: Factor, state: dict[str, Tensor], name: str, *, h: float | None = None, rtol: float = 1e-6
) -> None:
    """`g = -1/2 d cost / d x` with weights held: by forward-mode differentiation, or by central differences of step h."""
    equations, x = equations_of(factor, state), state[name]

    def cost(value: Tensor) -> Tensor:
        return equations_of(factor, {**state, name: value}).cost.sum()

    if h is None:
        slope = jacfwd(cost)(x)
    else:
        flat = torch.stack([(cost(x + h * e) - cost(x - h * e)) / (2 * h) for e in basis(x)])
        slope = flat.reshape(x.shape)
    ours = -2 * equations.gradient(name)
    torch.testing.assert_close(ours, slope, rtol=rtol, atol=rtol * float(slope.abs().max()))
    assert float(slope.abs().max()) > 0
    H = equations.H
    torch.testing.assert_close(H, H.mT)
    eigenvalues = torch.linalg.eigvalsh(H.double())
    assert (eigenvalues >= -1e-9 * eigenvalues.abs().amax(-1, keepdim=True)).all()
    assert isinstance(factor, Factor)


def basis(x: Tensor) -> Tensor:
    return torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)


# ---- prior -----------------------------------------------------------------------------------------------------------


def student_t() -> StudentTPrior:
    return StudentTPrior(STEP, vector(0.1, -0.2, 0.0), vector(0.5, 0.1, 2.0), weight=0.3)


def test_prior_gradient(frozen_weights: None) -> None:
    assert_gradient_of_cost(student_t(), {STEP: vector(0.3, 0.4, -1.0)}, STEP, rtol=1e-12)


def test_the_prior_is_gaussian_near_its_mean_and_its_pull_fades_far_away() -> None:
    one = StudentTPrior(STEP, vector(0.0), vector(0.5))
    pull = [float(equations_of(one, {STEP: vector(x)}).g) for x in (1e-4, 1.0, 2.0, 20.0)]
    assert pull[0] == pytest.approx(-1e-4 / 0.25)
    assert pull[1] == pytest.approx(-2.0)  # the largest, at two standard deviations
    assert pull[1] < pull[2] < pull[3] < 0


# ---- flow at points --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finger() -> Clip:
    return clip("planar_finger_3", frames=8, seed=1)


def small_field(c: Clip) -> AnalyticField:
    """A new field, which has computed nothing yet."""
    return AnalyticField(c.robot, c.camera, points=300, occluders=2000, contour_points=2000)


def flow_factor(c: Clip) -> FlowFactor:
    pose = small_field(c).at(torch.from_numpy(c.q[0]))
    flow = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)).double()
    return FlowFactor(pose, flow, pose.visible.double())


@pytest.mark.parametrize("size", [0.0, 0.3])
def test_flow_gradient_at_any_step(size: float, finger: Clip) -> None:
    assert_gradient_of_cost(flow_factor(finger), {STEP: size * vector(1.0, -0.7, 0.5)}, STEP, rtol=1e-9)


def test_flow_at_hidden_points_has_no_influence_even_if_nan(finger: Clip) -> None:
    factor, state = flow_factor(finger), {STEP: vector(0.1, 0.0, 0.2)}
    hidden = torch.where((factor.weight > 0)[:, None], factor.flow, torch.full_like(factor.flow, torch.nan))
    one, other = factor.linearize(state), replace(factor, flow=hidden).linearize(state)
    assert torch.equal(one.H, other.H) and torch.equal(one.g, other.g) and torch.equal(one.cost, other.cost)
    assert float(one.num_observations) == float(factor.weight.sum())


# ---- brightness of surface points ------------------------------------------------------------------------------------


class RampSheet:
    """Points that move linearly with two joints and whose normals rotate with the first, before a linear image.

    Sampling a linear image is exact, and so is its gradient.
    """

    JACOBIAN = torch.tensor([[3.0, 1.0], [-0.5, 2.0]]).double()

    def __init__(self, q: Tensor | None = None, with_normals: bool = True) -> None:
        self.q = torch.zeros(2).double() if q is None else q
        generator = torch.Generator().manual_seed(0)
        self.points = 20 + torch.rand(100, 2, generator=generator).double() * vector(80, 50)
        self.directions = torch.randn(100, 3, generator=generator).double()
        self.visible = torch.ones(100, dtype=torch.bool)
        self.with_normals = with_normals

    def surface(self, delta_q: Tensor | None = None) -> SurfaceJacobian:
        delta_q = torch.zeros_like(self.q) if delta_q is None else delta_q
        angle = (self.q + delta_q)[0]
        c, s, x, y, z = angle.cos(), angle.sin(), *self.directions.unbind(-1)
        normals = torch.stack([c * x + s * z, y, c * z - s * x], -1) if self.with_normals else None
        return SurfaceJacobian(
            self.points + self.JACOBIAN @ delta_q, self.JACOBIAN.expand(100, 2, 2), self.visible, normals
        )

    def keep(self, index: Tensor) -> RampSheet:
        return self


def ramp(offset: float) -> BrightnessPyramid:
    v, u = torch.meshgrid(torch.arange(90).double(), torch.arange(120).double(), indexing="ij")
    return BrightnessPyramid.from_frame((0.2 + 0.003 * u - 0.002 * v + offset).expand(3, 90, 120))


@pytest.mark.parametrize("with_normals", [True, False])
@pytest.mark.parametrize("level", [0, 1])
def test_photometric_gradient_of_the_positions(level: int, with_normals: bool, frozen_weights: None) -> None:
    reference = SurfaceAppearance.of(RampSheet(with_normals=with_normals), ramp(0.0))
    factor = PhotometricFactor(reference, ramp(0.01), level)
    equations = factor.linearize({POSITION: vector(0.4, -0.3)})
    assert [x for x, _ in equations.variables] == ([POSITION, "light"] if with_normals else [POSITION])
    assert_gradient_of_cost(factor, {POSITION: vector(0.4, -0.3)}, POSITION)


def test_photometric_gradient_of_the_light(frozen_weights: None) -> None:
    """With its prior, which is part of the cost."""
    factor = PhotometricFactor(SurfaceAppearance.of(RampSheet(), ramp(0.0)), ramp(0.01), light="lamp")
    state = {POSITION: vector(0.4, -0.3), "lamp": vector(0.02, -0.01, 0.03)}
    assert_gradient_of_cost(factor, state, "lamp")


# ---- contours --------------------------------------------------------------------------------------------------------


class OneLine:
    """A straight vertical contour of 30 points, which two joints move sideways."""

    contour_points = 30

    def visible_contour(self, q: Tensor) -> Tensor:
        return torch.arange(30)

    def contour(self, q: Tensor, index: Tensor) -> ContourJacobian:
        v = torch.linspace(15, 65, 30).double()
        lever = torch.stack([torch.full_like(v, 10.0), 0.2 * (v - 40)], -1)
        points = torch.stack([50.0 + lever @ q, v], -1)
        return ContourJacobian(index, points[index], vector(1.0, 0.0).expand(30, 2)[index], lever[index])


def contour_factor() -> ContourFactor:
    row = 0.2 + 0.6 * ((torch.arange(100).double() - 51.3) / 1.2).sigmoid()
    pyramid = BrightnessPyramid.from_frame(row.expand(3, 80, 100))
    zero = torch.zeros(30).double()
    return ContourFactor(OneLine(), pyramid, BackgroundModel(), torch.arange(30), zero, zero, search_radius=4.0)


def test_contour_gradient(frozen_weights: None) -> None:
    """Edges are located to a few hundredths of a pixel, so differences are taken over a whole one."""
    assert_gradient_of_cost(contour_factor(), {POSITION: vector(0.0, 0.05)}, POSITION, h=0.1, rtol=0.05)


# ---- silhouette ------------------------------------------------------------------------------------------------------


def test_silhouette_gradient(finger: Clip) -> None:
    """Another pose has other boundary points, so means over the points are compared."""
    field = AnalyticField(finger.robot, finger.camera, points=8000, occluders=20000, contour_points=500)
    q, h = torch.from_numpy(finger.q[2]), 0.02
    _, mask = field.dense(q, *finger.frames.shape[-2:])
    factor = SilhouetteFactor(field, 2 * mask.double() - 1, search_radius=12.0)
    start = q + vector(0.06, -0.05, 0.04)

    def mean_square(x: Tensor) -> Tensor:
        equations = equations_of(factor, {POSITION: x})
        return equations.cost / equations.total_weight

    numeric = torch.stack([(mean_square(start + h * e) - mean_square(start - h * e)) / (2 * h) for e in basis(start)])
    equations = equations_of(factor, {POSITION: start})
    ours = -2 * equations.g / equations.total_weight
    torch.testing.assert_close(ours, numeric, rtol=0.2, atol=0.1 * float(numeric.abs().max()))
    torch.testing.assert_close(equations.H, equations.H.mT)
    assert float(torch.linalg.eigvalsh(equations.H).min()) > 0 and isinstance(factor, Factor)


# ---- images of a learned field ---------------------------------------------------------------------------------------


def evaluated(count: int = 2) -> tuple[FieldEvaluation, FieldEvaluation]:
    """A field with a constant Jacobian at `count` pairs of linear images that differ by a constant."""
    field = ExactStepField(LinearMotion())
    features = field.encode(numbered_frames(torch.zeros(2 * count, 2).double()))
    u, v = (cell_centers(64)[k] for k in range(2))
    gray = torch.stack([0.3 + 0.004 * u + k * 0.001 * v for k in range(1, count + 1)])
    images = torch.cat([gray, gray + 0.02])[:, None]
    features = replace(features, gray=images, gray_downsampled=images)
    at = FieldEvaluation.of(field, features, torch.zeros(2 * count, 2).double())
    mask = torch.full_like(at.mask, -30.0)
    mask[:, 8:-8, 8:-8] = 2.0  # away from the border, where warping replicates pixels
    at = FieldEvaluation(features, at.jacobian, mask)
    return at[:count], at[count:]


def matched_factor(sign: float = 1.0) -> MatchedFlowFactor:
    source, _ = evaluated()
    generator = torch.Generator().manual_seed(0)
    flow, log_weight = (torch.randn(2, *s, 16, 16, generator=generator).double() for s in ((2,), ()))
    return MatchedFlowFactor(source, FlowMeasurement(flow, log_weight), sign)


def alignment_factor(sign: float = 1.0, scale: float | None = None) -> ImageAlignmentFactor:
    first, second = evaluated()
    return ImageAlignmentFactor(first, second, Crop(6, 26, 5, 27), RefinementStage(scale, 0.1), sign)


STEPS = torch.tensor([[0.01, -0.02], [0.03, 0.01]]).double()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_matched_flow_gradient(sign: float) -> None:
    assert_gradient_of_cost(matched_factor(sign), {STEP: STEPS}, STEP, rtol=1e-9)
    factor = matched_factor(sign)
    at_zero = factor.linearize({STEP: 0 * STEPS})
    torch.testing.assert_close(factor.linearize({}).g, at_zero.g)  # the step is zero where the state has none


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_image_alignment_gradient(sign: float, scale: float | None, frozen_weights: None) -> None:
    assert_gradient_of_cost(alignment_factor(sign, scale), {STEP: STEPS}, STEP)


# ---- torch.func ------------------------------------------------------------------------------------------------------


def photometric_factor(c: Clip) -> PhotometricFactor:
    field, (before, after) = small_field(c), (BrightnessPyramid.from_frame(c.frames[t]) for t in (0, 1))
    return PhotometricFactor(SurfaceAppearance.of(field.at(torch.from_numpy(c.q[0])), before), after)


def transformable(c: Clip) -> dict[str, tuple[Callable[[], Factor], str, Tensor]]:
    """Factors that have computed nothing yet, their variable and a value of it."""
    q = torch.from_numpy(c.q[0])
    return {
        "prior": (student_t, STEP, vector(0.3, 0.4, -1.0)),
        "flow": (lambda: flow_factor(c), STEP, vector(0.1, -0.1, 0.2)),
        "photometric": (lambda: photometric_factor(c), POSITION, q + 0.01),
        "matched flow": (matched_factor, STEP, STEPS),
        "image alignment": (alignment_factor, STEP, STEPS),
    }


NAMES = ("prior", "flow", "photometric", "matched flow", "image alignment")


@pytest.mark.parametrize("output", ["cost", "g"])
@pytest.mark.parametrize("name", NAMES)
def test_the_first_call_may_be_inside_jacfwd_or_jacrev(name: str, output: str, finger: Clip) -> None:
    make, variable, x = transformable(finger)[name]

    def evaluate(factor: Factor, value: Tensor) -> Tensor:
        return getattr(equations_of(factor, {variable: value}), output)

    slopes = []
    for transform in (jacfwd, jacrev):
        factor = make()
        slopes.append(transform(lambda value, factor=factor: evaluate(factor, value))(x))
        outside = evaluate(factor, x)  # nothing of the transform has stayed in the factor
        torch.testing.assert_close(outside, evaluate(make(), x))
        assert not outside.requires_grad
    torch.testing.assert_close(*slopes)
    assert slopes[0].abs().max() > 0


@pytest.mark.parametrize("name", ["prior", "flow", "photometric"])
def test_vmap_over_states(name: str, finger: Clip) -> None:
    make, variable, x = transformable(finger)[name]
    offsets = 0.02 * torch.randn(4, len(x), generator=torch.Generator().manual_seed(0)).double()
    factor = make()
    batch = vmap(lambda value: equations_of(factor, {variable: value}).g)(x + offsets)
    one_by_one = torch.stack([equations_of(make(), {variable: x + offset}).g for offset in offsets])
    torch.testing.assert_close(batch, one_by_one)


class LearnedEquations(nn.Module):
    """Normal equations of both learned factors, as a function of the network's parameters."""

    def __init__(self, field: LearnedField, align: bool) -> None:
        super().__init__()
        self.field, self.align = field, align

    def forward(self, images: Tensor, q: Tensor, step: Tensor) -> Tensor:
        features = self.field.encode(images)
        at = FieldEvaluation.of(self.field, features, q)
        factor: Factor
        if self.align:
            factor = ImageAlignmentFactor(at[:1], at[1:], Crop(0, 32, 0, 32), RefinementStage(1.0, 0.4))
        else:
            coarse = features.coarse
            window, _ = self.field.correlation.correlate(coarse[:1], coarse[1:])
            flow = FlowMeasurement(*self.field.correlation.initial_flow(window, coarse[:1]))
            factor = MatchedFlowFactor(at[:1], flow)
        return equations_of(factor, {STEP: step}).g[0]


@pytest.mark.parametrize("align", [True, False])
def test_functional_call_of_a_learned_field(align: bool) -> None:
    """The first call of a new field is inside the transform; parameters and poses are differentiated."""
    images, q, step = random_images(2), torch.tensor([[0.1, -0.2], [0.2, -0.1]]), torch.tensor([[0.02, 0.01]])

    def close(one: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(one.detach().abs().max()))

    transformed, plain = (LearnedEquations(untrained(), align) for _ in range(2))
    name, weight = "field.field_out.weight", plain.field.field_out.weight
    by_func = jacrev(lambda w: functional_call(transformed, {name: w}, (images, q, step)))(weight.detach())
    outputs = plain(images, q, step)
    close(by_func, torch.stack([torch.autograd.grad(g, weight, retain_graph=True)[0] for g in outputs]))
    new = [LearnedEquations(untrained(), align).requires_grad_(False) for _ in range(2)]
    close(jacfwd(lambda x: new[0](images, x, step))(q), jacrev(lambda x: new[1](images, x, step))(q))
