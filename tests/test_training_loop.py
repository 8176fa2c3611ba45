"""The training loop: it learns, resumes bit for bit after being killed, and stops with a clear message."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded import rendered_dataset
from rendered import clip
from safetensors.torch import load_file
from standin import KIND, StandIn, blob_dataset

from jidm import load_embodiment, model_registry
from jidm.checkpoint import load_checkpoint
from jidm.errors import CheckpointError, DatasetError, InputError, JidmError
from jidm.model_registry import train
from jidm.training.config import TrainConfig
from jidm.training.data.batch import PairBatch
from jidm.training.data.clips import Clip
from jidm.training.data.datamodule import joint_order, prepare_training, split_episodes
from jidm.training.optimizer import learning_rate

pytest.importorskip("lightning")


@pytest.fixture(autouse=True)
def stand_in_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, where in KIND.items():
        monkeypatch.setitem(model_registry.KINDS, kind, where)


def config(tmp_path: Path, name: str = "model", **changed: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "data": str(tmp_path / "blobs"), "out": str(tmp_path / name), "kind": "stand_in", "steps": 40, "batch_size": 8,
        "flow": "none", "augment": "none", "warmup_steps": 5, "learning_rate": 1e-2, "validate_every": 20, "strides": (1, 2),
        "ema": 0.9, "accelerator": "cpu", "cache": str(tmp_path / "cache"), "validation": 0.2, "validation_pairs": 16,
    }  # fmt: skip
    return TrainConfig(**{**given, **changed})


def weights(where: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(where) / "model.safetensors")


def logged(settings: TrainConfig, part: str) -> list[dict[str, Any]]:
    lines = [json.loads(x) for x in (settings.run_folder / "log.jsonl").read_text().splitlines()]
    return [{**x["values"], "step": x["step"]} for x in lines if x["part"] == part]


# ---- learning and saving ---------------------------------------------------------------------------------------------


def test_it_learns_and_records_what_it_learned_from(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs")
    settings = config(tmp_path, steps=300, validate_every=100, test_episodes="5")
    out = train(settings, dataset=dataset)
    validation = logged(settings, "validation")
    assert [x["step"] for x in validation] == [100, 200, 300]
    assert validation[-1]["nve"] < 0.6 and validation[-1]["nve"] < validation[0]["nve"]  # predicting no motion scores 1
    checkpoint = load_checkpoint(out)
    training = checkpoint.training
    assert training["data"]["test_episodes"] == [5] and 5 not in training["data"]["train_episodes"]
    assert training["data"]["data_hash"] == dataset.content_hash and training["seed"] == 0
    assert training["recipe"]["steps"] == 300 and training["recipe"]["strides"] == [1, 2]
    assert training["result"]["validation"]["nve"] == pytest.approx(validation[-1]["nve"])
    assert training["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(training)  # no paths of this machine
    model = model_registry.load_model(out)
    assert isinstance(model, StandIn) and not model.training
    assert checkpoint.config["joint_names"] == ["across", "down"]


def test_uncertainty_is_calibrated_on_pairs_of_the_smallest_stride(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, calibrated, clips = config(tmp_path, strides=(2, 5), steps=2, validate_every=1), [], []

    def calibrate(self: StandIn, batches: list[PairBatch], rounds: int) -> None:
        calibrated.append((torch.cat([x.delta_q for x in batches]), rounds))

    def calibrate_videos(self: StandIn, found: Iterator[Clip]) -> None:
        clips.append(list(found))

    monkeypatch.setattr(StandIn, "calibrate_uncertainty", calibrate, raising=False)
    monkeypatch.setattr(StandIn, "calibrate_video_uncertainty", calibrate_videos, raising=False)
    dataset = blob_dataset(tmp_path / "blobs")
    train(settings, dataset=dataset)
    assert [rounds for _, rounds in calibrated] == [1, 2] and torch.equal(calibrated[0][0], calibrated[1][0])
    setup = prepare_training(settings, StandIn, dataset, None, print)
    assert setup.validation is not None
    held = {int(x) for batch in setup.validation.validation_batches(16) for x in batch.episode}
    (found,) = clips  # once, with the final weights, and every second frame
    assert {len(x.frames) for x in found} == {-(-dataset.episode(i).length // 2) for i in held}
    states = [torch.from_numpy(np.asarray(dataset.episode(i).state)).float() for i in held]
    steps = torch.cat([q[2:] - q[:-2] for q in states])
    distance = (calibrated[0][0][:, None] - steps).abs().amax(-1).amin(-1)
    assert distance.max() < 1e-6  # each of them is a step over two frames
    all_strides = torch.cat([batch.delta_q for batch in setup.validation.validation_batches(16)])
    assert (all_strides[:, None] - steps).abs().amax(-1).amin(-1).max() > 1e-3  # among all pairs there are longer ones


def test_the_averaged_weights_are_saved(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs")
    raw = []
    for steps in range(1, 5):  # the raw weights after each step; with a constant learning rate, so that the runs agree
        settings = config(tmp_path, f"raw{steps}", steps=steps, ema=0.0, final_lr_ratio=1.0)
        raw.append(weights(train(settings, dataset=dataset))["first.weight"])
    torch.manual_seed(0)
    mean = StandIn.from_data(("a", "b"), ("revolute",) * 2, 16, 16, _stats(2)).first.weight.detach().clone()
    for step, now in enumerate(raw, start=1):
        mean = mean.lerp(now, 1 - min(0.9, (1 + step) / (10 + step)))
    saved = weights(train(config(tmp_path, "mean", steps=4, final_lr_ratio=1.0), dataset=dataset))["first.weight"]
    torch.testing.assert_close(saved, mean, rtol=1e-5, atol=1e-7)
    assert (saved - raw[-1]).abs().max() > 1e-4


def _stats(n: int):
    from jidm.training.data.batch import JointStats

    return JointStats(*[(1.0,) * n] * 5)


def test_test_episodes_are_never_opened_and_the_splits_are_disjoint(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs", episodes=12)
    opened: set[int] = set()
    episode = dataset.episode
    dataset.episode = lambda index: (opened.add(index), episode(index))[1]  # type: ignore[method-assign]
    settings = config(tmp_path, steps=2, test_episodes="last-digit:1,6", train_episodes="0-9")
    parts = split_episodes(settings, dataset)
    assert sorted(sum(parts, ())) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    assert parts[2] == (1, 6, 11) and len(parts[1]) == 2
    train(settings, dataset=dataset)
    assert opened == set(parts[0]) | set(parts[1])
    with pytest.raises(DatasetError, match="no episodes are left"):
        split_episodes(replace(settings, train_episodes="1"), dataset)


def test_exact_flow_reaches_the_model_and_a_robot_is_recorded(tmp_path: Path) -> None:
    dataset = rendered_dataset(tmp_path / "rendered", {0: clip("planar_finger_3", frames=8)})
    robot = load_embodiment("planar_finger_3")
    out = train(config(tmp_path, steps=2, flow="exact", height=64, width=80, embodiment=robot.name), dataset=dataset)
    checkpoint = load_checkpoint(out)
    assert checkpoint.training["data"]["flow"] == "exact"
    checkpoint.check_embodiment(robot)
    with pytest.raises(DatasetError, match="exact flow is not available, it holds no depth"):
        train(config(tmp_path, "other", flow="exact"), dataset=blob_dataset(tmp_path / "blobs"))


def test_exact_flow_is_refused_where_joints_are_in_another_order_than_the_recipes_robot(tmp_path: Path) -> None:
    dataset = rendered_dataset(tmp_path / "rendered", {0: clip("planar_finger_3", frames=4)})
    dataset.recipe = {"embodiment": "planar_finger_3"}
    settings = config(tmp_path, steps=1, flow="exact", height=64, width=80)
    train(settings, dataset=dataset)
    dataset.joint_names = dataset.joint_names[::-1]
    with pytest.raises(DatasetError, match="not in the order of 'planar_finger_3'; pass --embodiment"):
        train(config(tmp_path, "other", steps=1, flow="exact", height=64, width=80), dataset=dataset)


# ---- the schedule and the budget -------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_follows_a_half_cosine(tmp_path: Path) -> None:
    settings = config(tmp_path, warmup_steps=10, learning_rate=2.0, final_lr_ratio=0.1)
    assert learning_rate(settings, 0, 0.0) == pytest.approx(0.2)
    assert learning_rate(settings, 9, 0.0) == pytest.approx(2.0)
    assert learning_rate(settings, 1000, 0.5) == pytest.approx(2.0 * 0.55)
    assert learning_rate(settings, 1000, 1.0) == pytest.approx(0.2)
    rates = [learning_rate(settings, 1000, x / 50) for x in range(60)]
    assert all(a >= b for a, b in zip(rates, rates[1:]))  # noqa: RUF007


def test_a_budget_of_time_is_kept_across_sessions(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs")
    settings = config(tmp_path, steps=None, minutes=1.2 / 60, validate_every=10_000)
    started = time.monotonic()
    train(settings, dataset=dataset)
    assert time.monotonic() - started < 6
    (line,) = logged(settings, "validation")
    assert line["step"] > 20
    train(replace(settings, resume=True), dataset=dataset)  # nothing is left of the budget
    assert logged(settings, "validation")[-1]["step"] <= line["step"] + 1


def test_patience_ends_the_run_and_the_best_weights_are_kept(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs")
    # A learning rate that is far too high makes the loss grow.
    settings = config(
        tmp_path,
        steps=400,
        learning_rate=30.0,
        validate_every=2,
        patience=3,
        save_policy="best",
        ema=0.0,
        grad_clip=1e9,
    )
    out = train(settings, dataset=dataset)
    found = [x["nve"] for x in logged(settings, "validation")]
    assert len(found) < 100 and min(found) < min(found[-3:])
    assert load_checkpoint(out).training["result"]["validation"]["nve"] == pytest.approx(min(found))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"minutes": 1.0}, "either steps or minutes"),
        ({"steps": 0}, "must be positive"),
        ({"batch_size": 7, "devices": 2}, "does not divide over 2"),
        ({"ema": 1.0}, "ema and validation must be in"),
    ],
)
def test_an_invalid_configuration_is_refused(tmp_path: Path, changed: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        config(tmp_path, **changed)


# ---- numbers that are not finite -------------------------------------------------------------------------------------


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs")
    settings = config(tmp_path, steps=12, options={"nan_from": 4, "nan_until": 7}, ema=0.0, final_lr_ratio=1.0)
    out = train(settings, dataset=dataset)
    assert load_checkpoint(out).training["result"]["bad_steps"] == 3
    # Steps 4 to 6 were skipped: after 4 and after 7 steps the weights are the same.
    snapshots = [
        weights(train(replace(settings, out=str(tmp_path / f"m{steps}"), steps=steps), dataset=dataset))["last.weight"]
        for steps in (3, 4, 7, 8)
    ]
    assert torch.equal(snapshots[1], snapshots[2])
    assert not torch.equal(snapshots[0], snapshots[1]) and not torch.equal(snapshots[2], snapshots[3])


def test_a_run_that_stays_not_finite_ends_with_a_clear_message(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs")
    settings = config(tmp_path, steps=100, options={"nan_from": 5, "nan_until": 1000}, max_bad_steps=6)
    with pytest.raises(JidmError, match="training diverged: 6 steps in a row up to step 11"):
        train(settings, dataset=dataset)


# ---- killed and resumed ----------------------------------------------------------------------------------------------


def killed_and_resumed(tmp_path: Path, steps: int, kills: int, seed: int) -> tuple[TrainConfig, int]:
    """A run that is killed several times and then finished; how often it was killed before its end."""
    dataset = blob_dataset(tmp_path / "blobs")
    settings = config(
        tmp_path,
        "killed",
        steps=steps,
        options={"dropout": 0.2},
        augment="full",
        save_minutes=0.05 / 60,
        log_every=1,
        resume=True,
    )
    random = np.random.default_rng(seed)
    context, died = multiprocessing.get_context("fork"), 0
    for _ in range(kills):
        child = context.Process(target=_session, args=(settings, dataset))
        child.start()
        wait = time.monotonic() + 20
        before = _saved_at(settings)
        while _saved_at(settings) == before and child.is_alive() and time.monotonic() < wait:
            time.sleep(0.005)  # until the session has saved for the first time
        child.join(timeout=float(random.uniform(0.0, 0.3)))
        died += child.exitcode is None
        child.kill()
        child.join()
        if (tmp_path / "killed").exists():
            load_checkpoint(tmp_path / "killed")  # never incomplete
    train(settings, dataset=dataset)
    return settings, died


def _saved_at(settings: TrainConfig) -> int:
    state = settings.run_folder / "last.ckpt"
    return state.stat().st_mtime_ns if state.exists() else 0


def _session(settings: TrainConfig, dataset: Any) -> None:
    torch.set_num_threads(1)  # the parent's threads do not survive the fork
    train(settings, dataset=dataset)


def check_same_as_uninterrupted(tmp_path: Path, settings: TrainConfig) -> None:
    torch.set_num_threads(1)
    whole = replace(settings, out=str(tmp_path / "whole"), resume=False, save_minutes=60.0)
    train(whole, dataset=blob_dataset(tmp_path / "blobs"))
    for name, x in weights(whole.out).items():
        assert torch.equal(x, weights(settings.out)[name]), name
    assert logged(whole, "train") == logged(settings, "train")
    assert logged(whole, "validation") == logged(settings, "validation")


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings, died = killed_and_resumed(tmp_path, steps=60, kills=2, seed=0)
    assert died >= 1
    check_same_as_uninterrupted(tmp_path, settings)


def test_a_half_written_state_is_not_resumed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning

    dataset = blob_dataset(tmp_path / "blobs")
    given = {"steps": 30, "save_minutes": 1e-6, "resume": True, "options": {"dropout": 0.2}, "augment": "full"}
    settings, whole, calls = config(tmp_path, "killed", **given), lightning.Trainer.save_checkpoint, []

    def cut_off(self: Any, path: Path, *more: Any) -> None:
        calls.append(path)
        if len(calls) == 12:
            Path(path).write_bytes(b"half a")
            raise OSError("power cut")
        whole(self, path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(lightning.Trainer, "save_checkpoint", cut_off)
        with pytest.raises(OSError, match="power cut"):
            train(settings, dataset=dataset)
    assert calls[-1].name != "last.ckpt"
    train(settings, dataset=dataset)
    check_same_as_uninterrupted(tmp_path, settings)


@pytest.mark.slow
def test_a_run_killed_twenty_times_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings, died = killed_and_resumed(tmp_path, steps=1200, kills=20, seed=1)
    assert died >= 15
    check_same_as_uninterrupted(tmp_path, settings)


def test_a_run_of_another_recipe_or_data_is_not_resumed(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs")
    settings = config(tmp_path, steps=2)
    train(settings, dataset=dataset)
    with pytest.raises(InputError, match="--resume continues it, --overwrite deletes it"):
        train(settings, dataset=dataset)
    again = replace(settings, resume=True)
    with pytest.raises(InputError, match=r"started with another recipe \(seed 0 -> 3\)"):
        train(replace(again, seed=3), dataset=dataset)
    with pytest.raises(InputError, match="data set has changed"):
        train(again, dataset=blob_dataset(tmp_path / "blobs", episodes=7))
    train(replace(again, steps=3), dataset=dataset)  # a longer budget may be given
    assert load_checkpoint(settings.out).training["result"]["step"] == 3
    for change in ({"resume": True}, {"overwrite": True}):  # scales of the reward, which the user made, would be lost
        (Path(settings.out) / "reward.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"reward.json, which would be lost"):
            train(replace(settings, steps=4, **change), dataset=dataset)
    (Path(settings.out) / "reward.json").unlink()
    train(replace(settings, overwrite=True), dataset=dataset)
    assert load_checkpoint(settings.out).training["result"]["step"] == 2


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    """Each process gets half of the same common batches: the losses are the same, step by step."""
    dataset = blob_dataset(tmp_path / "blobs")
    one = config(tmp_path, "one", steps=50, validate_every=50, augment="full", ema=0.0, log_every=1)
    two = replace(one, out=str(tmp_path / "two"), devices=2, strategy="ddp")
    train(one, dataset=dataset)
    train(two, dataset=dataset)
    losses = [np.array([x["loss"] for x in logged(settings, "train")]) for settings in (one, two)]
    assert len(losses[0]) == 50 and losses[0][-5:].mean() < 0.8 * losses[0][:5].mean()
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    for name, x in weights(one.out).items():
        if x.is_floating_point():
            torch.testing.assert_close(weights(two.out)[name], x, rtol=1e-4, atol=1e-5)


# ---- the robot and its names -----------------------------------------------------------------------------------------


def test_joints_are_those_of_the_robot(tmp_path: Path) -> None:
    dataset, robot = blob_dataset(tmp_path / "blobs"), load_embodiment("planar_finger_2")
    assert joint_order(dataset, None) == ("across", "down")
    with pytest.raises(
        DatasetError, match=r"records 2 joints, 'planar_finger_2' has 2: it lacks .* has also across, down"
    ):
        joint_order(dataset, robot)
    dataset.joint_names = tuple(reversed(robot.joint_names))
    assert joint_order(dataset, robot) == robot.joint_names
    dataset.joint_names = ("joint_0", "joint_1")
    assert joint_order(dataset, robot) == ("joint_0", "joint_1")
    with pytest.raises(DatasetError, match="'planar_finger_3' has 3"):
        joint_order(dataset, load_embodiment("planar_finger_3"))


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(InputError, match="did you mean 'direct'"):
        model_registry.model_class("dirct")
