"""Image corruptions have the stated kind and strength, and their comparison with clean video is right."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from written_poses import InMemoryDataset, PixelPoseModel

from jidm.errors import InputError
from jidm.evaluation import corruptions
from jidm.evaluation.evaluate import evaluate
from jidm.evaluation.ground_truth import GroundTruthView, make_surface_field
from jidm.evaluation.held_out import EvalClip, HeldOut
from jidm.evaluation.summary import compare_corrupted
from jidm.robot.registry import load_embodiment

NAMES = ("joint_1", "joint_2")


@pytest.fixture(scope="module")
def clip() -> EvalClip:
    """Three frames of noise over the motion of a finger."""
    robot = load_embodiment("planar_finger_2")
    view = GroundTruthView(make_surface_field(robot), (robot.camera().resized(64, 64),), None, None)
    q = torch.tensor([[0.0, 0.0], [0.3, 0.3], [0.6, 0.6]], dtype=torch.float64)
    video = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return EvalClip(5, video, q, q, robot.joint_names, robot.joint_names, 16.0, (0, 1, 2), view)


@pytest.mark.parametrize("name", sorted(corruptions.CORRUPTIONS))
def test_every_corruption_is_deterministic(clip: EvalClip, name: str):
    corrupt = corruptions.CORRUPTIONS[name]
    out = corrupt(clip.video, clip)
    assert out.shape == clip.video.shape and out.dtype == clip.video.dtype
    assert float(out.min()) >= -1e-6 and float(out.max()) <= 1 + 1e-6 and bool(out.isfinite().all())
    assert not torch.equal(out, clip.video) and torch.equal(out, corrupt(clip.video, clip))
    if name in ("background", "occlusion"):
        assert not torch.equal(out, corrupt(clip.video, replace(clip, index=6)))


def test_background_keeps_the_robot_and_nothing_else(clip: EvalClip):
    out = corruptions.replace_background(clip.video, clip)
    for t in range(3):
        mask = clip.ground_truth.robot_mask(t, clip.q[t]).bool()
        kept = (out[t] == clip.video[t]).all(0)
        assert bool(kept[mask].all()) and 0 < int(mask.sum()) < 1500
        # One pixel around it is kept too, nothing beyond.
        near = torch.nn.functional.max_pool2d(mask[None, None].float(), 3, 1, 1)[0, 0].bool()
        assert not bool(kept[~near].any())
    off = ~torch.stack([clip.ground_truth.robot_mask(t, clip.q[t]).bool() for t in range(3)]).any(0)
    off = torch.nn.functional.max_pool2d((~off)[None, None].float(), 5, 1, 2)[0, 0] == 0
    assert torch.equal(out[0][:, off], out[2][:, off])  # the background is static
    with pytest.raises(InputError, match="robot and camera are known"):
        corruptions.replace_background(clip.video, replace(clip, ground_truth=None))


def test_occlusion_hides_a_fifth_at_the_same_place_in_all_frames(clip: EvalClip):
    out = corruptions.occlude(clip.video, clip)
    hidden = (out != clip.video).any(1)
    assert torch.equal(hidden[0], hidden[1]) and torch.equal(hidden[0], hidden[2])
    assert 0.19 <= float(hidden[0].float().mean()) <= 0.25
    assert torch.equal(out[0][:, hidden[0]], out[2][:, hidden[0]])


def test_jpeg_agrees_with_another_encoder(clip: EvalClip):
    from PIL import Image

    smooth = torch.nn.functional.interpolate(clip.video[:1, :, :8, :8], size=(64, 64), mode="bilinear")
    found = corruptions.compress_jpeg(smooth, clip)[0]
    memory = io.BytesIO()
    Image.fromarray((smooth[0].movedim(0, -1) * 255).round().byte().numpy()).save(memory, "JPEG", quality=30)
    expected = torch.from_numpy(np.array(Image.open(memory))).movedim(-1, 0).float() / 255
    damage = (expected - smooth[0]).abs().mean()
    assert float(damage) > 0.005
    assert float((found - expected).abs().mean()) < 0.35 * float(damage)


def test_blur_has_the_stated_width(clip: EvalClip):
    impulse = torch.zeros(1, 3, 129, 129)
    impulse[..., 64, 64] = 1.0
    out = corruptions.blur(impulse, clip)[0, 0]
    x = torch.arange(129) - 64.0
    assert float(out.sum()) == pytest.approx(1.0, abs=1e-4)
    assert float((out.sum(0) * x**2).sum()) ** 0.5 == pytest.approx(corruptions.BLUR_SIGMA * 129, rel=0.05)


def test_dead_leaves_have_edges_at_all_scales():
    image = corruptions.dead_leaves(128, 128, np.random.default_rng(0))
    assert image.shape == (128, 128, 3) and image.min() >= 0 and image.max() <= 1
    steps = np.abs(np.diff(image, axis=1)).max(-1)
    assert (steps > 0.2).mean() > 0.02 and (steps == 0).mean() > 0.5
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 40


# ---- comparison with clean video -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    t = np.arange(40)[:, None] / 16
    return HeldOut(InMemoryDataset({k: 0.5 * np.sin(2 * t + [k, 2.0 * k]) for k in range(3)}, NAMES))


def test_rise_is_the_ratio_of_errors(held_out: HeldOut):
    clean = evaluate(PixelPoseModel(NAMES, scale=0.9), held_out)
    worse = evaluate(PixelPoseModel(NAMES, scale=0.8), held_out)
    result = compare_corrupted(clean, worse)
    assert result["nve_rise"] == pytest.approx(2.0, rel=1e-3) and result["nve_trusted_rise"] == pytest.approx(
        2.0, rel=1e-3
    )
    assert result["invalid_share"] == result["widened_share"] == result["unobservable_share"] == 0.0


def test_wider_uncertainty_and_invalid_steps_are_reported(held_out: HeldOut):
    clean = evaluate(PixelPoseModel(NAMES, scale=0.9), held_out)
    wider = compare_corrupted(clean, evaluate(PixelPoseModel(NAMES, scale=0.5, std=0.1), held_out))
    assert wider["widened_share"] == 1.0 and wider["nve_trusted"] is None and wider["coverage_95"] == 1.0
    gap = compare_corrupted(clean, evaluate(PixelPoseModel(NAMES, scale=0.9, invalid=7), held_out))
    assert gap["invalid_share"] == pytest.approx(1 / 39) and gap["nve_rise"] > 1
    assert gap["nve_trusted_rise"] == pytest.approx(1.0, rel=1e-2)


def test_without_decoded_episodes_there_is_no_ratio(held_out: HeldOut):
    class Broken(PixelPoseModel):
        def decode(self, video, **how):
            raise ValueError("no")

    result = compare_corrupted(evaluate(PixelPoseModel(NAMES), held_out), evaluate(Broken(NAMES), held_out))
    assert result["episodes"] == 0 and len(result["failed"]) == 3 and "nve_rise" not in result
