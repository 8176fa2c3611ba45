"""Checkpoints: atomic writing, strict reading, and refusal for another robot with the differences named."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import jidm.checkpoint as checkpoints
from jidm import load_embodiment
from jidm.atomic_io import remove_stale_temporaries
from jidm.checkpoint import CONFIG, REWARD_SCALES, WEIGHTS, embodiment_record, load_checkpoint, save_checkpoint
from jidm.errors import CheckpointError


def save(folder: Path, value: float = 1.0, **changed: Any) -> Path:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    given: dict[str, Any] = {
        "kind": "linear", "config": {"inputs": 3, "names": ("a", "b")}, "tensors": model.state_dict(),
        "embodiment": None, "training": {"seed": 4},
    }  # fmt: skip
    return save_checkpoint(folder, **{**given, **changed})


# ---- save and load ---------------------------------------------------------------------------------------------------


def test_a_saved_checkpoint_loads_unchanged(tmp_path: Path) -> None:
    half = {
        "x": torch.arange(6.0).reshape(2, 3).T,
        "y": torch.tensor([1, 2], dtype=torch.int64),
        "z": torch.ones(2).half(),
    }
    robot = load_embodiment("planar_finger_2")
    found = load_checkpoint(save(tmp_path / "c", tensors=half, embodiment=embodiment_record(robot)))
    assert found.kind == "linear" and found.config == {"inputs": 3, "names": ["a", "b"]}
    assert found.training == {"seed": 4} and found.source == str(tmp_path / "c")
    assert set(found.tensors) == set(half)
    for name, x in half.items():
        assert torch.equal(found.tensors[name], x) and found.tensors[name].dtype == x.dtype
    found.check_embodiment(robot)
    assert sorted(x.name for x in (tmp_path / "c").iterdir()) == [CONFIG, WEIGHTS]


def test_the_hash_depends_on_the_content(tmp_path: Path) -> None:
    hashes = [
        load_checkpoint(save(tmp_path / name, value)).content_hash for name, value in (("a", 1), ("b", 1), ("c", 2))
    ]
    again = load_checkpoint(save(tmp_path / "a", 1, training={"seed": 5})).content_hash
    # Each has a random bias, so only copies of the files can be compared.
    (tmp_path / "copy").mkdir()
    for file in (CONFIG, WEIGHTS):
        (tmp_path / "copy" / file).write_bytes((tmp_path / "c" / file).read_bytes())
    assert load_checkpoint(tmp_path / "copy").content_hash == hashes[2]
    assert len({*hashes, again}) == 4


def test_tensors_that_share_memory_or_need_gradients_are_saved(tmp_path: Path) -> None:
    x = torch.rand(4, requires_grad=True)
    found = load_checkpoint(save(tmp_path / "c", tensors={"x": x, "y": x[:2], "z": x}))
    assert torch.equal(found.tensors["y"], x[:2].detach()) and not found.tensors["x"].requires_grad


# ---- atomic writing --------------------------------------------------------------------------------------------------


def _save_forever(folder: Path) -> None:
    torch.set_num_threads(1)
    for k in range(1_000_000):
        save(folder, float(k), training={"count": k})


def test_a_killed_writer_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    folder, random, last = tmp_path / "c", np.random.default_rng(0), -1
    save(folder, -1.0, training={"count": -1})
    for _ in range(12):
        child = multiprocessing.get_context("fork").Process(target=_save_forever, args=(folder,))
        child.start()
        time.sleep(float(random.uniform(0.02, 0.15)))
        child.kill()
        child.join()
        found = load_checkpoint(folder)
        last = max(last, found.training["count"])
        assert bool((found.tensors["weight"] == found.training["count"]).all())
    assert last > 3  # the writers made progress
    save(folder)
    assert load_checkpoint(folder).training == {"seed": 4}


def test_a_replacement_interrupted_between_its_renames_loads_the_old_one(tmp_path: Path) -> None:
    save(tmp_path / "c", 7.0)
    (tmp_path / "c").rename(tmp_path / ".c.previous")
    assert load_checkpoint(tmp_path / "c").tensors["weight"][0, 0] == 7
    save(tmp_path / "c", 8.0)
    assert load_checkpoint(tmp_path / "c").tensors["weight"][0, 0] == 8


def test_a_failed_save_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "c", 1.0)
    with pytest.raises(CheckpointError, match="is not JSON"):
        save(tmp_path / "c", 2.0, training={"when": object()})
    with pytest.raises(CheckpointError, match="is not JSON"):
        save(tmp_path / "c", 2.0, training={"loss": float("nan")})
    assert os.listdir(tmp_path) == ["c"] and load_checkpoint(tmp_path / "c").tensors["weight"][0, 0] == 1
    with pytest.raises(CheckpointError, match=r"weights of bias are not finite"):
        save(tmp_path / "c", tensors={"bias": torch.tensor([1.0, float("inf")]), "weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="does not exist; make it first"):
        save(tmp_path / "no" / "c")


def test_a_folder_of_other_things_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint folder \(thesis.tex\) and is not overwritten"):
        save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years"
    with pytest.raises(CheckpointError, match="not overwritten"):
        save(tmp_path / "thesis" / "thesis.tex")
    save(tmp_path / "c")
    (tmp_path / "c" / "reward.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"besides a checkpoint it holds reward.json, which would be lost"):
        save(tmp_path / "c", 2.0)
    assert load_checkpoint(tmp_path / "c").tensors["weight"][0, 0] == 1


# ---- damaged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda c: (c / WEIGHTS).unlink(), "it has no model.safetensors"),
        (lambda c: (c / CONFIG).unlink(), "it has no config.json"),
        (lambda c: (c / WEIGHTS).write_bytes((c / WEIGHTS).read_bytes()[:-4]), "its sha256 differs"),
        (lambda c: (c / WEIGHTS).write_bytes(b"\x00" + (c / WEIGHTS).read_bytes()[1:]), "its sha256 differs"),
        (lambda c: (c / CONFIG).write_text('{"format": '), "cannot be read as JSON"),
        (lambda c: (c / CONFIG).write_text("[]"), "not the record of a jidm-checkpoint"),
        (lambda c: edit(c, format="other"), "not the record of a jidm-checkpoint"),
        (lambda c: edit(c, format_version=2), "format version 2 is not 1"),
        (lambda c: edit(c, config=None), "entry 'config' is missing or of a wrong type"),
        (lambda c: edit(c, kind=3), "entry 'kind' is missing or of a wrong type"),
    ],
)  # fmt: skip
def test_damage_is_reported(tmp_path: Path, damage: Any, complaint: str) -> None:
    damage(save(tmp_path / "c"))
    with pytest.raises(CheckpointError, match=complaint) as caught:
        load_checkpoint(tmp_path / "c")
    assert "\n" not in str(caught.value)


def edit(folder: Path, **changed: Any) -> None:
    document = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**document, **changed}))


def rewrite_weights(folder: Path, data: bytes) -> None:
    """Other weights with a matching checksum, as written by an attacker or a careless tool."""
    (folder / WEIGHTS).write_bytes(data)
    edit(folder, weights_sha256=checkpoints._sha256(folder / WEIGHTS))


class Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_pickles_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rewrite_weights(save(tmp_path / "hidden"), pickle.dumps(Boom()))
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_checkpoint(tmp_path / "hidden")
    save(tmp_path / "open")
    (tmp_path / "open" / WEIGHTS).rename(tmp_path / "open" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds pytorch_model.bin, which could run code when read"):
        load_checkpoint(tmp_path / "open")
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Boom()))
    with pytest.raises(CheckpointError, match="single files are not read"):
        load_checkpoint(tmp_path / "model.pt")
    assert not (tmp_path / "exploded").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save as as_bytes

    rewrite_weights(save(tmp_path / "c"), as_bytes({"weight": torch.tensor([1.0, float("nan")])}))
    with pytest.raises(CheckpointError, match="weights of weight are not finite"):
        load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (nn.Linear(3, 2, bias=False), "has unknown bias"),
        (nn.Sequential(nn.Linear(3, 2)), "lacks 0.bias, 0.weight and has unknown bias, weight"),
        (nn.Linear(3, 4), r"tensor 'bias' is float32 \(2,\), the linear needs float32 \(4,\)"),
        (nn.Linear(3, 2).double(), r"is float32 \(2,\), the linear needs float64 \(2,\)"),
    ],
)
def test_a_model_that_does_not_fit_is_not_changed(tmp_path: Path, model: nn.Module, complaint: str) -> None:
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=complaint):
        load_checkpoint(save(tmp_path / "c", 9.0)).load_into(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    fits = nn.Linear(3, 2)
    load_checkpoint(tmp_path / "c").load_into(fits)
    assert bool((fits.weight == 9).all())


# ---- names -----------------------------------------------------------------------------------------------------------


def test_bundled_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    save(tmp_path / "checkpoints" / "panda-sim", 3.0)
    monkeypatch.setattr(checkpoints, "bundled_folder", lambda kind: tmp_path / kind)
    assert checkpoints.bundled_names() == ("panda-sim",)
    found = load_checkpoint("panda-sim")
    assert found.tensors["weight"][0, 0] == 3 and found.source == "bundled 'panda-sim'"
    with pytest.raises(CheckpointError, match="did you mean 'panda-sim'"):
        load_checkpoint("panda_sim")


def test_only_the_files_of_a_checkpoint_are_downloaded_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    save(tmp_path / "snapshot", 5.0)
    asked: list[Any] = []

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint("someone/panda-jidm@v1.2").source == "someone/panda-jidm@v1.2"
    load_checkpoint("someone/panda-jidm")
    assert asked == [("someone/panda-jidm", r, [CONFIG, WEIGHTS, REWARD_SCALES]) for r in ("v1.2", None)]
    (tmp_path / "someone" / "panda-jidm").mkdir(parents=True)  # a folder of that name comes first
    with pytest.raises(CheckpointError, match="it has no config"):
        load_checkpoint("someone/panda-jidm")

    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="no folder 'a/b', and not available on the hub: no route to the hub"):
        load_checkpoint("a/b")


def test_paths_are_not_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for where in (Path("a/b"), "../a/b", "a/b/c", "./a"):
        with pytest.raises(CheckpointError, match="not a folder"):
            load_checkpoint(where)


# ---- the wrong robot -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"joint_names": ("a", "b", "d")}, "joints removed: c; joints added: d"),
        ({"joint_names": ("a", "b"), "joint_types": ("r",) * 2, "lower": (0, 0), "upper": (1, 1)}, "joints removed: c"),
        ({"joint_names": ("a", "c", "b")}, "the same joints in another order, from b, c on"),
        ({"joint_types": ("r", "p", "r")}, "type of b r -> p"),
        ({"lower": (0.0, 0.0, -0.5)}, "lower limit of c 0 -> -0.5"),
        ({"upper": (1.0, 2.0, float("inf"))}, "upper limit of b 1 -> 2, upper limit of c 1 -> none"),
        ({}, r"its shapes or its descriptor differ \(content hash h, now other\)"),
    ],
)
def test_the_difference_between_robots_is_named(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    given = {
        "name": "arm", "content_hash": "h", "joint_names": ("a", "b", "c"), "joint_types": ("r",) * 3,
        "lower": (0.0,) * 3, "upper": (1.0,) * 3,
    }  # fmt: skip
    found = load_checkpoint(save(tmp_path / "c", embodiment=embodiment_record(SimpleNamespace(**given))))
    found.check_embodiment(SimpleNamespace(**given))
    other = SimpleNamespace(**{**given, "name": "leg", "content_hash": "other", **change})
    with pytest.raises(CheckpointError, match=complaint) as caught:
        found.check_embodiment(other)
    assert "trained for 'arm', which is not this 'leg'" in str(caught.value)
    replace(found, embodiment=None).check_embodiment(other)  # no robot on record: nothing to compare


def test_robots_with_unlimited_joints_are_recorded(tmp_path: Path) -> None:
    robots = [load_embodiment(name) for name in ("panda", "allegro_right")]
    found = load_checkpoint(save(tmp_path / "c", embodiment=embodiment_record(robots[0])))
    found.check_embodiment(robots[0])
    with pytest.raises(CheckpointError, match=r"joints removed: .* and \d+ more; joints added: "):
        found.check_embodiment(robots[1])


def test_files_of_dead_processes_are_removed_after_a_while(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    old = time.time() - 7200
    for name, age in ((f".c.{child.pid}.tmp", old), (f".c.{os.getpid()}.tmp", old), (f".d.{child.pid}.tmp", old)):
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS).write_bytes(b"half")
        for x in (tmp_path / name / WEIGHTS, tmp_path / name):
            os.utime(x, (age, age))
    fresh = tmp_path / f".c.{child.pid}.tmp" / WEIGHTS
    os.utime(fresh, (time.time(), time.time()))
    remove_stale_temporaries(tmp_path / "c")
    assert len(list(tmp_path.iterdir())) == 3  # changed too recently
    os.utime(fresh, (old, old))
    save(tmp_path / "c")
    assert {x.name for x in tmp_path.iterdir()} == {
        "c",
        f".d.{child.pid}.tmp",
    }  # the one of this process was reused by save
