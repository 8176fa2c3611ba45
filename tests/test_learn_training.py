"""The training loop: it learns, forgets nothing when it is killed, and says what stops it."""

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
from jidm.errors import DatasetError, InputError, JidmError
from jidm.training.config import TrainConfig
from jidm.training.data.batch import PairBatch
from jidm.training.data.clips import Clip
from jidm.training.data.datamodule import joint_order, prepare_training, split_episodes
from jidm.training.schedule import learning_rate
from jidm.training.train import train

pytest.importorskip("lightning")


@pytest.fixture(autouse=True)
def known_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, where in KIND.items():
        monkeypatch.setitem(model_registry.KINDS, kind, where)


def config(tmp_path: Path, name: str = "model", **changed: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "data": str(tmp_path / "blobs"), "out": str(tmp_path / name), "kind": "stand_in", "steps": 40, "batch_size": 8,
        "flow": "none", "augment": "none", "warmup": 5, "learning_rate": 1e-2, "validate_every": 20, "strides": (1, 2),
        "ema": 0.9, "accelerator": "cpu", "cache": str(tmp_path / "cache"), "validation": 0.2, "validation_pairs": 16,
    }  # fmt: skip
    return TrainConfig(**{**given, **changed})


def weights(where: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(where) / "model.safetensors")


def journal(settings: TrainConfig, part: str) -> list[dict[str, Any]]:
    lines = [json.loads(x) for x in (settings.run_folder / "log.jsonl").read_text().splitlines()]
    return [{**x["values"], "step": x["step"]} for x in lines if x["part"] == part]


# ---- it learns -------------------------------------------------------------------------------------------------------


def test_it_learns_and_keeps_what_it_learned_from(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs")
    settings = config(tmp_path, steps=300, validate_every=100, test_episodes="5")
    out = train(settings, dataset=dataset)
    validation = journal(settings, "validation")
    assert [x["step"] for x in validation] == [100, 200, 300]
    assert validation[-1]["nve"] < 0.6 and validation[-1]["nve"] < validation[0]["nve"]  # zero steps would give 1
    checkpoint = load_checkpoint(out)
    training = checkpoint.training
    assert training["data"]["test_episodes"] == [5] and 5 not in training["data"]["train_episodes"]
    assert training["data"]["data_hash"] == dataset.content_hash and training["seed"] == 0
    assert training["recipe"]["steps"] == 300 and training["recipe"]["strides"] == [1, 2]
    assert training["result"]["validation"]["nve"] == pytest.approx(validation[-1]["nve"])
    assert training["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(training)  # nothing of this machine
    model = model_registry.load_model(out)
    assert isinstance(model, StandIn) and not model.training
    assert checkpoint.config["joint_names"] == ["across", "down"]


def test_uncertainties_are_those_of_neighbouring_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, seen, filmed = config(tmp_path, strides=(2, 5), steps=2, validate_every=1), [], []

    def calibrate(self: StandIn, batches: list[PairBatch], rounds: int) -> None:
        seen.append((torch.cat([x.delta_q for x in batches]), rounds))

    def calibrate_videos(self: StandIn, films: Iterator[Clip]) -> None:
        filmed.append(list(films))

    monkeypatch.setattr(StandIn, "calibrate", calibrate, raising=False)
    monkeypatch.setattr(StandIn, "calibrate_videos", calibrate_videos, raising=False)
    dataset = blob_dataset(tmp_path / "blobs")
    train(settings, dataset=dataset)
    assert [rounds for _, rounds in seen] == [1, 2] and torch.equal(seen[0][0], seen[1][0])
    prepared = prepare_training(settings, dataset, None, print)
    assert prepared.validation is not None
    held = {int(x) for batch in prepared.validation.validation_batches(16) for x in batch.episode}
    (films,) = filmed  # once, of the weights that stay, and every second frame
    assert {len(x.frames) for x in films} == {-(-dataset.episode(i).length // 2) for i in held}
    states = [torch.from_numpy(np.asarray(dataset.episode(i).state)).float() for i in held]
    steps = torch.cat([q[2:] - q[:-2] for q in states])
    far = (seen[0][0][:, None] - steps).abs().amax(-1).amin(-1)
    assert far.max() < 1e-6  # every one of them is a step of two frames
    wide = torch.cat([batch.delta_q for batch in prepared.validation.validation_batches(16)])
    assert (wide[:, None] - steps).abs().amax(-1).amin(-1).max() > 1e-3  # of which others are not


def test_the_running_mean_is_what_is_saved(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs")
    raw = []
    for steps in range(1, 5):  # the raw weights after each step; the schedule is made flat, so that runs agree
        settings = config(tmp_path, f"raw{steps}", steps=steps, ema=0.0, floor=1.0)
        raw.append(weights(train(settings, dataset=dataset))["first.weight"])
    torch.manual_seed(0)
    mean = StandIn.from_data(("a", "b"), ("revolute",) * 2, 16, 16, _stats(2)).first.weight.detach().clone()
    for step, now in enumerate(raw, start=1):
        mean = mean.lerp(now, 1 - min(0.9, (1 + step) / (10 + step)))
    saved = weights(train(config(tmp_path, "mean", steps=4, floor=1.0), dataset=dataset))["first.weight"]
    torch.testing.assert_close(saved, mean, rtol=1e-5, atol=1e-7)
    assert (saved - raw[-1]).abs().max() > 1e-4


def _stats(n: int):
    from jidm.training.data.batch import JointStats

    return JointStats(*[(1.0,) * n] * 5)


def test_test_episodes_are_never_opened_and_no_episode_is_used_twice(tmp_path: Path) -> None:
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
    with pytest.raises(DatasetError, match="exact flow is not to be had, it holds no depth"):
        train(config(tmp_path, "other", flow="exact"), dataset=blob_dataset(tmp_path / "blobs"))


# ---- the schedule and the budget -------------------------------------------------------------------------------------


def test_the_rate_warms_up_and_follows_half_a_cosine(tmp_path: Path) -> None:
    settings = config(tmp_path, warmup=10, learning_rate=2.0, floor=0.1)
    assert learning_rate(settings, 0, 0.0) == pytest.approx(0.2)
    assert learning_rate(settings, 9, 0.0) == pytest.approx(2.0)
    assert learning_rate(settings, 1000, 0.5) == pytest.approx(2.0 * 0.55)
    assert learning_rate(settings, 1000, 1.0) == pytest.approx(0.2)
    rates = [learning_rate(settings, 1000, x / 50) for x in range(60)]
    assert all(a >= b for a, b in zip(rates, rates[1:]))  # noqa: RUF007


def test_a_budget_of_time_is_kept_and_goes_on_after_a_break(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs")
    settings = config(tmp_path, steps=None, minutes=1.2 / 60, validate_every=10_000)
    began = time.monotonic()
    train(settings, dataset=dataset)
    assert time.monotonic() - began < 6
    (line,) = journal(settings, "validation")
    assert line["step"] > 20
    train(replace(settings, resume=True), dataset=dataset)  # nothing is left of the budget
    assert journal(settings, "validation")[-1]["step"] <= line["step"] + 1


def test_no_better_validation_ends_the_run_and_the_best_is_kept(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs")
    # A rate that is far too high makes the loss worse and worse.
    settings = config(
        tmp_path, steps=400, learning_rate=30.0, validate_every=2, patience=3, keep="best", ema=0.0, clip=1e9
    )
    out = train(settings, dataset=dataset)
    found = [x["nve"] for x in journal(settings, "validation")]
    assert len(found) < 100 and min(found) < min(found[-3:])
    assert load_checkpoint(out).training["result"]["validation"]["nve"] == pytest.approx(min(found))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"minutes": 1.0}, "either steps or minutes"),
        ({"steps": None}, "either steps or minutes"),
        ({"steps": 0}, "must be positive"),
        ({"augment": "heavy"}, "unknown augmentation"),
        ({"batch_size": 7, "devices": 2}, "does not divide over 2"),
        ({"ema": 1.0}, "shares below 1"),
    ],
)
def test_a_configuration_without_sense_is_refused(tmp_path: Path, changed: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        config(tmp_path, **changed)


# ---- numbers that are not finite -------------------------------------------------------------------------------------


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs")
    settings = config(tmp_path, steps=12, options={"nan_from": 4, "nan_until": 7}, ema=0.0, floor=1.0)
    out = train(settings, dataset=dataset)
    assert load_checkpoint(out).training["result"]["bad_steps"] == 3
    # Steps 4 to 6 did nothing: at 4 and at 7 steps the weights are the same.
    halves = [
        weights(train(replace(settings, out=str(tmp_path / f"m{steps}"), steps=steps), dataset=dataset))["last.weight"]
        for steps in (3, 4, 7, 8)
    ]
    assert torch.equal(halves[1], halves[2])
    assert not torch.equal(halves[0], halves[1]) and not torch.equal(halves[2], halves[3])


def test_a_run_that_stays_not_finite_ends_with_a_clear_line(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs")
    settings = config(tmp_path, steps=100, options={"nan_from": 5, "nan_until": 1000}, bad_steps=6)
    with pytest.raises(JidmError, match="training diverged: 6 steps in a row up to step 11"):
        train(settings, dataset=dataset)


# ---- killed and resumed ----------------------------------------------------------------------------------------------


def killed_and_resumed(tmp_path: Path, steps: int, kills: int, seed: int) -> tuple[TrainConfig, int]:
    """A run that is killed again and again, until it is through; how often it was killed before its end."""
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
        child = context.Process(target=_sitting, args=(settings, dataset))
        child.start()
        wait = time.monotonic() + 20
        before = _saved_at(settings)
        while _saved_at(settings) == before and child.is_alive() and time.monotonic() < wait:
            time.sleep(0.005)  # it stands where it stood before until it has saved for the first time
        child.join(timeout=float(random.uniform(0.0, 0.3)))
        died += child.exitcode is None
        child.kill()
        child.join()
        if (tmp_path / "killed").exists():
            load_checkpoint(tmp_path / "killed")  # never half of one
    train(settings, dataset=dataset)
    return settings, died


def _saved_at(settings: TrainConfig) -> int:
    state = settings.run_folder / "last.ckpt"
    return state.stat().st_mtime_ns if state.exists() else 0


def _sitting(settings: TrainConfig, dataset: Any) -> None:
    torch.set_num_threads(1)  # the parent's threads did not come along
    train(settings, dataset=dataset)


def check_same_as_uninterrupted(tmp_path: Path, settings: TrainConfig) -> None:
    torch.set_num_threads(1)
    whole = replace(settings, out=str(tmp_path / "whole"), resume=False, save_minutes=60.0)
    train(whole, dataset=blob_dataset(tmp_path / "blobs"))
    for name, x in weights(whole.out).items():
        assert torch.equal(x, weights(settings.out)[name]), name
    assert journal(whole, "train") == journal(settings, "train")
    assert journal(whole, "validation") == journal(settings, "validation")


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings, died = killed_and_resumed(tmp_path, steps=60, kills=2, seed=0)
    assert died >= 1
    check_same_as_uninterrupted(tmp_path, settings)


def test_a_state_that_is_half_written_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    settings, died = killed_and_resumed(tmp_path, steps=1200, kills=20, seed=1)
    assert died >= 15
    check_same_as_uninterrupted(tmp_path, settings)


def test_a_run_of_another_recipe_or_data_is_not_gone_on_with(tmp_path: Path) -> None:
    dataset = blob_dataset(tmp_path / "blobs")
    settings = config(tmp_path, steps=2)
    train(settings, dataset=dataset)
    with pytest.raises(InputError, match="--resume goes on with it, --overwrite throws it away"):
        train(settings, dataset=dataset)
    again = replace(settings, resume=True)
    with pytest.raises(InputError, match=r"the run began otherwise \(seed 0 -> 3\)"):
        train(replace(again, seed=3), dataset=dataset)
    with pytest.raises(InputError, match="data set has changed"):
        train(again, dataset=blob_dataset(tmp_path / "blobs", episodes=7))
    train(replace(again, steps=3), dataset=dataset)  # a longer budget may be given
    assert load_checkpoint(settings.out).training["result"]["step"] == 3
    train(replace(settings, overwrite=True), dataset=dataset)
    assert load_checkpoint(settings.out).training["result"]["step"] == 2


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_follow_one(tmp_path: Path) -> None:
    """The same common batches, half of each in either process: the same losses, step by step."""
    dataset = blob_dataset(tmp_path / "blobs")
    one = config(tmp_path, "one", steps=50, validate_every=50, augment="full", ema=0.0, log_every=1)
    two = replace(one, out=str(tmp_path / "two"), devices=2, strategy="ddp")
    train(one, dataset=dataset)
    train(two, dataset=dataset)
    losses = [np.array([x["loss"] for x in journal(settings, "train")]) for settings in (one, two)]
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
