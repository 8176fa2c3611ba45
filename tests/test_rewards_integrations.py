"""The reward in other software: callers written from the code of flow_grpo, of EVA's trainer, of DanceGRPO and of TRL.

Each stand-in calls a reward and uses its answer as that project does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_rewards_executability import FPS, GOOD, reward, scene  # noqa: F401

from jidm import JacobianIDM
from jidm.errors import InputError, VideoError
from jidm.rewards import TERMS, ExecutabilityReward
from jidm.rewards.integrations import VideoAlignReward, eva_trainer, flow_grpo, trl
from jidm.video.io import write_video

pytest.importorskip("pybullet", reason="renders the robot: extra sim")


# ---- flow_grpo ------------------------------------------------------------------------------------------------------


def multi_score(device: str, table: dict[str, tuple[Any, float]]) -> Callable[..., Any]:
    """flow_grpo's reward: a weighted sum over its table, where a factory takes a device if it names one."""
    fns = {}
    for name, (factory, _) in table.items():
        takes_device = (
            "device" in inspect.unwrap(factory).__code__.co_varnames
        )  # wrapped by the type checks of the tests
        fns[name] = factory(device) if takes_device else factory()

    def fn(images: Any, prompts: Any, metadata: Any, only_strict: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
        total: list[Any] = []
        details: dict[str, Any] = {}
        for name, (_, weight) in table.items():
            scores, _ = fns[name](images, prompts, metadata)
            details[name] = scores
            weighted = [weight * score for score in scores]
            total = [a + b for a, b in zip(total, weighted)] if total else weighted
        return {**details, "avg": total}, {}

    return fn


def trainer_reads(fn: Callable[..., Any], images: Any, prompts: Any, metadata: Any) -> dict[str, torch.Tensor]:
    """What flow_grpo's trainer makes of a reward: called in a pool of threads, then as tensors by name."""
    with ThreadPoolExecutor(8) as pool:
        rewards, _ = pool.submit(fn, images, prompts, metadata, only_strict=True).result()
    return {key: torch.as_tensor(value).float() for key, value in rewards.items()}


def constant_tensor(images: Any, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    return torch.ones(len(prompts)), {}


def constant_array(images: Any, prompts: Any, metadata: Any) -> tuple[np.ndarray, dict[str, Any]]:
    return np.ones(len(prompts)), {}


def test_flow_grpo_weights_and_sums_the_scores(scene, reward):  # noqa: F811
    frames, q, _ = scene
    expected = reward(frames, q0=q[:, 0], fps=FPS).float()
    prompts, metadata = ("reach",) * GOOD, tuple({"q0": x.tolist()} for x in q[:, 0])
    table = {
        "ours": (flow_grpo(reward, fps=FPS), 0.5),
        "tensors": (lambda: constant_tensor, 2.0),
        "arrays": (lambda: constant_array, 3.0),
    }
    for order in (list(table), list(table)[::-1]):
        got = trainer_reads(multi_score("cpu", {k: table[k] for k in order}), frames, prompts, metadata)
        assert torch.allclose(got["avg"], 0.5 * expected + 5) and torch.allclose(got["ours"], expected)
    whole = trainer_reads(flow_grpo(reward, fps=FPS, detailed=True)("cpu"), frames, prompts, metadata)
    assert torch.allclose(whole["avg"], expected) and set(TERMS) < set(whole)
    assert all(len(values) == GOOD and bool(values.isfinite().all()) for values in whole.values())


def test_group_with_a_bad_video_stays_finite(scene, reward):  # noqa: F811
    frames, q, _ = scene
    bad = frames.clone()
    bad[2] = math.nan
    scores, _ = flow_grpo(reward, fps=FPS)("cpu")(bad, ["reach"] * GOOD, [{"q0": x} for x in q[:, 0]])
    assert scores[2] == 0.0 and min(scores[:2] + scores[3:]) > 0


def test_as_many_scores_as_prompts_or_a_refusal(scene, reward):  # noqa: F811
    frames, q, _ = scene
    fn = flow_grpo(reward, fps=FPS)("cpu")
    assert fn(frames[:0], [], []) == ([], {}) == fn(frames[:0], None, None)
    poses = [{"q0": x} for x in q[:, 0]]
    assert fn(frames, None, poses) == fn(frames, ["reach"] * GOOD, poses)
    with pytest.raises(InputError, match="5 videos came with 2 prompts"):
        fn(frames, ["a", "b"], [])
    with pytest.raises(InputError, match="1 entries of metadata"):
        fn(frames, ["reach"] * GOOD, [{}])
    for pictures, prompts in ((frames[:2, 0], ["a", "b"]), (frames[0], None), (frames[0].numpy(), ["a"])):
        with pytest.raises(VideoError, match="these are pictures, or one video"):
            fn(pictures, prompts, [])
    with pytest.raises(InputError, match="1 videos came with 8 prompts"):
        trl(reward, fps=FPS)(prompts=["a"] * 8, completions=frames[0])


# ---- EVA ------------------------------------------------------------------------------------------------------------


def eva_reads(fn: Callable[..., Any], videos: torch.Tensor, prompts: list[str] | None) -> torch.Tensor:
    """What EVA's trainer makes of a reward: (B, C, T, H, W) in [-1, 1], prompts if its batch has any, metadata per video."""
    metadata = [{"step": 0, "epoch": 2, "phase": "train", "rank": 0, "sample_idx": 1} for _ in range(videos.shape[0])]
    with ThreadPoolExecutor(1) as pool:
        by_name, _ = pool.submit(fn, videos, prompts, metadata).result()
    if "avg" in by_name:
        raw = by_name["avg"]
    else:
        raw = sum(np.array(value) for value in by_name.values() if isinstance(value, (list, np.ndarray)))
    for key, value in by_name.items():  # its evaluation logs all of them
        assert f"{key}: {float(value[0]):.2f}" and torch.as_tensor(value, dtype=torch.float32).shape == (len(videos),)
    return torch.as_tensor(raw, dtype=torch.float32)


def test_evas_trainer(scene):  # noqa: F811
    frames, q, unscaled = scene
    idm = KnowsInitialPose.of(unscaled, q[0, 0])
    own = ExecutabilityReward(idm).fit_scales(frames, fps=FPS)
    fn = eva_trainer(own, fps=FPS)("cpu", checkpoint_path="big_view.pt", save_dir="idm_plots")
    videos, expected = frames.transpose(1, 2) * 2 - 1, own(frames, fps=FPS).float()
    for prompts in (["reach"] * GOOD, None):
        assert torch.allclose(eva_reads(fn, videos, prompts), expected, atol=1e-3)


# ---- DanceGRPO and TRL ----------------------------------------------------------------------------------------------


class KnowsInitialPose(JacobianIDM):
    """For callers that pass no poses; learned fields estimate them."""

    known: np.ndarray

    @classmethod
    def of(cls, unscaled: ExecutabilityReward, q0: np.ndarray) -> KnowsInitialPose:
        idm = unscaled.idm
        made = cls(idm.embodiment, idm.field, idm.flow, limits="none", options=idm.options)
        made.known = q0
        return made

    def decode(self, video, *, q0=None, **how):  # type: ignore[no-untyped-def, override]
        return super().decode(video, q0=self.known if q0 is None else q0, **how)


def dance_grpo_reads(inferencer: Any, video_path: str, prompt: str) -> float:
    """DanceGRPO's call, which makes -1 of every error."""
    try:
        answer = inferencer.reward([video_path], [prompt], use_norm=True)
        return 0.5 * answer[0]["VQ"] + 0.5 * answer[0]["MQ"]
    except Exception:
        return -1.0


def test_dance_grpo(scene, tmp_path: Path):  # noqa: F811
    frames, q, unscaled = scene
    paths = []
    for k in range(GOOD):
        paths.append(str(tmp_path / f"{k}.mp4"))
        write_video(paths[-1], frames[k], fps=FPS)
    own = ExecutabilityReward(KnowsInitialPose.of(unscaled, q[0, 0])).fit_scales(paths)
    integration = VideoAlignReward(own)
    assert dance_grpo_reads(integration, paths[0], "reach") == pytest.approx(0.5 * float(own(paths[0])))
    out = integration.reward([*paths[:1], str(tmp_path / "none.mp4")])
    assert [set(x) >= {"VQ", "MQ", "TA", "Overall", "reasons", "problem"} for x in out] == [True, True]
    assert 0 < out[0]["MQ"] <= 10 and out[0]["problem"] is None
    assert out[1]["MQ"] == 0 and "none.mp4" in out[1]["problem"]


def test_trl(scene, reward):  # noqa: F811
    frames, q, _ = scene
    completions = [*frames[:2].numpy(), np.full_like(frames[0].numpy(), np.nan)]
    fn = trl(reward, fps=FPS)
    got = fn(prompts=["a"] * 3, completions=completions, q0=[q[0, 0], q[1, 0], q[2, 0]], trainer_state=None)
    assert got[:2] == pytest.approx(reward(frames[:2], q0=q[:2, 0], fps=FPS).tolist()) and got[2] is None
    assert fn(None, completions, q0=[q[0, 0], q[1, 0], q[2, 0]]) == got


# ---- all ------------------------------------------------------------------------------------------------------------


def test_a_reward_without_scales_is_refused_when_the_integration_is_made(scene):  # noqa: F811
    *_, unscaled = scene
    for make in (flow_grpo, eva_trainer, trl):
        with pytest.raises(InputError, match="no scales yet"):
            make(unscaled, fps=FPS)
    with pytest.raises(InputError, match="no scales yet"):
        VideoAlignReward(unscaled)


def pil(frames: torch.Tensor) -> list[list[Any]]:
    from PIL import Image

    return [[Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in video] for video in frames]


@pytest.mark.parametrize("kind", ["np", "pt", "pil"])
def test_outputs_of_diffusers_pipelines(scene, reward, kind: str):  # noqa: F811
    frames, q, unscaled = scene
    two = (frames[:2] * 255).round() / 255
    starts, expected = q[:2, 0], reward(two, q0=q[:2, 0], fps=FPS)
    forms = {"np": two.permute(0, 1, 3, 4, 2).numpy(), "pt": two, "pil": pil(two)}
    output = SimpleNamespace(frames=forms[kind])
    one = [SimpleNamespace(frames=forms[kind][k : k + 1]) for k in (0, 1)]  # one call of the pipeline per prompt
    for given in (output, one):
        assert torch.allclose(reward(given, q0=starts, fps=FPS), expected, atol=1e-5)
    score, _ = reward.explain(one[0], q0=starts[0], fps=FPS)
    assert float(score.reward) == pytest.approx(float(expected[0]), abs=1e-5)
    metadata = [{"q0": x} for x in starts]
    layout = "BTCHW" if kind == "pt" else "BTHWC"
    scores, _ = (
        flow_grpo(reward, fps=FPS, layout=layout)("cpu")(output, ["a", "b"], metadata)
        if kind != "pil"
        else (
            trl(reward, fps=FPS)(["a", "b"], output, q0=list(starts)),
            {},
        )
    )
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)
    decoded = unscaled.idm.decode(output, q0=starts, fps=FPS)
    assert torch.equal(decoded.position, unscaled.idm.decode(two, q0=starts, fps=FPS).position)


def test_latents_are_refused(scene, reward):  # noqa: F811
    *_, unscaled = scene
    latents = SimpleNamespace(frames=torch.randn(1, 16, 3, 12, 20, generator=torch.Generator().manual_seed(0)))
    calls: list[Callable[[], Any]] = [
        lambda: reward(latents, fps=FPS),
        lambda: reward([latents], fps=FPS),
        lambda: trl(reward, fps=FPS)(["a"], latents),
        lambda: unscaled.idm.decode(latents, fps=FPS),
        lambda: eva_trainer(reward, fps=FPS)("cpu")(latents, None, None),
    ]
    for call in calls:
        with pytest.raises(VideoError, match=r"VAE|outside value_range"):
            call()
