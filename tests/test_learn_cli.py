"""`jidm train` as it is typed: from files on disk to a checkpoint that decodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from standin import KIND, blob_dataset

from jidm import model_registry
from jidm.checkpoint import load_checkpoint
from jidm.cli import main
from jidm.datasets import DatasetWriter
from jidm.training.config import TrainConfig

pytest.importorskip("lightning")


@pytest.fixture(autouse=True)
def known_kind(monkeypatch: pytest.MonkeyPatch) -> None:
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
    given = ("--data", files, "--out", out, "--kind", "stand_in", "--flow", "none", "--steps", 30, "--batch-size", 8)
    return main(["train", *map(str, given), "--cache", str(out.parent / "cache"), "--accelerator", "cpu", *more])


def test_a_checkpoint_out_of_files(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(files, tmp_path / "c", "--test-episodes", "5", "--seed", "3", "--validate-every", "10") == 0
    told = capsys.readouterr().out
    assert "from 4 episodes (0, 1, 3, 4), 48 frames of 32x32, flow: none" in told
    assert "step 30 (100 %) train: loss" in told and f"checkpoint in {tmp_path}/c/" in told
    training = load_checkpoint(tmp_path / "c").training
    assert training["seed"] == 3 and training["data"]["test_episodes"] == [5]
    lines = [json.loads(x) for x in (tmp_path / "c.run" / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["part"] == "validation"] == [10, 20, 30]
    assert (
        train(files, tmp_path / "c", "--test-episodes", "5", "--seed", "3", "--validate-every", "10", "--resume") == 0
    )
    assert "going on from step 30" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--joints", "acros"], "no joint 'acros' is recorded: did you mean 'across'?"),
        (["--kind", "jacobian"], "unknown kind of model 'jacobian': did you mean 'jacobian_field'?"),
        (["--camera", "side"], "has no camera 'side'"),
        (["--embodiment", "panda"], "records 2 joints, 'panda' has"),
        (["--flow", "exact"], "exact flow is not to be had, it holds no depth"),
        (["--test-episodes", "9"], "there is no episode 9; the data set has 6 episodes (0, 1, 2, 3, 4, 5)"),
        (["--train-episodes", "some"], "episodes 'some' are not understood"),
        (["--minutes", "1"], "give either steps or minutes"),
        (["--height", "30", "--width", "32"], "height must be a multiple of 16 px, got 30"),
        (["--strides", "12"], "the longest episode has 12 frames, 13 are needed for strides 12"),
    ],
)
def test_what_cannot_be_is_one_line(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], complaint: str
) -> None:
    assert train(files, tmp_path / "c", *more) == 1
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert not (tmp_path / "c").exists() and not (tmp_path / "c.run").exists()  # nothing is in the way of the next try


def test_the_command_line_and_the_record_have_the_same_defaults() -> None:
    from jidm.cli.train import Train

    typed = Train(data=Path("d"), out=Path("o"), steps=3).config()
    assert typed == TrainConfig(data="d", out="o", steps=3)
    assert Train(data=Path("d"), out=Path("o")).config().minutes == 10
