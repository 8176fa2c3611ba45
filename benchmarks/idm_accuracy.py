"""Train ours and every baseline on the same recordings for the same time, decode held-out ones, print table and JSON.

    python benchmarks/idm_accuracy.py --embodiment planar_finger_5 --work work/finger --minutes 10 --seeds 0 1 2 --shares 1 0.5 \
        --width 224 --height 320 --train width=112 height=160
    python benchmarks/idm_accuracy.py --embodiment panda --work work/panda --minutes 60 --conditions --speed
    python benchmarks/idm_accuracy.py --embodiment panda --work work/analytic --kinds analytic
    python benchmarks/idm_accuracy.py --recording g1_inspire_real --work work/g1 --minutes 30

Self-play is recorded into the work folder where it is not there yet: training data of seed 0, held-out of seed 1000, and,
for --conditions, held-out motions a third wider. A recording of a real robot is split by whole episodes instead. What is
finished (one result per model, seed and share of the data) stays in the work folder; a run that was cut off goes on.

Every model decodes the same videos from the true first pose; `nve` and `action_mse` are of that. `*_pairs` are of single
pairs of frames with no pose given, `*_smoothed` of steps told by their neighbours as well. Seeds vary the training alone; medians over seeds, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode_speed import decode_speed

from jidm import JacobianIDM, JointMotion
from jidm.atomic_io import atomic_write
from jidm.cli.text import columns
from jidm.datasets import open_dataset
from jidm.datasets.episode_selection import select_episodes
from jidm.evaluation.corruptions import CORRUPTIONS, compare_corrupted
from jidm.evaluation.evaluate import Corruption, EvalConfig, Evaluation, HeldOut, evaluate
from jidm.evaluation.ground_truth import recorded_cameras
from jidm.evaluation.summary import corruption_table, summarize
from jidm.model_registry import KINDS, load_idm
from jidm.training.config import TrainConfig
from jidm.training.train import train
from jidm.visualization.field_pictures import plot_decoded, write_field_sheet

OURS = "jacobian_field"
ANALYTIC = "analytic"  # nothing learned: the exact field of the robot as each episode's own camera saw it
ANALYTIC_PREDICTED_START = "analytic, start read"  # the same from the pose that ours reads off the first frame
HELD_OUT_FRAMES = 64
TABLE_COLUMNS = (
    ("nve", "NVE", ".3f"),
    ("nve_pairs", "NVE PAIRS", ".3f"),
    ("nve_smoothed", "SMOOTHED", ".3f"),
    ("action_mse", "ACTION MSE", ".2e"),
    ("position_share", "WITHIN .05", ".1%"),
    ("tip_error_mm", "TIP [mm]", ".1f"),
    ("correlation_mean", "CORR", ".3f"),
    ("nve_moving", "NVE MOVING", ".3f"),
    ("flow_epe_px", "FLOW [px]", ".2f"),
    ("field_error_mean", "FIELD", ".2f"),
    ("coverage_68", "IN 68%", ".0%"),
    ("coverage_95", "IN 95%", ".0%"),
    ("valid_share", "VALID", ".0%"),
    ("frames_per_second", "FRAMES/S", ".1f"),
)


def main() -> int:
    args = arguments()
    work = Path(args.work)
    (work / "results").mkdir(parents=True, exist_ok=True)
    data = prepare_data(args, work)
    results: dict[str, list[dict[str, Any]]] = {}
    for share in args.shares:
        for kind in args.kinds if share == 1 else [OURS]:
            if kind == ANALYTIC:
                results[kind] = [one_result(args, work, data, kind, 0, share, decoder_name=kind)]
                continue
            label = kind if share == 1 else f"{kind} on {share:g} of the data"
            results[label] = [one_result(args, work, data, kind, seed, share) for seed in args.seeds]
            if label == OURS and args.embodiment:
                results[ANALYTIC_PREDICTED_START] = [
                    one_result(args, work, data, kind, seed, share, decoder_name=ANALYTIC_PREDICTED_START)
                    for seed in args.seeds
                ]
    document: dict[str, Any] = {
        "benchmark": "idm_accuracy",
        "embodiment": args.embodiment,
        "recording": args.recording,
        "arguments": vars(args),
        "threads": torch.get_num_threads(),
    }
    document["models"] = {label: summary(rows) for label, rows in results.items()}
    if args.conditions:
        document["conditions"] = median_corruptions(
            {k: v for k, v in results.items() if k in (*args.kinds, ANALYTIC_PREDICTED_START)}
        )
    if args.speed:
        model = str(result_folder(work, OURS, args.seeds[0], 1.0) / "model")
        document["speed"] = decode_speed(model, data["held_out"])
    document["must"] = check_requirements(document)
    document["results"] = results
    with atomic_write(work / "idm_accuracy.json") as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")
    write_figures(args, work, data)
    print(report(document))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--embodiment", help="robot to record self-play of")
    source.add_argument("--recording", help="data set of a real robot, split by whole episodes")
    parser.add_argument("--work", required=True, help="folder for data, checkpoints and results")
    parser.add_argument("--data", help="training data, in place of recording it")
    parser.add_argument("--held-out", help="held-out data, in place of recording it")
    parser.add_argument("--wide", help="held-out data with wider poses, in place of recording it")
    parser.add_argument("--episodes", type=int, default=1200, help="of self-play to train on")
    parser.add_argument("--held-out-episodes", type=int, default=20)
    parser.add_argument("--frames", type=int, default=20, help="of each of those; held-out ones have 64")
    parser.add_argument("--width", type=int, default=256, help="of the recorded pictures [px]")
    parser.add_argument("--height", type=int, default=256, help="likewise; the models see them as --train says")
    parser.add_argument(
        "--cropped", type=float, default=0.02, help="share of poses that reach out of each border, see `jidm babble`"
    )
    parser.add_argument(
        "--amplitude", type=float, default=0.75, help="share of the joint range; --wide is a third more"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that record")
    parser.add_argument("--test", default="last-digit:1,6", help="episodes of --recording that are held out")
    parser.add_argument("--flow", help="what measures motion for ours when decoding; its own matching if not given")
    parser.add_argument("--stride", type=int, default=3, help="recorded frames per step, for --recording")
    parser.add_argument(
        "--judged", default="Shoulder|Elbow|Wrist", help="joints that count, for --recording (regular expression)"
    )
    every = [*KINDS, ANALYTIC]
    parser.add_argument("--kinds", nargs="+", default=every, choices=every, help=f"'{ANALYTIC}' for self-play only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[1.0], help="shares of the training episodes; below 1 for ours only"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="training time of each model")
    parser.add_argument("--steps", type=int, help="training steps of each model, in place of --minutes")
    parser.add_argument(
        "--train",
        nargs="*",
        default=[],
        metavar="KEY=JSON",
        help="further entries of TrainConfig; kind:KEY=JSON for one model",
    )
    parser.add_argument("--conditions", action="store_true", help="also on worse pictures and wider poses")
    parser.add_argument("--speed", action="store_true", help="also decoding speed beside EVA's trunk at 512 x 512")
    args = parser.parse_args()
    args.kinds = sorted((k for k in args.kinds if args.embodiment or k != ANALYTIC), key=lambda kind: kind != OURS)
    return args


# ---- data -----------------------------------------------------------------------------------------------------------


def prepare_data(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Folders of training, held-out and wider data, and how the held-out are judged."""
    if args.recording:
        dataset = open_dataset(args.recording)
        scored_joints = tuple(name for name in dataset.joint_names if re.search(args.judged, name))
        test = select_episodes(args.test, dataset.episode_indices)
        eval_config = EvalConfig(episodes=test, stride=args.stride, joints=scored_joints)
        return {"train": args.recording, "held_out": args.recording, "wide": None, "protocol": eval_config}
    datasets = {
        "train": (args.data, args.episodes, args.frames, 0, 1.0),
        "held_out": (args.held_out, args.held_out_episodes, HELD_OUT_FRAMES, 1000, 1.0),
    }
    if args.conditions:
        datasets["wide"] = (args.wide, args.held_out_episodes, HELD_OUT_FRAMES, 1000, 4 / 3)
    folders: dict[str, Any] = {"wide": None, "protocol": EvalConfig()}
    if args.kinds == [ANALYTIC]:
        datasets["train"] = ("", 0, 0, 0, 0.0)  # it learns nothing
    for name, (given, episodes, frames, seed, wider) in datasets.items():
        folders[name] = str(work / name) if given is None else given
        if given is None:
            record(args, work / name, episodes, frames, seed, args.amplitude * wider)
    return folders


def record(args: argparse.Namespace, out: Path, episodes: int, frames: int, seed: int, range_fraction: float) -> None:
    from jidm.sim.babble import BabbleConfig, babble

    if range_fraction > 1:
        raise SystemExit(
            f"amplitude {range_fraction:g} is more than the robot's range; train with --amplitude 0.75 or less"
        )
    config = BabbleConfig(
        embodiment=args.embodiment, episodes=episodes, frames=frames, width=args.width, height=args.height,
        seed=seed, crop_fraction=args.cropped, range_fraction=range_fraction,
    )  # fmt: skip
    babble(config, out, workers=args.workers)


# ---- one model ------------------------------------------------------------------------------------------------------


def one_result(
    args: argparse.Namespace,
    work: Path,
    data: dict[str, Any],
    kind: str,
    seed: int,
    data_fraction: float,
    decoder_name: str = "",
) -> dict[str, Any]:
    """Train and evaluate, or what an earlier run found; `decoder_name` READ or TRACKED decodes with the robot's exact field."""
    folder = result_folder(work, kind, seed, data_fraction)
    # Whatever a figure depends on; kinds, seeds and shares are in the folder's name.
    ignored = ("work", "kinds", "seeds", "shares", "workers", "conditions", "speed", "data", "held_out", "wide")
    settings = {key: value for key, value in vars(args).items() if key not in ignored}
    settings |= {"data": data["train"], "held_out": data["held_out"]}
    file = folder / ("start_read.json" if decoder_name == ANALYTIC_PREDICTED_START else "result.json")
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"settings": settings}
    if result["settings"] != settings:
        raise SystemExit(f"{file} was made with other settings: {result['settings']}; use another --work, or remove it")
    if "scores" in result and ("conditions" in result or not args.conditions):
        return result
    folder.mkdir(parents=True, exist_ok=True)
    model = str(folder / "model")
    if "trained_seconds" not in result and not decoder_name:
        result["trained_seconds"] = timed_training(
            train_config(args, data, kind, seed, data_fraction, folder / "model")
        )
        write(file, result)
    decode: Callable[..., Evaluation]
    eval_config = replace(data["protocol"], told_start=decoder_name != ANALYTIC_PREDICTED_START)
    if decoder_name == ANALYTIC_PREDICTED_START:
        decode = partial(evaluate_exact, lambda camera: load_idm(model, camera=camera))
    elif decoder_name == ANALYTIC:
        decode = partial(evaluate_exact, partial(JacobianIDM.from_embodiment, args.embodiment))
    else:
        decode = partial(evaluate, decoder(args, kind, model))
    held_out = HeldOut(open_dataset(data["held_out"]), eval_config)
    evaluation = decode(held_out, name=decoder_name or kind)
    result["scores"] = summarize(evaluation)
    if args.conditions:
        result["conditions"] = evaluate_corruptions(decode, held_out, evaluation, data["wide"])
    write(file, result)
    return result


def decoder(args: argparse.Namespace, kind: str, model: str) -> Any:
    return load_idm(model, flow=args.flow) if kind == OURS and args.flow else load_idm(model)


def timed_training(config: TrainConfig) -> float:
    began = time.perf_counter()
    train(config, report=lambda line: print(f"{config.kind} seed {config.seed}: {line}", file=sys.stderr, flush=True))
    return time.perf_counter() - began


def train_config(
    args: argparse.Namespace, data: dict[str, Any], kind: str, seed: int, data_fraction: float, out: Path
) -> TrainConfig:
    values: dict[str, Any] = {"kind": kind, "seed": seed, "data": data["train"], "out": str(out), "resume": True}
    values |= {"steps": args.steps} if args.steps else {"minutes": args.minutes}
    values["embodiment"] = args.embodiment
    if args.recording:
        values |= {"test_episodes": args.test, "strides": (max(1, args.stride - 1), args.stride, args.stride + 1)}
    if data_fraction < 1:
        test = data["protocol"].episodes or ()
        listed = [k for k in sorted(open_dataset(data["train"]).episode_indices) if not (args.recording and k in test)]
        values["train_episodes"] = ",".join(map(str, listed[: max(1, round(data_fraction * len(listed)))]))
    for entry in args.train:
        key, _, text = entry.partition("=")
        only, _, key = key.rpartition(":")
        if only in ("", kind):
            value = json.loads(text)
            values[key] = tuple(value) if isinstance(value, list) else value
    return TrainConfig(**values)


def evaluate_exact(
    make_idm: Callable[..., Any], held_out: HeldOut, *, name: str, change: Corruption | None = None
) -> Evaluation:
    """As `evaluate`, by what is `made(camera=...)` for every episode's own camera: self-play moves it between episodes."""
    parts = []
    for index in held_out.episodes:
        cameras = recorded_cameras(held_out.dataset, held_out.dataset.episode(index), held_out.camera)
        if cameras is None:
            raise SystemExit("no exact field: the recording does not say what its camera is")
        one = HeldOut(
            held_out.dataset, replace(held_out.config, episodes=(index,)), embodiment=held_out.embodiment
        )  # fmt: skip
        parts.append(evaluate(make_idm(camera=cameras[0]), one, name=name, corruption=change))
    failed = {index: why for part in parts for index, why in part.failed.items()}
    return replace(parts[0], episodes=tuple(e for part in parts for e in part.episodes), failed=failed)


def evaluate_corruptions(
    decode: Callable[..., Evaluation], held_out: HeldOut, clean: Evaluation, wide: str | None
) -> dict[str, Any]:
    """Every condition's figures; one that cannot be made of these recordings is left out."""
    held_out = HeldOut(held_out.dataset, replace(held_out.config, looks=0), embodiment=held_out.embodiment)
    out: dict[str, Any] = {}
    for name, change in CORRUPTIONS.items():
        comparison = compare_corrupted(clean, decode(held_out, name=name, change=change))
        out |= {name: comparison} if comparison["episodes"] else {}
    if wide is not None:
        out["wider poses"] = compare_corrupted(clean, decode(HeldOut(open_dataset(wide), held_out.config), name="wide"))
    return out


def result_folder(work: Path, kind: str, seed: int, data_fraction: float) -> Path:
    return work / "results" / (f"{kind}-seed{seed}" + (f"-share{data_fraction:g}" if data_fraction != 1 else ""))


def write(file: Path, value: Any) -> None:
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")


# ---- over seeds -----------------------------------------------------------------------------------------------------


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Median over seeds of every figure, with lowest and highest; per joint likewise."""
    return {key: over_seeds([r["scores"].get(key) for r in results]) for key in results[0]["scores"]}


def over_seeds(values: list[Any]) -> Any:
    if all(isinstance(v, dict) for v in values):
        keys = [key for key in values[0] if all(key in v for v in values)]
        return {key: over_seeds([v[key] for v in values]) for key in keys}
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) < len(values) or not numbers:
        return values[0]
    return {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}


def median_corruptions(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """condition -> model -> median figures over seeds."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for label, rows in results.items():
        for corruption in rows[0]["conditions"]:
            medians = over_seeds([r["conditions"].get(corruption, {}) for r in rows])
            out.setdefault(corruption, {})[label] = {
                k: v["median"] if isinstance(v, dict) and "median" in v else v for k, v in medians.items()
            }
    return out


def median_of(document: dict[str, Any], model: str, key: str) -> float | None:
    value = document["models"].get(model, {}).get(key)
    return value["median"] if isinstance(value, dict) and "median" in value else None


# ---- what must hold -------------------------------------------------------------------------------------------------


def check_requirements(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Required figures beside what was measured; medians over seeds."""
    robot = document["embodiment"] or ""
    rows: list[dict[str, Any]] = []

    def require(what: str, figure: float | None, low: float = -float("inf"), high: float = float("inf")) -> None:
        if figure is not None and (low, high) != (-float("inf"), float("inf")):
            bound = [None if abs(x) == float("inf") else x for x in (low, high)]
            rows.append({"what": what, "figure": figure, "bounds": bound, "holds": low <= figure <= high})

    def ratio(key: str, rival: str, ours: str = OURS) -> float | None:
        a, b = median_of(document, ours, key), median_of(document, rival, key)
        return None if a is None or not b else a / b

    bounds = {"planar_finger_5": {"direct": 0.36, "direct_on_flow": 0.57}, "allegro_right": {"direct": 0.49}}.get(
        robot, {}
    )
    highest = {"planar_finger_5": 0.10, "panda": 0.25}.get(robot, float("inf"))
    lowest_share = 0.98 if robot == "panda" else -float("inf")
    for ours in (x for x in (OURS, ANALYTIC_PREDICTED_START, ANALYTIC) if x in document["models"]):
        by = f", {ours}" * (ours != OURS)
        for rival in document["models"]:
            if rival in KINDS and rival != OURS:
                most = bounds.get(rival, 1.0)
                require(f"action MSE{by} over that of {rival}", ratio("action_mse", rival, ours), high=most)
                require(f"NVE{by} over that of {rival}", ratio("nve", rival, ours), high=1.0)
                require(f"NVE{by} over that of {rival}, both smoothed", ratio("nve_smoothed", rival, ours), high=1.0)
        require(f"NVE{by}, smoothed", median_of(document, ours, "nve_smoothed"), high=highest)
        require(f"NVE{by}", median_of(document, ours, "nve"), high=highest)
        require(f"positions within .05 rad{by}", median_of(document, ours, "position_share"), low=lowest_share)
        require(f"errors inside 68 % intervals{by}", median_of(document, ours, "coverage_68"), 0.60, 0.76)
        require(f"errors inside 95 % intervals{by}", median_of(document, ours, "coverage_95"), 0.90, 0.99)
    for label in document["models"]:
        if label.startswith(OURS) and label != OURS:
            require(f"action MSE of {label} over that of direct on all", ratio("action_mse", "direct", label), high=1.0)
    if document["recording"]:
        correlation = median_of(document, OURS, "correlation_mean")
        require("correlation, joints that move", correlation, low=0.8)
        for rival in document["models"]:
            theirs = median_of(document, rival, "correlation_mean")
            if rival in KINDS and rival != OURS and correlation is not None and theirs is not None:
                require(f"correlation above that of {rival}", correlation - theirs, low=0.0)
                require(f"NVE where they move over that of {rival}", ratio("nve_moving", rival), high=1.0)
    for corruption, models in document.get("conditions", {}).items():
        rows += [
            check_error_rise(corruption + f", {x}" * (x != OURS), models[x])
            for x in (OURS, ANALYTIC_PREDICTED_START, ANALYTIC)
            if x in models
        ]
    require("decoded frames a second", document.get("speed", {}).get("ours_frames_per_second"), low=30)
    return rows


def check_error_rise(corruption: str, medians: dict[str, Any]) -> dict[str, Any]:
    """A rise of 1.5 at most, be it of the steps that are not flagged; or intervals that grow with the errors."""
    within_bound = [medians.get(key) is not None and medians[key] <= 1.5 for key in ("nve_rise", "nve_trusted_rise")]
    covered = (medians.get("coverage_95") or 0) >= 0.9
    return {
        "what": f"rise of NVE, {corruption}",
        "figure": medians.get("nve_rise"),
        "bounds": [None, 1.5],
        "holds": any(within_bound) or covered,
        "because": "rise"
        if within_bound[0]
        else "steps not flagged"
        if within_bound[1]
        else "intervals cover"
        if covered
        else None,
    }


# ---- for readers ----------------------------------------------------------------------------------------------------


def write_figures(args: argparse.Namespace, work: Path, data: dict[str, Any]) -> None:
    """The learned fields of one held-out episode, and every model's curves."""
    first = data["protocol"].episodes or tuple(open_dataset(data["held_out"]).episode_indices)
    held_out = HeldOut(open_dataset(data["held_out"]), replace(data["protocol"], episodes=first[:1]))
    motions: dict[str, JointMotion] = {}
    truth: np.ndarray | None = None
    for kind in (k for k in args.kinds if k != ANALYTIC):
        model = str(result_folder(work, kind, args.seeds[0], 1.0) / "model")
        evaluation = evaluate(decoder(args, kind, model), held_out, name=kind)
        for episode in evaluation.episodes:
            motions[kind], truth = episode.motion, episode.q.numpy()
            if (probe := episode.largest_motion_sample) is not None:
                write_field_sheet(
                    work / f"field_{kind}.png", probe.image, probe.prediction, evaluation.joint_names, exact=probe.jacobian, exact_mask=probe.mask,
                    exact_flow=probe.flow, title=f"{kind}, episode {episode.index}, frame {probe.frame}",
                )  # fmt: skip
    if truth is not None:
        scored_joints = data["protocol"].joints
        plot_decoded(work / "curves.png", motions, truth, joints=scored_joints, title=f"episode {first[0]}")


def report(document: dict[str, Any]) -> str:
    """Tables: models, required figures, conditions, joints."""

    def cell(value: Any, form: str) -> str:
        if not isinstance(value, dict):
            return "-"
        text = format(value["median"], form)
        return (
            text
            if value["low"] == value["high"]
            else f"{text} ({format(value['low'], form)}-{format(value['high'], form)})"
        )

    rows: list[tuple[str, ...]] = [("MODEL", *(heading for _, heading, _ in TABLE_COLUMNS))]
    rows += [
        (label, *(cell(m.get(key), form) for key, _, form in TABLE_COLUMNS)) for label, m in document["models"].items()
    ]
    parts = [document["embodiment"] or document["recording"], columns(rows)]
    joints: list[tuple[str, ...]] = [("JOINT", *(f"{k} NVE / CORR" for k in document["models"]))]
    for name in document["models"][OURS]["nve_per_joint"] if OURS in document["models"] else ():
        found = [(m["nve_per_joint"].get(name), m["correlation"].get(name)) for m in document["models"].values()]
        joints.append((name, *(f"{cell(a, '.2f')} / {cell(b, '.2f')}" for a, b in found)))
    parts.append(columns(joints))
    if "conditions" in document:
        parts.append(columns(corruption_table(document["conditions"])))
    if "speed" in document:
        parts.append("\n".join(f"{key}: {value}" for key, value in document["speed"].items()))
    required: list[tuple[str, ...]] = [("MUST", "FIGURE", "BOUNDS", "HOLDS")]
    for row in document["must"]:
        low, high = row["bounds"]
        bounds = " to ".join(f"{x:g}" if x is not None else "" for x in (low, high)).strip()
        figure = "-" if row["figure"] is None else f"{row['figure']:.3f}"
        required.append((row["what"], figure, bounds, "yes" if row["holds"] else "NO"))
    return "\n\n".join([*parts, columns(required)])


if __name__ == "__main__":
    sys.exit(main())
