"""`jidm train` on the command line: from files on disk to a checkpoint."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from standin import KIND, blob_dataset

from jidm import model_registry
from jidm.checkpoint import load_checkpoint
from jidm.cli import main
from jidm.cli.train import Train
from jidm.datasets import DatasetWriter
from jidm.errors import InputError
from jidm.training.config import TrainConfig

pytest.importorskip("lightning")


@pytest.fixture(autouse=True)
def stand_in_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, where in KIND.items():
        monkeypatch.setitem(model_registry.KINDS, kind, where)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "blobs"
    source = blob_dataset(root, size=32)
    writer = DatasetWriter(root, fps=16, joint_names=source.joint_names, cameras={"front": (32, 32)})
    for index in source.episode_indices:
        episode = source.episode(index)
        writer.write_episode(index, {"front": episode.frames}, episode.state, episode.state)
    writer.finalize()
    return root


def train(files: Path, out: Path, *more: str) -> int:
    arguments = (
        "--data",
        files,
        "--out",
        out,
        "--kind",
        "stand_in",
        "--flow",
        "none",
        "--steps",
        30,
        "--batch-size",
        8,
    )
    return main(["train", *map(str, arguments), "--cache", str(out.parent / "cache"), "--accelerator", "cpu", *more])


def test_trains_a_checkpoint_from_files(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(files, tmp_path / "c", "--test-episodes", "5", "--seed", "3", "--validate-every", "10") == 0
    out = capsys.readouterr().out
    assert "from 4 episodes (0, 1, 3, 4), 48 frames of 32x32, flow: none" in out
    assert "step 30 (100 %) train: loss" in out and f"checkpoint in {tmp_path}/c/" in out
    training = load_checkpoint(tmp_path / "c").training
    assert training["seed"] == 3 and training["data"]["test_episodes"] == [5]
    lines = [json.loads(x) for x in (tmp_path / "c.run" / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["part"] == "validation"] == [10, 20, 30]
    assert (
        train(files, tmp_path / "c", "--test-episodes", "5", "--seed", "3", "--validate-every", "10", "--resume") == 0
    )
    assert "resuming from step 30" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--joints", "acros"], "no joint 'acros' is recorded: did you mean 'across'?"),
        (["--kind", "jacobian"], "unknown kind of model 'jacobian': did you mean 'jacobian_field'?"),
        (["--image-key", "side"], "has no camera 'side'"),
        (["--embodiment", "panda"], "records 2 joints, 'panda' has"),
        (["--flow", "exact"], "exact flow is not available, it holds no depth"),
        (["--test-episodes", "9"], "there is no episode 9; the data set has 6 episodes (0, 1, 2, 3, 4, 5)"),
        (["--train-episodes", "some"], "episodes 'some' are not understood"),
        (["--minutes", "1"], "give either steps or minutes"),
        (["--height", "30", "--width", "32"], "height must be a multiple of 16 px, got 30"),
        (["--strides", "12"], "the longest episode has 12 frames, 13 are needed for strides 12"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], complaint: str
) -> None:
    assert train(files, tmp_path / "c", *more) == 1
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert not (tmp_path / "c").exists() and not (tmp_path / "c.run").exists()  # so that the next try can start


def test_every_field_of_the_configuration_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    flags = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    names = {f.name for f in fields(TrainConfig)} - {"options"} | {"backbone", "pretrained", "mesh_roots", "help"}
    assert flags == {"--" + name.replace("_", "-") for name in names}


def test_an_encoder_goes_into_the_options_of_a_field() -> None:
    config = TrainConfig(data="d", out="o")
    assert Train(config=config).with_encoder() == config and config.minutes == 10
    chosen = Train(config=config, backbone="resnet18").with_encoder()
    assert chosen.options == {"backbone": "resnet18", "pretrained": False}
    with pytest.raises(InputError, match="for --kind jacobian_field"):
        Train(config=TrainConfig(data="d", out="o", kind="eva"), pretrained=True).with_encoder()
