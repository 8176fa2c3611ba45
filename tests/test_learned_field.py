"""The learned field without training: what holds whatever its weights are, and what its pieces compute."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from step_fields import FINGER, SIDE, config, pictures, untrained

from jidm.errors import CheckpointError, InputError
from jidm.field.learned import Encoded, LearnedField, LearnedFieldConfig
from jidm.field.learned.blocks import Modulation, pixel_grid, spatial_softmax
from jidm.field.learned.matching import PairHead, carry_back, gradients, path


def flat_head(reach: int = 2, grid: tuple[int, int] = (8, 10), detail: int = 1) -> PairHead:
    """A head that adds nothing of its own: its answers are those of the formulas around it."""
    torch.manual_seed(0)
    head = PairHead(8, reach, grid, detail)
    for layer in (head.coarse_out, head.fine_out, *head.weigh_out):
        torch.nn.init.zeros_(layer.weight)
    return head


# ---- matching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [1, 2, 5])
def test_correlation_is_the_products_of_all_neighbours(reach: int) -> None:
    h, w = 4, 5
    first, second = torch.randn(2, 2, 8, h, w).unbind(0)
    windows = PairHead(8, reach, (h, w)).correlate(first, second)
    for window, (a, b) in zip(windows, ((first, second), (second, first)), strict=True):
        assert window.shape == (2, (2 * reach + 1) ** 2, h, w)
        for k, (dv, du) in enumerate((i, j) for i in range(-reach, reach + 1) for j in range(-reach, reach + 1)):
            for v in range(h):
                for u in range(w):
                    inside = 0 <= v + dv < h and 0 <= u + du < w
                    expected = (a[:, :, v, u] * b[:, :, v + dv, u + du]).sum(1) * 4 / 8**0.5 if inside else -20.0
                    torch.testing.assert_close(window[:, k, v, u], torch.as_tensor(expected).expand(2))


def test_both_windows_are_one_volume_seen_from_its_two_sides() -> None:
    first, second = torch.randn(2, 2, 8, 8, 10).unbind(0)
    head = flat_head()
    forward, backward = head.correlate(first, second)
    side = 2 * head.reach + 1
    # Cell (v, u) with offset (dv, du) forwards is cell (v + dv, u + du) with offset (-dv, -du) backwards.
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
def test_first_look_finds_a_shift_within_reach(du: int, dv: int) -> None:
    head = flat_head()
    head.sharpness.data.fill_(4.0)
    first = torch.randn(1, 8, 8, 10, generator=torch.Generator().manual_seed(1))
    first = first / first.square().mean(1, keepdim=True).sqrt() * 3  # of one length, as the network's features are
    second = first.roll((dv, du), (2, 3))  # what was at (v, u) is at (v + dv, u + du)
    forward, backward = head.correlate(first, second)
    flow, log_weight = head.start(forward, first)
    back, _ = head.start(backward, second)
    r = flow.shape[-1] // first.shape[-1]  # cells of the field per cell that is compared
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
    head.fine_out.bias.data[2:] = bias
    for weigh in head.weigh_out:
        weigh.bias.data[:] = bias
    first, second = torch.randn(2, 1, 8, 8, 10).unbind(0)
    image, other = torch.rand(2, 1, 3, 32, 40).unbind(0)
    found = [head.start(head.correlate(first, second)[0], first)[1]]
    textures = torch.randn(2, 1, 6, 16, 20)
    two = seen(image, first, textures[0]), seen(other, second, textures[1])
    still = torch.zeros(1, 2, 8, 10)
    rough, (_, late, close) = head.rough(*two, still), head.close(*two, still)
    for log_weight in (*found, late):
        torch.testing.assert_close(log_weight.abs(), torch.full_like(log_weight, 4.0))
    for weigh in head.weigh_out:
        weigh.bias.data[:] = 0
    for weighed, plain in ((rough, head.rough(*two, still)), (close, head.close(*two, still)[2])):
        wanted = plain.curvature * math.exp(math.copysign(4, bias))
        torch.testing.assert_close(weighed.curvature, wanted, rtol=1e-3, atol=0)


def seen(image: torch.Tensor, match: torch.Tensor, texture: torch.Tensor | None = None) -> Encoded:
    """A picture as far as a closer look needs it."""
    if texture is None:
        texture = torch.zeros_like(image[:, :1, ::2, ::2]).expand(-1, 6, -1, -1)
    small = torch.nn.functional.interpolate(image, size=[4 * side for side in match.shape[-2:]], mode="area")
    return Encoded(image, small, texture, match, match, match, match, match)


# ---- carrying back ---------------------------------------------------------------------------------------------------


def test_carrying_back_by_whole_cells_is_exact_and_by_nothing_is_nothing() -> None:
    image = torch.rand(2, 3, 9, 7, dtype=torch.float64)
    still = torch.zeros(2, 2, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(carry_back(image, still), image, rtol=0, atol=1e-12)
    flow = still.clone()
    flow[:, 0], flow[:, 1] = 2, -3
    moved = carry_back(image, flow)
    torch.testing.assert_close(moved[:, :, 3:, :5], image[:, :, :-3, 2:], rtol=0, atol=1e-12)
    torch.testing.assert_close(moved[:, :, :3, :5], image[:, :, :1, 2:].expand(-1, -1, 3, -1), rtol=0, atol=1e-12)


def test_carrying_back_reads_between_cells_linearly() -> None:
    v, u = torch.meshgrid(torch.arange(8.0), torch.arange(9.0), indexing="ij")
    ramp = (2 * u - 3 * v + 1)[None, None].double()
    flow = torch.stack([torch.full((8, 9), 0.3), torch.full((8, 9), -0.6)])[None].double()
    torch.testing.assert_close(carry_back(ramp, flow)[..., 1:, :-1], ramp[..., 1:, :-1] + 2 * 0.3 + 3 * 0.6)


def test_path_of_a_uniform_motion_is_that_motion_and_backwards_its_negative() -> None:
    ahead = torch.full((1, 2, 8, 10), 3.0)
    torch.testing.assert_close(path(ahead, ahead), ahead)
    one, two = torch.randn(2, 1, 2, 8, 10).unbind(0)
    torch.testing.assert_close(path(one, 0 * two), one / 2)
    torch.testing.assert_close(path(-one, -two), -(one + carry_back(two, -one / 4)) / 2)


def test_gradients_of_a_slope() -> None:
    v, u = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    along_u, along_v = gradients((5 * u - 2 * v)[None, None])
    torch.testing.assert_close(along_u[..., 1:-1], torch.full((1, 1, 6, 5), 5.0))
    torch.testing.assert_close(along_v[..., 1:-1, :], torch.full((1, 1, 4, 7), -2.0))
    torch.testing.assert_close(
        along_u[..., 0], torch.full((1, 1, 6), 2.5)
    )  # half of it is made up: nothing lies beyond


def test_brightness_is_summed_over_the_cells_pixels() -> None:
    head = flat_head(grid=(2, 3))
    pixels, other = torch.rand(2, 1, 3, 8, 12).unbind(0)
    match = torch.randn(1, 8, 2, 3)
    _, _, found = head.close(seen(pixels, match), seen(other, match), torch.zeros(1, 2, 2, 3))
    a, b = pixels[0].numpy().astype(float), other[0].numpy().astype(float)
    mean = np.pad((a + b) / 2, ((0, 0), (1, 1), (1, 1)), mode="edge")
    g = np.stack([mean[:, 1:-1, 2:] - mean[:, 1:-1, :-2], mean[:, 2:, 1:-1] - mean[:, :-2, 1:-1]]) / 2
    error = b - a
    weight = 1 / (0.03**2 + (error**2).mean(0)) / 3
    for i in range(4):
        for j in range(6):
            cell = np.s_[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            G, e, w = g[cell].reshape(2, -1), error[cell].reshape(-1), np.tile(weight[cell].reshape(-1), 3)
            np.testing.assert_allclose(found.curvature[0, :, :, i, j].detach(), (G * w) @ G.T, rtol=1e-4)
            np.testing.assert_allclose(found.slope[0, :, i, j].detach(), (G * w) @ e, rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(found.energy[0, i, j].detach(), (w * e) @ e, rtol=1e-4)


@pytest.mark.parametrize("detail", [1, 2, 3])
def test_brightness_asks_for_the_motion_that_is_left(detail: int) -> None:
    """A sloping picture moved by d: the minimum of what the cells say is d, or what a guess left of it, at any detail."""
    larger = torch.meshgrid(torch.arange(32.0 * detail), torch.arange(40.0 * detail), indexing="ij")
    v, u = (x / detail for x in larger)
    head = flat_head(detail=detail)
    slope = torch.tensor([[0.01, 0.0], [0.0, 0.008], [0.004, -0.006]])
    moved, guess = torch.tensor([1.3, -0.7]), torch.tensor([1.0, 0.0])

    def shown(shift: torch.Tensor) -> torch.Tensor:
        x = torch.stack([u - shift[0], v - shift[1]])
        return torch.einsum("kc,chw->khw", slope, x)[None]

    match = torch.randn(1, 8, 8, 10)
    around = guess[None, :, None, None].expand(1, 2, 8, 10)
    texture = torch.zeros(1, 6, 16, 20)
    one, two = (seen(shown(shift), match, texture) for shift in (torch.zeros(2), moved))
    _, _, found = head.close(one, two, around)
    assert found.curvature.shape[-2:] == (16, 20)
    C, s = found.curvature[0, :, :, 6, 8], found.slope[0, :, 6, 8]
    torch.testing.assert_close(-torch.linalg.solve(C, s), moved - guess, rtol=0, atol=1e-3)
    # Textures are half as large; what they say is in pixels of the picture all the same.
    step = 2 * detail
    textures = [x[..., ::step, ::step].repeat(1, 2, 1, 1) for x in (shown(torch.zeros(2)), shown(moved))]
    flat = [seen(torch.zeros(1, 3, 32 * detail, 40 * detail), match, texture) for texture in textures]
    found = head.rough(*flat, around)
    C, s = found.curvature[0, :, :, 6, 8], found.slope[0, :, 6, 8]
    torch.testing.assert_close(-torch.linalg.solve(C, s), moved - guess, rtol=0, atol=1e-3)


# ---- the network -----------------------------------------------------------------------------------------------------


def read(field: LearnedField, image: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    seen = field.encode(image)
    return (*field.state(seen), *field.jacobian(seen, q))


def test_detail_changes_nothing_that_does_not_look_closer() -> None:
    field, image, q = untrained(height=64, width=96), pictures(2, width=96), torch.randn(2, 2)
    close = LearnedField(replace(field.config, detail=2))
    close.load_state_dict({k: v for k, v in field.state_dict().items() if "weigh_out" not in k}, strict=False)
    larger = image.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert close.config.picture == (128, 192) and close.config.grid == field.config.grid
    for one, other in zip(read(field, image, q), read(close, larger, q), strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_is_its_items_one_by_one() -> None:
    field = untrained(height=64, width=96)
    image, q = pictures(3, width=96), torch.randn(3, 2)
    whole = read(field, image, q)
    shapes = [(3, 2), (3, 2), (3, 2, 2, 16, 24), (3, 16, 24)]
    assert [tuple(x.shape) for x in whole] == shapes
    for i in range(3):
        one = read(field, image[i : i + 1], q[i : i + 1])
        for a, b in zip(whole, one, strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-4, atol=1e-4 * float(a.detach().abs().max()))
    seen = field.encode(image)
    torch.testing.assert_close(field.state(seen[1:])[0], whole[0][1:], rtol=1e-4, atol=1e-5)
    assert seen[1:].match.shape == (2, 32, 16, 24)


def test_pose_and_picture_both_bend_the_field() -> None:
    field = untrained()
    image, q = pictures(2), torch.zeros(1, 2)
    seen = field.encode(image)
    base = field.jacobian(seen[:1], q)[0]
    scale = base.abs().mean()
    assert (field.jacobian(seen[:1], q + 0.3)[0] - base).abs().mean() > 0.01 * scale
    assert (field.jacobian(seen[1:], q)[0] - base).abs().mean() > 0.01 * scale


def test_the_field_is_per_unit_of_joint() -> None:
    """The same weights in a robot whose steps are ten times as large say a tenth, so that the pixels stay."""
    one, ten = untrained(delta_std=0.05), untrained(delta_std=0.5)
    seen, q = one.encode(pictures(1)), torch.zeros(1, 2)
    torch.testing.assert_close(one.jacobian(seen, q)[0], 10 * ten.jacobian(seen, q)[0])


@pytest.mark.parametrize("log_std", [-1e6, 0.0, 1e6])
def test_spread_of_the_state_is_positive_and_bounded(log_std: float) -> None:
    field = untrained()
    field.state_out[-1].bias.data[2:] = log_std
    image = torch.cat([pictures(1), torch.zeros(1, 3, SIDE, SIDE), torch.ones(1, 3, SIDE, SIDE)])
    value, spread = field.state(field.encode(image))
    assert value.isfinite().all()
    assert (spread >= 0.6 * np.exp(-5.001)).all() and (spread <= 0.6 * np.exp(1.001)).all()
    field.state_spread.copy_(torch.tensor([1.0, 3.0]))
    wider = field.state(field.encode(image))[1]
    torch.testing.assert_close(wider / spread, torch.tensor([[1.0, 3.0]]).expand(3, 2))


def test_the_grid_is_that_of_flow() -> None:
    """Cell (i, j) of stride 4 stands for pixel (4 j + 1.5, 4 i + 1.5); the middle of the picture is 0."""
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


# ---- what it is made for ---------------------------------------------------------------------------------------------


def test_config_survives_json() -> None:
    made = config(height=96, width=160, size="small", reach=6)
    again = LearnedFieldConfig.from_dict(json.loads(json.dumps(asdict(made))))
    assert again == made and again.grid == (24, 40) and again.n == 2
    field = LearnedField.from_config(json.loads(json.dumps(asdict(config()))))
    assert field.joint_names == FINGER
    assert set(field.state_dict()) == set(untrained().state_dict())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"height": 60}, "multiples of 16.*resize"),
        ({"width": 16}, "at least 32"),
        ({"size": "huge"}, "unknown size 'huge'; known: tiny"),
        ({"reach": 0}, "reach must be at least 1"),
        ({"q_mean": (0.0,)}, "q_mean has 1 entries for 2 joints"),
        ({"joint_types": ("revolute",) * 3}, "joint_types has 3 entries"),
        ({"q_std": (0.1, 0.0)}, "positive q_std"),
        ({"delta_std": (0.1, -0.1)}, "positive q_std and delta_std"),
        ({"delta_std": (0.1, float("nan"))}, "delta_std must be finite"),
        ({"q_upper": (float("inf"), 1.0)}, "q_upper must be finite"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        replace(config(), **change)


def test_no_joints_are_refused() -> None:
    with pytest.raises(InputError, match="needs joints"):
        config(())


def test_config_of_another_version_is_refused_by_name() -> None:
    values = asdict(config())
    with pytest.raises(CheckpointError, match="unknown entries: colour, depth"):
        LearnedFieldConfig.from_dict({**values, "depth": 3, "colour": 1})
    del values["q_mean"]
    with pytest.raises(CheckpointError, match=r"incomplete.*q_mean"):
        LearnedFieldConfig.from_dict(values)
