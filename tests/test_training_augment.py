"""Image augmentation keeps the motion, masks occluded cells, and depends on seed and step alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jidm.errors import InputError
from jidm.training.data.augment import PRESETS, Augment, AugmentOptions, make_augmentation
from jidm.training.data.batch import PairBatch


def smooth_images(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0.1, 0.9)


def pairs(count: int = 6) -> PairBatch:
    images = smooth_images(count)
    grid, fine = torch.ones(count, 8, 8), torch.ones(count, 16, 16)
    flow = torch.zeros(count, 2, 8, 8)
    flow[:, 0] = 8.0
    q = torch.zeros(count, 2)
    return PairBatch(
        images, images.clone(), q, q + 1, before=images.clone(), flow=flow, weight=grid, mask=fine,
        flow_back=-flow, weight_back=grid, mask_back=fine,
    )  # fmt: skip


def test_none_changes_nothing_and_unknown_names_are_refused() -> None:
    assert make_augmentation("none", 0) is None
    batch, nothing = pairs(), Augment(AugmentOptions(), 0)
    changed = nothing.apply(batch, nothing.sample(0, 6))
    for name, x in batch.tensors():
        torch.testing.assert_close(getattr(changed, name), x, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="did you mean 'full'"):
        make_augmentation("ful", 0)


@pytest.mark.parametrize("level", ["light", "full"])
def test_changes_depend_on_seed_and_step_and_are_sharded_like_the_batch(level: str) -> None:
    one, same, other = (make_augmentation(level, seed) for seed in (3, 3, 4))
    assert one and same and other
    batch = pairs()
    a = one.apply(batch, one.sample(5, 6))
    b = same.apply(batch, same.sample(5, 6))
    assert torch.equal(a.first, b.first) and torch.equal(a.weight, b.weight)
    assert not torch.equal(a.first, one.apply(batch, one.sample(6, 6)).first)
    assert not torch.equal(a.first, other.apply(batch, other.sample(5, 6)).first)
    part = one.apply(batch[1::2], one.sample(5, 6).shard(1, 2))
    for name, x in part.tensors():
        torch.testing.assert_close(x, getattr(a, name)[1::2], rtol=0, atol=1e-6)
    assert torch.equal(batch.first, smooth_images(6))  # the input is not modified
    assert a.first.min() >= 0 and a.first.max() <= 1 and (a.first - batch.first).abs().mean() > 0.01
    assert torch.equal(a.q, batch.q)


def test_all_frames_of_a_pair_change_alike() -> None:
    augment = Augment(replace(PRESETS["light"], noise=0.0, flicker=0.0), 0)
    changed = augment.apply(pairs(), augment.sample(1, 6))
    assert torch.equal(changed.first, changed.second) and torch.equal(changed.before, changed.first)
    flickering = Augment(replace(PRESETS["light"], noise=0.0), 0)
    changed = flickering.apply(pairs(), flickering.sample(1, 6))
    assert 1e-4 < (changed.first - changed.second).abs().mean() < 0.02


def test_noise_is_independent_between_frames_and_has_its_standard_deviation() -> None:
    augment = Augment(AugmentOptions(noise=0.05), 0)
    changes = augment.sample(0, 6)
    changed = augment.apply(pairs(), changes)
    noise = changed.first - pairs().first
    torch.testing.assert_close(noise.flatten(1).std(1), changes.noise, rtol=0.1, atol=1e-4)
    assert (
        float(torch.corrcoef(torch.stack([noise.flatten(), (changed.second - pairs().second).flatten()]))[0, 1]) < 0.1
    )


def test_hue_and_saturation_keep_gray_gray() -> None:
    augment = Augment(AugmentOptions(color=0.4), 0)
    changes = augment.sample(0, 6)
    gray = replace(pairs(), first=torch.full((6, 3, 32, 32), 0.5))
    changed = augment.apply(gray, changes).first
    torch.testing.assert_close(changed, changed.mean(1, keepdim=True).expand_as(changed))


@pytest.mark.parametrize(("name", "options"), [("blur", {"blur": 1.0}), ("jpeg", {"jpeg": 1.0})])
def test_blur_and_jpeg_remove_detail_and_keep_the_mean(name: str, options: dict) -> None:
    noisy = replace(pairs(), first=torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    augment = Augment(AugmentOptions(**options), 0)
    changed = augment.apply(noisy, augment.sample(0, 6)).first
    torch.testing.assert_close(changed.mean((2, 3)), noisy.first.mean((2, 3)), rtol=0, atol=0.03)

    def detail(x: torch.Tensor) -> float:
        return float((x[..., 1:] - x[..., :-1]).abs().mean())

    assert detail(changed) < 0.9 * detail(noisy.first)
    assert torch.equal(Augment(AugmentOptions(), 0).apply(noisy, augment.sample(0, 6)).q, noisy.q)


def test_occluded_cells_have_no_weight() -> None:
    augment = Augment(AugmentOptions(erase=1.0), 0)
    batch, changes = pairs(40), augment.sample(0, 40)
    changed = augment.apply(batch, changes)
    touched = {name: (getattr(changed, name) != getattr(batch, name)).any(1) for name in ("first", "second")}
    cells = {name: torch.nn.functional.max_pool2d(x[:, None].float(), 4)[:, 0] > 0 for name, x in touched.items()}
    assert cells["first"].float().mean() > 0.03
    fine = torch.nn.functional.max_pool2d(touched["first"][:, None].float(), 2)[:, 0] > 0
    assert changed.weight[cells["first"]].sum() == 0 and changed.mask[fine].sum() == 0
    assert changed.weight_back[cells["second"]].sum() == 0
    # Flow leads two cells to the right: cells that land behind the box of the second frame have no weight either.
    lands = torch.nn.functional.pad(cells["second"].float(), (0, 2))[:, :, 2:] > 0
    assert lands.any() and changed.weight[lands].sum() == 0
    free = torch.nn.functional.max_pool2d((cells["first"] | lands)[:, None].float(), 3, 1, 1)[:, 0] == 0
    free[:, :, -3:] = False  # flow out of the image counts as landing at its edge
    # A box may cover less than half a pixel: it changes no pixel, but its cell loses its weight.
    shown = torch.nn.functional.avg_pool2d(changed.mask, 2)
    assert changed.weight[free].mean() > 0.995 and shown[free].mean() > 0.995
    assert not torch.equal(cells["first"], cells["second"])  # the occluder drifts
