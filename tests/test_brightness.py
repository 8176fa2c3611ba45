"""Two pictures compared: carried back, differentiated, summed up into what they say of the motion left between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from jidm.estimation.dense_photometric import cell_equations, gradients, reweight_by_motion, symmetric_flow, warp

# ---- carrying back ---------------------------------------------------------------------------------------------------


def test_carrying_back_by_whole_cells_is_exact_and_by_nothing_is_nothing() -> None:
    image = torch.rand(2, 3, 9, 7, dtype=torch.float64)
    still = torch.zeros(2, 2, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(warp(image, still), image, rtol=0, atol=1e-12)
    flow = still.clone()
    flow[:, 0], flow[:, 1] = 2, -3
    moved = warp(image, flow)
    torch.testing.assert_close(moved[:, :, 3:, :5], image[:, :, :-3, 2:], rtol=0, atol=1e-12)
    torch.testing.assert_close(moved[:, :, :3, :5], image[:, :, :1, 2:].expand(-1, -1, 3, -1), rtol=0, atol=1e-12)


def test_carrying_back_reads_between_cells_linearly() -> None:
    v, u = torch.meshgrid(torch.arange(8.0), torch.arange(9.0), indexing="ij")
    ramp = (2 * u - 3 * v + 1)[None, None].double()
    flow = torch.stack([torch.full((8, 9), 0.3), torch.full((8, 9), -0.6)])[None].double()
    torch.testing.assert_close(warp(ramp, flow)[..., 1:, :-1], ramp[..., 1:, :-1] + 2 * 0.3 + 3 * 0.6)


def test_path_of_a_uniform_motion_is_that_motion_and_backwards_its_negative() -> None:
    ahead = torch.full((1, 2, 8, 10), 3.0)
    torch.testing.assert_close(symmetric_flow(ahead, ahead, 4), ahead)
    one, two = torch.randn(2, 1, 2, 8, 10).unbind(0)
    torch.testing.assert_close(symmetric_flow(one, 0 * two, 4), one / 2)
    torch.testing.assert_close(symmetric_flow(-one, -two, 4), -(one + warp(two, -one / 4)) / 2)


def test_gradients_of_a_slope() -> None:
    v, u = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    along_u, along_v = gradients((5 * u - 2 * v)[None, None])
    torch.testing.assert_close(along_u[..., 1:-1], torch.full((1, 1, 6, 5), 5.0))
    torch.testing.assert_close(along_v[..., 1:-1, :], torch.full((1, 1, 4, 7), -2.0))
    torch.testing.assert_close(
        along_u[..., 0], torch.full((1, 1, 6), 2.5)
    )  # half of it is made up: nothing lies beyond


# ---- what is left ----------------------------------------------------------------------------------------------------


def test_brightness_is_summed_over_the_cells_pixels() -> None:
    pixels, other = torch.rand(2, 1, 3, 8, 12).unbind(0)
    weights = torch.rand(1, 1, 8, 12)
    found = cell_equations(pixels, other, weights, noise=0.03, cell_size=2)
    a, b = pixels[0].numpy().astype(float), other[0].numpy().astype(float)
    mean = np.pad((a + b) / 2, ((0, 0), (1, 1), (1, 1)), mode="edge")
    g = np.stack([mean[:, 1:-1, 2:] - mean[:, 1:-1, :-2], mean[:, 2:, 1:-1] - mean[:, :-2, 1:-1]]) / 2
    error = b - a
    weight = weights[0, 0].numpy() / (0.03**2 + (error**2).mean(0)) / 3
    assert found.hessian.shape == (1, 2, 2, 4, 6)
    for i in range(4):
        for j in range(6):
            cell = np.s_[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            G, e, w = g[cell].reshape(2, -1), error[cell].reshape(-1), np.tile(weight[cell].reshape(-1), 3)
            np.testing.assert_allclose(found.hessian[0, :, :, i, j], (G * w) @ G.T, rtol=1e-4)
            np.testing.assert_allclose(found.gradient[0, :, i, j], (G * w) @ e, rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(found.cost[0, i, j], (w * e) @ e, rtol=1e-4)


@pytest.mark.parametrize("larger", [0.5, 1, 2, 3])
def test_the_minimum_is_the_motion_that_is_left(larger: float) -> None:
    """A sloping picture moved by d, told in pixels of a picture of another size."""
    v, u = (x / larger for x in torch.meshgrid(torch.arange(24.0), torch.arange(30.0), indexing="ij"))
    slope = torch.tensor([[0.01, 0.0], [0.0, 0.008], [0.004, -0.006]])
    left = torch.tensor([0.3, -0.7])

    def shown(shift: torch.Tensor) -> torch.Tensor:
        return torch.einsum("kc,chw->khw", slope, torch.stack([u - shift[0], v - shift[1]]))[None]

    found = cell_equations(shown(0 * left), shown(left), torch.ones(1, 1, 24, 30), noise=0.1, cell_size=3, scale=larger)
    C, s = found.hessian[0, :, :, 4, 6], found.gradient[0, :, 4, 6]
    torch.testing.assert_close(-torch.linalg.solve(C, s), left, rtol=0, atol=1e-3)


def test_what_differs_by_more_than_the_noise_counts_less() -> None:
    one = torch.rand(1, 3, 6, 6) / 4
    other = one + 0.01
    other[..., :3] += 0.5
    weights = torch.ones(1, 1, 6, 6)
    wary, open_ = (cell_equations(one, other, weights, noise=n, cell_size=1).cost[0] for n in (0.03, 3.0))
    assert (wary[:, :3].max() < 1.001) and (wary[:, 3:] / wary[:, :3]).min() > 0.05  # an error of 50 counts as one
    assert (open_[:, :3] / open_[:, 3:]).min() > 1000


# ---- what stayed in place ---------------------------------------------------------------------------------------------


def test_pixels_that_stayed_where_they_were_are_not_the_robot() -> None:
    draws = torch.Generator().manual_seed(0)
    texture = F.avg_pool2d(torch.rand(1, 3, 26, 42, generator=draws).double(), 3, 1)
    first, second = texture[..., :24, :32].clone(), texture[..., :24, :32].clone()
    second[..., 3:16] = first[..., :13]  # the left half moves 3 px to the right
    flow = torch.tensor([3.0, 0.0]).double()[None, :, None, None].expand(1, 2, 24, 32)
    carried = warp(second, flow)
    unsure = torch.full((1, 1, 24, 32), 0.6).double()
    found = reweight_by_motion(unsure, first, second, carried)
    torch.testing.assert_close(found[..., 2:11], unsure[..., 2:11], rtol=0, atol=0.02)
    assert found[..., 20:27].max() < 0.6 and found[..., 20:27].mean() < 0.4
    # A mask that is sure, and one that excludes, are hardly changed and not at all.
    assert (1 - reweight_by_motion(torch.full_like(unsure, 1 - 1e-9), first, second, carried)[..., 2:11]).max() < 2e-3
    assert not reweight_by_motion(torch.zeros_like(unsure), first, second, carried).any()


def test_where_nothing_tells_whether_it_moved_the_mask_stands() -> None:
    plain, half = torch.full((1, 3, 8, 8), 0.3), torch.full((1, 1, 8, 8), 0.4)
    torch.testing.assert_close(reweight_by_motion(half, plain, plain, plain), half)
    texture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reweight_by_motion(half, texture, texture, texture), half)  # no step, nothing moved
