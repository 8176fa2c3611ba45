"""The bundled checkpoints: small, with their full provenance, and accurate on unseen video."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jidm import JacobianIDM
from jidm.bundled import bundled_folder
from jidm.checkpoint import bundled_names, load_checkpoint

MAX_SIZE = 8e6  # [bytes]
MAX_NVE = {"panda-sim": 0.9}  # no motion scores 1; its wrist is hardly visible
DEFAULT_MAX_NVE = 0.7
SEED = 7000  # of motions and appearances that nothing was trained or tuned on


def test_there_is_one() -> None:
    assert "finger-5" in bundled_names()


@pytest.mark.parametrize("name", bundled_names())
def test_is_small_and_states_how_it_was_made(name: str) -> None:
    folder = bundled_folder("checkpoints") / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < MAX_SIZE
    training = load_checkpoint(name).training
    assert {"recipe", "seed", "data", "result", "commit"} <= set(training) and training["commit"]
    recipe = json.dumps(training)
    assert "/root" not in recipe and "/home" not in recipe
    log = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(log) > 10 and all(json.loads(line) for line in log)


@pytest.mark.parametrize(
    "name", [x if x == "finger-5" else pytest.param(x, marks=pytest.mark.slow) for x in bundled_names()]
)
def test_decodes_unseen_video(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pybullet", reason="renders the robot: extra sim")
    from jidm.datasets import open_dataset
    from jidm.evaluation.evaluate import evaluate
    from jidm.evaluation.held_out import HeldOut
    from jidm.sim.babble import BabbleConfig, babble

    idm, recipe = JacobianIDM.from_pretrained(name), load_checkpoint(name).training["data"]["data_recipe"]
    same = {key: recipe[key] for key in ("embodiment", "width", "height", "crop_fraction", "range_fraction")}
    babble(BabbleConfig(episodes=3, frames=16, seed=SEED, **same), tmp_path / "unseen")
    found = evaluate(idm, HeldOut(open_dataset(tmp_path / "unseen")))
    assert not found.failed and len(found.episodes) == 3
    moved, wrong = torch.zeros(()), torch.zeros(())
    for episode in found.episodes:
        moved += episode.delta_q.abs().sum()
        wrong += (episode.motion.delta_q - episode.delta_q).abs().sum()
    assert wrong < MAX_NVE.get(name, DEFAULT_MAX_NVE) * moved
