"""Train the learned field and every baseline on the same recordings for the same time and decode held-out ones.

    python benchmarks/idm_accuracy.py --embodiment planar_finger_5 --work out/finger --minutes 10 --seeds 0 1 2 --data-fractions 1 0.5 \
        --width 224 --height 320 --train width=112 height=160
    python benchmarks/idm_accuracy.py --embodiment panda --work out/panda --minutes 60 --corruptions
    python benchmarks/idm_accuracy.py --embodiment panda --work out/analytic --kinds analytic
    python benchmarks/idm_accuracy.py --recording g1_inspire_real --work out/g1 --minutes 30

Motor babbling is recorded into the work folder where it is not there yet: training data of seed 0, held-out data of
seed 1000, and, for --corruptions, held-out motions a third wider. A recording of a real robot is split by whole
episodes instead. Results (one per model, seed and share of the data) stay in the work folder, with the code that
trained and decoded; an interrupted run goes on. What other code decoded is decoded again by the model that is there.

Every model decodes the same videos from the true first pose; `nve` and `action_mse` are of that. `*_pairs` are of
single pairs of frames without any pose, `*_smoothed` of steps smoothed over the whole video. Seeds vary the training
alone; figures are medians over seeds, with the lowest and the highest. Prints tables; JSON goes to the work folder.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from idm_figures import ANALYTIC, ANALYTIC_PREDICTED_START, OURS, figures, median_corruptions, report, summary
from results import add_save, code, machine, requirements, save

from jidm import JacobianIDM, JointMotion
from jidm.atomic_io import atomic_write
from jidm.checkpoint import load_checkpoint
from jidm.datasets import open_dataset
from jidm.datasets.episode_selection import select_episodes
from jidm.evaluation.corruptions import CORRUPTIONS
from jidm.evaluation.evaluate import Corruption, Evaluation, evaluate
from jidm.evaluation.ground_truth import recorded_cameras
from jidm.evaluation.held_out import EvalConfig, HeldOut
from jidm.evaluation.summary import compare_corrupted, summarize
from jidm.model_registry import KINDS, load_idm, train
from jidm.training.config import TrainConfig
from jidm.visualization.field_plots import write_field_sheet
from jidm.visualization.plot import plot_motion

HELD_OUT_FRAMES = 64


def main() -> int:
    args = arguments()
    work = Path(args.work)
    (work / "results").mkdir(parents=True, exist_ok=True)
    data = prepare_data(args, work)
    results: dict[str, list[dict[str, Any]]] = {}
    for share in args.data_fractions:
        for kind in args.kinds if share == 1 else [OURS]:
            if kind == ANALYTIC:
                results[kind] = [one_result(args, work, data, kind, 0, share, decoder_name=kind)]
                continue
            seeds = args.seeds if kind == OURS else args.baseline_seeds or args.seeds
            results[label_of(args, kind, share)] = [one_result(args, work, data, kind, seed, share) for seed in seeds]
            if kind == OURS and share == 1 and args.embodiment:
                results[ANALYTIC_PREDICTED_START] = [
                    one_result(args, work, data, kind, seed, share, decoder_name=ANALYTIC_PREDICTED_START)
                    for seed in seeds
                ]
    document: dict[str, Any] = {
        "benchmark": "idm_accuracy",
        "embodiment": args.embodiment,
        "recording": args.recording,
        "arguments": vars(args),
        "code": code(),
        "machine": machine(),
    }
    document["models"] = {label: summary(found) for label, found in results.items()}
    if args.corruptions:
        document["corruptions"] = median_corruptions({k: v for k, v in results.items() if "corruptions" in v[0]})
    measured = figures(document)
    document["rows"], document["results"] = measured, results
    write(work / "idm_accuracy.json", document)
    write_figures(args, work, data)
    print(report(document))
    raw = {key: document[key] for key in ("models", "corruptions") if key in document}
    save(args.save, "idm_accuracy", measured, raw=raw, seeds=args.seeds, note=note(args, data))
    if args.save:
        print("\n".join(line for line, _ in requirements(args.save, measured)))
    return 0


def label_of(args: argparse.Namespace, kind: str, share: float) -> str:
    """Of a trained model in tables and results."""
    if share != 1:
        return f"{kind}_{'half' if share == 0.5 else f'{share:g}'}_data"
    flow = dict(train_options(args, kind).get("options", {})).get("flow")
    return f"{kind}_{flow}" if kind != OURS and flow not in (None, "learned") else kind


def note(args: argparse.Namespace, data: dict[str, Any]) -> str:
    """What a reader should know of this run."""
    counts = [len(data["eval_config"].episodes or open_dataset(data["held_out"]).episode_indices)]
    if args.kinds != [ANALYTIC]:
        counts.insert(0, len(open_dataset(data["train"]).episode_indices) - (counts[0] if args.recording else 0))
    trained = f"{counts[0]:,} training episodes, " if len(counts) > 1 else ""
    budget = f"{args.steps:,} steps" if args.steps else f"{args.minutes:g} minutes"
    each = f"; {budget} of training each, {len(args.seeds)} seed{'s' * (len(args.seeds) > 1)}" if trained else ""
    return f"{trained}{counts[-1]} held-out ones{each}."


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--embodiment", help="robot whose motor babbling is recorded")
    source.add_argument("--recording", help="data set of a real robot, split by whole episodes")
    parser.add_argument("--work", required=True, help="folder for data, checkpoints and results")
    parser.add_argument("--data", help="training data, in place of recording it")
    parser.add_argument("--held-out", help="held-out data, in place of recording it")
    parser.add_argument("--wide", help="held-out data with wider poses, in place of recording it")
    parser.add_argument("--episodes", type=int, default=1200, help="of motor babbling to train on")
    parser.add_argument("--held-out-episodes", type=int, default=20)
    parser.add_argument("--frames", type=int, default=20, help="of each of those; held-out ones have 64")
    parser.add_argument("--width", type=int, default=256, help="of the recorded images [px]")
    parser.add_argument("--height", type=int, default=256, help="likewise; the models see them as --train says")
    parser.add_argument(
        "--crop-fraction",
        type=float,
        default=0.02,
        help="share of poses that reach out of each border, see `jidm babble`",
    )
    parser.add_argument(
        "--range-fraction", type=float, default=0.75, help="share of the joint range; --wide is a third more"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that record")
    parser.add_argument("--test", default="last-digit:1,6", help="episodes of --recording that are held out")
    parser.add_argument("--flow", help="what measures motion for ours when decoding; its own matching if not given")
    parser.add_argument("--stride", type=int, default=3, help="recorded frames per step, for --recording")
    parser.add_argument(
        "--joints", default="Shoulder|Elbow|Wrist", help="joints that count, for --recording (regular expression)"
    )
    every = [*KINDS, ANALYTIC]
    parser.add_argument(
        "--kinds", nargs="+", default=every, choices=every, help=f"'{ANALYTIC}' for motor babbling only"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of training")
    parser.add_argument(
        "--baseline-seeds", nargs="+", type=int, help="of the baselines' training; --seeds if not given"
    )
    parser.add_argument(
        "--data-fractions",
        nargs="+",
        type=float,
        default=[1.0],
        help="shares of the training episodes; below 1 for ours only",
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
    parser.add_argument(
        "--corruptions", action="store_true", help="also corrupted videos and wider poses, trained models"
    )
    add_save(parser)
    args = parser.parse_args()
    args.kinds = sorted((k for k in args.kinds if args.embodiment or k != ANALYTIC), key=lambda kind: kind != OURS)
    return args


# ---- data -----------------------------------------------------------------------------------------------------------


def prepare_data(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Folders of training, held-out and wider data, and how held-out data are evaluated."""
    if args.recording:
        dataset = open_dataset(args.recording)
        scored_joints = tuple(name for name in dataset.joint_names if re.search(args.joints, name))
        test = select_episodes(args.test, dataset.episode_indices)
        eval_config = EvalConfig(episodes=test, stride=args.stride, joints=scored_joints)
        return {"train": args.recording, "held_out": args.recording, "wide": None, "eval_config": eval_config}
    datasets = {
        "train": (args.data, args.episodes, args.frames, 0, 1.0),
        "held_out": (args.held_out, args.held_out_episodes, HELD_OUT_FRAMES, 1000, 1.0),
    }
    if args.corruptions:
        datasets["wide"] = (args.wide, args.held_out_episodes, HELD_OUT_FRAMES, 1000, 4 / 3)
    folders: dict[str, Any] = {"wide": None, "eval_config": EvalConfig()}
    if args.kinds == [ANALYTIC]:
        datasets["train"] = ("", 0, 0, 0, 0.0)  # it learns nothing
    for name, (given, episodes, frames, seed, wider) in datasets.items():
        folders[name] = str(work / name) if given is None else given
        if given is None:
            record(args, work / name, episodes, frames, seed, args.range_fraction * wider)
    return folders


def record(args: argparse.Namespace, out: Path, episodes: int, frames: int, seed: int, range_fraction: float) -> None:
    from jidm.sim.babble import BabbleConfig, babble

    if range_fraction > 1:
        raise SystemExit(
            f"range fraction {range_fraction:g} is more than the robot's range; train with --range-fraction 0.75 or less"
        )
    config = BabbleConfig(
        embodiment=args.embodiment, episodes=episodes, frames=frames, width=args.width, height=args.height,
        seed=seed, crop_fraction=args.crop_fraction, range_fraction=range_fraction,
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
    """Train and evaluate, or what an earlier run found.

    Args:
        decoder_name: ANALYTIC or ANALYTIC_PREDICTED_START decode with the robot's exact field.
    """
    folder = result_folder(work, kind, seed, data_fraction)
    # Whatever a figure depends on; kinds, seeds and shares are in the folder's name.
    ignored = (
        "work",
        "kinds",
        "seeds",
        "baseline_seeds",
        "data_fractions",
        "workers",
        "corruptions",
        "save",
        "data",
        "held_out",
        "wide",
    )
    settings = {key: value for key, value in vars(args).items() if key not in ignored}
    settings |= {"data": data["train"], "held_out": data["held_out"]}
    file = folder / ("predicted_start.json" if decoder_name == ANALYTIC_PREDICTED_START else "result.json")
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"settings": settings}
    if result["settings"] != settings:
        raise SystemExit(f"{file} was made with other settings: {result['settings']}; use another --work, or remove it")
    corrupted = args.corruptions and not decoder_name and data_fraction == 1
    present = result.get("decoded_by", {}).get("sources") == code()["sources"]
    if present and "scores" in result and ("corruptions" in result or not corrupted):
        return result
    folder.mkdir(parents=True, exist_ok=True)
    model = str(folder / "model")
    if "trained_seconds" not in result and not decoder_name:
        result["trained_seconds"] = timed_training(
            train_config(args, data, kind, seed, data_fraction, folder / "model")
        )
        result["training_steps"] = load_checkpoint(model).training["result"]["step"]
        result["trained_by"] = code()
        write(file, result)
    decode: Callable[..., Evaluation]
    eval_config = replace(data["eval_config"], given_initial_pose=decoder_name != ANALYTIC_PREDICTED_START)
    if decoder_name == ANALYTIC_PREDICTED_START:
        decode = partial(evaluate_exact, lambda camera: load_idm(model, camera=camera))
    elif decoder_name == ANALYTIC:
        decode = partial(evaluate_exact, partial(JacobianIDM.from_embodiment, args.embodiment))
    else:
        decode = partial(evaluate, decoder(args, kind, model))
    held_out = HeldOut(open_dataset(data["held_out"]), eval_config)
    evaluation = decode(held_out, name=decoder_name or kind)
    result["scores"] = summarize(evaluation)
    result.pop("corruptions", None)
    if corrupted:
        result["corruptions"] = evaluate_corruptions(decode, held_out, evaluation, data["wide"])
    result["decoded_by"] = code()
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
        test = data["eval_config"].episodes or ()
        listed = [k for k in sorted(open_dataset(data["train"]).episode_indices) if not (args.recording and k in test)]
        values["train_episodes"] = ",".join(map(str, listed[: max(1, round(data_fraction * len(listed)))]))
    return TrainConfig(**values | train_options(args, kind))


def train_options(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """What --train says about a kind of model."""
    values: dict[str, Any] = {}
    for entry in args.train:
        key, _, text = entry.partition("=")
        only, _, key = key.rpartition(":")
        if only in ("", kind):
            value = json.loads(text)
            values[key] = tuple(value) if isinstance(value, list) else value
    return values


def evaluate_exact(
    make_idm: Callable[..., Any], held_out: HeldOut, *, name: str, corruption: Corruption | None = None
) -> Evaluation:
    """As `evaluate`, by `make_idm(camera=...)` for each episode's camera, which differs between episodes of babbling."""
    parts = []
    for index in held_out.episodes:
        cameras = recorded_cameras(held_out.dataset, held_out.dataset.episode(index), held_out.image_key)
        if cameras is None:
            raise SystemExit("no exact field: the recording does not say what its camera is")
        one = HeldOut(
            held_out.dataset, replace(held_out.config, episodes=(index,)), embodiment=held_out.embodiment
        )  # fmt: skip
        parts.append(evaluate(make_idm(camera=cameras[0]), one, name=name, corruption=corruption))
    failed = {index: why for part in parts for index, why in part.failed.items()}
    return replace(parts[0], episodes=tuple(e for part in parts for e in part.episodes), failed=failed)


def evaluate_corruptions(
    decode: Callable[..., Evaluation], held_out: HeldOut, clean: Evaluation, wide: str | None
) -> dict[str, Any]:
    """Figures under every corruption; one that cannot be made of these recordings is left out."""
    held_out = HeldOut(held_out.dataset, replace(held_out.config, field_samples=0), embodiment=held_out.embodiment)
    out: dict[str, Any] = {}
    for name, corruption in CORRUPTIONS.items():
        comparison = compare_corrupted(clean, decode(held_out, name=name, corruption=corruption))
        out |= {name: comparison} if comparison["episodes"] else {}
    if wide is not None:
        out["wider poses"] = compare_corrupted(clean, decode(HeldOut(open_dataset(wide), held_out.config), name="wide"))
    return out


def result_folder(work: Path, kind: str, seed: int, data_fraction: float) -> Path:
    return work / "results" / (f"{kind}-seed{seed}" + (f"-share{data_fraction:g}" if data_fraction != 1 else ""))


def write(file: Path, value: Any) -> None:
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")


# ---- for readers ----------------------------------------------------------------------------------------------------


def write_figures(args: argparse.Namespace, work: Path, data: dict[str, Any]) -> None:
    """The learned fields of one held-out episode, and every model's curves."""
    first = data["eval_config"].episodes or tuple(open_dataset(data["held_out"]).episode_indices)
    held_out = HeldOut(open_dataset(data["held_out"]), replace(data["eval_config"], episodes=first[:1]))
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
        scored_joints = data["eval_config"].joints
        plot_motion(motions, work / "curves.png", truth=truth, joints=scored_joints, title=f"episode {first[0]}")


if __name__ == "__main__":
    sys.exit(main())
