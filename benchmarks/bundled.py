"""A bundled checkpoint on motor babbling that it was not trained on. Prints a table and JSON.

    python benchmarks/bundled.py finger-5
    python benchmarks/bundled.py panda-sim --held-out out/benchmarks/data/panda-held-out

Held-out videos are recorded as the checkpoint's own data were, from another seed; `--held-out` takes them from a
folder. Decoding starts from the true first pose. Where a baseline was measured on the same videos (`models-*` in the
results), its action MSE is compared.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import RESULTS, add_save, read, rows, save

from jidm import JacobianIDM
from jidm.datasets import open_dataset
from jidm.evaluation.evaluate import EvalConfig, HeldOut, evaluate
from jidm.evaluation.summary import summarize
from jidm.sim.babble import BabbleConfig, babble

EPISODES, RECORDED = 24, 64
SHOWN = {
    "nve": "nve",
    "nve_smoothed": "nve_smoothed",
    "nve_pairs": "nve_pairs",
    "action_mse": "action_mse",
    "position_share": "position_share",
    "correlation": "correlation_mean",
    "tip_error": "tip_error_mm",
    "field_error": "field_error_mean",
    "flow_error": "flow_epe_px",
    "coverage_68": "coverage_68",
    "coverage_95": "coverage_95",
    "valid_share": "valid_share",
    "frames_per_second": "frames_per_second",
}
"""Metric -> its name in `jidm evaluate`."""


@dataclass(frozen=True)
class HowJudged:
    """How a checkpoint is judged.

    Attributes:
        recorded: what its training data were recorded with.
        seed: of the held-out videos.
        frames: of each video in use, all if None.
        baselines: the result that has other models on the same videos.
    """

    recorded: dict[str, Any]
    seed: int
    frames: int | None = None
    baselines: str | None = None


_FINGER = {"embodiment": "planar_finger_5", "width": 224, "height": 320}
_PANDA = {"embodiment": "panda", "width": 256, "height": 256, "crop_fraction": 0.15, "range_fraction": 0.75}
_ALLEGRO = {"embodiment": "allegro_right", "width": 256, "height": 256, "crop_fraction": 0.05, "range_fraction": 0.75}
CHECKPOINTS = {
    "finger-5": HowJudged(_FINGER, 2000),  # other videos than those of models-finger-5
    "panda-sim": HowJudged(_PANDA, 3000, 49, "models-panda"),
    "allegro-right-sim": HowJudged(_ALLEGRO, 3000, 49, "models-allegro"),
}


def record(how: HowJudged, out: Path) -> None:
    """Held-out videos, made as the checkpoint's training data were but for seed and length."""
    out.parent.mkdir(parents=True, exist_ok=True)
    babble(BabbleConfig(episodes=EPISODES, frames=RECORDED, seed=how.seed, **how.recorded), out, workers=2)


def direct_mse(result: str | None) -> float | None:
    """Action MSE of the direct regression on the same videos, where a result has it."""
    file = RESULTS / f"{result}.json"
    if result is None or not file.exists():
        return None
    found = {row["method"]: row["value"] for row in read(file)["rows"] if row["metric"] == "action_mse"}
    return found.get("direct")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", choices=tuple(CHECKPOINTS))
    parser.add_argument("--held-out", type=Path, help="data set, in place of recording it")
    add_save(parser)
    args = parser.parse_args()
    how = CHECKPOINTS[args.checkpoint]
    held_out = args.held_out or Path("out/benchmarks/data") / f"held-out-of-{args.checkpoint}"
    if args.held_out is None:
        record(how, held_out)
    dataset = open_dataset(held_out)
    idm = JacobianIDM.from_pretrained(args.checkpoint)
    found: dict[str, Any] = summarize(
        evaluate(idm, HeldOut(dataset, EvalConfig(episodes=tuple(dataset.episode_indices), frames=how.frames)))
    )
    print(json.dumps(found, indent=1, default=str))
    figures: dict[str, float | None] = {metric: found.get(key) for metric, key in SHOWN.items()}
    theirs = direct_mse(how.baselines)
    if theirs is not None and figures["action_mse"] is not None:
        figures["action_mse_over_direct"] = figures["action_mse"] / theirs
    assert idm.embodiment is not None
    note = f"{len(dataset.episode_indices)} held-out videos, {how.frames or RECORDED} frames each, from the true first pose."
    figure_rows = rows(idm.embodiment.name, "learned", figures)
    save(args.save, "bundled", figure_rows, raw=found, seeds=[how.seed], note=note)


if __name__ == "__main__":
    main()
