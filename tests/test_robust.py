"""The robust weight: Tukey's biweight, one scale for all or one a rigid part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jidm.estimation.robust import tukey_weight

FLOOR = 0.01


def by_definition(residual: Tensor, scale: Tensor | float) -> Tensor:
    ratio = residual / (4.685 * scale)
    return torch.where(ratio.abs() < 1, (1 - ratio**2) ** 2, torch.zeros_like(ratio)) / scale**2


def residuals(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_without_parts_it_is_tukeys_on_the_median_of_those_in_use() -> None:
    residual, used = residuals(200), torch.arange(200) % 3 > 0
    scale = FLOOR + 1.4826 * float(residual[used].abs().median())
    torch.testing.assert_close(tukey_weight(residual, used, FLOOR), by_definition(residual, scale))


def test_every_part_is_measured_on_its_own_median_where_that_is_wider() -> None:
    part = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(1))
    residual = residuals(400) * torch.tensor([0.1, 1.0, 5.0, 0.02]).double()[part]
    used = residuals(400, seed=2) > -1
    whole = FLOOR + 1.4826 * residual[used].abs().median()
    own = torch.stack([FLOOR + 1.4826 * residual[used & (part == k)].abs().median() for k in range(4)])
    for excused in (1.0, 0.4):
        scale = torch.maximum(whole, excused * own)[part]
        got = tukey_weight(residual, used, FLOOR, part, excused)
        torch.testing.assert_close(got, by_definition(residual, scale))
    torch.testing.assert_close(tukey_weight(residual, used, FLOOR, part, 0.0), tukey_weight(residual, used, FLOOR))


def test_a_part_that_is_off_as_a_whole_counts_a_little_and_single_outliers_do_not() -> None:
    part = torch.arange(200) // 180  # the second has a tenth of the points
    residual = residuals(200) * 0.1 + 3.0 * part
    residual[0] = 3.0
    weight = tukey_weight(residual, torch.ones(200, dtype=torch.bool), FLOOR, part)
    assert weight[0] == 0
    assert (weight[180:] > 0).all()
    assert weight[180:].max() < 0.05 * weight[1:180].max()
    assert (tukey_weight(residual, torch.ones(200, dtype=torch.bool), FLOOR)[180:] == 0).all()


@pytest.mark.parametrize("seen", [0, 7])
def test_a_part_with_few_points_in_use_has_no_scale_of_its_own(seen: int) -> None:
    part = torch.arange(200) // 180
    residual = residuals(200) * 0.1 + 3.0 * part
    used = torch.arange(200) < 180 + seen
    torch.testing.assert_close(tukey_weight(residual, used, FLOOR, part), tukey_weight(residual, used, FLOOR))


def test_no_points_and_none_in_use_are_finite() -> None:
    nothing = torch.zeros(0)
    assert tukey_weight(nothing, nothing > 0, FLOOR, nothing.long()).shape == (0,)
    residual = residuals(20)
    assert tukey_weight(residual, torch.zeros(20, dtype=torch.bool), FLOOR, torch.zeros(20).long()).isfinite().all()
