"""The baselines as models: shapes, gradients, learning, symmetries, and the pieces their papers define by formula."""

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
from jidm.baselines.base import BidirectionalFlow
from jidm.baselines.eva import EvaIDM, SpatialSoftmax
from jidm.baselines.flow_source import FlowBaseline, estimate_bidirectional_flow
from jidm.baselines.resnet import make_trunk
from jidm.baselines.vera import VeraField
from jidm.errors import CheckpointError, InputError, MissingExtraError
from jidm.flow.factory import CallableFlow
from jidm.model_registry import KINDS, build_model, model_class
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
    """Losses of so many Adam steps on one batch."""
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


HEART = arm_batch(8, seed=3)


@cache
def learnt_by_heart(variant: str) -> tuple[Baseline, dict[str, float], dict[str, float]]:
    """A model that saw `HEART` many times; its losses before and after, as when decoding."""
    model = make(variant)
    before = parts(model)
    train(model, HEART, 200 if variant == "vera" else 60)
    return model, before, parts(model)


def parts(model: Baseline) -> dict[str, float]:
    with torch.no_grad():
        found = {name: float(x) for name, x in model.eval().losses(HEART).items()}
    model.train()
    return found


every_variant = pytest.mark.parametrize("variant", VARIANTS)


# ---- as any model ----------------------------------------------------------------------------------------------------


def test_every_kind_but_ours_is_a_baseline_of_that_kind() -> None:
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
def test_wide_pictures(variant: str) -> None:
    kind, options = VARIANTS[variant]
    model = model_class(kind).from_data(JOINTS, TYPES, 32, 64, STATS, **options)
    assert model.step_pairs(torch.rand(2, 3, 32, 64), torch.rand(2, 3, 32, 64)).shape == (2, 2)


@every_variant
def test_every_parameter_learns(variant: str) -> None:
    model = make(variant)
    model.losses(arm_batch(3))["loss"].backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    # In half the difference of both orders of the frames this one cancels, up to rounding.
    assert still <= ({"regressor.perceptron.2.bias"} if variant.startswith("direct") else set())


@every_variant
def test_eight_pairs_are_learnt_by_heart(variant: str) -> None:
    _, before, after = learnt_by_heart(variant)
    # The matching network's likelihood may be negative; the other parts have a zero.
    judged = [name for name in before if name not in ("flow", "loss")]
    assert judged
    for name in judged:
        assert after[name] < before[name] / 10


@every_variant
def test_a_seed_decides_everything(variant: str) -> None:
    batch = arm_batch(3)
    one, same, other = (train(make(variant, seed), batch, 3) for seed in (0, 0, 1))
    assert one == same and one != other


@pytest.mark.parametrize("variant", ["direct", "direct_grid", "direct_on_flow", "direct_on_flow_dis"])
def test_swapped_frames_swap_the_sign(variant: str) -> None:
    model, batch = make(variant), arm_batch(4)
    there, back = model.predict_steps(batch.first, batch.second), model.predict_steps(batch.second, batch.first)
    assert there.abs().max() > 1e-6
    torch.testing.assert_close(there, -back, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("variant", ["direct", "eva", "vera"])
def test_answers_carry_the_units_of_the_training_data(variant: str) -> None:
    """The same weights for a joint that moves ten times as far say ten times as much."""
    model = make(variant)
    wide = replace(
        model.config, delta_std=tuple(10 * x for x in STATS.delta_std), q_std=tuple(10 * x for x in STATS.q_std)
    )
    other = type(model).from_config(wide)
    other.load_state_dict(model.state_dict())
    batch = arm_batch(3)
    ours, theirs = (m.predict_steps(batch.first, batch.second, batch.before) for m in (model.eval(), other.eval()))
    torch.testing.assert_close(theirs, 10 * ours, rtol=1e-3, atol=1e-6)


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
def test_spatial_softmax_finds_the_middle_of_a_blob(u: float, v: float) -> None:
    """To a tenth of a cell, also between cells."""
    j, i = torch.arange(13.0), torch.arange(13.0)[:, None]
    log_blob = -((j - u) ** 2 + (i - v) ** 2) / (2 * 1.2**2)
    found = SpatialSoftmax(1)(log_blob[None, None])[0]
    cells = (found.detach() + 1) / 2 * 13 - 0.5
    assert (cells - torch.tensor([u, v])).abs().max() < 0.1


# ---- EVA's -----------------------------------------------------------------------------------------------------------


def test_eva_steps_are_differences_of_its_positions() -> None:
    model, batch = make("eva").eval(), arm_batch(3)
    assert isinstance(model, EvaIDM) and batch.before is not None
    here = model.positions(batch.before, batch.first, batch.second)
    there = model.positions(batch.first, batch.second, batch.second)
    step = model.predict_steps(batch.first, batch.second, batch.before)
    torch.testing.assert_close(step, there - here, rtol=1e-3, atol=1e-7)


def test_eva_looks_at_all_three_frames() -> None:
    model = make("eva")
    assert isinstance(model, EvaIDM)
    frames = [torch.rand(1, 3, SIDE, SIDE, requires_grad=True) for _ in range(3)]
    model.positions(*frames).sum().backward()
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in frames)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "resnet18"])
@pytest.mark.parametrize("side", [64, 96, 128])
def test_small_pictures_keep_eight_cells_a_side(size: str, side: int) -> None:
    if size.startswith("resnet"):
        pytest.importorskip("torchvision")
    trunk, channels = make_trunk(size, 9, side, "group")
    with torch.no_grad():
        features = trunk(torch.zeros(1, 9, side, side))
    assert features.shape[1] == channels and min(features.shape[-2:]) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("size", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_published_trunks_learn(size: str, norm: str) -> None:
    pytest.importorskip("torchvision")
    losses = train(make("eva", size=size, norm=norm, side=64), _resized(arm_batch(4), 64), 6, rate=3e-4)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_published_trunk_sees_what_the_paper_says() -> None:
    """512 px pictures and ResNet-50: 2048 maps of 16 x 16."""
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
    pictures = {
        name: torch.nn.functional.interpolate(x, size=(side, side), mode="bilinear")
        for name, x in batch.tensors()
        if name in ("first", "second", "before", "third")
    }
    return PairBatch(**pictures, q=batch.q, q_next=batch.q_next, q_third=batch.q_third)


# ---- flow ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["direct_on_flow", "vera_learned_flow"])
def test_learned_flow_approaches_the_exact_one(variant: str) -> None:
    model, _, _ = learnt_by_heart(variant)
    assert isinstance(model, FlowBaseline) and HEART.flow is not None and HEART.mask is not None
    with torch.no_grad():
        told = model.estimate_flow(HEART.first, HEART.second).flow
        guessed = make(variant).motion(HEART.first, HEART.second).flow  # type: ignore[operator]
    robot = torch.nn.functional.max_pool2d(HEART.mask, 2)
    missed, guess, moved = (
        float((x.norm(dim=1) * robot).sum()) for x in (told - HEART.flow, guessed - HEART.flow, HEART.flow)
    )
    assert missed < 0.75 * moved and missed < 0.5 * guess


@pytest.mark.parametrize("variant", ["direct_on_flow", "vera", "vera_learned_flow"])
def test_flow_without_weight_teaches_nothing(variant: str) -> None:
    batch = arm_batch(3)
    assert batch.flow is not None and batch.weight is not None
    ignored = batch.weight.clone()
    ignored[:, :, 6:] = 0
    wild = torch.where(ignored[:, None] > 0, batch.flow, torch.full_like(batch.flow, 50.0))
    model = make(variant)
    torch.manual_seed(0)
    tame_loss = model.losses(replace(batch, weight=ignored))["loss"].item()
    wild_loss = model.losses(replace(batch, flow=wild, weight=ignored))["loss"].item()
    assert tame_loss == wild_loss
    assert model.losses(replace(batch, flow=wild))["loss"].item() > 2 * wild_loss


@pytest.mark.parametrize("variant", ["direct_on_flow_dis", "vera"])
def test_without_recorded_flow_the_estimator_is_asked(variant: str) -> None:
    batch = arm_batch(3)
    measured = estimate_bidirectional_flow(_dis(), batch.first, batch.second)
    bare = replace(batch, flow=None, weight=None, flow_back=None, weight_back=None)
    told = replace(
        batch,
        flow=measured.flow,
        weight=measured.weight,
        flow_back=measured.flow_back,
        weight_back=measured.weight_back,
    )
    model = make(variant)
    torch.testing.assert_close(model.losses(bare)["loss"], model.losses(told)["loss"])


def test_a_field_cannot_learn_from_no_flow_at_all() -> None:
    batch = arm_batch(2, with_flow=False)
    with pytest.raises(InputError, match="train with estimated flow"):
        make("vera_learned_flow").losses(batch)
    assert make("direct_on_flow").losses(batch)["step"].isfinite()  # its matching learns from the steps


def test_estimated_flow_is_in_px_of_the_models_picture() -> None:
    """A recorded picture of 160 x 120, seen as 64 x 64 with black bands: 5 px across are 2; back is the other way."""

    def brighter_is_right(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        way = torch.sign(second.mean((-3, -2, -1)) - first.mean((-3, -2, -1)))
        return (way[:, None] * torch.tensor([5.0, -2.5]))[..., None, None].expand(-1, 2, 120, 160)

    dark, bright = torch.full((2, 3, 120, 160), 0.2), torch.full((2, 3, 120, 160), 0.7)
    motion = estimate_bidirectional_flow(CallableFlow(brighter_is_right), dark, bright, Letterbox(120, 160, 64, 64))
    assert motion.flow_back is not None and motion.weight_back is not None
    for way, flow, weight in ((1.0, motion.flow, motion.weight), (-1.0, motion.flow_back, motion.weight_back)):
        assert flow.shape == (2, 2, 16, 16)
        seen = weight > 0
        assert not seen[:, :2].any() and not seen[:, -2:].any() and seen[:, 2:-2].all()
        for channel, px in enumerate((2.0, -1.0)):
            told = flow[:, channel][seen]
            torch.testing.assert_close(told, torch.full_like(told, way * px), rtol=1e-4, atol=0)


def _dis() -> Any:
    from jidm.flow import as_flow_estimator

    return as_flow_estimator("dis")


# ---- VERA's ----------------------------------------------------------------------------------------------------------


def test_vera_inverts_by_ridge_regression() -> None:
    """Against numpy's least squares with the ridge as further rows."""
    model = make("vera", ridge=3.0)
    assert isinstance(model, VeraField)
    J, flow, weight = torch.randn(2, 2, 2, 12, 12), torch.randn(2, 2, 12, 12), torch.rand(2, 12, 12)
    found = model.invert(J, BidirectionalFlow(flow, weight))
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
    """Unlike ours: twice the weight everywhere changes the answer."""
    model = make("vera", ridge=50.0)
    assert isinstance(model, VeraField)
    J, flow, weight = torch.randn(1, 2, 2, 12, 12), torch.randn(1, 2, 12, 12), torch.rand(1, 12, 12)
    once, twice = (model.invert(J, BidirectionalFlow(flow, k * weight)).delta_q for k in (1, 2))
    assert not torch.allclose(once, twice, rtol=1e-2)


def test_veras_field_is_that_of_the_arm() -> None:
    """Learnt by heart, the field times a joint step is the arm's exact motion, and its inverse the step."""
    model, _, _ = learnt_by_heart("vera")
    assert isinstance(model, VeraField) and HEART.flow is not None and HEART.weight is not None
    with torch.no_grad():
        told = torch.einsum("bcnhw,bn->bchw", model.jacobian(HEART.first), HEART.delta_q)
        step = model.predict(HEART.first, HEART.second, motion=BidirectionalFlow(HEART.flow, HEART.weight)).delta_q
    assert (told - HEART.flow).norm() < 0.3 * HEART.flow.norm()
    assert (step - HEART.delta_q).norm() < 0.3 * HEART.delta_q.norm()


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_veras_field_lies_on_the_grid_at_any_resolution(size: str) -> None:
    model = make("vera", size=size)
    assert isinstance(model, VeraField)
    assert model.jacobian(torch.rand(1, 3, SIDE, SIDE)).shape == (1, 2, 2, SIDE // 4, SIDE // 4)


# ---- refusals --------------------------------------------------------------------------------------------------------


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
        ("direct_on_flow", {"reach": 0}, "reach"),
    ],
)
def test_options_that_mean_nothing_are_refused(variant: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(variant, **options)


def test_an_unknown_flow_is_refused() -> None:
    with pytest.raises(InputError, match="unknown flow 'diss'"):
        model_class("vera").from_data(JOINTS, TYPES, SIDE, SIDE, STATS, flow="diss")


def test_statistics_that_fit_no_robot_are_refused() -> None:
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
    assert type(build_model(model.kind, values)) is type(model)
    with pytest.raises(CheckpointError, match="stretch"):
        build_model(model.kind, {**values, "stretch": 1})
    with pytest.raises(CheckpointError, match="height"):
        build_model(model.kind, {k: v for k, v in values.items() if k != "height"})
