"""Direct alignment of two images: Gauss-Newton equations per cell, and robot probability from the brightness errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from jidm.estimation.factors.dense_photometric import cell_equations, reweight_by_motion
from jidm.video.warping import warp

# ---- equations of the remaining motion -------------------------------------------------------------------------------


def test_equations_are_sums_over_the_pixels_of_a_cell() -> None:
    first, warped = torch.rand(2, 1, 3, 8, 12).unbind(0)
    weights = torch.rand(1, 1, 8, 12)
    found = cell_equations(first, warped, weights, noise=0.03, cell_size=2)
    a, b = first[0].numpy().astype(float), warped[0].numpy().astype(float)
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


@pytest.mark.parametrize("scale", [0.5, 1, 2, 3])
def test_the_minimum_is_the_remaining_motion(scale: float) -> None:
    """A ramp moved by d, in pixels of an image of another size."""
    v, u = (x / scale for x in torch.meshgrid(torch.arange(24.0), torch.arange(30.0), indexing="ij"))
    slope = torch.tensor([[0.01, 0.0], [0.0, 0.008], [0.004, -0.006]])
    motion = torch.tensor([0.3, -0.7])

    def ramp(shift: torch.Tensor) -> torch.Tensor:
        return torch.einsum("kc,chw->khw", slope, torch.stack([u - shift[0], v - shift[1]]))[None]

    found = cell_equations(
        ramp(0 * motion), ramp(motion), torch.ones(1, 1, 24, 30), noise=0.1, cell_size=3, scale=scale
    )
    H, gradient = found.hessian[0, :, :, 4, 6], found.gradient[0, :, 4, 6]
    torch.testing.assert_close(-torch.linalg.solve(H, gradient), motion, rtol=0, atol=1e-3)


def test_errors_beyond_the_noise_have_less_weight() -> None:
    one = torch.rand(1, 3, 6, 6) / 4
    other = one + 0.01
    other[..., :3] += 0.5
    weights = torch.ones(1, 1, 6, 6)
    robust, plain = (cell_equations(one, other, weights, noise=n, cell_size=1).cost[0] for n in (0.03, 3.0))
    assert (robust[:, :3].max() < 1.001) and (robust[:, 3:] / robust[:, :3]).min() > 0.05  # the cost saturates
    assert (plain[:, :3] / plain[:, 3:]).min() > 1000


# ---- static pixels ---------------------------------------------------------------------------------------------------


def test_static_pixels_are_less_likely_the_robot() -> None:
    draws = torch.Generator().manual_seed(0)
    texture = F.avg_pool2d(torch.rand(1, 3, 26, 42, generator=draws).double(), 3, 1)
    first, second = texture[..., :24, :32].clone(), texture[..., :24, :32].clone()
    second[..., 3:16] = first[..., :13]  # the left half moves 3 px to the right
    flow = torch.tensor([3.0, 0.0]).double()[None, :, None, None].expand(1, 2, 24, 32)
    warped = warp(second, flow)
    uncertain = torch.full((1, 1, 24, 32), 0.6).double()
    found = reweight_by_motion(uncertain, first, second, warped)
    torch.testing.assert_close(found[..., 2:11], uncertain[..., 2:11], rtol=0, atol=0.02)
    assert found[..., 20:27].max() < 0.6 and found[..., 20:27].mean() < 0.4
    # A prior near 1 hardly changes, a prior of 0 stays 0.
    assert (1 - reweight_by_motion(torch.full_like(uncertain, 1 - 1e-9), first, second, warped)[..., 2:11]).max() < 2e-3
    assert not reweight_by_motion(torch.zeros_like(uncertain), first, second, warped).any()


def test_without_texture_or_motion_the_mask_stays() -> None:
    plain, half = torch.full((1, 3, 8, 8), 0.3), torch.full((1, 1, 8, 8), 0.4)
    torch.testing.assert_close(reweight_by_motion(half, plain, plain, plain), half)
    texture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reweight_by_motion(half, texture, texture, texture), half)  # zero motion
