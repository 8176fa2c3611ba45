"""The baselines as models: shapes, gradients, learning, symmetries, and the parts that their papers define by
formula."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from toy_arm import JOINTS, SIDE, STATS, TYPES, arm_batch

from jidm.baselines import Baseline
from jidm.baselines.eva import EvaIDM, SpatialSoftmax
from jidm.baselines.flow_source import FlowBaseline, estimate_bidirectional_flow
from jidm.baselines.resnet import make_trunk
from jidm.baselines.vera import VeraField
from jidm.errors import CheckpointError, InputError, MissingExtraError
from jidm.flow import Flow
from jidm.flow.factory import CallableFlow
from jidm.model_registry import KINDS, model_class
from jidm.training.data.batch import PairBatch
from jidm.video.letterbox import Letterbox

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "direct": ("direct", {}),
    "direct_grid": ("direct", {"pool": "grid"}),
    "direct_on_flow": ("direct_on_flow", {}),
    "direct_on_flow_dis": ("direct_on_flow", {"flow": "dis"}),
    "eva": ("eva", {}),
    "eva_average_pool": ("eva_average_pool", {}),
    "vera": ("vera", {}),
    "vera_learned_flow": ("vera", {"flow": "learned"}),
}


def make(variant: str, seed: int = 0, side: int = SIDE, **options: Any) -> Baseline:
    kind, fixed = VARIANTS[variant]
    torch.manual_seed(seed)
    return model_class(kind).from_data(JOINTS, TYPES, side, side, STATS, **fixed, **options)


def train(model: Baseline, batch: PairBatch, steps: int, rate: float = 3e-3) -> list[float]:
    """Losses over Adam steps on one batch."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    history = []
    for _ in range(steps):
        loss = model.losses(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    return history


BATCH = arm_batch(8, seed=3)


@cache
def overfitted(variant: str) -> tuple[Baseline, dict[str, float], dict[str, float]]:
    """A model trained on `BATCH` alone; its losses on it before and after, in evaluation mode."""
    model = make(variant)
    before = evaluation_losses(model)
    train(model, BATCH, 200 if variant == "vera" else 60)
    return model, before, evaluation_losses(model)


def evaluation_losses(model: Baseline) -> dict[str, float]:
    with torch.no_grad():
        found = {name: float(x) for name, x in model.eval().losses(BATCH).items()}
    model.train()
    return found


every_variant = pytest.mark.parametrize("variant", VARIANTS)


# ---- all kinds -------------------------------------------------------------------------------------------------------


def test_every_kind_but_the_field_is_a_baseline() -> None:
    kinds = {kind for kind in KINDS if kind != "jacobian_field"}
    assert kinds == {kind for kind, _ in VARIANTS.values()}
    for kind in kinds:
        assert issubclass(model_class(kind), Baseline) and model_class(kind).kind == kind


@every_variant
@pytest.mark.parametrize("count", [1, 5])
def test_steps_and_losses_of_any_number_of_pairs(variant: str, count: int) -> None:
    model, batch = make(variant), arm_batch(count)
    steps = model.predict_steps(batch.first, batch.second, batch.before)
    assert steps.shape == (count, 2) and steps.isfinite().all()
    losses = model.losses(batch)
    assert all(x.shape == () and x.isfinite() for x in losses.values())


@every_variant
def test_wide_images(variant: str) -> None:
    kind, options = VARIANTS[variant]
    model = model_class(kind).from_data(JOINTS, TYPES, 32, 64, STATS, **options)
    assert model.predict_steps(torch.rand(2, 3, 32, 64), torch.rand(2, 3, 32, 64)).shape == (2, 2)


@every_variant
def test_every_parameter_is_trained(variant: str) -> None:
    model = make(variant)
    model.losses(arm_batch(3))["loss"].backward()
    untrained = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    # This one cancels in the difference of both orders of the frames, up to rounding.
    assert untrained <= ({"regressor.mlp.2.bias"} if variant.startswith("direct") else set())


@every_variant
def test_eight_pairs_can_be_overfitted(variant: str) -> None:
    _, before, after = overfitted(variant)
    # The matching network's likelihood can be negative; the other terms are zero at best.
    bounded = [name for name in before if name not in ("flow", "loss")]
    assert bounded
    for name in bounded:
        assert after[name] < before[name] / 10


@every_variant
def test_training_is_determined_by_the_seed(variant: str) -> None:
    batch = arm_batch(3)
    one, same, other = (train(make(variant, seed), batch, 3) for seed in (0, 0, 1))
    assert one == same and one != other


@pytest.mark.parametrize("variant", ["direct", "direct_grid", "direct_on_flow", "direct_on_flow_dis"])
def test_swapped_frames_flip_the_sign(variant: str) -> None:
    model, batch = make(variant), arm_batch(4)
    there, back = model.predict_steps(batch.first, batch.second), model.predict_steps(batch.second, batch.first)
    assert there.abs().max() > 1e-6
    torch.testing.assert_close(there, -back, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("variant", ["direct", "eva", "vera"])
def test_predictions_have_the_units_of_the_training_data(variant: str) -> None:
    """With the same weights, steps are ten times larger for joints that move ten times as far."""
    model = make(variant)
    wide = replace(
        model.config, delta_std=tuple(10 * x for x in STATS.delta_std), q_std=tuple(10 * x for x in STATS.q_std)
    )
    other = type(model).from_config(wide)
    other.load_state_dict(model.state_dict())
    batch = arm_batch(3)
    original, scaled = (m.predict_steps(batch.first, batch.second, batch.before) for m in (model.eval(), other.eval()))
    torch.testing.assert_close(scaled, 10 * original, rtol=1e-3, atol=1e-6)


# ---- spatial softmax -------------------------------------------------------------------------------------------------


def test_spatial_softmax_is_its_formula() -> None:
    maps, pool = torch.randn(2, 3, 4, 6), SpatialSoftmax(3)
    torch.nn.init.normal_(pool.logit_scale)
    F = maps.numpy().astype(np.float64) * np.exp(pool.logit_scale.detach().numpy())[None, :, None, None]
    expected = np.zeros((2, 3, 2))
    for b, c in np.ndindex(2, 3):
        total = sum(np.exp(F[b, c, i, j]) for i in range(4) for j in range(6))
        for i, j in np.ndindex(4, 6):
            p = np.exp(F[b, c, i, j]) / total
            expected[b, c] += p * np.array([(2 * j + 1) / 6 - 1, (2 * i + 1) / 4 - 1])
    np.testing.assert_allclose(pool(maps).detach().numpy().reshape(2, 3, 2), expected, atol=1e-6)


@pytest.mark.parametrize("u, v", [(6.0, 6.0), (4.3, 7.8), (8.7, 3.1)])
def test_spatial_softmax_locates_the_center_of_a_blob(u: float, v: float) -> None:
    """To a tenth of a cell, also between cells."""
    j, i = torch.arange(13.0), torch.arange(13.0)[:, None]
    log_blob = -((j - u) ** 2 + (i - v) ** 2) / (2 * 1.2**2)
    found = SpatialSoftmax(1)(log_blob[None, None])[0]
    cells = (found.detach() + 1) / 2 * 13 - 0.5
    assert (cells - torch.tensor([u, v])).abs().max() < 0.1


# ---- EVA -------------------------------------------------------------------------------------------------------------


def test_eva_steps_are_differences_of_its_positions() -> None:
    model, batch = make("eva").eval(), arm_batch(3)
    assert isinstance(model, EvaIDM) and batch.before is not None
    here = model.positions(batch.before, batch.first, batch.second)
    there = model.positions(batch.first, batch.second, batch.second)
    step = model.predict_steps(batch.first, batch.second, batch.before)
    torch.testing.assert_close(step, there - here, rtol=1e-3, atol=1e-7)


def test_eva_depends_on_all_three_frames() -> None:
    model = make("eva")
    assert isinstance(model, EvaIDM)
    frames = [torch.rand(1, 3, SIDE, SIDE, requires_grad=True) for _ in range(3)]
    model.positions(*frames).sum().backward()
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in frames)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "resnet18"])
@pytest.mark.parametrize("side", [64, 96, 128])
def test_small_images_keep_eight_cells_a_side(size: str, side: int) -> None:
    if size.startswith("resnet"):
        pytest.importorskip("torchvision")
    trunk, channels = make_trunk(size, 9, side, "group")
    with torch.no_grad():
        features = trunk(torch.zeros(1, 9, side, side))
    assert features.shape[1] == channels and min(features.shape[-2:]) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("size", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_published_trunks_can_be_trained(size: str, norm: str) -> None:
    pytest.importorskip("torchvision")
    losses = train(make("eva", size=size, norm=norm, side=64), _resized(arm_batch(4), 64), 6, rate=3e-4)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_published_trunk_has_the_shape_of_the_paper() -> None:
    """512 px images and ResNet-50: 2048 maps of 16 x 16."""
    pytest.importorskip("torchvision")
    trunk, channels = make_trunk("resnet50", 9, 512, "batch")
    with torch.no_grad():
        assert trunk(torch.zeros(1, 9, 512, 512)).shape == (1, channels, 16, 16)
    assert channels == 2048


def test_a_missing_torchvision_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtraError, match="torchvision"):
        make("eva", size="resnet18")


def _resized(batch: PairBatch, side: int) -> PairBatch:
    images = {
        name: torch.nn.functional.interpolate(x, size=(side, side), mode="bilinear")
        for name, x in batch.tensors()
        if name in ("first", "second", "before")
    }
    return PairBatch(**images, q=batch.q, q_next=batch.q_next)


# ---- flow ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["direct_on_flow", "vera_learned_flow"])
def test_learned_flow_approaches_the_exact_one(variant: str) -> None:
    model, _, _ = overfitted(variant)
    assert isinstance(model, FlowBaseline) and BATCH.flow is not None and BATCH.mask is not None
    with torch.no_grad():
        learned = model.estimate_flow(BATCH.first, BATCH.second)[0].flow
        untrained = make(variant).estimate_flow(BATCH.first, BATCH.second)[0].flow  # type: ignore[operator]
    robot = torch.nn.functional.max_pool2d(BATCH.mask, 2)
    error, initial_error, motion = (
        float((x.norm(dim=1) * robot).sum()) for x in (learned - BATCH.flow, untrained - BATCH.flow, BATCH.flow)
    )
    assert error < 0.75 * motion and error < 0.5 * initial_error


@pytest.mark.parametrize("variant", ["direct_on_flow", "vera", "vera_learned_flow"])
def test_flow_without_weight_is_ignored(variant: str) -> None:
    batch = arm_batch(3)
    assert batch.flow is not None and batch.weight is not None
    ignored = batch.weight.clone()
    ignored[:, :, 6:] = 0
    extreme = torch.where(ignored[:, None] > 0, batch.flow, torch.full_like(batch.flow, 50.0))
    model = make(variant)
    torch.manual_seed(0)
    loss = model.losses(replace(batch, weight=ignored))["loss"].item()
    extreme_loss = model.losses(replace(batch, flow=extreme, weight=ignored))["loss"].item()
    assert loss == extreme_loss
    assert model.losses(replace(batch, flow=extreme))["loss"].item() > 2 * extreme_loss


@pytest.mark.parametrize("variant", ["direct_on_flow_dis", "vera"])
def test_without_flow_in_the_batch_the_estimator_is_used(variant: str) -> None:
    batch = arm_batch(3)
    forward, backward = estimate_bidirectional_flow(_dis(), batch.first, batch.second)
    bare = replace(batch, flow=None, weight=None, flow_back=None, weight_back=None)
    given = replace(
        batch,
        flow=forward.flow,
        weight=forward.weight,
        flow_back=backward.flow,
        weight_back=backward.weight,
    )
    model = make(variant)
    torch.testing.assert_close(model.losses(bare)["loss"], model.losses(given)["loss"])


def test_a_field_cannot_be_trained_without_flow() -> None:
    batch = arm_batch(2, with_flow=False)
    with pytest.raises(InputError, match="train with estimated flow"):
        make("vera_learned_flow").losses(batch)
    assert make("direct_on_flow").losses(batch)["step"].isfinite()  # its matching network is trained by the steps


def test_estimated_flow_is_in_px_of_the_models_image() -> None:
    """A recorded image of 160 x 120 is letterboxed to 64 x 64: 5 px are 2; backward flow has the opposite sign."""

    def brighter_is_right(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        sign = torch.sign(second.mean((-3, -2, -1)) - first.mean((-3, -2, -1)))
        return (sign[:, None] * torch.tensor([5.0, -2.5]))[..., None, None].expand(-1, 2, 120, 160)

    dark, bright = torch.full((2, 3, 120, 160), 0.2), torch.full((2, 3, 120, 160), 0.7)
    flows = estimate_bidirectional_flow(CallableFlow(brighter_is_right), dark, bright, Letterbox(120, 160, 64, 64))
    for sign, flow in zip((1.0, -1.0), flows, strict=True):
        assert flow.flow.shape == (2, 2, 16, 16)
        seen = flow.weight > 0
        assert not seen[:, :2].any() and not seen[:, -2:].any() and seen[:, 2:-2].all()
        for channel, px in enumerate((2.0, -1.0)):
            values = flow.flow[:, channel][seen]
            torch.testing.assert_close(values, torch.full_like(values, sign * px), rtol=1e-4, atol=0)


def _dis() -> Any:
    from jidm.flow import as_flow_estimator

    return as_flow_estimator("dis")


# ---- VERA ------------------------------------------------------------------------------------------------------------


def test_vera_inverts_by_ridge_regression() -> None:
    """Against numpy's least squares with the ridge as additional rows."""
    model = make("vera", ridge=3.0)
    assert isinstance(model, VeraField)
    J, flow, weight = torch.randn(2, 2, 2, 12, 12), torch.randn(2, 2, 12, 12), torch.rand(2, 12, 12)
    found = model.invert(J, Flow(flow, weight))
    for b in range(2):
        root = np.sqrt(np.tile(weight[b].double().numpy().ravel(), 2))
        rows = J[b].double().permute(0, 2, 3, 1).reshape(-1, 2).numpy() * root[:, None]
        aims = flow[b].double().reshape(-1).numpy() * root
        damped = np.vstack([rows, np.sqrt(3.0) * np.eye(2)])
        step = np.linalg.lstsq(damped, np.concatenate([aims, np.zeros(2)]), rcond=None)[0]
        np.testing.assert_allclose(found.delta_q[b] / model.delta_std, step, rtol=1e-4, atol=1e-6)
        left = ((rows @ step - aims) ** 2).sum()
        assert found.residual is not None and found.explained_fraction is not None
        assert float(found.residual[b]) == pytest.approx(np.sqrt(left / weight[b].double().sum().item()), rel=1e-4)
        assert float(found.explained_fraction[b]) == pytest.approx(1 - left / (aims**2).sum(), rel=1e-3)


def test_veras_ridge_is_absolute() -> None:
    """Twice the weight everywhere changes the step, unlike with a relative ridge."""
    model = make("vera", ridge=50.0)
    assert isinstance(model, VeraField)
    J, flow, weight = torch.randn(1, 2, 2, 12, 12), torch.randn(1, 2, 12, 12), torch.rand(1, 12, 12)
    once, twice = (model.invert(J, Flow(flow, k * weight)).delta_q for k in (1, 2))
    assert not torch.allclose(once, twice, rtol=1e-2)


def test_veras_field_is_that_of_the_arm() -> None:
    """After overfitting, the field times a joint step is the arm's exact motion, and the inverse gives the step."""
    model, _, _ = overfitted("vera")
    assert isinstance(model, VeraField) and BATCH.flow is not None
    with torch.no_grad():
        motion = torch.einsum("bcnhw,bn->bchw", model.jacobian(BATCH.first), BATCH.delta_q)
        step = model.predict(BATCH.first, BATCH.second, motion=BATCH.flows).delta_q
    assert (motion - BATCH.flow).norm() < 0.3 * BATCH.flow.norm()
    assert (step - BATCH.delta_q).norm() < 0.3 * BATCH.delta_q.norm()


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_veras_field_lies_on_the_grid_at_any_resolution(size: str) -> None:
    model = make("vera", size=size)
    assert isinstance(model, VeraField)
    assert model.jacobian(torch.rand(1, 3, SIDE, SIDE)).shape == (1, 2, 2, SIDE // 4, SIDE // 4)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant, options, message",
    [
        ("direct", {"sise": "tiny"}, "did you mean 'size'"),
        ("direct", {"size": "tny"}, "did you mean 'tiny'"),
        ("direct", {"pool": "max"}, "pool"),
        ("direct_on_flow", {"loss": "mae"}, "mse, smooth_l1"),
        ("eva", {"size": "resnet19"}, "did you mean 'resnet18'"),
        ("eva", {"norm": "layer"}, "norm"),
        ("vera", {"ridge": 0.0}, "ridge"),
        ("vera", {"ridge": float("nan")}, "ridge"),
        ("direct_on_flow", {"search_radius": 0}, "search_radius"),
    ],
)
def test_invalid_options_are_refused(variant: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(variant, **options)


def test_an_unknown_flow_is_refused() -> None:
    with pytest.raises(InputError, match="unknown flow 'diss'"):
        model_class("vera").from_data(JOINTS, TYPES, SIDE, SIDE, STATS, flow="diss")


def test_invalid_statistics_are_refused() -> None:
    for broken in (
        replace(STATS, q_std=(0.5, 0.0)),
        replace(STATS, q_mean=(0.0,)),
        replace(STATS, q_lower=(float("nan"), 0.0)),
    ):
        with pytest.raises(InputError):
            model_class("direct").from_data(JOINTS, TYPES, SIDE, SIDE, broken)
    with pytest.raises(InputError, match="multiples of 16"):
        model_class("direct").from_data(JOINTS, TYPES, 50, 48, STATS)


@every_variant
def test_a_config_of_another_version_is_refused(variant: str) -> None:
    model = make(variant)
    values = asdict(model.config)
    assert type(model_class(model.kind).from_config(values)) is type(model)
    with pytest.raises(CheckpointError, match="stretch"):
        model_class(model.kind).from_config({**values, "stretch": 1})
    with pytest.raises(CheckpointError, match="height"):
        model_class(model.kind).from_config({k: v for k, v in values.items() if k != "height"})
