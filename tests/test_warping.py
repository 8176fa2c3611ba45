"""Backward warping, image gradients and the symmetric flow of two first-order motions."""

from __future__ import annotations

import torch

from jidm.video.warping import gradients, symmetric_flow, warp


def test_warping_by_whole_cells_shifts_and_by_zero_is_the_identity() -> None:
    image = torch.rand(2, 3, 9, 7, dtype=torch.float64)
    zero = torch.zeros(2, 2, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(warp(image, zero), image, rtol=0, atol=1e-12)
    flow = zero.clone()
    flow[:, 0], flow[:, 1] = 2, -3
    moved = warp(image, flow)
    torch.testing.assert_close(moved[:, :, 3:, :5], image[:, :, :-3, 2:], rtol=0, atol=1e-12)
    torch.testing.assert_close(moved[:, :, :3, :5], image[:, :, :1, 2:].expand(-1, -1, 3, -1), rtol=0, atol=1e-12)


def test_warping_is_bilinear_between_cells() -> None:
    v, u = torch.meshgrid(torch.arange(8.0), torch.arange(9.0), indexing="ij")
    ramp = (2 * u - 3 * v + 1)[None, None].double()
    flow = torch.stack([torch.full((8, 9), 0.3), torch.full((8, 9), -0.6)])[None].double()
    torch.testing.assert_close(warp(ramp, flow)[..., 1:, :-1], ramp[..., 1:, :-1] + 2 * 0.3 + 3 * 0.6)


def test_the_flow_of_a_crop_is_warped_from_its_corner() -> None:
    image, flow = torch.rand(1, 2, 9, 11).double(), torch.rand(1, 2, 9, 11).double() - 0.5
    whole = warp(image, flow)
    torch.testing.assert_close(warp(image, flow[..., 2:6, 3:9], (2, 3)), whole[..., 2:6, 3:9])


def test_symmetric_flow_of_a_uniform_motion_is_that_motion_and_odd_in_time() -> None:
    forward = torch.full((1, 2, 8, 10), 3.0)
    torch.testing.assert_close(symmetric_flow(forward, forward, 4), forward)
    one, two = torch.randn(2, 1, 2, 8, 10).unbind(0)
    torch.testing.assert_close(symmetric_flow(one, 0 * two, 4), one / 2)
    torch.testing.assert_close(symmetric_flow(-one, -two, 4), -(one + warp(two, -one / 4)) / 2)


def test_gradients_of_a_ramp() -> None:
    v, u = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    along_u, along_v = gradients((5 * u - 2 * v)[None, None])
    torch.testing.assert_close(along_u[..., 1:-1], torch.full((1, 1, 6, 5), 5.0))
    torch.testing.assert_close(along_v[..., 1:-1, :], torch.full((1, 1, 4, 7), -2.0))
    # At the border one of the two neighbors is replicated.
    torch.testing.assert_close(along_u[..., 0], torch.full((1, 1, 6), 2.5))
