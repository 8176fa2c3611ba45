"""Robust weights: Tukey and Cauchy, scales by median absolute deviation, overall or per rigid part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jidm.estimation.robust import cauchy, flow_weight, mad, tukey, tukey_weight

MIN_SCALE = 0.01


def biweight(residual: Tensor, scale: Tensor | float) -> Tensor:
    ratio = residual / (4.685 * scale)
    return torch.where(ratio.abs() < 1, (1 - ratio**2) ** 2, torch.zeros_like(ratio)) / scale**2


def residuals(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_without_parts_the_scale_is_the_median_of_the_masked() -> None:
    residual, mask = residuals(200), torch.arange(200) % 3 > 0
    scale = MIN_SCALE + 1.4826 * float(residual[mask].abs().median())
    torch.testing.assert_close(tukey_weight(residual, mask, MIN_SCALE), biweight(residual, scale))


def test_a_part_has_the_scale_of_its_own_median_where_that_is_larger() -> None:
    part = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(1))
    residual = residuals(400) * torch.tensor([0.1, 1.0, 5.0, 0.02]).double()[part]
    mask = residuals(400, seed=2) > -1
    overall = MIN_SCALE + 1.4826 * residual[mask].abs().median()
    own = torch.stack([MIN_SCALE + 1.4826 * residual[mask & (part == k)].abs().median() for k in range(4)])
    for part_scale in (1.0, 0.4):
        scale = torch.maximum(overall, part_scale * own)[part]
        got = tukey_weight(residual, mask, MIN_SCALE, part, part_scale)
        torch.testing.assert_close(got, biweight(residual, scale))
    torch.testing.assert_close(
        tukey_weight(residual, mask, MIN_SCALE, part, 0.0), tukey_weight(residual, mask, MIN_SCALE)
    )


def test_a_part_that_is_off_as_a_whole_keeps_some_weight_and_single_outliers_none() -> None:
    part = torch.arange(200) // 180  # the second has a tenth of the points
    residual = residuals(200) * 0.1 + 3.0 * part
    residual[0] = 3.0
    weight = tukey_weight(residual, torch.ones(200, dtype=torch.bool), MIN_SCALE, part)
    assert weight[0] == 0
    assert (weight[180:] > 0).all()
    assert weight[180:].max() < 0.05 * weight[1:180].max()
    assert (tukey_weight(residual, torch.ones(200, dtype=torch.bool), MIN_SCALE)[180:] == 0).all()


@pytest.mark.parametrize("count", [0, 7])
def test_a_part_with_few_masked_points_has_no_scale_of_its_own(count: int) -> None:
    part = torch.arange(200) // 180
    residual = residuals(200) * 0.1 + 3.0 * part
    mask = torch.arange(200) < 180 + count
    torch.testing.assert_close(tukey_weight(residual, mask, MIN_SCALE, part), tukey_weight(residual, mask, MIN_SCALE))


def test_no_points_and_an_empty_mask_are_finite() -> None:
    empty = torch.zeros(0)
    assert tukey_weight(empty, empty > 0, MIN_SCALE, empty.long()).shape == (0,)
    residual = residuals(20)
    assert tukey_weight(residual, torch.zeros(20, dtype=torch.bool), MIN_SCALE, torch.zeros(20).long()).isfinite().all()


def test_mad_estimates_the_standard_deviation_of_the_masked() -> None:
    residual = 3.0 * residuals(20000).reshape(2, -1)
    residual[1] *= 2
    mask = torch.ones_like(residual, dtype=torch.bool)
    mask[:, ::5] = False
    outliers = torch.where(mask, residual, torch.full_like(residual, 1e6))
    torch.testing.assert_close(mad(outliers, mask), torch.tensor([3.0, 6.0]).double(), rtol=0.03, atol=0)
    assert mad(residual, mask & False).tolist() == [0.0, 0.0]


def test_both_weights_are_one_at_zero_and_fall() -> None:
    t = torch.linspace(0, 3, 31).double()
    for weight in (tukey(t), cauchy(t**2)):
        assert float(weight[0]) == 1.0 and (weight.diff() <= 0).all()
    assert (tukey(t)[t >= 1] == 0).all() and float(cauchy(torch.tensor(1.0))) == 0.5


@pytest.mark.parametrize("kind", ["tukey", "cauchy"])
def test_flow_weights_have_no_unit_and_ignore_pixels_without_confidence(kind: str) -> None:
    length = residuals(1000).abs().reshape(2, -1)
    confidence = (torch.arange(500) % 2).double().expand(2, -1)
    hidden = torch.where(confidence > 0, length, torch.full_like(length, torch.nan))
    weight = flow_weight(length, confidence, kind)
    torch.testing.assert_close(flow_weight(100 * length, 7 * confidence, kind), weight)
    torch.testing.assert_close(flow_weight(hidden, confidence, kind)[:, 1::2], weight[:, 1::2])
    assert ((weight >= 0) & (weight <= 1)).all()
