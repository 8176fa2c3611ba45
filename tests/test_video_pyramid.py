"""Brightness pyramid: samples equal the image, at every level, size and position."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from jidm.video.pyramid import BrightnessPyramid

SIZES = [(120, 160), (121, 161), (97, 203), (240, 131), (99, 98), (101, 103)]
LEVELS = range(4)


def grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    v, u = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return u, v


def gray(image: Tensor) -> Tensor:
    return image.expand(3, *image.shape)


def plane_wave(u: Tensor, v: Tensor, k: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """A wave of wave number k [rad/px], and its gradient."""
    phase = k[0] * u + k[1] * v
    return 0.5 + 0.4 * phase.sin(), 0.4 * phase.cos()[..., None] * torch.tensor(k).double()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("level", LEVELS)
def test_a_ramp_is_sampled_exactly(size: tuple[int, int], level: int) -> None:
    """Blurs and means do not change a ramp, so value and slope are exact, and any shift is detected."""
    height, width = size
    u, v = grid(height, width)
    pyramid = BrightnessPyramid.from_frame(gray(0.1 + 0.003 * u + 0.002 * v))
    assert level < len(pyramid) or min(size) < 24 * 2**level
    if level >= len(pyramid):
        return
    away = 12.0 * 2**level  # extent of the influence of the replicated border
    where = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)).double()
    uv = away + where * (torch.tensor([width, height]) - 1 - 2 * away).clamp(min=0)
    if min(size) <= 2 * away + 2:
        uv = torch.tensor([[(width - 1) / 2, (height - 1) / 2]]).double()
    brightness, gradient = pyramid.sample(level, uv)
    expected = 0.1 + 0.003 * uv[:, 0] + 0.002 * uv[:, 1]
    if min(size) > 2 * away + 2:
        torch.testing.assert_close(brightness, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(gradient, torch.tensor([[0.003, 0.002]]).double().expand_as(gradient))
    else:
        torch.testing.assert_close(brightness, expected, rtol=0, atol=0.003)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_gradient_equals_that_of_a_smooth_image(size: tuple[int, int], level: int) -> None:
    """Blur scales a wave by one known factor; after that factor value and gradient are the analytic ones."""
    height, width = size
    u, v = grid(height, width)
    k = (0.09, -0.06)
    pyramid = BrightnessPyramid.from_frame(gray(plane_wave(u, v, k)[0]))
    if level >= len(pyramid):
        return
    away = 10.0 * 2**level
    where = torch.rand(400, 2, generator=torch.Generator().manual_seed(1)).double()
    uv = away + where * (torch.tensor([width, height]) - 1 - 2 * away)
    brightness, gradient = pyramid.sample(level, uv)
    value, slope = plane_wave(uv[:, 0], uv[:, 1], k)
    swing = value - 0.5
    attenuation = float((brightness - 0.5) @ swing / (swing @ swing))
    assert 0.75 < attenuation <= 1.0 + 1e-6
    assert float((brightness - 0.5 - attenuation * swing).abs().max()) < 0.012
    assert float((gradient - attenuation * slope).abs().max()) < 0.03 * 0.4 * math.hypot(*k) + 0.002 * level


@pytest.mark.parametrize("size", SIZES)
def test_levels_are_aligned(size: tuple[int, int]) -> None:
    """The centroid of a blob is the same on every level; a shift by half a pixel of a level is detected."""
    height, width = size
    u, v = grid(height, width)
    center = (width * 0.47 + 0.3, height * 0.52 - 0.2)
    blob = 0.9 * torch.exp(-((u - center[0]) ** 2 + (v - center[1]) ** 2) / (2 * 6.0**2))
    pyramid = BrightnessPyramid.from_frame(gray(blob))
    uv = torch.stack([u, v], dim=-1)
    assert len(pyramid) >= 2
    for level in range(min(len(pyramid), 3)):
        brightness, _ = pyramid.sample(level, uv)
        centroid = (brightness[..., None] * uv).sum((0, 1)) / brightness.sum()
        assert float((centroid - torch.tensor(center)).abs().max()) < 0.02, level


def test_gradient_agrees_with_differences_of_samples() -> None:
    random = torch.rand(3, 91, 117, generator=torch.Generator().manual_seed(3)).double()
    pyramid = BrightnessPyramid.from_frame(random)
    for level in range(len(pyramid)):
        h, w = pyramid.levels[level].shape[-2:]
        v, u = torch.meshgrid(torch.arange(4, h - 4), torch.arange(4, w - 4), indexing="ij")
        at_nodes = (torch.stack([u, v], dim=-1).double() + 0.5) * 2**level - 0.5
        _, gradient = pyramid.sample(level, at_nodes)
        for axis in range(2):
            step = torch.zeros(2).double()
            step[axis] = 2.0**level
            central = (pyramid.sample(level, at_nodes + step)[0] - pyramid.sample(level, at_nodes - step)[0]) / (
                2 * 2.0**level
            )
            # Scharr averages the central difference over three rows, so the two differ as neighboring rows do.
            correlation = torch.corrcoef(torch.stack([central.flatten(), gradient[..., axis].flatten()]))[0, 1]
            assert float(correlation) > 0.9
            slope = float((central * gradient[..., axis]).sum() / central.square().sum())
            assert 0.6 < slope < 1.05


def test_brightness_is_luma() -> None:
    for channel, luma in enumerate((0.299, 0.587, 0.114)):
        frame = torch.zeros(3, 60, 80)
        frame[channel] = 1.0
        brightness, _ = BrightnessPyramid.from_frame(frame).sample(0, torch.tensor([[40.0, 30.0]]))
        assert float(brightness) == pytest.approx(luma, abs=1e-6)


def test_positions_outside_are_clamped_and_reported() -> None:
    pyramid = BrightnessPyramid.from_frame(gray(torch.linspace(0, 1, 80).double().expand(60, 80)))
    uv = torch.tensor([[-50.0, 30.0], [500.0, 30.0], [40.0, 30.0], [78.0, 30.0], [40.0, 1.0]]).double()
    brightness, gradient = pyramid.sample(0, uv)
    assert brightness.isfinite().all()
    assert gradient.isfinite().all()
    assert float(brightness[0]) < 0.05
    assert float(brightness[1]) > 0.95
    assert pyramid.inside(uv).tolist() == [False, False, True, False, False]
    assert pyramid.inside(uv, margin=0.5).tolist() == [False, False, True, True, True]
    assert pyramid.size == (60, 80)


@pytest.mark.parametrize(("size", "levels"), [((30, 40), 1), ((60, 80), 2), ((240, 320), 4), ((20, 900), 1)])
def test_levels_end_where_the_next_would_be_too_small(size: tuple[int, int], levels: int) -> None:
    assert len(BrightnessPyramid.from_frame(torch.rand(3, *size))) == levels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_dtype_and_shape_of_points(dtype: torch.dtype) -> None:
    pyramid = BrightnessPyramid.from_frame(torch.rand(3, 60, 80, dtype=dtype))
    brightness, gradient = pyramid.sample(1, torch.full((2, 5, 2), 20.0, dtype=dtype))
    assert brightness.shape == (2, 5)
    assert gradient.shape == (2, 5, 2)
    assert brightness.dtype == gradient.dtype == dtype
    empty, _ = pyramid.sample(0, torch.zeros(0, 2, dtype=dtype))
    assert empty.shape == (0,)
