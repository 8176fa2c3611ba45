"""The learned field without training: properties that hold for any weights, and its parts against formulas."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from step_fields import FINGER, SIDE, config, random_images, untrained

from jidm.errors import CheckpointError, InputError
from jidm.fields.free import LearnedField, LearnedFieldConfig
from jidm.fields.free.blocks import Modulation, pixel_grid, spatial_softmax
from jidm.fields.free.correlation import CorrelationHead


def flat_head(search_radius: int = 2, grid: tuple[int, int] = (8, 10)) -> CorrelationHead:
    """A head whose learned correction is zero, so that its output is given by a formula."""
    torch.manual_seed(0)
    head = CorrelationHead(8, search_radius, grid)
    torch.nn.init.zeros_(head.coarse_out.weight)
    return head


# ---- matching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search_radius", [1, 2, 5])
def test_correlation_is_the_products_of_all_neighbors(search_radius: int) -> None:
    h, w = 4, 5
    first, second = torch.randn(2, 2, 8, h, w).unbind(0)
    windows = CorrelationHead(8, search_radius, (h, w)).correlate(first, second)
    for window, (a, b) in zip(windows, ((first, second), (second, first)), strict=True):
        assert window.shape == (2, (2 * search_radius + 1) ** 2, h, w)
        offsets = range(-search_radius, search_radius + 1)
        for k, (dv, du) in enumerate((i, j) for i in offsets for j in offsets):
            for v in range(h):
                for u in range(w):
                    inside = 0 <= v + dv < h and 0 <= u + du < w
                    expected = (a[:, :, v, u] * b[:, :, v + dv, u + du]).sum(1) * 4 / 8**0.5 if inside else -20.0
                    torch.testing.assert_close(window[:, k, v, u], torch.as_tensor(expected).expand(2))


def test_both_windows_are_of_one_correlation_volume() -> None:
    first, second = torch.randn(2, 2, 8, 8, 10).unbind(0)
    head = flat_head()
    forward, backward = head.correlate(first, second)
    side = 2 * head.search_radius + 1
    # Cell (v, u) with offset (dv, du) forward is cell (v + dv, u + du) with offset (-dv, -du) backward.
    f, b = forward.unflatten(1, (side, side)), backward.unflatten(1, (side, side)).flip(1, 2)
    for i, dv in enumerate(range(-2, 3)):
        for j, du in enumerate(range(-2, 3)):
            rows, columns = slice(max(0, -dv), min(8, 8 - dv)), slice(max(0, -du), min(10, 10 - du))
            there = slice(rows.start + dv, rows.stop + dv), slice(columns.start + du, columns.stop + du)
            torch.testing.assert_close(f[:, i, j, rows, columns], b[:, i, j, there[0], there[1]])
    again = head.correlate(second, first)
    torch.testing.assert_close(again[0], backward)
    torch.testing.assert_close(again[1], forward)


@pytest.mark.parametrize(("du", "dv"), [(2, 1), (-1, 2), (0, -2)])
def test_initial_flow_finds_a_shift_within_the_window(du: int, dv: int) -> None:
    head = flat_head()
    head.logit_scale.data.fill_(4.0)
    first = torch.randn(1, 8, 8, 10, generator=torch.Generator().manual_seed(1))
    first = first / first.square().mean(1, keepdim=True).sqrt() * 3  # of one length, as the network's features are
    second = first.roll((dv, du), (2, 3))  # what was at (v, u) is now at (v + dv, u + du)
    forward, backward = head.correlate(first, second)
    flow, log_weight = head.initial_flow(forward, first)
    back, _ = head.initial_flow(backward, second)
    r = flow.shape[-1] // first.shape[-1]  # cells of flow per coarse cell
    inside = slice(3 * r + r - 1, 5 * r - r + 1), slice(3 * r + r - 1, 7 * r - r + 1)
    for found, way in ((flow, 4.0 * r), (back, -4.0 * r)):
        middle = found[0, :, inside[0], inside[1]]
        shift = torch.tensor([way * du, way * dv])[:, None, None].expand_as(middle)
        torch.testing.assert_close(middle, shift, rtol=0, atol=0.02)
    assert torch.equal(log_weight, torch.zeros_like(log_weight))


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_confidence_is_bounded(bias: float) -> None:
    head = flat_head()
    head.coarse_out.bias.data[2] = bias
    first, second = torch.randn(2, 1, 8, 8, 10).unbind(0)
    log_weight = head.initial_flow(head.correlate(first, second)[0], first)[1]
    torch.testing.assert_close(log_weight.abs(), torch.full_like(log_weight, 4.0))


# ---- the network -----------------------------------------------------------------------------------------------------


def read(field: LearnedField, image: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    seen = field.encode(image)
    return (*field.predict_pose(seen), *field.jacobian(seen, q))


def test_input_scale_changes_neither_field_nor_pose() -> None:
    field, image, q = untrained(height=64, width=96), random_images(2, width=96), torch.randn(2, 2)
    close = LearnedField(replace(field.config, input_scale=2))
    close.load_state_dict(field.state_dict())
    larger = image.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert close.config.input_size == (128, 192) and close.config.grid == field.config.grid
    for one, other in zip(read(field, image, q), read(close, larger, q), strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_is_its_items_one_by_one() -> None:
    field = untrained(height=64, width=96)
    image, q = random_images(3, width=96), torch.randn(3, 2)
    whole = read(field, image, q)
    shapes = [(3, 2), (3, 2), (3, 2, 2, 32, 48), (3, 32, 48)]
    assert [tuple(x.shape) for x in whole] == shapes
    for i in range(3):
        one = read(field, image[i : i + 1], q[i : i + 1])
        for a, b in zip(whole, one, strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-4, atol=1e-4 * float(a.detach().abs().max()))
    seen = field.encode(image)
    torch.testing.assert_close(field.predict_pose(seen[1:])[0], whole[0][1:], rtol=1e-4, atol=1e-5)
    assert seen[1:].coarse.shape == (2, 32, 8, 12)


def test_it_is_a_dense_field() -> None:
    field = untrained(height=64, width=96)
    image, q = random_images(20, width=96), torch.randn(20, 2)
    jacobian, mask = field.dense(q, 32, 48, image)  # the network's own grid
    seen = field.encode(image)
    own, logit = field.jacobian(seen, q)
    torch.testing.assert_close(jacobian, own / 2, rtol=1e-3, atol=1e-4)  # its cells are two pixels wide
    torch.testing.assert_close(mask, logit.sigmoid(), rtol=1e-3, atol=1e-4)
    coarse, _ = field.dense(q, 16, 24, image)
    torch.testing.assert_close(coarse.mean((-2, -1)), jacobian.mean((-2, -1)) / 2, rtol=0.1, atol=0.02)
    shaped, _ = field.dense(q.view(4, 5, 2), 32, 48, image.view(4, 5, 3, 64, 96))
    assert torch.equal(shaped.flatten(0, 1), jacobian)
    single, alone = field.dense(q[0], 32, 48, image[0])
    assert single.shape == (2, 2, 32, 48) and alone.shape == (32, 48)
    for wrong in (None, image[..., :32]):
        with pytest.raises(InputError, match="64 x 96"):
            field.dense(q, 32, 48, wrong)


def flows_between(count: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        (3 * torch.randn(count, 2, SIDE // 4, SIDE // 4, generator=random),
         torch.randn(count, SIDE // 4, SIDE // 4, generator=random))
        for _ in range(2)
    ]  # fmt: skip


def test_a_regressed_step_changes_sign_with_the_order_of_the_images() -> None:
    field = untrained()
    seen, flows = field.encode(random_images(6)), flows_between(3)
    (step, std), (back, same) = (
        field.regress_step(seen[:3], seen[3:], flows),
        field.regress_step(seen[3:], seen[:3], flows[::-1]),
    )
    torch.testing.assert_close(back, -step, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(same, std)
    one, _ = field.regress_step(seen[:3], seen[3:], flows[:1])
    assert step.abs().max() > 1e-5 and (one - step).abs().max() > 1e-5


def test_a_step_regressed_from_unknown_flow_is_finite() -> None:
    field = untrained()
    seen, flows = field.encode(random_images(2)), flows_between(1)
    flows = [(flow, torch.full_like(sure, -torch.inf)) for flow, sure in flows]
    assert all(x.isfinite().all() for x in field.regress_step(seen[:1], seen[1:], flows))


def test_step_regression_does_not_train_the_encoder() -> None:
    field = untrained().train()
    seen = field.encode(random_images(2))
    step, std = field.regress_step(seen[:1], seen[1:], flows_between(1))
    (step.sum() + std.sum()).backward()
    assert all(p.grad is None for p in field.encoder.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in field.step_head.parameters())


def test_a_field_without_a_regression_head_refuses_to_regress() -> None:
    field = untrained(step_regression=False)
    assert field.step_head is None
    with pytest.raises(InputError, match="step_regression=True"):
        field.regress_step(field.encode(random_images(1)), field.encode(random_images(1)), flows_between(1))


def test_the_field_depends_on_pose_and_image() -> None:
    field = untrained()
    image, q = random_images(2), torch.zeros(1, 2)
    seen = field.encode(image)
    base = field.jacobian(seen[:1], q)[0]
    scale = base.abs().mean()
    assert (field.jacobian(seen[:1], q + 0.3)[0] - base).abs().mean() > 0.01 * scale
    assert (field.jacobian(seen[1:], q)[0] - base).abs().mean() > 0.01 * scale


def test_the_field_is_per_unit_of_joint() -> None:
    """With the same weights, for a robot with ten times larger steps, the field is a tenth."""
    one, ten = untrained(delta_std=0.05), untrained(delta_std=0.5)
    seen, q = one.encode(random_images(1)), torch.zeros(1, 2)
    torch.testing.assert_close(one.jacobian(seen, q)[0], 10 * ten.jacobian(seen, q)[0])


@pytest.mark.parametrize("log_std", [-1e6, 0.0, 1e6])
def test_the_standard_deviation_of_the_pose_is_positive_and_bounded(log_std: float) -> None:
    field = untrained()
    field.pose_out[-1].bias.data[2:] = log_std
    image = torch.cat([random_images(1), torch.zeros(1, 3, SIDE, SIDE), torch.ones(1, 3, SIDE, SIDE)])
    value, std = field.predict_pose(field.encode(image))
    assert value.isfinite().all()
    assert (std >= 0.6 * np.exp(-5.001)).all() and (std <= 0.6 * np.exp(1.001)).all()
    field.pose_std_scale.copy_(torch.tensor([1.0, 3.0]))
    wider = field.predict_pose(field.encode(image))[1]
    torch.testing.assert_close(wider / std, torch.tensor([[1.0, 3.0]]).expand(3, 2))


def test_the_pixel_grid_is_that_of_flow() -> None:
    """Cell (i, j) of stride 4 stands for pixel (4 j + 1.5, 4 i + 1.5); the center of the image is 0."""
    grid = pixel_grid(64, 96, 4)
    assert grid.shape == (2, 16, 24)
    assert float(grid[0, 0, 0]) == pytest.approx((1.5 - 47.5) / 48) and float(grid[1, 0, 0]) == pytest.approx(-30 / 48)
    torch.testing.assert_close(grid.flip(1, 2), -grid)
    maps = torch.full((1, 2, 16, 24), -1e4)
    maps[0, 0, 3, 5], maps[0, 1, 9, 20] = 1e4, 1e4
    torch.testing.assert_close(spatial_softmax(maps, grid)[0], torch.stack([grid[:, 3, 5], grid[:, 9, 20]]))


def test_modulation_adds_a_plane() -> None:
    layer = Modulation(3, 4)
    grid = pixel_grid(32, 32, 4)
    out = layer(torch.zeros(1, 4, 8, 8), torch.randn(1, 3), grid)
    steps = out.diff(dim=-1), out.diff(dim=-2)
    for step in steps:
        torch.testing.assert_close(step, step[..., :1, :1].expand_as(step), rtol=1e-4, atol=1e-5)
        assert step.abs().max() > 1e-3


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_config_survives_json() -> None:
    made = config(height=96, width=160, size="small", search_radius=6, delta_correlation=((1.0, 0.5), (0.5, 1.0)))
    again = LearnedFieldConfig.from_dict(json.loads(json.dumps(asdict(made))))
    assert again == made and again.grid == (48, 80) and again.n == 2
    field = LearnedField.from_config(json.loads(json.dumps(asdict(config()))))
    assert field.joint_names == FINGER
    assert set(field.state_dict()) == set(untrained().state_dict())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"height": 60}, "multiples of 16.*resize"),
        ({"width": 16}, "at least 32"),
        ({"size": "huge"}, "unknown size 'huge'; known: base, small, tiny"),
        ({"search_radius": 0}, "search_radius must be at least 1"),
        ({"q_mean": (0.0,)}, "q_mean has 1 entries for 2 joints"),
        ({"joint_types": ("revolute",) * 3}, "joint_types has 3 entries"),
        ({"q_std": (0.1, 0.0)}, "positive q_std"),
        ({"delta_std": (0.1, -0.1)}, "positive q_std and delta_std"),
        ({"delta_std": (0.1, float("nan"))}, "delta_std must be finite"),
        ({"q_upper": (float("inf"), 1.0)}, "q_upper must be finite"),
        ({"delta_correlation": ((1.0, 0.0),)}, "2 rows of 2 numbers"),
    ],
)
def test_an_invalid_configuration_is_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        replace(config(), **change)


def test_no_joints_are_refused() -> None:
    with pytest.raises(InputError, match="needs joints"):
        config(())


def test_config_of_another_version_is_refused_by_name() -> None:
    values = asdict(config())
    with pytest.raises(CheckpointError, match="unknown entries: color, depth"):
        LearnedFieldConfig.from_dict({**values, "depth": 3, "color": 1})
    del values["q_mean"]
    with pytest.raises(CheckpointError, match=r"incomplete.*q_mean"):
        LearnedFieldConfig.from_dict(values)
